"""Measure bilingual image-text encoders, or look at what one finds.

    python -m eval run --models A,B --tasks all --data-dir DATA --output OUT_DIR
    python -m eval verify --tasks flickr8k-cn --data flickr8k-cn=PATH
    python -m eval build coco-mcc --sources annotations=instances_val2014.json ... --output DIR
    python -m eval report OUT_DIR
    python -m eval compare A B --output OUT_DIR
    python -m eval picture --model DIR --data FILES --query "a red star" --query 一颗红色的星星 --output found.png

docs/evaluation.md says what is measured and how. Nothing heavy is imported here: a run whose work is all done ends in a
second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .run import Settings, run
from .tasks import Columns, Data, Task, load_task, select_tasks, task_files


@dataclass(frozen=True)
class Run:
    """Score models on tasks: prints a table and writes OUTPUT/results.json. Finished work is kept, so the same command
    goes on where it was interrupted; what fails is reported, the rest is done, and the exit status is 1."""

    models: Annotated[str, tyro.conf.arg(aliases=["--model"])]
    """One or more, with commas between: names of eval/systems.yaml, folders that from_pretrained loads, Hub ids,
    open_clip:ARCHITECTURE/WEIGHTS; or NAME=one of these."""
    output: str
    """The folder for the scores and results.json."""
    tasks: str | None = None
    """all, or names or YAML files with commas between: see eval/tasks."""
    data: tuple[str, ...] = ()
    """TASK=PATH for each task whose data lie on this machine: a file, a glob pattern or a folder."""
    data_dir: str | None = None
    """A folder of data folders called as the tasks."""
    scenes: str | None = None
    """A folder written by `python -m training.scenes`; short for --tasks scenes --data scenes=DIR."""
    retrieval: tuple[str, ...] = ()
    """Parquet files, globs or folders of your own that make up one retrieval benchmark."""
    captions: tuple[str, ...] = ("zh=caption_zh", "en=caption_en")
    """The caption column of each language, for --retrieval; it holds a caption or a list of captions."""
    zero_shot: str | None = None
    """A parquet file, glob or folder of your own with an integer label column."""
    classes: str | None = None
    """The YAML file of a classification task whose classes, templates and columns are used for --zero-shot."""
    image_column: str = "image"
    """The image column, for --retrieval."""
    limit: int | None = None
    """Use only so many rows of each data set, evenly spaced."""
    batch_size: int = 128
    cache: str | None = None
    """A folder of embeddings and finished scores, which runs may share; left out, embeddings go to
    OUTPUT/embeddings."""
    dtype: str = "float32"
    """Of the weights: float32, bfloat16 or float16. Scores are computed in fp32."""
    autocast: str | None = None
    """bfloat16 or float16 for mixed precision."""
    text_rule: str | None = None
    """What is done to texts instead of what the model's family does, e.g. "lower, straight quotes"."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""

    def __call__(self) -> None:
        tasks, sources = self._tasks()
        settings = Settings(
            sources,
            **{name: getattr(self, name) for name in (
                "data_dir", "limit", "batch_size", "cache", "dtype", "autocast", "text_rule", "trust_remote_code",
            )},
        )  # fmt: skip
        group = _processes()
        output = Path(self.output)
        failures = run(_listed(self.models), tasks, output, settings, group=group)
        if int(os.environ.get("RANK", 0)) == 0:
            from .report import results, write_results
            from .tables import markdown

            document = results(output, tasks)
            write_results(output, document)
            print(f"{markdown({**document, 'systems': ()})}\nwritten to {output / 'results.json'}")
        if group is not None:
            import torch.distributed as dist

            dist.destroy_process_group()
        if failures:
            work = len(_listed(self.models)) * len(tasks)
            sys.exit(f"error: {len(failures)} of {work} could not be done; the first: {failures[0].error}")

    def _tasks(self) -> tuple[list[Task], dict[str, object]]:
        """The tasks, and where their data lie."""
        sources: dict[str, object] = dict(parse_pairs("--data", "TASK=PATH", self.data))
        tasks = select_tasks(_listed(self.tasks)) if self.tasks else []
        if bool(self.zero_shot) != bool(self.classes):
            raise ValueError("--zero-shot and --classes belong together: give both or neither.")
        if self.scenes:
            tasks.append(load_task("scenes"))
            sources["scenes"] = self.scenes
        if self.retrieval:
            tasks.append(own_retrieval(self.retrieval, self.captions, self.image_column))
            sources[tasks[-1].name] = self.retrieval
        if self.zero_shot and self.classes:
            tasks.append(load_task(self.classes))
            sources[tasks[-1].name] = self.zero_shot
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is asked for twice: give --tasks or the short option, not both.")
        if not tasks:
            raise ValueError("Nothing to run: give --tasks, --scenes, --retrieval or --zero-shot.")
        return tasks, sources


