"""The scenes data set: world, drawing, captions, tasks, files. scene_parser.py reads back what the captions say."""

from __future__ import annotations

import io
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.training.scene_parser import ZH, ZH_WORD, Said, Statement, parse_chinese, parse_english
from training import scenes
from training.scene_captions import (
    Facts,
    Phrase,
    chinese,
    chinese_phrase,
    english,
    english_phrase,
    first,
    full_facts,
    holds,
    join_chinese,
    join_english,
    plural,
)
from training.scene_families import FAMILY_SIZE, sample_family
from training.scene_tasks import build_task
from training.scene_world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    OPPOSITE,
    SHAPES,
    SIZES,
    TEXTURES,
    Kind,
    Scene,
    SceneObject,
    draw_scene,
    relation_between,
    sample_scene,
)
from training.scenes import ScenesConfig, write_scenes

SMALL = ScenesConfig(twins=100, train=300, validation=40, test=150, task_size=60, workers=1)


def thing(shape: str, colour: str, x: float, y: float, size: str = "small", texture: str = "solid") -> SceneObject:
    return SceneObject(Kind(shape, colour, size, texture), x, y)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(path, SMALL)
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[dict]]:
    """All rows of the splits and the tasks."""
    files = {split: folder / f"{split}-00000-of-00001.parquet" for split in scenes.SPLITS}
    files |= {
        task: folder / "tasks" / f"{task}.parquet" for task in ("attribute", "counting", "combination", "spatial")
    }
    return {name: pq.read_table(path).to_pylist() for name, path in files.items()}


# ---------------------------------------------------------------------------------------------------------------- world


def cie_lab(rgb: tuple[int, int, int]) -> np.ndarray:
    """sRGB to CIE 1976 L*a*b*, D65."""
    channel = np.array(rgb) / 255
    linear = np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(matrix @ linear / [0.95047, 1, 1.08883])  # none of our colours is in the linear foot
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_are_far_apart() -> None:
    for a, b in combinations([*COLOURS.values(), *BACKGROUNDS.values()], 2):
        both_backgrounds = {a, b} <= set(BACKGROUNDS.values())
        assert np.linalg.norm(cie_lab(a) - cie_lab(b)) >= (14 if both_backgrounds else 25), (a, b)


def test_size_of_the_world() -> None:
    assert (len(SHAPES), len(COLOURS), len(SIZES), len(TEXTURES), len(BACKGROUNDS)) == (8, 10, 3, 4, 5)


def test_held_out_pairs_leave_every_colour_and_shape_in_training() -> None:
    assert len(set(HELD_OUT_PAIRS)) == 16
    assert set(Counter(shape for _, shape in HELD_OUT_PAIRS).values()) == {2}
    by_colour = Counter(colour for colour, _ in HELD_OUT_PAIRS)
    assert set(by_colour) == set(COLOURS) and max(by_colour.values()) == 2


@pytest.mark.parametrize("unseen", [False, True])
def test_sampled_scenes(unseen: bool) -> None:
    sampled = [sample_scene(random.Random(i), unseen=unseen) for i in range(600)]
    for scene in sampled:
        assert 1 <= len(scene.objects) <= 4
        pairs = {(item.kind.colour, item.kind.shape) for item in scene.objects}
        assert len(pairs) == len(scene.groups)
        assert bool(pairs & set(HELD_OUT_PAIRS)) == unseen
        for item in scene.objects:
            assert min(item.box) >= 0.0159 and max(item.box) <= 0.9841
        for a, b in combinations([item.box for item in scene.objects], 2):
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= 0.0299  # 2 pixels at 64
    kinds = [kind for scene in sampled for kind in scene.groups]
    assert {kind.shape for kind in kinds} == set(SHAPES) and {kind.colour for kind in kinds} == set(COLOURS)
    assert {(kind.size, kind.texture) for kind in kinds} == {(size, texture) for size in SIZES for texture in TEXTURES}
    assert {scene.background for scene in sampled} == set(BACKGROUNDS)
    assert {len(items) for scene in sampled for items in scene.groups.values()} == {1, 2, 3, 4}
    relations = Counter(relation_between(*s.groups.values()) for s in sampled if len(s.groups) == 2)
    assert min(relations[name] for name in ("left", "right", "above", "below")) >= 30


