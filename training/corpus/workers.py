"""datatrove's executor for one machine, on a pool that notices when a worker is gone.

The pool of datatrove (multiprocessing.Pool) replaces a worker that was killed, as by the kernel for want of memory,
and waits for ever for the task that it had.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from datatrove.executor import LocalPipelineExecutor


class LocalExecutor(LocalPipelineExecutor):
    """Runs the tasks that are not complete, `workers` at a time.

    Raises:
        RuntimeError: if a worker was killed; tasks that are complete stay so.
        Exception: of the first task that failed, after those that run beside it have ended.
    """

    def run(self) -> None:
        """Returns when all tasks are complete."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                self._run_for_rank(rank, local_rank=1)
            return
        context = multiprocessing.get_context("forkserver")
        # One process imports these, and the workers of all stages are its forks: half a second less for each of them.
        context.set_forkserver_preload(["__main__", "datatrove.executor", "pyarrow.parquet", "PIL.Image"])
        pool = ProcessPoolExecutor(self.workers, context, initializer=_end_with_parent)
        try:
            for done in as_completed([pool.submit(self._run_for_rank, rank, 1) for rank in ranks]):
                done.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker was killed (by the system, if memory is short); run the stage again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: ends it when the process that started it is gone, which the pool leaves to wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
