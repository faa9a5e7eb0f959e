"""The corpus file: every mistake in it is a message that names the place, and none becomes a default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from training.corpus.__main__ import main
from training.corpus.clean import CleanSettings
from training.corpus.config import build, load_config
from training.corpus.sources import SourcesSettings

GOOD = """
output: {output}
seed: 3
executor: {{kind: local, workers: 2}}
sources:
  list:
    - {{name: a, adapter: parquet, files: [a.parquet], language: en}}
clean: {{min_characters: {{zh: 2}}}}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "corpus.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_becomes_settings(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, GOOD.format(output=tmp_path / "out")))
    assert (config.output, config.seed, config.executor.workers) == (tmp_path / "out", 3, 2)
    assert config.has("clean") and not config.has("score")
    assert config.section("clean", CleanSettings).min_characters == {"zh": 2}
    (source,) = config.section("sources", SourcesSettings).list
    assert (source.name, source.files, source.priority, source.published.text) == ("a", ("a.parquet",), 0, "text")


@pytest.mark.parametrize(
    "text, said",
    [
        ("- a list", "expected a mapping"),
        ("output: [", "not a readable corpus file"),
        ("seed: 1", "`output`"),
        ("output: x\nseed: -1", "`seed`"),
        ("output: x\nseed: true", "`seed`"),
        ("output: x\ncleen: {}", "unknown sections ['cleen']"),
        ("output: x\nexecutor: {workers: 0}", "executor.workers"),
        ("output: x\nexecutor: {kind: mpi}", "executor.kind"),
        ("output: x\nexecutor: {wrokers: 2}", "wrokers"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError) as failure:
        load_config(written(tmp_path, text))
    assert said in str(failure.value)


@pytest.mark.parametrize(
    "section, said",
    [
        ("sources: {list: []}", "sources.list is empty"),
        ("sources: {}", "['list'] must be set"),
        ("sources: {list: [{name: a, adapter: parquet, files: [x]}]}", "neither `language`"),
        ("sources: {list: [{name: a, adapter: parquet, files: [x], language: de}]}", "'de'"),
        ("sources: {list: [{name: a/b, adapter: wukong, files: [x]}]}", "'a/b'"),
        ("sources: {list: [{name: a, adapter: laion, files: [x]}]}", "sources.list[0].adapter"),
        (
            "sources: {list: [{name: a, adapter: wukong, files: [x]}, {name: a, adapter: zero, files: [y]}]}",
            "['a'] more than once",
        ),
        ("sources: {rows_per_part: 0, list: [{name: a, adapter: wukong, files: [x]}]}", "rows_per_part"),
        ("clean: {max_aspect_ratio: 0.5}", "max_aspect_ratio"),
        ("clean: {min_characters: {de: 3}}", "['de']"),
        ("clean: {min_characters: 5}", "clean.min_characters"),
        ("clean: {wrong_language: keep}", "clean.wrong_language"),
        ("clean: {max_pixels: many}", "clean.max_pixels"),
    ],
)
def test_mistakes_in_sections(tmp_path: Path, section: str, said: str) -> None:
    config = load_config(written(tmp_path, f"output: {tmp_path / 'out'}\n{section}"))
    kinds = {"sources": SourcesSettings, "clean": CleanSettings}
    name = section.partition(":")[0]
    with pytest.raises(ValueError) as failure:
        config.section(name, kinds[name])
    assert said in str(failure.value)


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    inner: Inner | None = None
    ratio: float = 1.0
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    path: Path | None = None
    limits: dict[str, int] = field(default_factory=dict)


def test_values_are_built_by_their_types() -> None:
    values = {"inner": {"size": 1}, "ratio": 2, "kind": "b", "names": ["x"], "path": "p", "limits": {"en": 5}}
    assert build(Outer, values, "o") == Outer(Inner(1), 2.0, "b", ("x",), Path("p"), {"en": 5})
    assert build(Outer, {"inner": None}, "o") == Outer()


@pytest.mark.parametrize(
    "values, said",
    [
        ({"inner": {"size": True}}, "o.inner.size is True; expected int"),
        ({"inner": {}}, "o.inner: ['size'] must be set"),
        ({"ratio": "2"}, "o.ratio is '2'; expected float"),
        ({"kind": "c"}, "o.kind is 'c'; expected one of ['a', 'b']"),
        ({"names": "x"}, "o.names is 'x'"),
        ({"limits": {"en": "5"}}, "o.limits.en is '5'; expected int"),
        ({"more": 1}, "unknown settings ['more']"),
    ],
)
def test_values_of_other_types(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as failure:
        build(Outer, values, "o")
    assert said in str(failure.value)


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(written(tmp_path, GOOD.format(output=tmp_path / "out")))
    for arguments, said in [
        (["sources", "--config", str(tmp_path / "none.yaml")], "not a readable corpus file"),
        (["score", "--config", config], "no section `score`"),
        (["sources", "--config", config], "no file matches 'a.parquet'"),
        (["clean", "--config", config], "no report.json"),
        (["sources", "--config", config, "--workers", "0"], "executor.workers is 0"),
    ]:
        with pytest.raises(SystemExit) as failure:
            main(arguments)
        assert failure.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was begun
