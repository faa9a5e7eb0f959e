"""What `python -m eval build` writes is what the task of that name reads, verifies and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.embed import Encoder
from eval.score import score_task, verify
from eval.tasks import load_task

NAMES = [f"COCO_val2014_{image:012d}.jpg" for image in (1, 3, 5)]


def test_a_built_set_is_scored(
    coco: dict[str, Path],
    pictures: Callable[[Sequence[str]], Path],
    colour_encoder: Encoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sources = [f"{role}={path}" for role, path in {**coco, "images": pictures(NAMES)}.items()]
    folder = tmp_path / "coco-mcc"
    main(["build", "coco-mcc", "--output", str(folder), "--sources", *sources])
    assert "coco-mcc: 3 images, 3 texts, 3 pairs" in capsys.readouterr().out
    findings, _ = verify(load_task("coco-mcc"), folder)
    assert {finding.level for finding in findings[:-1]} == {"ok"} and findings[-1].level == "warning"
    retrieval, choice = score_task(load_task("coco-mcc"), colour_encoder, folder)
    assert retrieval.counts == {"images": 3, "zh texts": 3, "en texts": 3}
    assert choice.name == "coco-mcc/choice" and 0 <= choice.metrics["accuracy"]["zh"].value <= 1
    with pytest.raises(ValueError, match="holds the set 'coco-mcc', not 'coco-count'"):
        score_task(load_task("coco-count"), colour_encoder, folder)
    main(["build", "coco-mcc", "--output", str(tmp_path / "bare"), "--sources", *sources[:-1]])
    with pytest.raises(ValueError, match="was built without images"):
        score_task(load_task("coco-mcc"), colour_encoder, tmp_path / "bare")
    with pytest.raises(SystemExit, match="error: "):
        main(["build", "coco-mcc", "--output", str(tmp_path / "x"), "--sources", "annotations=nowhere.json"])
