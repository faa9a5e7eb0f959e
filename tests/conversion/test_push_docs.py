"""docs/publishing.md, every command in its order, with a tiny model and a Hub on this machine."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from huggingface_hub import constants

from modeling_m2encoder.hub_folder import save_hub_folder
from tests.hub_double import HubDouble
from tests.snippets import blocks, python
from training.configs import nano_smoke
from training.scenes import ScenesConfig, write_scenes

ROOT = Path(__file__).parents[2]


def test_the_page_that_the_document_makes(model, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/quickstart/nano")
    save_hub_folder(model, processor, run / "model")
    data = dataclasses.replace(nano_smoke().data, files=("runs/quickstart/scenes/train-*.parquet",))
    settings = dataclasses.asdict(dataclasses.replace(nano_smoke(), data=data))
    (run / "config.json").write_text(json.dumps(settings))
    sizes = {"twins": 2, "train": 8, "validation": 12, "test": 40, "task_size": 8, "workers": 1}
    write_scenes(Path("runs/quickstart/scenes"), ScenesConfig(**sizes))
    commands = [
        c for block in blocks(ROOT / "docs/publishing.md") if block.language == "bash" for c in block.commands()
    ]
    assert len(commands) == 5
    with HubDouble(tmp_path / "hub") as hub:
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        for command in commands:
            assert not hub.store.repos
            # The tiny model has not nano's measures, so that its card is asked for; what it is loads elsewhere.
            more = ["--size", "trained"] if "conversion." in command else []
            more += ["--no-load-check"] if "conversion.push" in command else []
            python([*shlex.split(command)[1:], *more])
        repo = hub.repo("user/m2-encoder-nano")
        readme = hub.files(repo.id, "v1")["README.md"].decode()
    assert repo.private and readme == Path("card.md").read_text(encoding="utf-8")
    results = json.loads(Path("runs/quickstart/evaluation/results.json").read_text())
    top = results["models"][0]["tasks"][0]["benchmarks"][0]["metrics"]["mean_recall"]["zh"]["value"]
    assert f"{100 * top:.1f} [" in readme and "| zh  |" in readme.split("right pairs kept")[1]


@pytest.mark.parametrize("name", ["--push-to-hub", "--push-private"])
def test_the_document_names_flags_that_there_are(name, capsys):
    from training.pretrain import parse

    assert f"`{name}" in (ROOT / "docs/publishing.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(["nano", "--help"])
    assert name in capsys.readouterr().out
