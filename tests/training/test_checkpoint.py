"""What a checkpoint holds and how it is read again: whole, damaged, hostile, from other ranks, with other settings."""

from __future__ import annotations

import json
import logging
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from modeling_m2encoder import M2EncoderConfig, M2EncoderModel
from tests.distributed import run_distributed
from training.checkpoint import (
    Checkpoint,
    check_settings,
    find_checkpoint,
    forget_later,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
)
from training.configs import flat_settings, nano
from training.optim import build_optimizer
from training.schedule import share_layers
from training.sharding import Distributed, ShardingConfig, distribute

SETTINGS = {"optimizer.lr": 0.001, "steps": 100, "data.files": ["a"], "itc.retain": 1, "bank_size": 16}
LAMB = ("lamb", 1e-3)


@dataclass
class Trainee:
    distributed: Distributed
    optimizer: torch.optim.Optimizer


def trainee(config: M2EncoderConfig, seed: int = 0, strategy: str = "ddp", shard_size: int | None = None) -> Trainee:
    torch.manual_seed(seed)
    sharding = ShardingConfig(strategy, shard_size)
    distributed = distribute(M2EncoderModel(config).train(), sharding, device="cpu")
    return Trainee(distributed, build_optimizer(distributed.module, *LAMB))


def step(trained: Trainee, seed: int) -> None:
    """One update from gradients that do not depend on how the model is sharded."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained.distributed.parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (
            torch.distributed.tensor.distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor)
            else gradient
        )
    trained.optimizer.step()


def values(trained: Trainee) -> dict[str, torch.Tensor]:
    """Weights and moments, whole."""
    found = {}
    for name, parameter in trained.distributed.module.named_parameters():
        found[name] = parameter
        found |= {f"{name}.{key}": value for key, value in trained.optimizer.state[parameter].items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


def save(folder: Path, number: int, trained: Trainee, **changes: Any) -> Path:
    position = {"step": number, "lanes": [None, {"shard": 3}], "名": "红"}
    arguments = {"settings": SETTINGS, "position": position, "skipped": {"broken_image": 2}, "keep": 3}
    return save_checkpoint(folder, number, trained, **{**arguments, **changes})


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- There and back


def test_everything_comes_back_bit_for_bit(config: M2EncoderConfig, tmp_path: Path):
    trained = trainee(config)
    step(trained, 1)
    step(trained, 2)
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    random.gauss(0, 1), np.random.normal()  # both keep a second number back
    path = save(tmp_path, 2, trained)
    expected = values(trained)
    drawn = (random.gauss(0, 1), np.random.normal(), torch.rand(3))
    assert path == tmp_path / "step_00000002"

    fresh = trainee(config, seed=1)
    checkpoint = find_checkpoint("auto", tmp_path)
    assert checkpoint == Checkpoint(path, 2, 1, SETTINGS)
    position, skipped = load_checkpoint(checkpoint, fresh)
    assert same(values(fresh), expected) and "logit_scale" in expected
    assert position == {"step": 2, "lanes": [None, {"shard": 3}], "名": "红"} and skipped == {"broken_image": 2}
    again = (random.gauss(0, 1), np.random.normal(), torch.rand(3))
    assert again[:2] == drawn[:2] and torch.equal(again[2], drawn[2])
    step(trained, 3), step(fresh, 3)
    assert same(values(fresh), values(trained))


def test_shared_layers_come_back_shared(config: M2EncoderConfig, tmp_path: Path):
    def shared(seed: int) -> Trainee:
        torch.manual_seed(seed)
        model = M2EncoderModel(config).train()
        share_layers(model, "layer")
        distributed = distribute(model, ShardingConfig(), device="cpu")
        return Trainee(distributed, build_optimizer(model, *LAMB))

    trained, fresh = shared(0), shared(1)
    step(trained, 1)
    save(tmp_path, 1, trained)
    load_checkpoint(find_checkpoint("auto", tmp_path), fresh)
    assert same(values(fresh), values(trained))
    layers = fresh.distributed.module.encoder.layers
    assert layers[0]["vision"] is layers[1]["vision"]


def test_the_file_holds_the_weights_under_their_names(config: M2EncoderConfig, tmp_path: Path):
    """Read by safetensors itself."""
    trained = trainee(config)
    step(trained, 1)
    (shard,) = save(tmp_path, 1, trained).glob("*.safetensors")
    stored = load_file(shard)
    for name, parameter in trained.distributed.module.named_parameters():
        assert torch.equal(stored[f"model.{name}"], parameter)
        assert torch.equal(stored[f"optimizer.{name}.exp_avg"], trained.optimizer.state[parameter]["exp_avg"])


def test_nothing_is_pickled(config: M2EncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = trainee(config)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, refuse)
    path = save(tmp_path, 1, trained)
    load_checkpoint(find_checkpoint(str(path), tmp_path), trained)
    kinds = {file.suffix for file in path.iterdir()}
    assert kinds == {".json", ".safetensors"}


def test_random_states_are_json_and_others_are_refused():
    states = json.loads(json.dumps(random_states()))
    drawn = torch.rand(2)
    set_random_states(states)
    assert torch.equal(torch.rand(2), drawn)
    for wrong in ({}, {**states, "torch": "AAAA"}, {**states, "python": [3, [1, 2], None]}, {**states, "numpy": 1}):
        with pytest.raises(ValueError, match="not the random states"):
            set_random_states(wrong)


# ---- Which one


def test_the_newest_are_kept(config: M2EncoderConfig, tmp_path: Path):
    trained = trainee(config)
    for number in (2, 9, 10, 100):
        save(tmp_path, number, trained, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]
    assert find_checkpoint("auto", tmp_path).step == 100
    assert find_checkpoint(str(tmp_path / "step_00000010"), tmp_path).step == 10
    assert find_checkpoint("none", tmp_path) is None
    assert find_checkpoint("auto", tmp_path / "elsewhere") is None


def test_going_on_clears_away_what_is_left(config: M2EncoderConfig, tmp_path: Path):
    trained = trainee(config)
    for number in (3, 6):
        save(tmp_path, number, trained)
    for name in (".step_00000009.partial", ".step_00000001.removed"):  # of processes that were killed
        shutil.copytree(tmp_path / "step_00000003", tmp_path / name)
    assert find_checkpoint("auto", tmp_path).step == 6
    forget_later(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def truncate(path: Path) -> None:
    (shard,) = path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    (shard,) = path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)


def lose_a_rank(path: Path) -> None:
    (path / "rank_00000.json").unlink()


def garble(path: Path) -> None:
    (path / "run.json").write_bytes(b"\x80\x04\x95")


def nest(path: Path) -> None:
    (path / "run.json").write_text("[" * 100_000)


def reach_outside(path: Path) -> None:
    run = json.loads((path / "run.json").read_text())
    run["files"]["../../secret"] = [1, "00"]
    (path / "run.json").write_text(json.dumps(run))


def claim_many_ranks(path: Path) -> None:
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**run, "world_size": 10**12}))


DAMAGES: list[Callable[[Path], None]] = [
    truncate,
    flip_a_bit,
    lose_a_rank,
    garble,
    nest,
    reach_outside,
    claim_many_ranks,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over(
    config: M2EncoderConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
):
    trained = trainee(config)
    old, new = save(tmp_path, 1, trained), save(tmp_path, 2, trained)
    damage(new)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint("auto", tmp_path).path == old
    assert "Passing over a damaged checkpoint" in caplog.text and str(new) in caplog.text
    with pytest.raises(ValueError, match="No checkpoint to go on from.*step_00000002.*--resume PATH"):
        find_checkpoint(str(new), tmp_path)
    damage(old)
    with pytest.raises(ValueError, match="step_00000002.*step_00000001"):
        find_checkpoint("auto", tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a checkpoint"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path)


def test_another_model_is_refused(config: M2EncoderConfig, tmp_path: Path):
    checkpoint_path = save(tmp_path, 1, trainee(config))
    wider = M2EncoderConfig(**{**config.to_dict(), "intermediate_size": 96})
    deeper = M2EncoderConfig(**{**config.to_dict(), "num_hidden_layers": 3})
    for other in (wider, deeper):
        with pytest.raises(ValueError, match="step_00000001 does not hold this model and optimizer"):
            load_checkpoint(find_checkpoint(str(checkpoint_path), tmp_path), trainee(other))


def test_a_full_disk_leaves_the_older_one(config: M2EncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = trainee(config)
    save(tmp_path, 1, trained)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr("training.checkpoint._write_json", full)
        save(tmp_path, 2, trained)
    assert find_checkpoint("auto", tmp_path).step == 1
    forget_later(tmp_path, 1)
    assert save(tmp_path, 2, trained).is_dir()


# ---- Settings


def test_changed_settings_are_refused_by_name():
    settings = {**flat_settings(nano()), "bank_size": 128}
    checkpoint = Checkpoint(Path("step_00000005"), 5, 1, json.loads(json.dumps(settings)))
    check_settings(checkpoint, settings)
    may = {"steps": 2000, "output_dir": "b", "data.num_workers": 3, "itc.retain": 0, "sharding.strategy": "fsdp"}
    check_settings(checkpoint, {**settings, **may, "checkpoint.every": 7, "evaluation.limit": 3, "log_every": 2})
    with pytest.raises(ValueError, match="optimizer.lr was 0.001 and is 0.1; bank_size was 128 and is 64"):
        check_settings(checkpoint, {**settings, "optimizer.lr": 0.1, "bank_size": 64})
    for name in ("objective.cmlm_weight", "seed", "batch_size", "size", "data.neighbours", "schedule.until"):
        with pytest.raises(ValueError, match=f"{name} was"):
            check_settings(checkpoint, {**settings, name: 77})
    with pytest.raises(ValueError, match="has done 5 steps, more than steps = 4"):
        check_settings(checkpoint, {**settings, "steps": 4})


# ---- Several ranks


def save_sharded(folder: str, config: M2EncoderConfig, strategy: str, shard_size: int | None) -> dict[str, Any]:
    trained = trainee(config, 0, strategy, shard_size)
    step(trained, 1)
    save(Path(folder), 1, trained, skipped={"no_caption": dist.get_rank() + 1}, position={"rank": dist.get_rank()})
    return values(trained)


def load_sharded(folder: str, config: M2EncoderConfig, strategy: str, shard_size: int | None) -> tuple[Any, ...]:
    trained = trainee(config, 3, strategy, shard_size)
    position, skipped = load_checkpoint(find_checkpoint("auto", Path(folder)), trained)
    return values(trained), position, skipped


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "ddp", None), (2, "fsdp", None)),
        ((2, "fsdp", None), (4, "hsdp", 2)),
        ((4, "hsdp", 2), (3, "fsdp", None)),
        ((4, "hpz", 2), (2, "ddp", None)),
    ],
)
def test_ranks_and_sharding_may_change(
    config: M2EncoderConfig, tmp_path: Path, before: tuple[Any, ...], after: tuple[Any, ...]
):
    (expected, *_) = run_distributed(save_sharded, before[0], str(tmp_path), config, *before[1:], timeout=600)
    results = run_distributed(load_sharded, after[0], str(tmp_path), config, *after[1:], timeout=600)
    for rank, (found, position, skipped) in enumerate(results):
        assert same(found, expected)
        if before[0] == after[0]:
            assert (position, skipped) == ({"rank": rank}, {"no_caption": rank + 1})
        else:
            total = before[0] * (before[0] + 1) // 2
            assert (position, skipped) == ({"rank": 0}, {"no_caption": total} if rank == 0 else {})
