"""`python -m training.corpus STAGE --config FILE`: runs one stage, or `all` of those that the file has a section of."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys

from .config import STAGES, CorpusConfig, load_config
from .downloads import TO_DOWNLOAD


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; mistakes of the user end with their message and status 2, failed tasks with status 1."""
    parser = argparse.ArgumentParser(prog="python -m training.corpus", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all", "plan"], help="what to run")
    parser.add_argument("--config", required=True, help="the YAML file of the corpus; see docs/corpus.md")
    parser.add_argument("--executor", choices=["local", "ray", "slurm"], help="instead of the file's")
    parser.add_argument("--workers", type=int, help="instead of the file's")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        changes = {"kind": options.executor, "workers": options.workers}
        changes = {name: value for name, value in changes.items() if value is not None}
        config = dataclasses.replace(config, executor=dataclasses.replace(config.executor, **changes))
        for stage in _chosen(config, options.stage):
            report = importlib.import_module(f".{stage}", __package__).run(config)
            if report is None:  # `plan` has printed
                continue
            print(f"{stage}: " + ", ".join(f"{number:,} {what}" for what, number in report.counts.outcomes().items()))
            if report.counts.total(TO_DOWNLOAD):
                break  # the rest waits for the images
    except ValueError as error:
        sys.exit(_say(error, 2))
    except RuntimeError as error:
        sys.exit(_say(error, 1))


def _chosen(config: CorpusConfig, stage: str) -> list[str]:
    if stage == "all":
        return [name for name in STAGES if config.has(name)]
    if stage != "plan" and not config.has(stage):
        raise ValueError(f"The file has no section `{stage}`; it has {list(config.sections)}.")
    return [stage]


def _say(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
