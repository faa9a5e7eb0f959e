"""What the project promises about itself: the wheel's contents, import directions, the Makefile's and README's
commands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"modeling_m2encoder", "conversion", "training", "eval", "model_cards"}
MAY_IMPORT = {
    "modeling_m2encoder": set(),
    "eval": {"modeling_m2encoder"},
    "conversion": {"modeling_m2encoder", "eval"},
    "training": {"modeling_m2encoder", "eval"},
    "model_cards": set(),
}


def test_the_wheel_holds_the_model_package_only(tmp_path: Path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("m2encoder-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"modeling_m2encoder", wheel.name.split("-py3")[0] + ".dist-info"}
    sources = {path.name for path in (ROOT / "modeling_m2encoder").glob("*.py")}
    assert {Path(name).name for name in names if name.startswith("modeling_m2encoder/")} == sources | {"py.typed"}


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_import_directions(package: str):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            used = {module.split(".")[0] for module in modules} & OURS
            assert used <= MAY_IMPORT[package] | {package}, f"{path.relative_to(ROOT)} imports {used}"
            if package == "modeling_m2encoder":
                assert not used, f"{path.name}: relative imports only, it is also the Hub's remote code"


def test_the_versions_that_are_tested_fit_the_versions_that_are_allowed():
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==2\.13\.0$", constraints, re.MULTILINE)


def test_ci_runs_the_readme_s_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make test" in readme and "make quickstart" in readme