def test_relation_between() -> None:
    middle = [thing("square", "red", 0.5, 0.5)]
    assert relation_between([thing("circle", "blue", 0.2, 0.5)], middle) == "left"
    assert relation_between(middle, [thing("circle", "blue", 0.2, 0.5)]) == "right"
    assert relation_between([thing("circle", "blue", 0.55, 0.2)], middle) == "above"
    assert relation_between(middle, [thing("circle", "blue", 0.55, 0.2)]) == "below"
    assert relation_between([thing("circle", "blue", 0.2, 0.2)], middle) is None  # diagonal: left as well as above
    two = [thing("star", "green", 0.2, 0.4), thing("star", "green", 0.2, 0.7)]
    assert relation_between(two, middle) == "left"
    assert relation_between([two[0], thing("star", "green", 0.8, 0.5)], middle) is None  # one on each side
    # A small square is 0.11 * 0.88 = 0.0968 to each side: a gap of 0.04 is enough, one of 0.02 is not.
    assert relation_between([thing("square", "blue", 0.5 - 2 * 0.0968 - 0.04, 0.5)], middle) == "left"
    assert relation_between([thing("square", "blue", 0.5 - 2 * 0.0968 - 0.02, 0.5)], middle) is None


def test_scene_json_round_trip() -> None:
    scene = sample_scene(random.Random(3))
    assert Scene.from_json(scene.to_json()) == scene


# -------------------------------------------------------------------------------------------------------------- drawing

# Points in and out of each shape, in its bounding box from (-1, -1) to (1, 1), by eye from what the shape is.
INSIDE = {
    "circle": [(0, 0), (0.6, 0.6), (-0.6, 0.6)],
    "square": [(0, 0), (0.8, 0.8), (-0.8, -0.8), (0.8, -0.8)],
    "triangle": [(0, 0), (0.75, 0.8), (-0.75, 0.8), (0, -0.6)],
    "star": [(0, 0), (0, -0.7), (0.7, -0.12), (-0.7, -0.12)],
    "heart": [(0, 0), (0.5, -0.6), (-0.5, -0.6), (0, 0.7)],
    "diamond": [(0, 0), (0, 0.7), (0.7, 0), (0, -0.7)],
    "cross": [(0, 0), (0.8, 0), (-0.8, 0), (0, 0.8), (0, -0.8)],
    "crescent": [(-0.6, 0), (-0.3, 0.7), (-0.3, -0.7)],
}
OUTSIDE = {
    "circle": [(0.9, 0.9), (-0.9, -0.9)],
    "square": [],
    "triangle": [(0.7, -0.7), (-0.7, -0.7)],
    "star": [(0, 0.85), (0.8, 0.5), (-0.6, -0.8)],
    "heart": [(0, -0.95), (0.85, 0.85), (-0.85, 0.85)],
    "diamond": [(0.7, 0.7), (-0.7, 0.7), (0.7, -0.7)],
    "cross": [(0.75, 0.75), (-0.75, 0.75), (0.75, -0.75)],
    "crescent": [(0.8, 0), (0.5, 0), (-0.9, -0.9)],
}


def pixel(image: Image.Image, item: SceneObject, point: tuple[float, float]) -> np.ndarray:
    left, top, right, bottom = item.box
    x = (left + right) / 2 + point[0] * (right - left) / 2
    y = (top + bottom) / 2 + point[1] * (bottom - top) / 2
    return np.array(image.getpixel((int(x * image.width), int(y * image.height))))


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_and_colour_are_drawn_where_the_scene_says(shape: str) -> None:
    item = thing(shape, "blue", 0.36, 0.58, size="large")
    for size in (64, 224):
        image = draw_scene(Scene("white", (item,)), size)
        assert image.size == (size, size) and image.mode == "RGB"
        for point in INSIDE[shape]:
            assert tuple(pixel(image, item, point)) == (25, 65, 205), point
        for point in OUTSIDE[shape]:
            assert tuple(pixel(image, item, point)) == (255, 255, 255), point


