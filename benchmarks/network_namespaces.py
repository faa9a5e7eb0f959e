"""Network namespaces of Linux as the nodes of a cluster on one machine, for what must be seen between nodes.

Each node has one network card, `eth0`, with an address of its own, on a common switch; the kernel counts its bytes.
Processes of a node reach each other over its loopback, those of other nodes only over the switch. Needs root and `ip`
(iproute2). Everything is taken down at the end, processes included; what a killed program left, at the next start.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_PREFIX = "m2encoder-"
_numbers = itertools.count()


@dataclass(frozen=True)
class Node:
    """One namespace."""

    name: str
    address: str

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen:
        """Starts a command on this node, in a session of its own; `options` as for `subprocess.Popen`."""
        # gloo would otherwise take the address of the host's name, which is outside of all nodes.
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **(environment or {})}
        whole = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(whole, env=environment, start_new_session=True, **options)

    def sent_bytes(self) -> int:
        """Bytes that this node's card has sent since it exists, headers included."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_run("ip", "netns", "exec", self.name, "cat", path))

    def kill(self) -> None:
        """Ends every process of this node without a word, as a power cut would."""
        _kill_all(self.name)


def why_not() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (apt install iproute2)"
    name = _name("probe")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"`ip netns add` failed: {made.stderr.strip()}"
    probe = subprocess.run(["ip", "-n", name, "link", "add", "probe", "type", "bridge"], capture_output=True, text=True)
    _run("ip", "netns", "del", name)
    return f"`ip link add type bridge` failed: {probe.stderr.strip()}" if probe.returncode else None


@contextmanager
def nodes(count: int) -> Iterator[list[Node]]:
    """`count` nodes, 10.77.0.1 onwards, with nothing else on their network.

    Raises:
        ValueError: for a count outside [1, 250].
        RuntimeError: when `ip` fails (see `why_not`), with what it said.
    """
    if not 1 <= count <= 250:
        raise ValueError(f"The network has room for 1 to 250 nodes, asked for {count}.")
    _take_down_orphans()
    switch = _name("switch")
    made = [Node(_name(f"node{i}"), f"10.77.0.{i + 1}") for i in range(count)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for i, node in enumerate(made):
            _run("ip", "netns", "add", node.name)
            # Without IPv6 the kernel announces nothing of its own on the cards that are counted.
            _run("ip", "netns", "exec", node.name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
            card = f"eth0 type veth peer name port{i} netns {switch}".split()
            _run("ip", "-n", node.name, "link", "add", *card)
            _run("ip", "-n", switch, "link", "set", f"port{i}", "master", "br0", "up")
            _run("ip", "-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", node.name, "link", "set", device, "up")
        yield made
    finally:
        for name in (*(node.name for node in made), switch):
            _take_down(name)


def _name(role: str) -> str:
    return f"{_PREFIX}{os.getpid()}-{next(_numbers)}-{role}"


def _take_down_orphans() -> None:
    for name in _run("ip", "netns", "list").split():
        owner = name.removeprefix(_PREFIX).split("-")[0]
        if name.startswith(_PREFIX) and owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            _take_down(name)


def _take_down(name: str) -> None:
    if os.path.exists(f"/run/netns/{name}"):
        _kill_all(name)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _kill_all(name: str) -> None:
    for pid in _run("ip", "netns", "pids", name).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
