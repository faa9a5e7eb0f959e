"""Pretraining on one GPU: samples/s, model FLOPs utilisation and peak memory of 0.4B over batch, k and r, and the
contrastive loss alone up to a million pairs.

    python -m benchmarks.gpu_pretraining [--output benchmarks/gpu_pretraining.json]
    python -m benchmarks.gpu_pretraining --device cpu --smoke          # the same code on nano, without meaning

Without a GPU it says so and writes nothing. Steps are those of training (`banked_backward`, LAMB, bf16 autocast) on
random pixels and tokens: data loading is not in them. In the part on the loss one process stands for all: the other
ranks' features are there beforehand, and torch's "fake" process group answers the exchange in backward at once. These
are SIMULATED RANKS: one rank's computation and memory, no communication, no throughput of several GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.itc_baselines import local_itc_loss, naive_itc_loss
from modeling_m2encoder import M2EncoderConfig, M2EncoderForPreTraining
from training.bank import MicroBatchOutput, banked_backward
from training.configs import ObjectiveConfig
from training.flops import peak_flops
from training.losses import grouped_itc_loss
from training.optim import build_optimizer
from training.sharding import Distributed, ShardingConfig, distribute


@dataclass(frozen=True)
class Settings:
    """What is measured; `SMOKE` is the same on a laptop."""

    size: str = "0.4B"
    batches: tuple[int, ...] = (64, 128, 256, 512)
    banks: tuple[tuple[int, int], ...] = ((1, 1), (4, 0), (4, 1), (4, 4))
    """(k, r) of each."""
    checkpointing: tuple[bool, ...] = (False, True)
    steps: int = 20
    warmup: int = 3
    pairs: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
    """N of the loss alone; `loss_batch` of them are this rank's."""
    loss_batch: int = 1024
    dim: int = 1024
    naive_pairs: int = 65_536
    """Largest N for the loss that makes [N, N]."""


SMOKE = Settings(
    size="nano", batches=(2,), banks=((1, 1), (2, 0)), steps=1, warmup=1, pairs=(32, 64), loss_batch=16, dim=8,
    naive_pairs=32,
)  # fmt: skip


# ---- Steps of training ---------------------------------------------------------------------------------------------