def test_every_solid_object_of_random_scenes_has_its_colour_and_nothing_is_drawn_elsewhere() -> None:
    for seed in range(150):
        scene = sample_scene(random.Random(seed))
        image = draw_scene(scene, 64)
        left_over = np.abs(np.asarray(image).astype(int) - BACKGROUNDS[scene.background]).max(axis=2) > 12
        for item in scene.objects:
            if item.kind.texture == "solid":
                assert tuple(pixel(image, item, INSIDE[item.kind.shape][0])) == COLOURS[item.kind.colour]
            left, top, right, bottom = (value * 64 for value in item.box)
            box = (slice(int(top - 0.5), math.ceil(bottom + 0.5)), slice(int(left - 0.5), math.ceil(right + 0.5)))
            assert left_over[box].any()
            left_over[box] = False
        assert not left_over.any()


@pytest.mark.parametrize(("size", "width"), [("small", 14.1), ("medium", 20.5), ("large", 27.5)])
def test_sizes_in_pixels(size: str, width: float) -> None:
    """A circle is 2 * radius * 64 pixels wide."""
    image = np.asarray(draw_scene(Scene("white", (thing("circle", "black", 0.5, 0.5, size),)), 64))
    coverage = (255 - image[:, :, 0].astype(float)) / 230
    assert coverage[32].sum() == pytest.approx(width, abs=0.6)
    assert coverage.sum() == pytest.approx(math.pi * (width / 2) ** 2, rel=0.06)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_textures_look_different(shape: str, size: str) -> None:
    """Share of the solid object's pixels that have the colour, the ink or the background in each texture."""
    images = {t: draw_scene(Scene("grey", (thing(shape, "red", 0.5, 0.5, size, t),)), 128) for t in TEXTURES}
    pixels = {texture: np.asarray(image).astype(int) for texture, image in images.items()}

    def share(texture: str, colour: tuple[int, int, int]) -> float:
        return (np.abs(pixels[texture] - colour).max(axis=2) < 60).sum() / area

    area = (np.abs(pixels["solid"] - (215, 25, 30)).max(axis=2) < 60).sum()
    for texture in ("striped", "dotted"):
        assert share(texture, (215, 25, 30)) > 0.4 and share(texture, (255, 255, 255)) > 0.06
    assert 0.2 < share("hollow", (215, 25, 30)) < 0.9
    assert np.abs(pixels["striped"] - pixels["dotted"]).max(axis=2).astype(bool).sum() > 0.2 * area
    if shape != "crescent":  # the middle of a crescent's box lies on its edge
        assert tuple(pixels["hollow"][64, 64]) == (200, 200, 200)


# -------------------------------------------------------------------------------------------------------------- wording


def test_holds() -> None:
    scene = Scene(
        "beige",
        (
            thing("star", "red", 0.2, 0.4, texture="striped"),
            thing("star", "red", 0.2, 0.7, texture="striped"),
            thing("circle", "red", 0.7, 0.5, size="large"),
        ),
    )
    stars, circle = Phrase(2, "star", "red"), Phrase(1, "circle")
    assert holds(Facts((stars, circle), "left", "beige"), scene)
    assert holds(Facts((circle, stars), "right"), scene)
    assert holds(Facts((Phrase(3),)), scene) and holds(Facts((Phrase(3, colour="red"),)), scene)
    assert not holds(Facts((stars, circle), "right"), scene)
    assert not holds(Facts((stars, circle), "above"), scene)
    assert not holds(Facts((stars,), None, "white"), scene)
    assert not holds(Facts((Phrase(1, "star"),)), scene)  # number words are exact
    assert not holds(Facts((Phrase(2, "star", "red", texture="dotted"),)), scene)
    assert not holds(Facts((Phrase(2, "star"), Phrase(2, colour="red", texture="striped"))), scene)  # the same two


