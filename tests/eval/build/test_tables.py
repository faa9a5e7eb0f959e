"""The tables are complete, say different things differently in both languages, and hold nothing odd."""

from __future__ import annotations

import re
from itertools import combinations, product
from pathlib import Path

import pytest

from eval.build import tables
from eval.build.phrases import (
    categories,
    category_counts,
    category_set,
    hico_verbs,
    interaction,
    relation,
    vg_nouns,
    vg_predicates,
    with_article,
)
from eval.build.tables import read_table

SIZES = {"coco_categories": 80, "vg_nouns": 150, "vg_predicates": 50, "cub_birds": 200, "stanford_dogs": 120}
SIZES |= {"stanford_cars": 196}
# CJK Unified Ideographs with extension A (䴙䴘, 䳭), and the interpunct of transcribed names.
CHINESE = r"[\u3400-\u4dbf\u4e00-\u9fff·]"
# Latin letters in Chinese names of cars: codes (M3, GT, SUV, 2500HD, C/V), and these words, which stay in Chinese.
CODE = re.compile(r"[A-Z0-9]+([-/.][A-Z0-9]+)*")
LATIN_WORDS = {"Type", "Type-S", "Vantage", "Virage", "Italia", "Terrain", "Metro", "Ascender", "xD", "Model"}
LATIN_WORDS |= {"smart", "fortwo"}


def distinct(values: list[str]) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    assert not twice


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_rows_and_distinct_names(name: str, size: int) -> None:
    rows = read_table(name)
    assert len(rows) == size
    for column in {"id", "name", "label", "predicate", "one", "many", "en", "zh"} & set(rows[0]):
        distinct([row[column] for row in rows])


@pytest.mark.parametrize("path", sorted(tables.FOLDER.glob("*.tsv")), ids=lambda path: path.stem)
def test_nothing_odd_in_any_file(path: Path) -> None:
    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text and not text.startswith("\ufeff")
    for row in read_table(path.stem):
        for column, cell in row.items():
            assert cell == cell.strip() and "  " not in cell and "\u3000" not in cell, row
            if column in ("zh", "measure", "wear", "ride"):
                # Apart from slots, and codes of cars, which have a test of their own.
                rest = re.sub(r"\{\w+\}", "", cell)
                if path.stem == "stanford_cars":
                    rest = re.sub(r"[A-Za-z0-9 /.-]", "", rest)
                assert re.fullmatch(f"{CHINESE}*", rest), row
            elif column not in ("label",):
                assert re.fullmatch(r"[A-Za-z0-9 '’*{}_ç-]*", cell), row
        required = [cell for column, cell in row.items() if column not in ("wear", "ride", "opposite")]
        assert all(required), row


