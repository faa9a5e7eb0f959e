"""What datatrove's Slurm executor leaves to its user: the environment of a job, and its end."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

_SECONDS = 10


def environment() -> str:
    """Shell commands that make a job see what this process sees: its folder, its Python and this code."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Beside the Python that runs lies datatrove's `launch_pickled_pipeline`.
    return (
        f"cd {shlex.quote(str(Path.cwd()))}\n"
        f"export PYTHONPATH={shlex.quote(path)}\n"
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    )


def wait_for(job: str | None) -> None:
    """Returns when a job has left the queue, done or not; None: there was nothing to submit.

    Raises:
        RuntimeError: if `squeue` cannot be asked; the job goes on.
    """
    while job:
        try:
            asked = subprocess.run(["squeue", "-h", "-j", str(job)], capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(
                f"Job {job} is submitted, but squeue does not run: {error}. Run it again later."
            ) from error
        # Slurm forgets a job some minutes after its end, and then calls its number invalid.
        if asked.returncode and "Invalid job id" not in asked.stderr:
            raise RuntimeError(f"Job {job} is submitted, but squeue says: {asked.stderr.strip()}. Run it again later.")
        if not asked.stdout.strip():
            return
        time.sleep(_SECONDS)