@pytest.mark.parametrize(
    ("phrase", "en", "zh"),
    [
        (Phrase(1, "star", "orange"), "an orange star", "一个橙色星星"),
        (Phrase(1, "star", "red"), "a red star", "一个红色星星"),
        (Phrase(2, "cross", "blue"), "two blue crosses", "两个蓝色十字"),
        (Phrase(3, "square", "pink", "small"), "three small pink squares", "三个粉色小正方形"),
        (Phrase(4, "heart", "black", "large", "striped"), "four large striped black hearts", "四个黑色条纹大爱心"),
        (Phrase(1, "diamond", "brown", "medium"), "a medium-sized brown diamond", "一个中等大小的棕色菱形"),
        (Phrase(1, "crescent", None, None, "hollow"), "a hollow crescent", "一个空心月牙"),
        (Phrase(2, None, "cyan"), "two cyan shapes", "两个青色图形"),
        (Phrase(1), "a shape", "一个图形"),
    ],
)
def test_standard_wording(phrase: Phrase, en: str, zh: str) -> None:
    assert english_phrase(phrase, first) == en
    assert chinese_phrase(phrase, first) == zh


def wordings(write: Callable[..., str], facts: Facts, counting: bool = False) -> set[str]:
    return {write(facts, random.Random(seed), counting=counting) for seed in range(4000)}


def test_wordings_of_one_object() -> None:
    facts = Facts((Phrase(1, "star", "orange", "small", "hollow"),), None, "light blue")
    assert {
        "There is a small hollow orange star on a light blue background.",
        "a little outlined orange star against a light blue background",
        "On a light blue background there is a little hollow orange star.",
    } <= wordings(english, facts)
    assert {"浅蓝色背景上有一颗橙色空心小星星", "一颗小号空心的橘色五角星，背景是浅蓝色"} <= wordings(chinese, facts)
    assert "an outlined star" in wordings(english, Facts((Phrase(1, "star", None, None, "hollow"),)))


def test_wordings_of_a_relation() -> None:
    facts = Facts((Phrase(2, "cross", "red"), Phrase(1, "circle", "blue")), "above")
    assert {
        "two red crosses above a blue circle",
        "There are two red crosses above a blue circle.",
        "The two red plus signs are above the blue circle.",
        "The blue circle is below the two red crosses.",
        "Above a blue circle there are two red crosses.",
        "a blue circle with two red crosses above it",
        "two red crosses with a blue circle beneath them",
    } <= wordings(english, facts)
    assert {
        "两个红色十字在蓝色圆形的上方",
        "蓝色圆形的上方有两个红色十字",
        "一个蓝色圆形位于两个红色十字下方",
        "两个红色十字下面是一个蓝色的圆圈",
    } <= wordings(chinese, facts)


def test_wordings_of_numbers() -> None:
    facts = Facts((Phrase(3, "diamond"), Phrase(1, "heart")))
    assert {
        "three diamonds and one heart",
        "There is one heart and three rhombuses.",
        "There are exactly three diamonds and one heart.",
        "I can count one heart and three diamonds.",
    } <= wordings(english, facts, counting=True)
    assert {"一共有三个菱形和一颗爱心", "正好有一个心形和三个菱形", "数一数，有三个菱形和一个爱心"} <= wordings(
        chinese, facts, counting=True
    )


def test_lists_and_plurals() -> None:
    assert [join_english(["a"]), join_english(["a", "b"]), join_english(["a", "b", "c"])] == [
        "a",
        "a and b",
        "a, b and c",
    ]
    assert [join_chinese(["甲"]), join_chinese(["甲", "乙"]), join_chinese(["甲", "乙", "丙"])] == [
        "甲",
        "甲和乙",
        "甲、乙和丙",
    ]
    assert [plural(noun) for noun in ("star", "cross", "rhombus", "crescent moon")] == [
        "stars",
        "crosses",
        "rhombuses",
        "crescent moons",
    ]


# ------------------------------------------------------------------------------------------------------------- captions


def says(statement: Statement, scene: Scene) -> bool:
    """Whether what the parser read is true of the scene."""
    phrases = list(statement.phrases)
    if statement.relation is None:
        return holds(Facts(tuple(Phrase(*p) for p in phrases), None, statement.background), scene)
    a, relation, b = statement.relation
    return holds(Facts((Phrase(*a), Phrase(*b)), relation, statement.background), scene)


