"""Which shards the names in a configuration stand for: paths, globs, folders, URLs, number ranges, Hub data sets.

Tested by `pytest tests/training/test_streams.py`.
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import fsspec

SUFFIXES = (".parquet", ".tar")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?/?")


def is_local_parquet(name: str) -> bool:
    """Whether a name, if it means anything, means local parquet files."""
    if "://" in name or _RANGE.search(name):
        return False
    path = Path(name)
    if path.is_dir():
        return not any(path.glob("*.tar"))
    return path.suffix != ".tar" and (path.suffix == ".parquet" or not _HUB_ID.fullmatch(name))


def resolve_shards(names: Iterable[str | Path]) -> list[str]:
    """The parquet and tar shards, each once, in the given order (globs and folders: sorted).

    A folder, here or remote, stands for its `train-*` shards if it has any, otherwise for all of its shards;
    sub-folders are not searched. A Hub id, or `hf://datasets/owner/name[@revision]`, stands for the train split as
    `datasets` finds it, at the commit of today. Explicit URLs are not looked up.

    Raises:
        ValueError: for a name that matches nothing or something else than shards, or for none at all.
    """
    found: dict[str, None] = {}
    for name in names:
        for pattern in expand_ranges(str(name)):
            found.update(dict.fromkeys(_shards_of(pattern)))
    if not found:
        raise ValueError("No data: give at least one parquet or tar file, glob, folder, URL or Hub data set.")
    return list(found)


def expand_ranges(name: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar: as long as the first number. Several ranges multiply."""
    parts = _RANGE.split(name)
    texts, numbers = (
        parts[::3],
        [
            [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
            for first, last in zip(parts[1::3], parts[2::3], strict=True)
        ],
    )
    return ["".join(itertools.chain(*zip(texts, (*chosen, ""), strict=True))) for chosen in itertools.product(*numbers)]


def kind_of(shard: str) -> str:
    """ "parquet" or "tar", by the name.

    Raises:
        ValueError: for anything else.
    """
    path = urlsplit(shard).path if "://" in shard else shard
    for suffix in SUFFIXES:
        if path.endswith(suffix):
            return suffix[1:]
    raise ValueError(f"A shard must be a .parquet or an (uncompressed) .tar file, got {shard!r}.")


def _shards_of(pattern: str) -> list[str]:
    if hub := _HUB_URL.fullmatch(pattern):
        return _hub_shards(hub[1], hub[2])
    path = Path(pattern)
    if "://" in pattern:
        shards = _remote_shards(pattern)
    elif path.is_dir():
        shards = _of_folder([str(file) for file in path.iterdir()])
    else:
        shards = [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
        if not shards and _HUB_ID.fullmatch(pattern) and path.suffix not in SUFFIXES:
            return _hub_shards(pattern, None)
    if not shards:
        raise ValueError(f"No parquet or tar shard matches {pattern!r} (seen from {Path.cwd()}).")
    for shard in shards:
        kind_of(shard)
    return shards


def _remote_shards(url: str) -> list[str]:
    magic = "*" in url or "[" in url
    if not magic and url.split("?")[0].endswith(SUFFIXES):
        return [url]
    try:
        fs, path = fsspec.core.url_to_fs(url)
        files = fs.glob(path) if magic else _of_folder(fs.ls(path, detail=False))
    except ImportError as error:
        raise ValueError(f"Reading {url} needs another package: {error}.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{url} cannot be listed ({type(error).__name__}: {error}): name its shards.") from error
    return sorted(fs.unstrip_protocol(file) for file in files)


def _of_folder(files: list[str]) -> list[str]:
    shards = sorted(file for file in files if file.endswith(SUFFIXES))
    return [shard for shard in shards if shard.rpartition("/")[2].startswith("train-")] or shards


def _hub_shards(name: str, revision: str | None) -> list[str]:
    try:
        builder = datasets.load_dataset_builder(name, revision=revision)
    except Exception as error:  # whatever the Hub, the network and a repository's settings can do
        raise ValueError(
            f"{name!r} is no local file, and no Hub data set that can be read ({type(error).__name__}: {error})."
        ) from error
    splits = builder.config.data_files or {}
    if "train" not in splits and len(splits) != 1:
        raise ValueError(f"Data set {name!r} has no train split but {', '.join(splits) or 'no files'}: name its files.")
    shards = [str(file) for file in splits.get("train", next(iter(splits.values())))]
    for shard in shards:
        kind_of(shard)
    return shards