def measure_steps(settings: Settings, device: torch.device, peak: float | None) -> list[dict[str, Any]]:
    """One row for each batch, (k, r) and use of checkpointing, with the full objective and with ITC alone."""
    rows = []
    objectives = (ObjectiveConfig(), ObjectiveConfig(0, 0))
    flops = {objective: flops_per_pair(settings.size, objective, device) for objective in objectives}
    for objective, checkpointing, batch in itertools.product(objectives, settings.checkpointing, settings.batches):
        for k, retain in settings.banks:
            setting = {
                "objective": "ITC + CMLM + CMIM" if objective.masks else "ITC",
                "gradient_checkpointing": checkpointing,
                "batch": batch,
                "bank_steps": k,
                "retain": retain,
            }
            try:
                step = Step(settings.size, objective, batch, k, retain, checkpointing, device)
                seconds, memory = timed(step, settings, device)
            except torch.OutOfMemoryError:
                rows.append({**setting, "out_of_memory": True})
                continue
            finally:
                step = None
                release(device)
            per_second = batch * k / seconds
            utilisation = None if peak is None else per_second * flops[objective] / peak
            measured = {"samples_per_second": per_second, "mfu": utilisation, "peak_bytes": memory}
            rows.append({**setting, **measured, "flops_per_pair": flops[objective]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


class Step:
    """One optimizer step of `size` on random pairs, as the loop makes it."""

    def __init__(
        self,
        size: str,
        objective: ObjectiveConfig,
        batch: int,
        bank_steps: int,
        retain: int,
        checkpointing: bool,
        device: torch.device,
    ) -> None:
        self.objective, self.retain = objective, retain
        self.model: Distributed = distribute(
            build_model(size, device),
            ShardingConfig(),
            device=device,
            mixed_precision="bf16",
            gradient_checkpointing=checkpointing,
        )
        if not objective.masks:
            self.model.module.pretraining_heads.requires_grad_(False)
        self.optimizer = build_optimizer(self.model.module, "lamb", 1e-3)
        config = self.model.module.config
        self.micro_batches = [random_batch(config, objective, batch, device) for _ in range(bank_steps)]

    def __call__(self) -> None:
        banked_backward(self._model_step, self.micro_batches, self.model.module.logit_scale, retain=self.retain)
        self.model.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _model_step(self, batch: dict[str, Tensor], with_auxiliary: bool) -> MicroBatchOutput:
        masks = ("text_mask", "patch_mask")
        inputs = {name: value for name, value in batch.items() if with_auxiliary or name not in masks}
        output = self.model.model(**inputs)
        auxiliary = None
        if with_auxiliary and self.objective.masks:
            auxiliary = self.objective.cmlm_weight * output.loss_cmlm + self.objective.cmim_weight * output.loss_cmim
        return MicroBatchOutput(output.image_embeds, output.text_embeds, auxiliary)


def build_model(size: str, device: torch.device) -> M2EncoderForPreTraining:
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "mask_token_id": 2}
    with device:  # a CPU takes much longer to draw the weights
        return M2EncoderForPreTraining(M2EncoderConfig.from_size(size, **special)).train()


def random_batch(
    config: M2EncoderConfig, objective: ObjectiveConfig, batch: int, device: torch.device
) -> dict[str, Tensor]:
    """Pixels, texts of full length, and masks at the ratios of the objective."""
    length = config.max_text_length
    inputs = {
        "input_ids": torch.randint(3, config.vocab_size, (batch, length), device=device),
        "attention_mask": torch.ones(batch, length, dtype=torch.long, device=device),
        "pixel_values": torch.randn(batch, 3, config.image_size, config.image_size, device=device),
    }
    if objective.masks:
        ratios, patches = objective.masking, config.num_patches
        inputs["text_mask"] = torch.rand(batch, length, device=device) < ratios.text_ratio
        order = torch.rand(batch, patches, device=device).argsort(dim=1)
        inputs["patch_mask"] = order < round(ratios.image_ratio * patches)
    return inputs


def flops_per_pair(size: str, objective: ObjectiveConfig, device: torch.device) -> float:
    """Multiplications and additions of one forward and backward of a pair, counted by torch while two run. What is
    computed twice (r < k, checkpointing) counts once: that makes it the model's and not the hardware's utilisation."""
    step = Step(size, objective, 2, 1, 1, False, device)
    with FlopCounterMode(display=False) as counter:
        banked_backward(step._model_step, step.micro_batches, step.model.module.logit_scale, retain=1)
    return counter.get_total_flops() / 2


# ---- The loss alone ------------------------------------------------------------------------------------------------


def measure_loss(settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """Time and peak memory of forward and backward over N, with simulated ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rows = []
    for pairs in settings.pairs:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=pairs // settings.loss_batch)
        bank = torch.nn.functional.normalize(torch.randn(pairs, 2, settings.dim, device=device), dim=-1)
        bank = bank.to(torch.bfloat16).flatten(1)
        # Without a copy of the bank for itself: it counts in no row.
        losses: dict[str, Callable[..., Tensor]] = {
            "grouped": lambda *own, bank=bank: grouped_itc_loss(*own, gathered=bank),
            "local": local_itc_loss,
        }
        if pairs <= settings.naive_pairs:
            losses["naive"] = naive_itc_loss
        for name, loss in losses.items():
            image, text = bank[: settings.loss_batch].clone().chunk(2, dim=1)
            own = [image.contiguous().requires_grad_(), text.contiguous().requires_grad_()]
            scale = torch.tensor([2.6592], device=device, requires_grad=True)
            row = {"loss": name, "pairs": pairs, "batch": settings.loss_batch, "dim": settings.dim}
            row |= {"simulated_ranks": pairs // settings.loss_batch, "bank_bytes": bank.nbytes}
            try:
                seconds, peak = timed(
                    lambda loss=loss, own=own, scale=scale: loss(*own, scale).backward(), settings, device
                )
                rows.append({**row, "milliseconds": seconds * 1e3, "peak_bytes": peak})
            except torch.OutOfMemoryError:
                rows.append({**row, "out_of_memory": True})
            print(json.dumps(rows[-1]), flush=True)
            release(device)
        dist.destroy_process_group()
    return rows


# ---- Clocks and memory ---------------------------------------------------------------------------------------------


def timed(work: Callable[[], object], settings: Settings, device: torch.device) -> tuple[float, int | None]:
    """Median seconds, and the most bytes that torch had allocated at a time, model included (None on a CPU)."""
    for _ in range(settings.warmup):
        work()
    if device.type == "cpu":
        times = []
        for _ in range(settings.steps):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times), None
    torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(settings.steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times), torch.cuda.max_memory_allocated(device)


def release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- Command line --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="nano and tiny banks: to see that everything runs")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the GPU, where it is not known here")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA GPU here: nothing was measured. (--device cpu --smoke runs the code on nano.)")
        return
    if options.device == "cpu" and not options.smoke:
        parser.error("on a CPU only --smoke: 0.4B would take hours and say nothing about a GPU.")
    device = torch.device(options.device)
    settings = SMOKE if options.smoke else Settings()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(device) if options.peak_tflops is None else options.peak_tflops * 1e12
    report = {
        "device": name,
        "peak_flops": peak,
        "torch": torch.__version__,
        "smoke": options.smoke,
        "settings": dataclasses.asdict(settings),
        "steps": measure_steps(settings, device, peak),
        "loss_with_simulated_ranks": measure_loss(settings, device),
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