def full_description(statement: Statement) -> tuple[frozenset[Said], tuple | None]:
    """What a full description means: of medium size and solid where it says nothing. Without the background."""

    def complete(said: Said) -> Said:
        return said._replace(size=said.size or "medium", texture=said.texture or "solid")

    relation = statement.relation
    if relation is not None:
        relation = (complete(relation[0]), relation[1], complete(relation[2]))
    return frozenset(map(complete, statement.phrases)), relation


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_every_caption_is_true_and_the_languages_agree(rows: dict[str, list[dict]], split: str) -> None:
    for row in rows[split]:
        scene = Scene.from_json(row["scene"])
        assert len(row["captions_en"]) == len(row["captions_zh"]) == 6
        assert len(set(row["captions_en"])) == len(set(row["captions_zh"])) == 6
        for text_en, text_zh in zip(row["captions_en"], row["captions_zh"], strict=True):
            statement = parse_english(text_en)
            assert statement == parse_chinese(text_zh), (text_en, text_zh)
            assert says(statement, scene), (text_en, row["scene"])
            assert len(text_en.split()) <= 30 and len(text_zh) <= 46


def test_first_two_captions_are_full_and_fit_one_test_image_only(rows: dict[str, list[dict]]) -> None:
    descriptions = []
    for row in rows["test"]:
        scene = Scene.from_json(row["scene"])
        groups = {
            Said(len(items), kind.shape, kind.colour, kind.size, kind.texture): items
            for kind, items in scene.groups.items()
        }
        (phrases, relation), again = (full_description(parse_english(text)) for text in row["captions_en"][:2])
        assert (phrases, relation) == again
        assert phrases == set(groups)
        expected = relation_between(*groups.values()) if len(groups) == 2 else None
        assert (relation is None) == (expected is None)
        descriptions.append((phrases, relation))
    assert len(set(descriptions)) == len(descriptions) == SMALL.test


def test_captions_but_the_last_are_full_and_the_last_is_of_every_sort(rows: dict[str, list[dict]]) -> None:
    last: Counter[str] = Counter()
    for row in rows["train"]:
        kinds = set(Scene.from_json(row["scene"]).groups)
        for text in row["captions_en"][:-1]:
            assert len(parse_english(text).phrases) == len(kinds)
        statement = parse_english(row["captions_en"][-1])
        looks = any(p.size or p.texture for p in statement.phrases)
        last["relation" if statement.relation else "looks" if looks else "other"] += 1
    assert all(last[sort] >= 0.1 * SMALL.train for sort in ("relation", "looks", "other")), last


def test_a_family_shares_background_colours_and_numbers() -> None:
    turned = 0
    for seed in range(40):
        family = sample_family(random.Random(seed))
        assert len({full_facts(scene) for scene in family}) == len(family) == FAMILY_SIZE
        assert len({scene.background for scene in family}) == 1
        assert len({tuple(sorted((k.colour, len(v)) for k, v in scene.groups.items())) for scene in family}) == 1
        for a, b in zip(family[::2], family[1::2], strict=True):
            facts_a, facts_b = full_facts(a), full_facts(b)
            if facts_a.relation is not None:
                assert facts_b == replace(facts_a, relation=OPPOSITE[facts_a.relation])
                turned += 1
    assert turned >= 20


def test_twins_differ_in_the_relation_alone(rows: dict[str, list[dict]]) -> None:
    ordered = Counter()
    order = list(COLOURS)
    for one, other in zip(rows["twins"][::2], rows["twins"][1::2], strict=True):
        a, b = (Scene.from_json(row["scene"]) for row in (one, other))
        assert a.background == b.background and [o.kind for o in a.objects] == [o.kind for o in b.objects]
        facts = full_facts(a)
        assert facts.relation and full_facts(b) == replace(facts, relation=OPPOSITE[facts.relation])
        for text in one["captions_en"] + other["captions_en"]:
            statement = parse_english(text)
            assert not any(p.shape or p.size or p.texture for p in statement.phrases)
            a, relation, b = statement.relation
            of_first = relation if order.index(a.colour) < order.index(b.colour) else OPPOSITE[relation]
            ordered[of_first in text.lower().replace("under", "below").replace("beneath", "below")] += 1
    assert 0.7 < ordered[True] / ordered.total() < 0.8  # told in the order of the colours: a half, and half of the rest


