"""Data are held against their task file: counts, captions, revision."""

from __future__ import annotations

import pytest

from eval.data import local_revision
from eval.retrieval import read_captioned
from eval.tasks import Columns, Data, Expected, Task, load_task
from eval.verify import captions_checksum, check_captioned, check_revision, record, require

PINNED = "a" * 40
NOTHING = Expected()


def task(expected: Expected = NOTHING, **data) -> Task:
    columns = Columns(captions={"en": "text"}, image_id="image_id")
    return Task("mine", "Mine", "retrieval", "p", Data("parquet", "*.parquet", **data), columns, expected=expected)


@pytest.fixture
def file(write):
    return write("d/a.parquet", ["red", "blue"], text=[["a", "b"], ["c"]], image_id=["r", "b"])


def findings(task_, source):
    return {finding.what: finding.level for finding in check_captioned(task_, read_captioned(task_, source))}


def test_counts_and_checksums(file):
    checksum = captions_checksum([["a", "b"], ["c"]])
    right = task(Expected(images=2, texts={"en": 3}, sha256={"en": checksum}))
    assert set(findings(right, file).values()) == {"ok"}
    unknown = findings(task(), file)
    assert unknown["2 images; how many there should be is not recorded"] == "warning"
    assert unknown[f"no checksum is recorded for the en captions; --write records theirs: {checksum}"] == "warning"
    wrong = task(Expected(images=3, texts={"en": 5}, sha256={"en": "0" * 64}))
    with pytest.raises(ValueError, match="not those of the task mine: 3 images expected, 2 seen; 5 en texts expected, 3 seen; the en captions have the checksum"):  # fmt: skip  # noqa: E501
        require(wrong, check_captioned(wrong, read_captioned(wrong, file)))


def test_the_checksum_knows_images_apart_but_not_their_order():
    first = captions_checksum([["a", "b"], ["c"]])
    assert captions_checksum([["c"], ["a", "b"]]) == first
    for other in ([["b", "a"], ["c"]], [["a"], ["b", "c"]], [["a", "b", "c"]], [["a", "b"], ["c "]]):
        assert captions_checksum(other) != first


def test_a_changed_revision_is_wrong(file, tmp_path):
    """The commit as `hf download --local-dir` notes it, and as the Hub's cache has it in its paths."""
    pinned = task(id="org/name", revision=PINNED)
    assert check_revision(pinned, read_captioned(pinned, file).table).level == "warning"
    notes = tmp_path / "d" / ".cache" / "huggingface" / "download" / "a.parquet.metadata"
    notes.parent.mkdir(parents=True)
    notes.write_text(f"{PINNED}\netag\n1.0\n")
    assert check_revision(pinned, read_captioned(pinned, tmp_path / "d").table).level == "ok"
    notes.write_text(f"{'b' * 40}\netag\n1.0\n")
    table = read_captioned(pinned, tmp_path / "d").table
    with pytest.raises(ValueError, match=f"the data are at revision {'b' * 40}, the task pins {PINNED}"):
        require(pinned, [check_revision(pinned, table)])
    unpinned = check_revision(task(id="org/name"), table)  # nothing is pinned, and that is said
    assert unpinned.level == "warning" and str(unpinned).startswith("warning: revision not pinned: org/name may change")
    assert str(unpinned).endswith(f"to pin what is here: data.revision: {'b' * 40}")
    assert local_revision([f"/x/snapshots/{PINNED}/data/a.parquet"]) == PINNED
    assert local_revision(["/x/a.parquet"]) is None


def test_what_was_seen_is_recorded_in_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (
        "# a comment that stays\nname: mine\ntitle: Mine\nkind: retrieval\nprotocol: p\ndata: {format: parquet}\n"
        "columns: {captions: {en: text}}\nexpected:\n  images: 1\n  texts: {en: 1}\nnotes: [kept]\n"
    )
    for before in (text, text.replace("expected:\n  images: 1\n  texts: {en: 1}\n", "")):
        path.write_text(before)
        record(path, 2, {"en": 3}, {"en": "f" * 64})
        assert load_task(path).expected == Expected(images=2, texts={"en": 3}, sha256={"en": "f" * 64})
        assert load_task(path).notes == ("kept",) and path.read_text().startswith("# a comment that stays")


def test_flickr8k_cn_is_what_its_task_file_says(shared):
    """The real file: 1,000 images, five captions in either language, and the captions themselves."""
    flickr8k = load_task("flickr8k-cn")
    levels = findings(flickr8k, shared / "data" / "flickr8k_cn_val.parquet")
    assert set(levels.values()) == {"ok"} and "1,000 images" in levels
