"""Pretraining end to end: each way of launching it, one process against two, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor

from modeling_m2encoder import M2EncoderConfig, M2EncoderForPreTraining, M2EncoderModel
from tests.distributed import run_distributed
from training.build import Trainee
from training.checkpoint import export
from training.configs import PRESETS, ITCConfig, ObjectiveConfig, OptimizerConfig, PretrainConfig, nano_smoke
from training.pretrain import parse, pretrain, train_step
from training.scenes import ScenesConfig, write_scenes
from training.sharding import ShardingConfig, distribute

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, ScenesConfig(twins=2, train=64, validation=16, test=48, task_size=4, workers=1))
    return folder


def smoke(scenes: Path, output_dir: Path, **changes: Any) -> PretrainConfig:
    preset = nano_smoke()
    data = dataclasses.replace(preset.data, files=(f"{scenes}/train-*.parquet",))
    return dataclasses.replace(preset, output_dir=str(output_dir), data=data, **changes)


def log_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def test_writes_log_settings_and_a_model_that_loads(scenes: Path, tmp_path: Path):
    evaluation = dataclasses.replace(nano_smoke().evaluation, every=2, scenes=str(scenes), limit=8)
    folder = pretrain(smoke(scenes, tmp_path / "run", evaluation=evaluation))
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["samples"] for line in lines] == [16, 32, 48, 64]
    required = {"step", "samples", "loss", "loss_itc", "logit_scale", "lr", "grad_norm", "samples_per_second"}
    required |= {"param_norm", "update_norm", "performance"}
    assert all(required <= line.keys() for line in lines)
    assert all({"data_wait", "mfu", "memory_gb"} == line["performance"].keys() for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([5e-4, 1e-3, 5e-4, 0.0])
    assert "scenes/retrieval/zh/mean_recall" in lines[1] and "scenes/retrieval/zh/mean_recall" not in lines[2]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["steps"] == 4 and settings["batch_size"] == 16
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is M2EncoderModel and model.config.vocab_size == len(processor.tokenizer)
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(smoke(scenes, tmp_path / "run"))


def test_training_learns_and_is_repeatable(scenes: Path, tmp_path: Path):
    """From ln(32) = 3.47 downwards on 64 pairs; and once more to the same numbers."""
    optimizer = dataclasses.replace(nano_smoke().optimizer, warmup_steps=10)
    pretrain(smoke(scenes, tmp_path / "a", steps=70, batch_size=32, optimizer=optimizer))
    losses = [line["loss"] for line in log_of(tmp_path / "a")]
    assert losses[0] == pytest.approx(3.47, abs=0.4) and sum(losses[-10:]) / 10 < 3.2
    # While the learning rate warms up, the run's length is nothing to it.
    pretrain(smoke(scenes, tmp_path / "b", steps=10, batch_size=32, optimizer=optimizer))
    assert [line["loss"] for line in log_of(tmp_path / "b")] == losses[:10]


def test_continues_from_a_checkpoint(scenes: Path, tmp_path: Path):
    first = pretrain(smoke(scenes, tmp_path / "a"))
    second = pretrain(smoke(scenes, tmp_path / "b", init_from=str(first), steps=2))
    config = AutoModel.from_pretrained(second).config
    assert config.vocab_size == AutoModel.from_pretrained(first).config.vocab_size


@pytest.mark.parametrize(("cmlm", "cmim"), [(0.3, 0.3), (0.3, 0.0), (0.0, 0.5)])
def test_masked_losses(scenes: Path, tmp_path: Path, cmlm: float, cmim: float):
    """They are parts of the loss with their weights, and what is exported loads with and without the heads."""
    objective = ObjectiveConfig(cmlm_weight=cmlm, cmim_weight=cmim)
    folder = pretrain(smoke(scenes, tmp_path / "run", objective=objective))
    for line in log_of(tmp_path / "run"):
        assert ("loss_cmlm" in line, "loss_cmim" in line) == (cmlm > 0, cmim > 0)
        parts = line["loss_itc"] + cmlm * line.get("loss_cmlm", 0) + cmim * line.get("loss_cmim", 0)
        assert line["loss"] == pytest.approx(parts, rel=1e-6)
    assert type(AutoModel.from_pretrained(folder)) is M2EncoderModel
    assert type(AutoModelForPreTraining.from_pretrained(folder)) is M2EncoderForPreTraining
    again = pretrain(smoke(scenes, tmp_path / "more", objective=objective, init_from=str(folder), steps=2))
    assert "loss_itc" in log_of(again.parent)[0]


# ---- Launchers


def launch(command: list[str], output_dir: Path, scenes: Path) -> None:
    arguments = ["nano_smoke", "--output-dir", str(output_dir), "--data.files", f"{scenes}/train-*.parquet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, "training.pretrain", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_launcher_gives_the_same_run(scenes: Path, tmp_path: Path):
    """python, torchrun and accelerate launch; one process and two see the same global batches."""
    config = str(ROOT / "training" / "launch" / "two_cpu_processes.yaml")
    launchers = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
        "accelerate": ["accelerate.commands.launch", "--config_file", config, "-m"],
    }
    subprocess_of_one = [sys.executable, "-m", "training.pretrain"]
    arguments = ["nano_smoke", "--output-dir", str(tmp_path / "python"), "--data.files", f"{scenes}/train-*.parquet"]
    subprocess.run([*subprocess_of_one, *arguments], cwd=ROOT, check=True, capture_output=True, timeout=300)
    expected = log_of(tmp_path / "python")
    assert [line["processes"] for line in expected] == [1] * 4
    for name, command in launchers.items():
        launch(command, tmp_path / name, scenes)
        lines = log_of(tmp_path / name)
        assert [line["processes"] for line in lines] == [2] * 4, name
        for line, one in zip(lines, expected, strict=True):
            assert line["loss"] == pytest.approx(one["loss"], abs=1e-5), name
            assert line["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), name


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given instead of using them."""

    def step(self, closure: Any = None) -> None:
        self.seen = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]


