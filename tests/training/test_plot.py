"""The picture of several runs' losses, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.plot import main, plot_runs, read_run


def write_run(folder: Path, losses: list[float], batch_size: int = 4, **parts: float) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": 10 * i, "samples": 10 * i * batch_size, "loss": loss, "loss_itc": loss, **parts}
        for i, loss in enumerate(losses, start=1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        return set(image.convert("RGB").get_flattened_data())


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two


def test_a_curve_is_the_log(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", [3.0, 2.5, 2.0], batch_size=4))
    assert run.curve("loss", "steps") == ([10, 20, 30], [3.0, 2.5, 2.0])
    assert run.curve("loss", "samples") == ([40, 80, 120], [3.0, 2.5, 2.0])
    assert run.curve("loss_cmlm", "steps") == ([], [])
    assert read_run(tmp_path / "a" / "log.jsonl") == run


def test_each_run_has_its_colour_and_each_loss_its_panel(tmp_path: Path):
    one = write_run(tmp_path / "one", [3.0, 2.0])
    two = write_run(tmp_path / "two", [3.5, 2.5], loss_cmlm=6.0, loss_cmim=1.0)
    plot_runs([one], tmp_path / "1.png")
    plot_runs([one, two], tmp_path / "2.png", x="samples")
    assert BLUE in colours(tmp_path / "1.png") and ORANGE not in colours(tmp_path / "1.png")
    assert {BLUE, ORANGE} <= colours(tmp_path / "2.png")
    with Image.open(tmp_path / "1.png") as narrow, Image.open(tmp_path / "2.png") as wide:
        assert wide.size == (4 * narrow.width, narrow.height)


def test_a_run_that_is_going_on(tmp_path: Path):
    """Its last line may be there in part; a single step is a point."""
    run = write_run(tmp_path / "a", [3.0])
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 20, "sam')
    assert read_run(run).curve("loss", "steps") == ([10], [3.0])
    plot_runs([run], tmp_path / "a.png")
    assert BLUE in colours(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "there is no file"),
        ("", "holds no step yet"),
        ('{"step": 1, "samples": 4, "lo', "holds no step yet"),
        ('nonsense\n{"step": 2, "samples": 8, "loss": 1.0}\n', "Line 1 of .* is not a log line"),
        ('{"step": 1}\n', "lack samples or loss"),
    ],
)
def test_what_is_no_run(tmp_path: Path, content: str | None, named: str, capsys: Any):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "log.jsonl").write_text(content)
    with pytest.raises(ValueError, match=named):
        plot_runs([run], tmp_path / "a.png")
    with pytest.raises(SystemExit, match=named):
        main((str(run),), output=str(tmp_path / "a.png"))
    assert not (tmp_path / "a.png").exists()


def test_what_is_no_picture(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one run"):
        plot_runs([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"must end in one of .*\.png"):
        plot_runs([write_run(tmp_path / "a", [1.0])], tmp_path / "a.gif7")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels: list[str] = []
    monkeypatch.setattr("training.plot._draw", lambda panel, runs, loss, x: labels.extend(run.name for run in runs))
    runs = [write_run(tmp_path / place / "run", [1.0]) for place in ("here", "there")]
    plot_runs(runs, tmp_path / "a.png")
    assert labels == [str(run) for run in runs]
