"""The Space's folder is one that the Hub takes, and needs nothing of this project."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "model_cards" / "space"
# What the Hub knows, from its documentation of Spaces' settings.
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def pinned(name: str) -> str:
    return re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]


def requirements() -> set[str]:
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")}


def test_the_front_matter_is_what_the_hub_reads():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["sdk"] == "gradio" and front["sdk_version"] == pinned("gradio")
    assert (SPACE / front["app_file"]).is_file()
    assert {front["colorFrom"], front["colorTo"]} <= COLOURS
    assert len(front["short_description"]) <= 60
    assert front["license"] == "apache-2.0" and isinstance(front["python_version"], str)
    for variable in ("MODEL", "DATA", "INDEX", "EXAMPLES"):
        assert f'environment("{variable}"' in (SPACE / "app.py").read_text(encoding="utf-8")
        assert f"`{variable}`" in text


def test_it_imports_what_its_requirements_name_and_itself():
    names = set()
    for file in SPACE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0  # app.py is run as a file
                names.add(node.module)
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    own = {file.stem for file in SPACE.glob("*.py")}
    given = requirements() - {"pillow"} | {"PIL", "gradio"}
    with_them = {"huggingface_hub"}  # transformers and gradio need it
    assert tops - own <= given | with_them
    assert given <= tops | {"gradio"}


def test_nothing_in_it_names_another_machine():
    """The page's own pieces: what gradio adds is watched in test_space_page.py."""
    for file in (*SPACE.glob("*.py"), SPACE / "style.css"):
        assert not re.search(r"https?://(?!127\.0\.0\.1)|@import|url\(", file.read_text(encoding="utf-8")), file