def test_splits_and_held_out_pairs(rows: dict[str, list[dict]]) -> None:
    for split in scenes.SPLITS:
        assert [row["image_id"] for row in rows[split]] == [f"{split}-{i:06d}" for i in range(getattr(SMALL, split))]
        for row in rows[split]:
            objects = json.loads(row["scene"])["objects"]
            unseen = {(o["colour"], o["shape"]) for o in objects} & set(HELD_OUT_PAIRS)
            assert bool(unseen) == (split == "test")


# ---------------------------------------------------------------------------------------------------------------- tasks


def differing(a: list[str], b: list[str]) -> list[tuple[str, str]]:
    assert len(a) == len(b), (a, b)
    return [(x, y) for x, y in zip(a, b, strict=True) if x != y]


def english_words(text: str) -> list[str]:
    """Words without what must follow a changed word: the form of the article, the plural of the noun."""
    words = re.findall(r"[a-z-]+", text.lower())
    return ["a" if word == "an" else re.sub("(?<=cross)es$|(?<=[^s])s$", "", word) for word in words]


def chinese_words(text: str) -> list[str]:
    return re.findall(rf"{ZH_WORD}|左边|右边|上方|下方|.", text)


@pytest.mark.parametrize("task", ["attribute", "counting", "combination", "spatial"])
def test_tasks_have_one_true_candidate_and_differ_by_one_word(rows: dict[str, list[dict]], task: str) -> None:
    test_rows = {row["image_id"]: row for row in rows["test"]}
    assert len(rows[task]) == len({(row["image_id"], row["factor"]) for row in rows[task]}) == SMALL.task_size
    for row in rows[task]:
        source = test_rows[row["image_id"]]
        assert row["image"] == source["image"]
        scene = Scene.from_json(source["scene"])
        statements = [parse_english(text) for text in row["candidates_en"]]
        assert statements == [parse_chinese(text) for text in row["candidates_zh"]]
        assert [says(s, scene) for s in statements] == [i == row["label"] for i in range(len(statements))], row
        assert len(statements) == (4 if task == "counting" else 2)
        for split in (english_words, chinese_words):
            texts = [split(text) for text in row["candidates_en" if split is english_words else "candidates_zh"]]
            for text in texts:
                assert len(differing(text, texts[row["label"]])) == (text is not texts[row["label"]]), texts


def test_attribute_negatives_match_nothing_in_the_scene(rows: dict[str, list[dict]]) -> None:
    scenes_by_id = {row["image_id"]: Scene.from_json(row["scene"]) for row in rows["test"]}
    for row in rows["attribute"]:
        scene = scenes_by_id[row["image_id"]]
        (wrong,) = parse_english(row["candidates_en"][1 - row["label"]]).phrases
        (right,) = parse_english(row["candidates_en"][row["label"]]).phrases
        assert getattr(wrong, row["factor"]) != getattr(right, row["factor"])
        assert all(
            any(
                value is not None and value != getattr(item.kind, name)
                for name, value in wrong._asdict().items()
                if name != "count"
            )
            for item in scene.objects
        )
        if row["factor"] in ("colour", "shape"):
            assert getattr(wrong, row["factor"]) not in {getattr(item.kind, row["factor"]) for item in scene.objects}


