"""Runs a function in several real processes that talk over gloo, and gives back what each of them returned."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One server process imports torch, transformers and what most ranks run once for the whole pytest run; each rank is
# then a fork of it, in milliseconds.
# Forking pytest itself would copy the thread pools of torch in an undefined state.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed", "training.sharding", "modeling_m2encoder"])


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Calls `fn(*args)` in `world_size` processes inside an initialised gloo group; returns their results by rank.

    `fn`, `args` and the results must be picklable, so `fn` is a function at module level. Processes meet in a file,
    never at a port that another test could hold.

    Raises:
        RuntimeError: with the traceback of every rank that raised; the others are ended.
        TimeoutError: when they are not done after `timeout` seconds, for example because a collective hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = range(world_size)
        # Pickled here: an argument that cannot be unpickled then fails inside the rank's own try, with a traceback.
        work = pickle.dumps((fn, args))
        processes = [
            _context.Process(target=_rank_main, args=(rank, world_size, folder, timeout, work), daemon=True)
            for rank in ranks
        ]
        try:
            for process in processes:
                process.start()
            _wait_for(processes, time.monotonic() + timeout)
        finally:
            # All of them before any is waited for, or the others would report a lost connection as the fault.
            started = [process for process in processes if process.pid is not None]
            for process in started:
                process.kill()
            for process in started:
                process.join()
        results = [_read(Path(folder), rank) for rank in ranks]
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if ok is False]
    if failures:
        raise RuntimeError(f"{len(failures)} of {world_size} ranks failed\n" + "\n".join(failures))
    missing = [rank for rank, (ok, _) in enumerate(results) if ok is None]
    if missing:
        codes = [processes[rank].exitcode for rank in missing]
        raise TimeoutError(f"ranks {missing} gave no result in {timeout} s (exit codes {codes})")
    return [value for _, value in results]


def _wait_for(processes: list[Any], deadline: float) -> None:
    """Until all have ended, or one has failed (the others get two seconds to fail as well), or the deadline."""
    running = list(processes)
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running], timeout=deadline - time.monotonic())
        if any(process.exitcode not in (None, 0) for process in running):
            deadline = min(deadline, time.monotonic() + 2)
        running = [process for process in running if process.exitcode is None]


def _read(folder: Path, rank: int) -> tuple[bool | None, Any]:
    path = folder / f"{rank}.pkl"
    return pickle.loads(path.read_bytes()) if path.exists() else (None, None)


def _rank_main(rank: int, world_size: int, folder: str, timeout: float, work: bytes) -> None:
    path = Path(folder) / f"{rank}.pkl"
    try:
        torch.set_num_threads(1)
        fn, args = pickle.loads(work)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        assert dist.get_world_size() == world_size, f"asked for {world_size} processes, got {dist.get_world_size()}"
        outcome = pickle.dumps((True, fn(*args)))
        dist.barrier()  # nobody leaves while another still reads from it
        dist.destroy_process_group()
    except BaseException:
        path.write_bytes(pickle.dumps((False, traceback.format_exc())))
        raise SystemExit(1) from None
    path.write_bytes(outcome)
