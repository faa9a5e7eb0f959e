"""What a step of the contrastive loss sends from node to node, counted by the kernel, is what the formulas say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.itc_wire_bytes import CASES, measure
from benchmarks.network_namespaces import nodes, why_not

ROOT = Path(__file__).parents[2]


@pytest.fixture
def needs_namespaces() -> None:
    if reason := why_not():
        pytest.skip(reason)


def test_bytes_between_nodes(needs_namespaces: None):
    rows = {row["name"]: row for row in measure(256, 256, [torch.float32])}
    assert rows.keys() == {case.name for case in CASES}
    for name, row in rows.items():
        if "group = node" in name:
            assert row["measured_bytes"] == row["formula_bytes"] == 0, name
        else:
            assert row["measured_bytes"] == pytest.approx(row["formula_bytes_on_gloo"], rel=0.03), name
    # By hand: 3 times 256 pairs of 2 * 256 fp32 numbers and 2 more.
    assert rows["Grouped-ITC, whole world, k = 1"]["formula_bytes"] == 3 * 256 * (2 * 256 * 4 + 2 * 4)


def test_nodes_are_taken_down(needs_namespaces: None):
    with pytest.raises(ZeroDivisionError), nodes(2) as cluster:
        sleeper = cluster[1].start(["sleep", "60"])
        names = [node.name for node in cluster]
        there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert all(name in there for name in names)
        raise ZeroDivisionError
    assert sleeper.wait(5) < 0
    there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in there for name in names)


def test_what_a_killed_program_left_is_taken_down(needs_namespaces: None):
    made = "from benchmarks.network_namespaces import nodes\nimport os\nwith nodes(1) as made:\n"
    made += "    made[0].start(['sleep', '60'])\n    print(made[0].name, flush=True)\n    os.kill(os.getpid(), 9)"
    name = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    assert name in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    with nodes(1):
        assert name not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