def test_combination_negatives_use_words_of_other_objects(rows: dict[str, list[dict]]) -> None:
    scenes_by_id = {row["image_id"]: Scene.from_json(row["scene"]) for row in rows["test"]}
    for row in rows["combination"]:
        right, wrong = (parse_english(row["candidates_en"][i]).phrases for i in (row["label"], 1 - row["label"]))
        assert len(right) == (2 if row["factor"].endswith("of two") else 1)
        ((changed,), (true,)) = wrong - right, right - wrong
        attribute = row["factor"].split()[0]
        assert getattr(changed, attribute) != getattr(true, attribute)
        kinds = list(scenes_by_id[row["image_id"]].groups)
        assert getattr(changed, attribute) in {getattr(kind, attribute) for kind in kinds}
        assert (changed.colour, changed.shape) not in {(kind.colour, kind.shape) for kind in kinds}


def test_tasks_are_balanced(rows: dict[str, list[dict]]) -> None:
    for task in ("attribute", "counting", "combination", "spatial"):
        candidates = 4 if task == "counting" else 2
        labels = Counter(row["label"] for row in rows[task])
        assert labels == dict.fromkeys(range(candidates), SMALL.task_size // candidates)
    for task in ("attribute", "combination"):
        assert set(Counter(row["factor"] for row in rows[task]).values()) == {15}
    truths = [row["candidates_en"][row["label"]].lower() for row in rows["counting"]]
    assert Counter(re.search("one|two|three|four", text)[0] for text in truths) == dict.fromkeys(
        ("one", "two", "three", "four"), 15
    )
    truths = [row["candidates_en"][row["label"]] for row in rows["spatial"]]
    assert Counter(re.search("left|right|above|below", text)[0] for text in truths) == dict.fromkeys(
        ("left", "right", "above", "below"), 15
    )


def test_a_task_by_hand() -> None:
    """A scene with one object allows a colour, a shape, a size and a texture question, and nothing to combine."""
    scene = Scene("white", (thing("star", "orange", 0.5, 0.5, size="large"),))
    task = build_task("attribute", [scene], 4, random.Random(0))
    assert {row.factor for row in task} == {"colour", "shape", "size", "texture"}
    (size,) = [row for row in task if row.factor == "size"]
    assert size.candidates_en[size.label].rstrip(".").endswith("a large orange star")
    assert size.candidates_en[1 - size.label].rstrip(".").endswith("a small orange star")
    assert "橙色小星星" in size.candidates_zh[1 - size.label]
    with pytest.raises(ValueError, match="allow only 0 questions for the task 'combination', not 1"):
        build_task("combination", [scene], 1, random.Random(0))


# ---------------------------------------------------------------------------------------------------------------- files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    sizes = {"twins": 3, "train": 260, "validation": 2, "test": 30, "task_size": 8}  # 260: two jobs
    for name, settings in {"one": {"workers": 1}, "two": {"workers": 2}, "other": {"workers": 1, "seed": 1}}.items():
        write_scenes(tmp_path / name, ScenesConfig(**sizes, **settings))
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_version_3_is_what_it_was() -> None:
    """Fails if the scenes or words of a seed change: then raise scenes.VERSION and these lines."""
    assert scenes.VERSION == 3
    table = scenes._split_table([scenes.SceneId("test", 4)], seed=0, image_size=64)
    (row,) = table.to_pylist()
    hearts = [thing("heart", "purple", x, y, size="medium") for x, y in ((0.7946, 0.2737), (0.7675, 0.8052))]
    star = thing("star", "cyan", 0.2913, 0.5186, size="large")
    assert Scene.from_json(row["scene"]) == Scene("white", (*hearts, star))
    assert row["captions_en"][2] == "a large cyan star to the left of two purple hearts"
    assert row["captions_zh"][2] == "大号青色星星右侧是两颗紫色的爱心"


def test_datasets_loads_splits_and_tasks(folder: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {
        "twins": 100,
        "train": 300,
        "validation": 40,
        "test": 150,
    }
    assert loaded["test"].features == scenes.SPLIT_FEATURES
    image = loaded["test"][0]["image"]
    assert image.size == (64, 64) and image.mode == "RGB"
    scene = Scene.from_json(loaded["test"][0]["scene"])
    assert image.tobytes() == draw_scene(scene, 64).tobytes()
    for task in ("attribute", "counting", "combination", "spatial"):
        loaded = datasets.load_dataset(str(folder), task, cache_dir=str(tmp_path))
        assert list(loaded) == ["test"] and len(loaded["test"]) == 60
        assert loaded["test"].features == scenes.TASK_FEATURES
        assert isinstance(loaded["test"][0]["image"], Image.Image)


def test_files_and_manifest(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "manifest.json",
        "tasks",
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
        "twins-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"] == {
        "twins": 100,
        "train": 300,
        "validation": 40,
        "test": 150,
        "task_size": 60,
        "image_size": 64,
        "seed": 0,
    }
    assert [(pair["colour"], pair["shape"]) for pair in manifest["held_out_pairs"]] == list(HELD_OUT_PAIRS)
    assert manifest["vocabulary"]["shape"]["star"] == {"en": "star", "zh": "星星"}
    assert {len(values) for values in manifest["vocabulary"].values()} == {8, 10, 3, 4, 5}
    for attribute, words in ZH.items():
        assert all(
            words[names["zh"]] == value
            for value, names in manifest["vocabulary"][attribute].items()
            if value != "medium"
        )
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "--twins 100 --train 300 --validation 40 --test 150 --task-size 60 --image-size 64 --seed 0" in card


def test_many_rows_make_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "ROWS_PER_JOB", 5)
    monkeypatch.setattr(scenes, "ROWS_PER_FILE", 10)
    write_scenes(tmp_path / "s", ScenesConfig(twins=2, train=23, validation=1, test=10, task_size=5, workers=1))
    files = [tmp_path / "s" / f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert [pq.read_metadata(path).num_rows for path in files] == [10, 10, 3]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("settings", [{"train": 0}, {"validation": -1}, {"test": 0}, {"task_size": 0}, {"workers": 0}])
def test_impossible_numbers_are_refused(settings: dict[str, int]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be at least 1"):
        ScenesConfig(**settings)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size is 32, but must be at least 48"):
        ScenesConfig(image_size=32)


def test_existing_data_is_never_overwritten(tmp_path: Path) -> None:
    tiny = ScenesConfig(twins=2, train=1, validation=1, test=10, task_size=2, workers=1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(ValueError, match="not an empty folder"):
            write_scenes(tmp_path / name, tiny)
    (tmp_path / "empty").mkdir()
    write_scenes(tmp_path / "empty", tiny)
    assert (tmp_path / "empty" / "README.md").exists()


def test_more_questions_than_the_scenes_allow(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the 3 test scenes allow only .* not 500: lower task_size or raise test"):
        write_scenes(tmp_path / "s", ScenesConfig(twins=2, train=1, validation=1, test=3, workers=1))
    assert list(tmp_path.iterdir()) == []


def test_test_scenes_must_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always = sample_scene(random.Random(0), unseen=True)
    monkeypatch.setattr(scenes, "sample_scene", lambda rng, unseen: always)
    with pytest.raises(ValueError, match="only 1 test scenes with different descriptions: test is 5"):
        write_scenes(tmp_path / "s", ScenesConfig(twins=2, train=1, validation=1, test=5, task_size=1, workers=1))


def test_test_scenes_with_a_duplicate_are_drawn_again() -> None:
    ids = list(scenes._distinct_test_ids(ScenesConfig(test=900)))
    assert any(scene_id.attempt for scene_id in ids)
    assert len({full_facts(scene_id.scene(0)) for scene_id in ids}) == 900


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        assert any(path.suffix == ".parquet" for path in tmp_path.rglob("*"))  # it had written something
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "_task_table", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "s", ScenesConfig(twins=2, train=3, validation=1, test=10, task_size=2, workers=1))
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path) -> None:
    sizes = "--train 3 --validation 2 --test 20 --task-size 4 --image-size 48 --seed 5 --workers 1"
    command = [sys.executable, "-m", "training.scenes", str(tmp_path / "s"), *sizes.split()]
    subprocess.run(command, check=True, capture_output=True)
    table = pq.read_table(tmp_path / "s" / "test-00000-of-00001.parquet")
    assert len(table) == 20
    assert Image.open(io.BytesIO(table["image"][0].as_py()["bytes"])).size == (48, 48)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ") and "not an empty folder" in again.stderr
