"""`--push-to-hub`: a training that publishes its model, and one that cannot."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_m2encoder.hub_folder import save_hub_folder
from tests.hub_double import HubDouble
from training.checkpoint import Checkpoint, check_settings
from training.configs import flat_settings, nano_smoke
from training.pretrain import parse
from training.publish import publish
from training.scenes import ScenesConfig, write_scenes

REPO = "user/m2-encoder-nano"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What the push, which is a process of its own, finds in its environment."""
    with HubDouble(tmp_path / "hub") as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield hub


def test_a_training_of_two_processes_publishes_its_model_once(hub, tmp_path):
    scenes = tmp_path / "scenes"
    write_scenes(scenes, ScenesConfig(twins=2, train=64, validation=16, test=16, task_size=4, workers=1))
    words = ["--nproc_per_node", "2", "-m", "training.pretrain", "nano_smoke", "--output-dir", str(tmp_path / "run")]
    words += ["--data.files", f"{scenes}/train-*.parquet", "--steps", "1", "--optimizer.warmup-steps", "0"]
    words += ["--push-to-hub", REPO, "--push-private"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "model"
    files = hub.files(REPO)
    assert hub.repo(REPO).private and len(hub.commits(REPO)) == 2
    assert {path.name for path in folder.iterdir() if path.is_file()} < set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    readme = files["README.md"].decode()
    assert "# M2-Encoder-nano" in readme and f"1 steps of {nano_smoke().batch_size} pairs" in readme
    assert str(tmp_path) not in readme and "Nothing was measured for this card" in readme


def test_a_push_that_fails_loses_no_model_and_says_how_to_go_on(hub, model, processor, tmp_path, capfd, monkeypatch):
    folder = save_hub_folder(model, processor, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(nano_smoke())))
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher leaves it
    monkeypatch.setenv("RANK", "0")
    hub.fail("/api/models/", status=403, times=99)
    assert not publish(folder, REPO, private=True)
    said = capfd.readouterr().err
    assert "the Hub answered 403" in said and "lacks the right to write" in said
    command = f"python -m conversion.push {folder} {REPO} --private"
    assert said.rstrip().endswith(command) and "hf_dummy" not in said
    assert (folder / "model.safetensors").is_file() and not hub.store.repos


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "user/a b"])
def test_an_impossible_repository_is_refused_before_the_training(repo_id, tmp_path):
    config = dataclasses.replace(nano_smoke(), output_dir="x", push_to_hub=repo_id)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, files=("x.parquet",)))
    with pytest.raises(ValueError, match="push_to_hub"):
        config.check(1)


def test_the_flag_and_a_resume_with_another_one(tmp_path):
    given = parse(["nano", "--output-dir", "x", "--data.files", "y", "--push-to-hub", REPO])
    assert given.push_to_hub == REPO and not given.push_private
    before = flat_settings(parse(["nano", "--output-dir", "x", "--data.files", "y"]))
    check_settings(Checkpoint(Path("step_00000001"), 1, 1, before), flat_settings(given))
