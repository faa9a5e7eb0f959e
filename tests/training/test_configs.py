"""Presets against what the paper gives; every setting within reach of the command line; refusals before any writing."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from training.configs import PRESETS, CheckpointConfig, DataConfig, ITCConfig, PretrainConfig, flat_settings
from training.pretrain import parse
from training.schedule import ScheduleConfig
from training.sharding import ShardingConfig

PAPER = ["base_0_4b", "large_1b", "huge_10b"]
SOME_DATA = ["--output-dir", "x", "--data.files", "a"]


def ready(preset: str, **changes: Any) -> PretrainConfig:
    config = PRESETS[preset]()
    return dataclasses.replace(config, output_dir="x", data=dataclasses.replace(config.data, files=("a",)), **changes)


# ---- Presets


@pytest.mark.parametrize(
    ("preset", "size", "batch_size", "bank_size"),
    [("base_0_4b", "0.4B", 131_072, 32_768), ("large_1b", "1B", 131_072, 32_768), ("huge_10b", "10B", 143_360, 35_840)],
)
def test_the_papers_values(preset: str, size: str, batch_size: int, bank_size: int):
    """Table 10; but for the 10B bank, which does not divide there."""
    config = PRESETS[preset]()
    assert (config.size, config.batch_size, config.itc.bank_size) == (size, batch_size, bank_size)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.betas, optimizer.eps) == ("lamb", (0.9, 0.98), 1e-6)
    assert optimizer.weight_decay == 0.05
    assert (config.objective.cmlm_weight, config.objective.cmim_weight) == (0.3, 0.3)
    assert (config.steps - 1) * batch_size < 9_000_000_000 <= config.steps * batch_size
    assert config.model_config().image_size == 224 and config.vocab_size == 115_244


@pytest.mark.parametrize("preset", PAPER)
@pytest.mark.parametrize("world_size", [32, 256])
def test_the_papers_presets_fit_whole_nodes(preset: str, world_size: int):
    phases, (bank,) = ready(preset).check(world_size, gpus_per_node=8)
    assert bank.num_groups == 4 and bank.bank_size == PRESETS[preset]().itc.bank_size
    assert len(phases) == 1


def test_the_papers_own_row_of_10b_is_refused():
    config = ready("huge_10b", itc=ITCConfig(bank_size=32_768))
    with pytest.raises(ValueError, match=r"4\.375 banks.*35840 \(4 groups of 64 GPUs\)"):
        config.check(256, 8)


@pytest.mark.parametrize("preset", ["nano", *PAPER])
def test_the_smoke_twin_is_of_one_kind_with_its_preset(preset: str):
    config, twin = ready(preset), ready(f"{preset}_smoke")
    for part in ("objective", "evaluation", "schedule", "resume", "gradient_checkpointing", "mixed_precision"):
        assert getattr(twin, part) == getattr(config, part), part
    assert twin.optimizer.name == config.optimizer.name and twin.data.augment == config.data.augment
    assert (twin.itc.bank_steps, twin.itc.retain) == (config.itc.bank_steps, config.itc.retain)
    assert (twin.sharding.strategy == "ddp") == (config.sharding.strategy == "ddp")
    assert bool(twin.checkpoint.every) == bool(config.checkpoint.every)
    assert twin.size == "nano" and twin.steps * twin.batch_size <= 100
    for processes in (1, 2):
        twin.check(processes)


def test_every_preset_says_what_it_is():
    assert set(PRESETS) == {f"{name}{twin}" for name in ["nano", *PAPER] for twin in ("", "_smoke")}
    for name, preset in PRESETS.items():
        assert preset.__name__ == name and inspect.getdoc(preset)
        assert preset() == preset()


# ---- Command line


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--itc.group-size 2", "itc.group_size", 2),
        ("--itc.group-nodes 8", "itc.group_nodes", 8),
        ("--itc.bank-size 64", "itc.bank_size", 64),
        ("--itc.bank-steps 4", "itc.bank_steps", 4),
        ("--itc.retain 0", "itc.retain", 0),
        ("--itc.tile 256", "itc.tile", 256),
        ("--objective.decoder-context cls", "objective.decoder_context", "cls"),
        ("--objective.no-normalize-pixels", "objective.normalize_pixels", False),
        ("--objective.masking.text-ratio 0.4", "objective.masking.text_ratio", 0.4),
        ("--objective.masking.image-ratio 0.6", "objective.masking.image_ratio", 0.6),
        ("--objective.masking.no-whole-words", "objective.masking.whole_words", False),
        ("--sharding.strategy hsdp", "sharding.strategy", "hsdp"),
        ("--sharding.shard-size 8", "sharding.shard_size", 8),
        ("--sharding.compile", "sharding.compile", True),
        ("--schedule.until 0.9 1.0", "schedule.until", [0.9, 1.0]),
        ("--schedule.image-size 112 224", "schedule.image_size", [112, 224]),
        ("--schedule.sharing.mode layer", "schedule.sharing.mode", "layer"),
        ("--checkpoint.every 100", "checkpoint.every", 100),
        ("--checkpoint.keep 5", "checkpoint.keep", 5),
        ("--resume auto", "resume", "auto"),
        ("--data.streaming on", "data.streaming", "on"),
        ("--data.augment official", "data.augment", "official"),
        ("--mixed-precision bf16", "mixed_precision", "bf16"),
    ],
)
def test_a_setting_on_the_command_line(words: str, name: str, value: Any):
    assert flat_settings(parse(["nano", *SOME_DATA, *words.split()]))[name] == value


def test_the_model_hears_of_its_settings():
    config = parse(["base_0_4b", *SOME_DATA, "--objective.decoder-context", "cls", "--drop-path-rate", "0.1"])
    model = config.model_config(vocab_size=7)
    assert (model.decoder_context, model.drop_path_rate, model.vocab_size) == ("cls", 0.1, 7)
    assert (
        model.normalize_pixels
        and not parse(["nano", *SOME_DATA, "--objective.no-normalize-pixels"]).model_config().normalize_pixels
    )


# ---- Refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"itc": ITCConfig(group_size=3)}, r"group_size 3 does not divide the 4 GPUs.*2 and 4"),
        ({"itc": ITCConfig(group_size=2, bank_size=8)}, "each fix the group"),
        ({"itc": ITCConfig(group_nodes=3)}, "group_nodes 3 does not divide the 2 nodes"),
        ({"itc": ITCConfig(bank_steps=3)}, r"12 \(1 per GPU\) and 24 \(2 per GPU\)"),
        ({"itc": ITCConfig(bank_steps=0, retain=0)}, "bank_steps must be at least 1"),
        ({"itc": ITCConfig(bank_steps=2, retain=3)}, r"retain must lie in \[0, bank_steps = 2\], got 3"),
        ({"itc": ITCConfig(tile=0)}, "tile must be at least 1"),
        ({"sharding": ShardingConfig("hsdp", 3)}, "shard_size 3"),
        ({"schedule": ScheduleConfig(until=(0.5, 1.0), image_size=(50, 64))}, "multiple of the patch size 16"),
        ({"schedule": ScheduleConfig(until=(0.5, 1.0), bank_steps=(3, 1))}, "Steps 1 to 2"),
        ({"checkpoint": CheckpointConfig(every=-1)}, "checkpoint.every must be 0 or more"),
        ({"checkpoint": CheckpointConfig(keep=0)}, "checkpoint.keep 1 or more"),
        ({"data": DataConfig()}, "--data.files"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], named: str):
    config = dataclasses.replace(ready("nano_smoke"), **changes)
    with pytest.raises(ValueError, match=named):
        config.check(4, gpus_per_node=2)
