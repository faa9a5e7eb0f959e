"""What the benchmark of the corpus calls a mistake, by hand."""

from __future__ import annotations

from benchmarks.corpus import mistakes
from tests.training.corpus.messy import KEPT, Expected

LOST = ("duplicate", "near_duplicate")


def expected(id: str, outcomes: tuple[str, ...], twins: str = "") -> Expected:
    return Expected(id, "s", "en", id, "", None, "a text", outcomes, twins)


TRUTH = [
    expected("good", (KEPT,)),
    expected("short", ("short_text",)),
    expected("copy", LOST, "dog"),
    expected("dog", (KEPT,), "dog"),
    expected("cat 1", (KEPT, *LOST), "cat"),
    expected("cat 2", (KEPT, *LOST), "cat"),
]
RIGHT = {"good": KEPT, "short": "short_text", "copy": "duplicate", "dog": KEPT, "cat 1": KEPT, "cat 2": "duplicate"}


def test_no_mistake():
    found = mistakes(TRUTH, RIGHT)
    assert (found["should_go"], found["should_stay"]) == (2, 2)
    assert found["stayed_and_should_not"] == found["went_and_should_not"] == {}


def test_every_mistake():
    wrong = {"good": "duplicate", "short": KEPT, "copy": KEPT, "cat 2": KEPT}
    found = mistakes(TRUTH, RIGHT | wrong)
    assert found["went_and_should_not"] == {"duplicate": 1}
    # Both dogs, of which one is a copy, and both cats, of which either may.
    assert found["stayed_and_should_not"] == {"short_text": 1, "a twin": 2}


def test_all_of_some_twins_lost():
    found = mistakes(TRUTH, RIGHT | {"cat 1": "duplicate"})
    assert found["went_and_should_not"] == {"duplicate": 1} and found["stayed_and_should_not"] == {}
