"""Loss curves of one or several runs on one picture.

    python -m training.plot runs/itc runs/grouped runs/gba --output curves.png --x samples

Reads the `log.jsonl` of each run, also of one that is still going on. Tested by `pytest tests/training/test_plot.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modeling_m2encoder.hub_folder import complete_or_absent

from .run_log import read_log

Axis = Literal["steps", "samples"]

# What is drawn, one panel each, of the losses that any of the runs has.
LOSSES = {
    "loss": "loss",
    "loss_itc": "contrastive loss (ITC)",
    "loss_cmlm": "masked language loss (CMLM)",
    "loss_cmim": "masked image loss (CMIM)",
}
_PANEL = (5.0, 3.6)  # inches
_DPI = 150


@dataclass(frozen=True)
class Run:
    """What a picture shows of one run."""

    name: str
    records: list[dict[str, Any]]
    """The lines of its log."""

    def curve(self, loss: str, x: Axis) -> tuple[list[int], list[float]]:
        """Where along x, and how high; empty if the run does not have this loss."""
        key = {"steps": "step", "samples": "samples"}[x]
        points = [(record[key], record[loss]) for record in self.records if loss in record]
        return [point[0] for point in points], [point[1] for point in points]


def read_run(path: str | Path) -> Run:
    """A run by its folder or its `log.jsonl`.

    Raises:
        ValueError: when there is no log, or nothing in it yet, or something else than a log.
    """
    path = Path(path)
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise ValueError(f"{path} is not a run: there is no file {log}.")
    records = read_log(log)
    if not records:
        raise ValueError(f"{log} holds no step yet.")
    if not all(isinstance(record.get(name), (int, float)) for record in records for name in ("samples", "loss")):
        raise ValueError(f"{log} is not the log of a run: its lines lack samples or loss.")
    return Run(log.parent.name if log.name == "log.jsonl" else log.stem, records)


def plot_runs(runs: Sequence[str | Path], output: str | Path, x: Axis = "steps") -> Path:
    """Draws every loss of the runs over the same axis; the picture replaces an older one of that name.

    Args:
        runs: folders of runs, or their logs.
        output: the picture; its ending says which kind (.png, .svg, .pdf).
        x: what to compare runs at: optimizer steps, or pairs seen.

    Raises:
        ValueError: for no run, one without a log, or an ending that is no kind of picture.
    """
    if not runs:
        raise ValueError("Name at least one run: a folder with a log.jsonl.")
    drawn = [read_run(run) for run in runs]
    if len({run.name for run in drawn}) < len(drawn):  # runs of the same name in different places
        drawn = [Run(str(path), run.records) for path, run in zip(runs, drawn, strict=True)]
    losses = [loss for loss in LOSSES if any(loss in run.records[0] for run in drawn)]
    if losses == ["loss", "loss_itc"]:  # one and the same
        losses = ["loss"]
    figure = Figure(figsize=(_PANEL[0] * len(losses), _PANEL[1]), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for panel, loss in zip(panels, losses, strict=True):
        _draw(panel, drawn, loss, x)
    output = Path(output)
    kinds = figure.canvas.get_supported_filetypes()
    if output.suffix.lstrip(".").lower() not in kinds:
        raise ValueError(f"{output} must end in one of {', '.join(f'.{kind}' for kind in sorted(kinds))}.")
    with complete_or_absent(output, replace=True) as written:
        figure.savefig(written, dpi=_DPI)
    return output


def _draw(panel: Axes, runs: Sequence[Run], loss: str, x: Axis) -> None:
    for number, run in enumerate(runs):
        positions, values = run.curve(loss, x)
        if positions:
            # The colour is the run's, in every panel. A single point makes no line.
            panel.plot(
                positions,
                values,
                label=run.name,
                color=f"C{number % 10}",
                linewidth=1.2,
                marker="o" if len(positions) == 1 else None,
            )
    panel.set_xlabel({"steps": "optimizer steps", "samples": "pairs seen"}[x])
    panel.set_ylabel(LOSSES[loss])
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def main(
    runs: tyro.conf.Positional[tuple[str, ...]],
    output: Annotated[str, tyro.conf.arg(aliases=("-o",))] = "curves.png",
    x: Axis = "steps",
) -> None:
    """Draws the loss curves of runs.

    Args:
        runs: Folders of runs, or their logs.
        output: The picture (.png, .svg, .pdf).
        x: Optimizer steps, or pairs seen.
    """
    try:
        print(plot_runs(runs, output, x))
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    tyro.cli(main, prog="training.plot")
