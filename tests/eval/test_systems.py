"""The systems of the comparison: complete, consistent with the tasks, and resolved by name."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from eval import models
from eval.systems import systems
from eval.tasks import FOLDER


def test_every_system_that_the_issue_names_is_there():
    """Runnable or not; of which those that cannot be run say why."""
    names = " ".join(systems())
    runnable = [
        "CLIP-0.4B",
        "OpenCLIP",
        "EVA-CLIP",
        "AltCLIP",
        "CN-CLIP",
        "FLAVA",
        "ALIGN",
        "CoCa",
        "SigLIP",
        "MetaCLIP-2",
    ]
    for name in runnable:
        assert any(found.startswith(name) and system.model for found, system in systems().items()), name
    for name in "BriVL Taiyi Wukong Taisu R2D2 ERNIE-ViL FILIP Florence LiT BASIC BEiT-3 UMG-CLIP".split():
        assert name in names
        (system,) = (system for found, system in systems().items() if found.startswith(name))
        assert system.published_only and not system.model
    assert all(set(system.languages) <= {"zh", "en"} and system.languages for system in systems().values())


def test_each_says_where_the_paper_has_it_and_what_runs_it():
    for system in systems().values():
        assert set(system.tables) <= {1, 2, 3, 4, 5} and (system.in_paper or not system.tables)
        assert (system.adapter is None) == (system.published_only is not None)
    assert systems()["CLIP-0.4B"].where == "Table 3, 4" and systems()["MetaCLIP-2"].where == "later"
    assert systems()["UMG-CLIP"].where == "one of Tables 1 to 5"
    adapters = {name: system.adapter for name, system in systems().items()}
    assert adapters["CoCa"] == "open_clip" and adapters["FLAVA"] == "transformers" and adapters["BASIC"] is None
    assert adapters["M2-Encoder-1B"] == "ours, after conversion"


def test_revisions_are_commits():
    for system in systems().values():
        assert system.revision is None or re.fullmatch("[0-9a-f]{40}", system.revision)


def test_published_numbers_of_tasks_belong_to_a_system():
    for path in FOLDER.glob("*.yaml"):
        for number in yaml.safe_load(path.read_text(encoding="utf-8")).get("published") or ():
            assert number["system"] in systems(), (path.name, number)


def test_a_name_leads_to_its_model(monkeypatch):
    asked = []

    def from_pretrained(name: str, **options: Any) -> None:
        asked.append((name, options["revision"]))
        raise OSError("offline")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="kakaobrain/align-base cannot be loaded"):
        models.load("ALIGN")
    with pytest.raises(ValueError, match="kakaobrain/align-base cannot be loaded"):
        models.load("ALIGN", revision="main")
    with pytest.raises(ValueError, match="org/name cannot be loaded: OSError: offline"):
        models.load("org/name@v1.0")
    assert asked == [
        ("kakaobrain/align-base", "e96a37facc7b1f59090ece82293226b817afd6ba"),
        ("kakaobrain/align-base", "main"),
        ("org/name", "v1.0"),
    ]
    monkeypatch.setattr("eval.open_clip_adapter.load_open_clip", lambda name, **_: SimpleNamespace(name=name))
    assert models.load("OpenCLIP-1.3B").name == "ViT-g-14/laion2b_s34b_b88k"


def test_names_that_cannot_be_loaded_say_why():
    with pytest.raises(ValueError, match="Wukong cannot be run: its weights are for MindSpore. Reports show"):
        models.load("Wukong")
    with pytest.raises(ValueError, match="M2-Encoder-1B is published as m2_encoder_1B.ckpt.*conversion.convert"):
        models.load("M2-Encoder-1B")