def loss_and_gradients(masked: bool, bank_steps: int, retain: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    """One `train_step` on this rank's share of a fixed global batch of 8: losses over all ranks, gradients."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # What torchrun would set: Accelerate reads its rank from here.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    torch.manual_seed(0)
    config = M2EncoderConfig.from_size(
        "nano",
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        mask_token_id=2,
    )
    model = (M2EncoderForPreTraining if masked else M2EncoderModel)(config).train()
    ids = torch.randint(0, 100, (8, 12))
    mask = (torch.arange(12)[None] < torch.randint(3, 13, (8, 1))).long()
    pixels = torch.randn(8, 3, 64, 64)
    recorder = Recorder(model.parameters(), lr=1.0)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    batch = {"input_ids": ids[mine], "attention_mask": mask[mine], "pixel_values": pixels[mine]}
    if masked:  # the first half of the texts hides many more tokens than the second
        hidden = (torch.rand(8, 12) < torch.tensor([0.9] * 4 + [0.3] * 4)[:, None]) & mask.bool()
        hidden[:, 0] = True
        batch |= {"text_mask": hidden[mine], "patch_mask": (torch.rand(8, 16).argsort(dim=1) < 12)[mine]}
    trainee = Trainee(distribute(model, ShardingConfig(), device="cpu"), recorder, "none")
    settings = PretrainConfig(itc=ITCConfig(retain=retain), optimizer=OptimizerConfig(max_grad_norm=1e9))
    metrics = train_step(trainee, batch, settings, accelerator, bank_steps=bank_steps, lr=1.0)
    losses = {name: accelerator.reduce(metrics[name], "mean").item() for name in metrics if name.startswith("loss")}
    return losses, recorder.seen


@pytest.mark.parametrize("masked", [False, True])
def test_neither_processes_nor_micro_batches_change_the_gradients(masked: bool):
    """The pairs, all losses and all gradients of n processes with k micro-batches are those of one with one."""
    ((losses, gradients),) = run_distributed(loss_and_gradients, 1, masked, 1, 1)
    assert losses["loss"] == pytest.approx(
        losses["loss_itc"] + 0.3 * losses.get("loss_cmim", 0) + 0.3 * losses.get("loss_cmlm", 0), rel=1e-6
    )
    for processes, bank_steps, retain in [(2, 1, 1), (1, 4, 1), (2, 2, 0)]:
        for other_losses, other_gradients in run_distributed(loss_and_gradients, processes, masked, bank_steps, retain):
            assert other_losses == pytest.approx(losses, abs=1e-5)
            assert len(gradients) == len(other_gradients) > 50
            whole = torch.stack([one.norm() for one in gradients]).norm().item()
            for one, two in zip(gradients, other_gradients, strict=True):
                # The keys' biases have no gradient but rounding: softmax does not see a constant.
                assert (one - two).norm() <= 1e-5 * max(one.norm().item(), 1e-3 * whole)


def rank_of_a_run(config: PretrainConfig) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    Accelerator.end_training = without_reducers  # `run_distributed` ends the process group
    pretrain(config)


def without_reducers(accelerator: Accelerator) -> None:
    """As the last owners of a process group they can hang the process that ends it."""
    assert not [one for one in gc.get_objects() if isinstance(one, torch.nn.parallel.DistributedDataParallel)]


def test_nothing_outlives_the_process_group(scenes: Path, tmp_path: Path):
    run_distributed(rank_of_a_run, 2, smoke(scenes, tmp_path / "run", steps=2))


def test_a_sharded_model_is_evaluated_and_exported(scenes: Path, tmp_path: Path):
    """fsdp on two processes: losses, scores and weights of one process with ddp."""
    evaluation = dataclasses.replace(nano_smoke().evaluation, every=1, scenes=str(scenes), limit=8)
    settings = {"steps": 2, "evaluation": evaluation, "itc": ITCConfig(bank_steps=2)}
    whole = AutoModel.from_pretrained(pretrain(smoke(scenes, tmp_path / "ddp", **settings)))
    sharded = smoke(scenes, tmp_path / "fsdp", sharding=ShardingConfig("fsdp"), **settings)
    run_distributed(rank_of_a_run, 2, sharded, timeout=600)
    for line, other in zip(log_of(tmp_path / "ddp"), log_of(tmp_path / "fsdp"), strict=True):
        for name in line.keys() - {"processes", "samples_per_second", "performance"}:
            assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6), name
        assert any(name.startswith("scenes/") for name in line)
    weights = AutoModel.from_pretrained(tmp_path / "fsdp" / "model").state_dict()
    for name, weight in whole.state_dict().items():
        # Adam takes whole steps also where a gradient is only rounding: the keys' biases.
        assert torch.allclose(weights[name], weight, atol=2e-3), name


def test_bf16(scenes: Path, tmp_path: Path):
    """Computed in bf16, about the same loss; what is trained and exported is fp32."""
    losses = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision
        objective = ObjectiveConfig()
        config = smoke(scenes, tmp_path / precision, steps=2, mixed_precision=precision, objective=objective)
        folder = pretrain(config)
        losses[precision] = [line["loss"] for line in log_of(tmp_path / precision)]
        assert {weight.dtype for weight in AutoModel.from_pretrained(folder, dtype="auto").parameters()} == {
            torch.float32
        }
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02) and losses["bf16"] != losses["no"]


# ---- Refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"output_dir": ""}, "output-dir"),
        ({"batch_size": 1}, "at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"size": "2B"}, "2B"),
    ],
)
def test_impossible_settings(scenes: Path, tmp_path: Path, changes: dict[str, Any], named: str):
    config = dataclasses.replace(smoke(scenes, tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=named):
        pretrain(config)
    assert not (tmp_path / "run" / "model").exists()


def test_impossible_settings_of_the_parts(scenes: Path, tmp_path: Path):
    config = smoke(scenes, tmp_path / "run")
    with pytest.raises(ValueError, match=r"15 \(5 per GPU\) and 18 \(6 per GPU\)"):
        config.check(num_processes=3)
    late = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=99))
    with pytest.raises(ValueError, match="warmup_steps"):
        late.check(1)
    blind = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, every=5))
    with pytest.raises(ValueError, match="evaluation.every needs data"):
        blind.check(1)
    nothing = dataclasses.replace(config, data=dataclasses.replace(config.data, files=()))
    with pytest.raises(ValueError, match="data.files"):
        nothing.check(1)
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, files=("/nowhere/*.parquet",)))
    with pytest.raises(ValueError, match="/nowhere"):
        pretrain(elsewhere)


def test_the_command_line():
    config = parse(["nano", "--output-dir", "x", "--data.files", "a", "b", "--data.captions", "en", "c", "zh", "d"])
    assert config.data.files == ("a", "b") and config.data.captions == {"en": "c", "zh": "d"}
    with pytest.raises(SystemExit, match="one of: " + ", ".join(PRESETS)):
        parse(["huge"])


def test_export_is_whole_or_absent(model, processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export(model, processor, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(model, processor, tmp_path / "model")
    after = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    assert before == after and [path.name for path in tmp_path.iterdir()] == ["model"]
