"""Measure a bilingual image-text encoder, or look at what it finds.

    python -m eval run --model DIR --scenes SCENES_DIR --output OUT_DIR
    python -m eval picture --model DIR --data FILES --query "a red star" --query 一颗红色的星星 --output found.png

docs/evaluation.md says what is measured and how.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import datasets
import transformers
import tyro

from .data import open_table
from .embed import Encoder
from .models import load_model
from .picture import retrieval_picture
from .results import Benchmark, format_table, write_results
from .retrieval import score_retrieval
from .scenes import score_scenes
from .zero_shot import score_zero_shot


@dataclass(frozen=True)
class Run:
    """Score a model on one or more benchmarks: prints a table and writes OUTPUT/results.json."""

    model: str
    """A folder that from_pretrained loads."""
    output: str
    """The folder for results.json."""
    scenes: str | None = None
    """A folder written by `python -m training.scenes`: its test split and its fine-grained tasks."""
    retrieval: tuple[str, ...] = ()
    """Parquet files, globs or folders that make up one retrieval benchmark."""
    captions: tuple[str, ...] = ("zh=caption_zh", "en=caption_en")
    """The caption column of each language, for --retrieval; it holds a caption or a list of captions."""
    zero_shot: str | None = None
    """A parquet file, glob or folder with an integer label column."""
    classes: str | None = None
    """The YAML file of class names and prompt templates, for --zero-shot (see eval/zero_shot.py)."""
    image_column: str = "image"
    """The image column, for --retrieval and --zero-shot."""
    limit: int | None = None
    """Use only so many rows of each data set, evenly spaced."""
    batch_size: int = 128

    def __call__(self) -> None:
        captions = parse_captions(self.captions)
        if not (self.scenes or self.retrieval or self.zero_shot):
            raise ValueError("Nothing to run: give --scenes, --retrieval or --zero-shot.")
        if bool(self.zero_shot) != bool(self.classes):
            raise ValueError("--zero-shot and --classes belong together: give both or neither.")
        encoder = _encoder(self.model, self.batch_size)
        benchmarks: list[Benchmark] = []
        if self.scenes:
            benchmarks += score_scenes(encoder, self.scenes, limit=self.limit)
        if self.retrieval:
            scored = score_retrieval(
                encoder, self.retrieval, captions=captions, image_column=self.image_column, limit=self.limit
            )
            benchmarks.append(scored)
        if self.zero_shot and self.classes:
            scored = score_zero_shot(
                encoder, self.zero_shot, self.classes, image_column=self.image_column, limit=self.limit
            )
            benchmarks.append(scored)
        path = Path(self.output) / "results.json"
        write_results(path, benchmarks, model=encoder.model, model_path=self.model)
        print(f"{format_table(benchmarks)}\n\nwritten to {path}")


@dataclass(frozen=True)
class Picture:
    """Draw what a model finds for some queries: one row per query, its best images and their scores."""

    model: str
    """A folder that from_pretrained loads."""
    data: str
    """A parquet file, glob or folder; of a scenes folder the test split."""
    query: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A query in any language; may be repeated."""
    output: str
    """The picture to write: .png, .pdf or .svg."""
    image_column: str = "image"
    top: int = 5
    """Images per query."""
    limit: int | None = None
    """Search only so many images, evenly spaced."""
    batch_size: int = 128

    def __call__(self) -> None:
        data = Path(self.data)
        source = data / "test-*.parquet" if (data / "manifest.json").is_file() else data
        table = open_table([source]).limited(self.limit)
        encoder = _encoder(self.model, self.batch_size)
        title = f"{len(table):,} images of {data.name}, searched by {Path(self.model).resolve().name}"
        retrieval_picture(
            encoder, table, self.query, self.output, image_column=self.image_column, top=self.top, title=title
        )
        print(f"written to {self.output}")


def parse_captions(pairs: Sequence[str]) -> dict[str, str]:
    """("en=caption_en", "zh=caption_zh") -> {"en": "caption_en", "zh": "caption_zh"}.

    Raises:
        ValueError: for an entry of another form, or a language given twice.
    """
    captions: dict[str, str] = {}
    for pair in pairs:
        language, found, column = pair.partition("=")
        if not (language and found and column) or language in captions:
            raise ValueError(
                f"--captions takes one LANGUAGE=COLUMN per language, e.g. zh=caption_zh, not {' '.join(pairs)}."
            )
        captions[language] = column
    return captions


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; user mistakes end it with one line instead of a traceback."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    commands = {"run": Run, "picture": Picture}
    title = (__doc__ or "").partition("\n")[0]
    command = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="python -m eval", description=title)
    try:
        command()
    except ValueError as error:
        sys.exit(f"error: {error}")


def _encoder(model: str, batch_size: int) -> Encoder:
    return Encoder(*load_model(model), batch_size=batch_size, progress=sys.stderr.isatty())


if __name__ == "__main__":
    main()