@dataclass(frozen=True)
class Verify:
    """Check data before they are scored: columns, split, revision, counts, and checksums of the captions."""

    tasks: str
    """all, or names or YAML files with commas between."""
    data: tuple[str, ...] = ()
    """TASK=PATH for each task whose data lie on this machine."""
    data_dir: str | None = None
    """A folder of data folders called as the tasks."""
    write: bool = False
    """Record the counts and checksums that were seen in the task files of retrieval tasks."""

    def __call__(self) -> None:
        from .score import verify
        from .verify import captions_checksum, record

        settings = Settings(parse_pairs("--data", "TASK=PATH", self.data), self.data_dir)
        bad = 0
        for path in task_files(_listed(self.tasks)):
            task = load_task(path)
            print(task.name)
            try:
                findings, seen = verify(task, settings.source(task))
            except ValueError as error:
                print(f"  wrong: {error}")
                bad += 1
                continue
            print("\n".join(f"  {finding}" for finding in findings))
            bad += any(finding.level == "wrong" for finding in findings)
            if self.write and seen is not None:
                checksums = {name: captions_checksum(lists) for name, lists in seen.captions.items()}
                texts = {name: sum(map(len, lists)) for name, lists in seen.captions.items()}
                print(f"  recorded in {record(path, len(seen.table), texts, checksums)}")
        if bad:
            sys.exit(1)


@dataclass(frozen=True)
class Build:
    """Build a fine-grained set from public annotations, in Chinese and English."""

    name: tyro.conf.Positional[str]
    """coco-mcc, coco-count, vg-pos, hoi-pos, cub, dogs or cars."""
    output: str
    """The folder to write."""
    sources: tuple[str, ...]
    """ROLE=PATH for each file that the set is made from: docs/fine_grained.md lists them."""
    rule: str | None = None
    """One of the set's rules; left out, the first that gives the paper's counts, else the default."""
    seed: int = 0
    """For what a rule leaves open."""

    def __call__(self) -> None:
        from .build import build

        sources = parse_pairs("--sources", "ROLE=PATH", self.sources)
        manifest = build(self.name, sources, self.output, rule=self.rule, seed=self.seed)
        counts = ", ".join(f"{count:,} {what}" for what, count in manifest["counts"].items())
        print(f"{self.name}: {counts} (rule {manifest['rule']}), written to {self.output}")


@dataclass(frozen=True)
class Report:
    """Tables, plots, model-index and .eval_results from what `run` left in a folder."""

    output: tyro.conf.Positional[str]
    """The output folder of `run`."""

    def __call__(self) -> None:
        from .report import write_report

        for path in write_report(Path(self.output)):
            print(f"written to {path}")


@dataclass(frozen=True)
class Compare:
    """The difference of two models on the same images, with intervals and p-values."""

    first: tyro.conf.Positional[str]
    """A model that `run` scored; without --output, an output folder with the scores of one model."""
    second: tyro.conf.Positional[str]
    """The same, or a system of eval/systems.yaml: of one that was not run, the published numbers."""
    output: str | None = None
    """The output folder of `run` that holds the scores of both."""

    def __call__(self) -> None:
        from .compare import compare, comparison_table

        print(comparison_table(compare(None if self.output is None else Path(self.output), self.first, self.second)))


@dataclass(frozen=True)
class Picture:
    """Draw what a model finds for some queries: one row per query, its best images and their scores."""

    model: str
    """A folder that from_pretrained loads, or what `run` takes."""
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
        from .data import open_table
        from .embed import Encoder
        from .models import load
        from .picture import retrieval_picture
        from .run import quiet

        quiet()
        data = Path(self.data)
        source = data / "test-*.parquet" if (data / "manifest.json").is_file() else data
        table = open_table([source]).limited(self.limit)
        encoder = Encoder(load(self.model), batch_size=self.batch_size, progress=sys.stderr.isatty())
        title = f"{len(table):,} images of {data.name}, searched by {Path(self.model).resolve().name}"
        retrieval_picture(
            encoder, table, self.query, self.output, image_column=self.image_column, top=self.top, title=title
        )
        print(f"written to {self.output}")


def own_retrieval(files: Sequence[str], captions: Sequence[str], image_column: str) -> Task:
    """The task of some parquet files that no task file describes, called as the first of them."""
    columns = Columns(image_column, parse_pairs("--captions", "LANGUAGE=COLUMN", captions))
    name = Path(files[0]).stem.replace("*", "").strip("-_.") or "retrieval"
    return Task(name, name, "retrieval", "own/all-rows/any-hit/text-equal/fp32", Data("parquet"), columns, paired=True)


def parse_pairs(option: str, form: str, pairs: Sequence[str]) -> dict[str, str]:
    """("en=caption_en", "zh=caption_zh") -> {"en": "caption_en", "zh": "caption_zh"}.

    Raises:
        ValueError: for an entry of another form, or a name given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or name in found:
            raise ValueError(f"{option} takes one {form} for each name, not {' '.join(pairs)}.")
        found[name] = value
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; user mistakes end it with one line instead of a traceback."""
    commands = {
        "run": Run, "verify": Verify, "build": Build, "report": Report, "compare": Compare, "picture": Picture,
    }  # fmt: skip
    title = (__doc__ or "").partition("\n")[0]
    command = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="python -m eval", description=title)
    try:
        command()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: finished work is kept; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _processes():
    """All processes, where torchrun or accelerate started several; None for one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    import torch
    import torch.distributed as dist

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group()
    return dist.group.WORLD


if __name__ == "__main__":
    main()
