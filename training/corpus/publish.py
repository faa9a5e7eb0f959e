"""Shards as a data set on the Hub."""

from __future__ import annotations

from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError

from .manifest import verify

PATTERNS = ["train-*", "validation-*", "index.json", "manifest.json", "README.md"]


def publish(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Uploads shards, index, manifest and card as the data set `repo_id`; returns the address of the commit.

    What the Hub has already is not sent again, so after a connection that broke the same call goes on. Shards that are
    on the Hub and no longer here are removed there, in the same commit.

    Raises:
        ValueError: for shards that are not what the index says, or a name that cannot be.
        RuntimeError: when the Hub refuses, or cannot be reached.
    """
    if wrong := verify(folder):
        raise ValueError(f"{folder} is not pushed: {' '.join(wrong[:5])}")
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=PATTERNS,
            delete_patterns=PATTERNS[:2],
            commit_message="Upload shards with training.corpus",
        )
    except HFValidationError as error:
        raise ValueError(f"shards.push_to_hub is {repo_id!r}: {error}") from None
    except (
        httpx.HTTPError,
        OSError,
        RuntimeError,
    ) as error:  # of HTTP; of files and sockets; of huggingface_hub itself
        said = str(error).replace(get_token() or "\0", "(token)")  # a server may repeat what it was sent
        raise RuntimeError(f"The Hub did not take {repo_id}: {said} Run the stage again to go on.") from None
    return str(commit.commit_url)
