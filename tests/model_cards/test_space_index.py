"""The Space's index and encoder: exact results, kept on disk while nothing changes, and the model's own numbers."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import pipeline

from model_cards.space import search_index
from model_cards.space.encoder import Encoder, language, open_image, split_labels
from model_cards.space.search_index import DatasetImages, FolderImages, load_or_build, open_images
from tests.model_cards.conftest import encoded


class Grey:
    """Embeds an image as the direction of its grey level, and counts what it is asked for."""

    def __init__(self, fingerprint: str = "one"):
        self.name, self.fingerprint, self.asked, self.batches = "grey", fingerprint, 0, []

    def pixels(self, source) -> float:
        self.asked += 1
        if source == b"":
            raise ValueError("there is nothing")
        return float(source) if isinstance(source, int) else np.asarray(open_image(source)).mean()

    def images(self, levels) -> np.ndarray:
        self.batches.append(len(levels))
        angle = np.array(levels) / 255
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)


class Numbers:
    """Images that are only numbers."""

    def __init__(self, levels, fingerprint="numbers"):
        self.levels, self.name, self.fingerprint = levels, "numbers", fingerprint

    def __len__(self) -> int:
        return len(self.levels)

    def source(self, number: int):
        return self.levels[number]

    def label(self, number: int) -> str:
        return f"number {number}"


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, level in (("b.png", 200), ("a.PNG", 100), ("more/c.jpg", 30)):
        Image.new("L", (9, 9), level).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def query(level: float) -> np.ndarray:
    return np.array([np.cos(level / 255), np.sin(level / 255)])


def test_thousands_of_images_are_searched_exactly(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, 3000).tolist()
    encoder, seen = Grey(), []
    index = load_or_build(encoder, Numbers(levels), tmp_path, lambda done, total: seen.append((done, total)))
    assert max(encoder.batches) <= 64 and sum(encoder.batches) == 3000
    assert seen[-1] == (3000, 3000) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    found = index.search(query(76.9), 20)
    by_hand = sorted(range(3000), key=lambda number: (abs(levels[number] - 76.9), number))[:20]
    assert [levels[each.number] for each in found] == [levels[number] for number in by_hand]
    assert found[0].number == by_hand[0]  # of equals, the first
    assert found[0].cosine == pytest.approx(1, abs=1e-6) and found[-1].cosine <= found[0].cosine
    assert len(index.search(query(77), 9999)) == 3000


def test_kept_until_something_changes(photos, tmp_path):
    kept, encoder = tmp_path / "index", Grey()
    first = load_or_build(encoder, open_images(str(photos)), kept)
    assert encoder.asked == 3
    again = load_or_build(encoder, open_images(str(photos)), kept)
    assert encoder.asked == 3 and np.array_equal(first.embeddings, again.embeddings)
    Image.new("L", (9, 9), 90).save(photos / "b.png")
    os.utime(photos / "b.png", (1, 1))
    assert load_or_build(encoder, open_images(str(photos)), kept).search(query(90), 1)[0].cosine > 0.999
    assert encoder.asked == 6
    (photos / "a.PNG").unlink()
    assert len(load_or_build(encoder, open_images(str(photos)), kept).numbers) == 2
    other = Grey("another model")
    load_or_build(other, open_images(str(photos)), kept)
    assert other.asked == 2
    assert len(list(kept.iterdir())) == 1  # older ones are gone


def test_two_sets_are_kept_beside_each_other(photos, tmp_path):
    encoder = Grey()
    for images in (open_images(str(photos)), Numbers([1, 2])):
        load_or_build(encoder, images, tmp_path / "index")
    asked = encoder.asked
    load_or_build(encoder, open_images(str(photos)), tmp_path / "index")
    assert encoder.asked == asked


def test_bad_images_are_named_and_passed_over(photos, tmp_path):
    (photos / "0-broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (photos / "empty.jpg").touch()
    huge = bytearray(encoded(Image.new("L", (9, 9))))
    huge[16:24] = struct.pack(">II", 50_000, 50_000)
    (photos / "huge.png").write_bytes(huge)
    index = load_or_build(Grey(), open_images(str(photos)), tmp_path / "index")
    assert set(index.bad) == {"0-broken.png", "empty.jpg", "huge.png"}
    assert index.images.label(index.search(query(30), 1)[0].number) == "more/c.jpg"
    kept = load_or_build(Grey(), open_images(str(photos)), tmp_path / "index")
    assert kept.bad == index.bad and all(kept.bad.values())


def test_no_image_that_can_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"None of the 2 images of numbers can be read \(number 0: there is nothing"):
        load_or_build(Grey(), Numbers([b"", b""]), tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    encoder = Grey()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_build(encoder, Numbers([1, 2]), tmp_path, stop)
    assert list(tmp_path.iterdir()) == []
    load_or_build(encoder, Numbers([1, 2]), tmp_path)
    older = list(tmp_path.iterdir())

    def full(*arguments, **keywords) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(search_index, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        load_or_build(encoder, Numbers([1, 2, 3], "changed"), tmp_path)
    assert list(tmp_path.iterdir()) == older


@pytest.mark.parametrize("damage", [lambda content: content[:20], lambda content: b"", lambda content: b"{}" * 99])
def test_a_damaged_index_is_built_again(tmp_path, damage, capsys):
    encoder = Grey()
    load_or_build(encoder, Numbers([5, 6]), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert len(load_or_build(encoder, Numbers([5, 6]), tmp_path).numbers) == 2
    assert encoder.asked == 4 and "damaged" in capsys.readouterr().out


# ---- Sets of images --------------------------------------------------------------------------------------------------


def write_parquet(file: Path, levels: list[int], **columns) -> Path:
    rows = {"text": [str(level) for level in levels], "picture": [encoded(Image.new("L", (8, 8), i)) for i in levels]}
    file.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    rows["picture"] = [{"bytes": content, "path": None} for content in rows["picture"]]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_folder_in_the_order_of_names(photos):
    images = FolderImages(photos)
    assert [images.label(number) for number in range(len(images))] == ["a.PNG", "b.png", "more/c.jpg"]


def test_parquet_files(tmp_path):
    for number, levels in enumerate(([10, 20], [30])):
        write_parquet(tmp_path / "set" / f"test-{number}.parquet", levels)
    images = open_images(str(tmp_path / "set" / "test-*.parquet"))
    assert isinstance(images, DatasetImages) and len(images) == 3
    assert [np.asarray(open_image(images.source(number))).mean() for number in range(3)] == [10, 20, 30]
    assert images.label(2) == "row 2"
    assert open_images(str(tmp_path / "set" / "test-*.parquet")).fingerprint == images.fingerprint


def test_folders_of_the_same_name_are_not_confused(tmp_path):
    """`datasets.load_dataset(folder)` gives the first one's rows for the second one too (seen in datasets 5.2)."""
    first = open_images(str(write_parquet(tmp_path / "one" / "scenes" / "test.parquet", [10, 20])))
    second = open_images(str(write_parquet(tmp_path / "two" / "scenes" / "test.parquet", [30])))
    assert (len(first), len(second)) == (2, 1) and first.fingerprint != second.fingerprint


