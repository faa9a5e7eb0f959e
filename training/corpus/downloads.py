"""Sources of addresses: lists for img2dataset, which downloads the images in an environment of its own.

img2dataset is the complete downloader there is (hashes, robots headers, limits by shape), but it was last released in
August 2025 and pins pandas < 3, webdataset < 0.3 and opencv < 5: never in our environment, and run by hand, since it
talks to a million hosts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from .config import CorpusConfig
from .engine import Counts, Report, run_stage
from .entries import SourceSettings, rows_of
from .reading import Slice
from .rows import DROPPED, PartWriter, part_path

TO_DOWNLOAD = "to_download"
"""The outcome of a row that has an address and no image yet."""
LIST = pa.schema([(name, pa.string()) for name in ("url", "text", "image_id", "language", "licence")])


def command(folder: Path) -> str:
    """The command that downloads the list in `folder`/list into `folder`/images.

    `resize_mode keep_ratio` with `skip_reencode`: images are made smaller, never larger, and the others keep their
    bytes. X-Robots-Tag headers with one of the four directives are respected.
    """
    flags = {
        "url_list": folder / "list",
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "text",
        "save_additional_columns": json.dumps(["image_id", "language", "licence"]),
        "output_folder": folder / "images",
        "output_format": "parquet",
        "image_size": 512,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": 95,
        "max_aspect_ratio": 3,
        "max_image_area": 50_000_000,
        "compute_hash": "sha256",
        "disallowed_header_directives": json.dumps(["noai", "noimageai", "noindex", "noimageindex"]),
        "processes_count": 16,
        "thread_count": 64,
        "number_sample_per_shard": 10_000,
    }
    said = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())
    return f"uvx --python 3.11 img2dataset==1.47.0 {said}"


def run(config: CorpusConfig, sources: Sequence[tuple[SourceSettings, list[Slice]]]) -> Report:
    """Writes the list of each source that has only addresses and prints how to download it.

    Returns:
        A report whose rows are all "to_download", or lost. There is no report of the stage "sources" yet, which runs
        when every entry has `images`.
    """
    counts = Counts()
    for source, found in sources:
        folder = config.output / "downloads" / source.name
        known = {"source": source, "contents": source.fingerprint()}
        report = run_stage(
            config, f"downloads/{source.name}", len(found), ListTask(folder, source, tuple(found)), known
        )
        counts.update(report.counts)
        if not report.counts.total(TO_DOWNLOAD):
            print(f"{source.name}: no address to download, of {report.counts.outcomes()}.")
            continue
        print(
            f"{source.name}: {report.counts.total(TO_DOWNLOAD)} addresses to download. Run\n\n"
            f"    {command(folder)}\n\n"
            f"(or with pipx run instead of uvx), then add to the entry of {source.name}\n\n"
            f"    images: [{folder / 'images'}]\n\n"
            "and run the stage sources again.\n"
        )
    return Report("downloads", len(sources), counts, {}, "")


@dataclass(frozen=True)
class ListTask:
    """Writes the addresses of one slice."""

    folder: Path
    source: SourceSettings
    slices: tuple[Slice, ...]

    def __call__(self, number: int) -> Counts:
        counts = Counts()
        with (
            PartWriter(part_path(self.folder / "list", number), LIST) as kept,
            PartWriter(part_path(self.folder / "dropped", number), DROPPED) as dropped,
        ):
            for row, reason in rows_of(self.source, self.slices[number]):
                counts.add(self.source.name, row["language"], reason or TO_DOWNLOAD)
                if reason is None:
                    kept.write({name: row[name] for name in LIST.names})
                else:
                    dropped.write({**row, "reason": reason})
        return counts
