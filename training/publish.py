"""`--push-to-hub`: what a finished training does with its model, by the very command that a person would type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

ROOT = Path(__file__).parents[1]
# What launchers leave in the environment: the command runs alone.
LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError for what is no NAMESPACE/NAME: before a training, not after it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: {error}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"push_to_hub needs the namespace too, as in user/{repo_id}, not {repo_id!r}.")


def publish(folder: Path, repo_id: str, *, private: bool = False) -> bool:
    """Runs `python -m conversion.push FOLDER REPO_ID`; call on one process.

    A push that fails loses nothing: the model lies in `folder`, and what is printed says how to push it again.

    Returns:
        Whether it was published.
    """
    command = ["-m", "conversion.push", str(folder), repo_id, *(["--private"] if private else [])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        published = subprocess.run([sys.executable, *command], env=environment).returncode == 0
    except OSError as error:
        print(f"Could not start {sys.executable}: {error}", file=sys.stderr)
        published = False
    if not published:
        print(
            f"The training is done and its model lies in {folder}, but it could not be published. Once the reason "
            f"above is mended: python {shlex.join(command)}",
            file=sys.stderr,
            flush=True,
        )
    return published