def test_what_cannot_be_opened_is_said(photos, tmp_path):
    with pytest.raises(ValueError, match="neither a folder, nor parquet files, nor a data set on the Hub"):
        open_images(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="No file matches"):
        open_images(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match="has no images"):
        (tmp_path / "nothing").mkdir()
        open_images(str(tmp_path / "nothing"))
    write_parquet(tmp_path / "nothing" / "a.parquet", [1])
    with pytest.raises(ValueError, match=r"its parquet files are .*nothing/\*.parquet"):
        open_images(str(tmp_path / "nothing"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="no column of images, only text"):
        open_images(str(tmp_path / "text.parquet"))
    with pytest.raises(ValueError, match="cannot be loaded from the Hub"):  # offline, as all tests are
        open_images("owner/photos:test")


def test_a_set_from_elsewhere_names_no_files_of_ours(photos, tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    cells = [{"bytes": None, "path": str(photos / "b.png")}, {"bytes": encoded(Image.new("L", (8, 8))), "path": "x"}]
    rows = datasets.Dataset.from_dict({"image": cells}, features=features)
    index = load_or_build(Grey(), DatasetImages("set", rows), tmp_path / "index")
    assert index.bad == {"row 0": "it names a file outside of the data set"}
    assert index.numbers.tolist() == [1]


# ---- The encoder -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(hub_folder) -> Encoder:
    return Encoder(str(hub_folder))


def test_embeddings_are_the_models(encoder, tiny_model, processor, images, captions):
    with torch.no_grad():
        expected = tiny_model(**processor(text=captions, images=images, return_tensors="pt"))
    assert encoder.texts(captions * 6)[:6] == pytest.approx(expected.text_embeds.numpy(), abs=1e-6)
    pixels = [encoder.pixels(encoded(image)) for image in images]
    assert encoder.images(pixels * 6)[-6:] == pytest.approx(expected.image_embeds.numpy(), abs=1e-6)


def test_scores_are_the_pipelines(encoder, hub_folder, images):
    classify = pipeline("zero-shot-image-classification", model=str(hub_folder))
    for labels, template in ((["红色的圆", "蓝色方块"], "一张{}的图片"), (["circle", "star", "x"], "a picture of {}")):
        reference = classify(images[0], candidate_labels=labels, hypothesis_template=template)
        scores = encoder.classify(encoded(images[0]), labels)
        assert [score.label for score in scores] == [each["label"] for each in reference]
        assert [score.probability for score in scores] == pytest.approx([r["score"] for r in reference], abs=1e-5)
        assert all(-1 <= score.cosine <= 1 for score in scores)


def test_each_label_in_the_template_of_its_language(encoder, images):
    scores = encoder.classify(encoded(images[0]), ["圆", "circle"], {"zh": "一个{}", "en": "one {}"})
    pixels = encoder.images([encoder.pixels(encoded(images[0]))])[0]
    cosines = {"圆": encoder.texts(["一个圆"])[0] @ pixels, "circle": encoder.texts(["one circle"])[0] @ pixels}
    assert {score.label: score.cosine for score in scores} == pytest.approx(cosines, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "templates", "words"),
    [
        ([], {"zh": "{}", "en": "{}"}, "at least one label"),
        (["a"] * 201, {"zh": "{}", "en": "{}"}, "201 labels"),
        (["a"], {"zh": "{}", "en": "none"}, "one place for the label"),
        (["a"], {"zh": "{:>99}", "en": "{}"}, "one place for the label"),
    ],
)
def test_labels_that_cannot_be_scored(encoder, images, labels, templates, words):
    with pytest.raises(ValueError, match=words):
        encoder.classify(encoded(images[0]), labels, templates)


def test_the_fingerprint_follows_the_files(encoder, hub_folder):
    before = encoder.fingerprint
    assert Encoder(str(hub_folder)).fingerprint == before
    state = (hub_folder / "model.safetensors").stat()
    os.utime(hub_folder / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert encoder.fingerprint != before


def test_photos_are_turned_upright(images):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(images[0].transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert open_image(turned).tobytes() == images[0].tobytes()


@pytest.mark.parametrize(
    "content", [b"", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", encoded(Image.new("L", (9, 9)))[:40]]
)
def test_what_is_no_picture(content, tmp_path):
    for source in (content, tmp_path / "file.png"):
        (tmp_path / "file.png").write_bytes(content)
        with pytest.raises(ValueError):
            open_image(source)


def test_languages_and_labels():
    assert [language(text) for text in ("红色", "red", "a 圆", "", "éà", "\U00020021")] == [
        "zh",
        "en",
        "zh",
        "en",
        "en",
        "zh",
    ]
    expected = ["红色的圆形", "a red circle", "猫", "狗"]
    assert split_labels(" 红色的圆形\uff0ca red circle, 猫\u3001狗\n猫,, ") == expected
    assert split_labels(" ,\uff0c ") == []


def test_the_published_numbers_are_the_measured_ones():
    root = Path(__file__).parents[2]
    text = (root / "docs" / "demo.md").read_text(encoding="utf-8")
    measured = json.loads((root / "benchmarks" / "demo_search.json").read_text(encoding="utf-8"))
    percent = measured["percent"]
    zh, en, chance = percent["zh"], percent["en"], percent["chance"]
    for name, by_chance in (("right_colour_in_first_12", "right_colour"), ("right_pair_in_first_12", "right_pair")):
        assert f"| {zh[name]} % | {en[name]} % | {chance[by_chance]} % |" in text
    assert f"| {zh['right_pair_is_first']} % | {en['right_pair_is_first']} % |" in text
    assert f"each of the {percent['pairs']} pairs" in text and f"{measured['images']:,} scenes" in text
