"""What a killed run goes on from, and the Hub-format folder that a finished one leaves; both whole or not at all.

Tested by `pytest tests/training/test_checkpoint.py` and `test_resume.py`.

A checkpoint is a folder `OUTPUT_DIR/checkpoints/step_00000100` with

- `shard-*.safetensors`, one file per rank by torch's distributed checkpoint (DCP): the model with its `logit_scale`,
  and the optimizer's moments and step counts. DCP reads them into any number of ranks and any sharding;
- `rank_00000.json`, ...: each rank's random states (Python, numpy, torch, accelerator), its place in the data and the
  samples it has skipped;
- `run.json`, written last: the step, the settings, and size and SHA-256 of every other file.

The learning rate is a function of the step and needs no state, and neither does bf16, which has no loss scaler.

Every rank writes into `.step_00000100.partial` on a file system that all nodes see; the folder is renamed when all of
it is on the disk. So a kill leaves whole checkpoints and perhaps a partial one, which the next start deletes.

Checkpoints may come from anywhere, so reading one must not run code: DCP's own format pickles its metadata
(`FileSystemReader`), and so do `torch.save` files; safetensors and JSON hold data only.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from eval.files import sha256_of
from modeling_m2encoder import M2EncoderModel, M2EncoderProcessor
from modeling_m2encoder.hub_folder import save_hub_folder

from .sharding import Distributed

logger = logging.getLogger(__name__)


class Trained(Protocol):
    """What is saved: a model, sharded or not, and its optimizer (`training.build.Trainee`)."""

    @property
    def distributed(self) -> Distributed: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...


_NAME = re.compile(r"step_(\d{8,})")


def export(model: M2EncoderModel, processor: M2EncoderProcessor, folder: str | Path) -> Path:
    """Writes a folder that `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` load; replaces an older one.

    Call on one process, with the model out of its wrappers.
    """
    return save_hub_folder(model, processor, folder, replace=True)


# ---- Writing


def save_checkpoint(
    folder: Path,
    step: int,
    trainee: Trained,
    *,
    settings: Mapping[str, Any],
    position: Any,
    skipped: Mapping[str, int],
    keep: int,
) -> Path:
    """Writes the checkpoint of a step and removes all but the newest `keep`. Every rank must call it.

    Args:
        folder: of all checkpoints of the run.
        trainee: what is trained.
        settings: what the run was asked to do, JSON values only.
        position: this rank's place in the data, JSON values only.
        skipped: this rank's unusable samples so far.
    """
    final, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
    if _rank() == 0:
        partial.mkdir(parents=True)
    _everyone(None)
    with _quiet():
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(_tensors(trainee), storage_writer=writer)
    own = [partial / f"rank_{_rank():05d}.json", *partial.glob(f"shard-{_rank() + 1:05d}-*")]
    _write_json(own[0], {"random": random_states(), "data": position, "skipped": dict(skipped)})
    files = {path.name: _digest(path) for path in own}
    files = {name: digest for part in _everyone(files) for name, digest in part.items()}
    if _rank() == 0:
        run = {"step": step, "world_size": _world_size(), "settings": settings, "files": files}
        _write_json(partial / "run.json", run)
        _sync_folder(partial)
        partial.rename(final)
        _sync_folder(folder)
        for old in _listed(folder)[keep:]:
            _remove(old)
    return final


def forget_later(folder: Path, step: int) -> None:
    """Deletes what a run that goes on from this step leaves behind: later checkpoints, be they damaged or of a course
    that was given up, and what killed processes have half written or half deleted."""
    if _rank() == 0:
        for path in _listed(folder):
            if int(_NAME.fullmatch(path.name)[1]) > step:
                _remove(path)
        for leftover in folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Out of sight first: a kill while deleting must not leave a damaged checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _tensors(trainee: Trained) -> dict[str, torch.Tensor]:
    """Everything that is learned, by name. The tensors are the live ones: what DCP reads into them is loaded.

    Not DCP's `get_state_dict`: it names a layer that serves several depths once for each, and adds numbers (learning
    rates, betas) that are settings here and that safetensors cannot hold.
    """
    if not trainee.optimizer.state:
        _make_moments(trainee.optimizer)
    tensors = {}
    for name, parameter in trainee.distributed.module.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in trainee.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Of an optimizer that has not stepped yet: places to read into. Parameters stay as they are."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# ---- Finding


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there as they were written."""

    path: Path
    step: int
    world_size: int
    settings: dict[str, Any]


def find_checkpoint(resume: str, folder: Path) -> Checkpoint | None:
    """The checkpoint to go on from; every rank must call it, and all get the same.

    Args:
        resume: "none"; "auto" for the newest whole one in `folder`, passing over damaged ones with a warning; or the
            path of one.
        folder: of all checkpoints of the run.

    Returns:
        None for "none", and for "auto" if the folder has no checkpoint.

    Raises:
        ValueError: when the named checkpoint, or every one in the folder, is damaged or missing.
    """
    if resume == "none":
        return None
    paths = [Path(resume)] if resume != "auto" else _listed(folder)
    (paths, *_) = _everyone(paths)  # as rank 0 sees them
    reasons = []
    for path in paths:
        try:
            return _open(path)
        except ValueError as error:
            reasons.append(str(error))
            if _rank() == 0 and resume == "auto":
                logger.warning("Passing over a damaged checkpoint: %s", error)
    if reasons:
        hint = "Name a whole one with --resume PATH, or begin in another --output-dir."
        raise ValueError(f"No checkpoint to go on from. {' '.join(reasons)} {hint}")
    return None


def _listed(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)), reverse=True)


