"""The README's Python snippets run as they stand, on a tiny checkpoint in the place of the quickstart's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_python_snippets_run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 2
    place = tmp_path / "runs" / "quickstart" / "nano"
    place.mkdir(parents=True)
    (place / "model").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in snippets:  # one after another, as a reader would type them
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["output"].text_embeds.shape[0] == 2


def test_commands_name_modules_and_settings_that_exist():
    from training.configs import PRESETS
    from training.pretrain import parse

    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md"))
    commands = re.findall(r"-m training\.pretrain ((?:\w+) --[^\n`…]*)", text.replace("\\\n", " "))
    assert commands
    for command in commands:
        arguments = [word.strip('"') for word in command.split()]
        if arguments[0] == "PRESET":
            continue
        assert arguments[0] in PRESETS
        parse(arguments)