def test_coco_categories_are_those_of_coco() -> None:
    rows = list(categories().values())
    numbers = [int(row["id"]) for row in rows]
    # COCO left these eleven of its 91 ids out.
    assert numbers == [n for n in range(1, 91) if n not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
    assert [row["name"] for row in rows][:5] == ["person", "bicycle", "car", "motorcycle", "airplane"]


@pytest.mark.parametrize(
    ("name", "two", "zh"),
    [
        ("person", "two people", "两个人"),
        ("bus", "two buses", "两辆公交车"),
        ("airplane", "two airplanes", "两架飞机"),
        ("sheep", "two sheep", "两只绵羊"),
        ("horse", "two horses", "两匹马"),
        ("cow", "two cows", "两头牛"),
        ("tie", "two ties", "两条领带"),
        ("skis", "two pairs of skis", "两副双板滑雪板"),
        ("snowboard", "two snowboards", "两块单板滑雪板"),
        ("knife", "two knives", "两把刀"),
        ("wine glass", "two wine glasses", "两只高脚杯"),
        ("broccoli", "two pieces of broccoli", "两颗西兰花"),
        ("couch", "two couches", "两张沙发"),
        ("mouse", "two computer mice", "两只鼠标"),
        ("toothbrush", "two toothbrushes", "两把牙刷"),
        ("scissors", "two pairs of scissors", "两把剪刀"),
        ("book", "two books", "两本书"),
        ("train", "two trains", "两列火车"),
        ("boat", "two boats", "两艘船"),
        ("cell phone", "two cell phones", "两部手机"),
    ],
)
def test_plurals_and_measure_words(name: str, two: str, zh: str) -> None:
    assert category_counts({name: 2}) == (f"a photo of {two}.", f"一张有{zh}的照片。")


def test_plurals_are_regular_but_for_those_we_know() -> None:
    for row in categories().values():
        one, many = row["one"], row["many"]
        if many not in {"people", "sheep", "knives", "computer mice"} and " of " not in one:
            assert many == one + ("es" if one.endswith(("s", "ch", "sh", "x")) else "s")


def test_articles() -> None:
    vowels = {row["one"] for row in categories().values() if with_article(row["one"]).startswith("an ")}
    assert vowels == {"airplane", "elephant", "umbrella", "apple", "orange", "oven"}
    assert with_article("European goldfinch") == "a European goldfinch"
    assert with_article("Eskimo dog") == "an Eskimo dog"


def test_every_pair_of_categories_gives_its_own_text() -> None:
    sets = [[name] for name in categories()] + [list(pair) for pair in combinations(categories(), 2)]
    texts = [category_set(names) for names in sets]
    assert len({en for en, _ in texts}) == len({zh for _, zh in texts}) == len(sets) == 80 + 80 * 79 // 2


def test_no_category_is_read_into_another() -> None:
    """Lists are told apart at their separators: no name holds one, and counts are read back from the text."""
    for row in categories().values():
        assert not re.search(r",| and ", row["one"] + "|" + row["many"])
        assert not re.search("[、和有]", row["zh"] + row["measure"])
    counted = [category_counts({name: count}) for name in categories() for count in range(1, 31)]
    assert len({en for en, _ in counted}) == len({zh for _, zh in counted}) == 80 * 30


def test_every_hico_verb_with_every_object_gives_its_own_text() -> None:
    assert len(hico_verbs()) == 116 and "no_interaction" not in hico_verbs()
    rows = read_table("hico_verbs")
    assert {row["object"] for row in rows} <= {"*", *categories()}
    for row in rows:
        assert row["en"].count("{o}") == row["zh"].count("{o}") == 1, row
    # HICO's own list of classes, without no_interaction.
    lines = Path(__file__).with_name("hico_pairs.tsv").read_text().splitlines()
    used = [(verb, line.partition("\t")[0]) for line in lines for verb in line.partition("\t")[2].split()]
    assert len(lines) == 80 and len(used) == 520 and {verb for verb, _ in used} == hico_verbs()
    texts = [interaction(verb, name) for verb, name in used]
    distinct([en for en, _ in texts])
    distinct([zh for _, zh in texts])
    # A row for one object that HICO does not have with this verb would be an error of typing.
    assert {(row["verb"], row["object"]) for row in rows if row["object"] != "*"} <= set(used)


def test_every_relation_of_the_vocabulary_gives_its_own_text() -> None:
    """All 150 x 50 x 150, in both languages: no two of the 1,125,000 are the same."""
    english: set[str] = set()
    chinese: set[str] = set()
    for words in product(vg_nouns(), vg_predicates(), vg_nouns()):
        en, zh = relation(*words)
        english.add(en)
        chinese.add(zh)
    assert len(english) == len(chinese) == 150 * 50 * 150


def test_predicates() -> None:
    rows = vg_predicates()
    for row in rows.values():
        assert "{s}" in row["zh"] and "{o}" in row["zh"]
        assert row["swap"] in ("yes", "no") and row["spatial"] in ("yes", "no")
        assert not row["opposite"] or row["opposite"] in rows
    # What reads the same from both sides must not be asked about.
    assert all(rows[name]["swap"] == "no" for name in ("and", "near", "with", "against"))


@pytest.mark.parametrize(
    ("words", "en", "zh"),
    [
        (("man", "wearing", "hat"), "a man wearing a hat", "男人戴着帽子"),
        (("man", "wearing", "shirt"), "a man wearing a shirt", "男人穿着衬衫"),
        (("man", "wears", "tie"), "a man wears a tie", "男人系领带"),
        (("woman", "wearing", "glass"), "a woman wearing glasses", "女人戴着眼镜"),
        (("man", "riding", "wave"), "a man riding a wave", "男人踏着海浪"),
        (("boy", "riding", "skateboard"), "a boy riding a skateboard", "男孩踩着滑板"),
        (("elephant", "has", "trunk"), "an elephant has a trunk", "大象有象鼻"),
        (("trunk", "of", "tree"), "a trunk of a tree", "树的树干"),
        (("wing", "of", "plane"), "a wing of a plane", "客机的机翼"),
        (("wing", "of", "bird"), "a wing of a bird", "鸟的翅膀"),
        (("cup", "on", "table"), "a cup on a table", "杯子在桌子上"),
        (("vase", "made of", "glass"), "a vase made of glass", "花瓶由玻璃制成"),
    ],
)
def test_relations_in_words(words: tuple[str, str, str], en: str, zh: str) -> None:
    assert relation(*words) == (en, zh)


def test_contexts_are_about_words_of_the_vocabulary() -> None:
    for row in read_table("vg_contexts"):
        assert row["name"] in vg_nouns()
        assert row["predicate"] in {"*", *vg_predicates()} and row["other"] in {"*", *vg_nouns()}


def test_chinese_names_of_cars_keep_latin_letters_only_where_allowed() -> None:
    used = set()
    for row in read_table("stanford_cars"):
        for word in re.findall(r"[A-Za-z0-9][A-Za-z0-9/.-]*", row["zh"]):
            assert CODE.fullmatch(word) or word in LATIN_WORDS, (row["zh"], word)
            # A word of capitals alone is a code of at most four letters, not a name in capitals.
            assert not word.isalpha() or word in LATIN_WORDS or len(word) <= 4, (row["zh"], word)
            used.add(word)
    assert LATIN_WORDS <= used


def test_names_of_cars_are_parallel() -> None:
    """Same year in both languages; one Chinese make for each make, and no other; bodies by the same words."""
    makes: dict[str, set[str]] = {}
    for row in read_table("stanford_cars"):
        year = row["label"].split()[-1]
        assert row["zh"].startswith(f"{year}款"), row
        make = next((make for make in MAKES if row["label"].startswith(f"{make} ")), None)
        assert make, row["label"]
        assert row["zh"].removeprefix(f"{year}款").startswith(MAKES[make]), row
        makes.setdefault(make, set()).add(row["zh"])
        for body, chinese in BODIES.items():
            if f" {body} {year}" in row["label"]:
                assert re.search(chinese, row["zh"]), row
        assert ("Hybrid" in row["label"]) == ("混合动力" in row["zh"]), row
    assert makes.keys() == MAKES.keys()
    distinct(list(MAKES.values()))


MAKES = {
    "AM General": "AM通用", "Acura": "讴歌", "Aston Martin": "阿斯顿·马丁", "Audi": "奥迪", "BMW": "宝马",
    "Bentley": "宾利", "Bugatti": "布加迪", "Buick": "别克", "Cadillac": "凯迪拉克", "Chevrolet": "雪佛兰",
    "Chrysler": "克莱斯勒", "Daewoo": "大宇", "Dodge": "道奇", "Eagle": "鹰牌", "FIAT": "菲亚特",
    "Ferrari": "法拉利", "Fisker": "菲斯科", "Ford": "福特", "GMC": "GMC", "Geo": "吉奥", "HUMMER": "悍马",
    "Honda": "本田", "Hyundai": "现代", "Infiniti": "英菲尼迪", "Isuzu": "五十铃", "Jaguar": "捷豹",
    "Jeep": "吉普", "Lamborghini": "兰博基尼", "Land Rover": "路虎", "Lincoln": "林肯", "MINI": "迷你",
    "Maybach": "迈巴赫", "Mazda": "马自达", "McLaren": "迈凯伦", "Mercedes-Benz": "奔驰", "Mitsubishi": "三菱",
    "Nissan": "日产", "Plymouth": "普利茅斯", "Porsche": "保时捷", "Ram": "公羊", "Rolls-Royce": "劳斯莱斯",
    "Scion": "赛恩", "Spyker": "世爵", "Suzuki": "铃木", "Tesla": "特斯拉", "Toyota": "丰田",
    "Volkswagen": "大众", "Volvo": "沃尔沃", "smart": "smart",
}  # fmt: skip
BODIES = {
    "Sedan": "轿车$", "Convertible": "敞篷(跑)?车$", "Coupe": "双门轿(跑)?车$", "SUV": "SUV$",
    "Wagon": "旅行车$", "Hatchback": "掀背车$", "Regular Cab": "单排座皮卡$",
    "Extended Cab": "加长驾驶室皮卡$", "Crew Cab": "双排座皮卡$", "Cargo Van": "厢式货车$",
}  # fmt: skip


@pytest.mark.parametrize("name", ["cub_birds", "stanford_dogs"])
def test_names_of_animals_have_no_latin_letter(name: str) -> None:
    for row in read_table(name):
        assert re.fullmatch(f"{CHINESE}+", row["zh"]), row


def test_names_of_birds_end_in_what_they_are() -> None:
    """The family in the English name and the one in the Chinese name agree, as the field guides have them."""
    families = {
        "Albatross": "信天翁", "Auklet": "海雀", "Cormorant": "鸬鹚", "Cowbird": "牛鹂", "Cuckoo": "美洲鹃",
        "Flycatcher": "霸鹟", "Goldfinch": "金翅雀", "Grebe": "䴙䴘", "Hummingbird": "蜂鸟", "Jaeger": "贼鸥",
        "Kingbird": "王霸鹟", "Nuthatch": "䴓", "Oriole": "拟鹂", "Pelican": "鹈鹕", "Shrike": "伯劳",
        "Swallow": "燕", "Thrasher": "弯嘴嘲鸫", "Towhee": "唧鹀", "Vireo": "莺雀", "Waxwing": "太平鸟",
        "Woodpecker": "啄木鸟", "Wren": "鹪鹩", "Waterthrush": "灶莺", "Blackbird": "黑鹂",
        "Grackle": "拟八哥", "Merganser": "秋沙鸭", "Raven": "渡鸦", "Tanager": "丽唐纳雀", "Warbler": "莺",
        "Gull": "鸥",
    }  # fmt: skip
    for row in read_table("cub_birds"):
        kind = row["label"].rpartition("_")[2]
        if kind in families:
            assert row["zh"].endswith(families[kind]), row
        if kind == "Sparrow" and row["label"] != "House_Sparrow":
            assert row["zh"].endswith("鹀"), row