def _open(path: Path) -> Checkpoint:
    """Reads `run.json` and compares every file with it, each rank a part of them. All ranks raise, or none."""
    error, run = None, {}
    try:
        run = _read_run(path)
        for name in sorted(run["files"])[_rank() :: _world_size()]:
            if not (path / name).is_file() or _digest(path / name) != run["files"][name]:
                raise ValueError(f"{path / name} is missing or not as it was written.")
    except (ValueError, OSError) as damage:
        error = str(damage)
    errors = [seen for seen in _everyone(error) if seen is not None]
    if errors:
        raise ValueError(errors[0])
    return Checkpoint(path, run["step"], run["world_size"], run["settings"])


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a checkpoint, or its run.json is damaged: {error}") from error
    valid = (
        isinstance(run, dict)
        and all(isinstance(run.get(name), int) and run[name] >= 1 for name in ("step", "world_size"))
        and all(isinstance(run.get(name), dict) for name in ("settings", "files"))
        and all(Path(name).name == name for name in run["files"])  # none outside the folder
        and run["world_size"] <= len(run["files"])
        and {f"rank_{rank:05d}.json" for rank in range(run["world_size"])} <= set(run["files"])
    )
    if not valid:
        raise ValueError(f"{path / 'run.json'} does not describe a checkpoint.")
    return run


# ---- Reading


def load_checkpoint(checkpoint: Checkpoint, trainee: Trained) -> tuple[Any, dict[str, int]]:
    """Reads the weights and the optimizer's state into their tensors, and sets this rank's random states.

    Ranks may be other in number and otherwise sharded than those that wrote it. If they are other in number, random
    states stay as they are, and all get rank 0's place in the data: enough for an indexable source, whose place is the
    same for all; the stream of any other refuses it.

    Returns:
        A place in the data, and this rank's part of the skipped samples.

    Raises:
        ValueError: when the tensors are not those of this model and optimizer.
    """
    try:
        with _quiet():
            reader = dcp.HuggingFaceStorageReader(str(checkpoint.path))
            dcp.load(_tensors(trainee), storage_reader=reader)
    except (CheckpointException, ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{checkpoint.path} does not hold this model and optimizer: {error}") from error
    ranks = [_read_rank(checkpoint.path / f"rank_{rank:05d}.json") for rank in range(checkpoint.world_size)]
    if checkpoint.world_size == _world_size():
        own = ranks[_rank()]
        set_random_states(own["random"])
        return own["data"], own["skipped"]
    total: Counter[str] = Counter()
    for rank in ranks if _rank() == 0 else []:  # only the sum over the ranks is ever shown
        total.update(rank["skipped"])
    return ranks[0]["data"], dict(total)


def _read_rank(path: Path) -> dict[str, Any]:
    try:
        rank = json.loads(path.read_text(encoding="utf-8"))
        rank["random"], rank["data"], rank["skipped"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the state of a rank: {error!r}") from error
    return rank


# ---- Settings


# What may change from one start of a run to the next. Nothing here changes which pairs a step sees or what its loss is
# (of `itc` the bank's size does, which is compared on its own), except `steps`, which stretches the schedule of what is
# still to come. Of the data, the stream compares what matters: a folder may have moved.
CHANGEABLE = (
    "output_dir",
    "steps",
    "resume",
    "log_every",
    "trackers",
    "push_",
    "gradient_checkpointing",
    "data.files",
    "data.num_workers",
    "evaluation.",
    "checkpoint.",
    "sharding.",
    "itc.",
)


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Refuses to go on with other settings than the checkpoint's, but for `CHANGEABLE` ones.

    Args:
        settings: JSON values by name, {"optimizer.lr": 0.001, ...}, as `save_checkpoint` was given them.

    Raises:
        ValueError: naming every setting that differs, with both values; or for a run that is shorter than what has been
            done.
    """
    before = checkpoint.settings
    changed = [
        f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
        for name in {**before, **settings}
        if before.get(name) != settings.get(name) and not name.startswith(CHANGEABLE)
    ]
    if changed:
        raise ValueError(
            f"{checkpoint.path} was written with other settings: {'; '.join(changed)}. Set them back, or begin a new "
            "run in another --output-dir with --resume none (from these weights, once exported: --init-from)."
        )
    if settings["steps"] < checkpoint.step:
        raise ValueError(f"{checkpoint.path} has done {checkpoint.step} steps, more than steps = {settings['steps']}.")


# ---- Random states


def random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and this process's accelerator, as JSON values."""
    version, values, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    states = {"python": [version, list(values), gauss], "numpy": numpy_state, "torch": _to_text(torch.get_rng_state())}
    if torch.cuda.is_available():
        states["cuda"] = _to_text(torch.cuda.get_rng_state())
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """The opposite of `random_states`.

    Raises:
        ValueError: for anything else.
    """
    try:
        version, values, gauss = states["python"]
        random.setstate((version, tuple(values), gauss))
        key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
        np.random.set_state({**states["numpy"], "state": {**states["numpy"]["state"], "key": key}})
        torch.set_rng_state(_from_text(states["torch"]))
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(_from_text(states["cuda"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"These are not the random states of a checkpoint: {error!r}") from error


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())


# ---- Files and ranks


def _write_json(path: Path, content: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> list[Any]:
    """[bytes, SHA-256]; read again from the file, which also tells whether it can be read."""
    return [path.stat().st_size, sha256_of(path)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's word on single processes, which is no news here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _everyone(value: Any) -> list[Any]:
    """The value of every rank, by rank; nobody leaves before all have come."""
    if _world_size() == 1:
        return [value]
    values: list[Any] = [None] * _world_size()
    dist.all_gather_object(values, value)
    return values
