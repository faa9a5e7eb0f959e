"""The stage `translate`: against a server that fails and dies, and with tiny models of each kind; quarantined why."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from tests.eval.tiny_models import save_tiny as save_tiny_encoder
from tests.training.corpus.chat_server import Body, ChatServer, Die, Drop, Fault, Hang, Question, Status
from tests.training.corpus.pairs import config, contents, finished, row, stream
from tests.training.corpus.tiny_generators import save_tiny
from training.corpus import translate
from training.corpus.engine import KEPT
from training.corpus.pinned import OPUS_EN_ZH, PINNED
from training.corpus.scorer import Scorer, ScoreSettings
from training.corpus.translate import TranslateSettings
from training.corpus.translators import TransformersTranslator, TranslationModel, _loaded

BAD = {
    4: (None, "untranslated"),  # the English text again
    5: ("狗狗狗狗狗狗狗狗", "repeated"),
    6: ("Perros juegan en la hierba verde", "wrong_language"),
    7: ("狗", "length_ratio"),
    8: ("一些狗在绿色的草地上玩耍。", "lost_numbers"),
    9: ("对不起，我无法翻译这句话。", "refusal"),
}
"""Last digit of a row -> what the model says, and what is counted for it."""


def english(place: int) -> str:
    return f"{place} dogs play in the green grass"


def chinese(place: int) -> str:
    said, _ = BAD.get(place % 10, (f"{place}只狗在绿色的草地上玩耍。", None))
    return said or english(place)


def answer(question: Question) -> str:
    text = re.search(r"<caption>(.*)</caption>", question.text)[1]
    return chinese(int(text.split()[0])) if text[0].isdigit() else "一个红色的圆。"


def rows(number: int, **changes: object) -> list[dict]:
    """Rows of score/high; every fourth is Chinese and is not translated."""
    found = []
    for place in range(number):
        if place % 4 == 3:
            found.append(row(place, "zh", id=f"row-{place}", score=0.5, **changes))
        else:
            found.append(row(place, id=f"row-{place}", text=english(place), score=0.5, **changes))
    return found


def rewritten(number: int) -> list[dict]:
    changes = {"source": "web-en", "raw_text": "IMG_1", "origin": "rewritten", "score": 0.4}
    return [row(place, id=f"low-{place}", text=english(place), **changes) for place in range(100, 100 + number)]


def section(server: str, **changes: object) -> dict:
    quick = {"first_wait": 0.01, "longest_wait": 0.02, "retries": 2, "timeout": 0.5, "concurrency": 4}
    return {"server": {"url": server, "model": "tiny", **quick, **changes}}


def prepare(output: Path) -> Path:
    """32 + 8 rows in parts of 10; 24 + 8 of them are English."""
    if not (output / "score").exists():
        finished(output, "score", {"high": rows(32), "low": []}, part=8)
        finished(output, "rewrite", {"kept": rewritten(8), "dropped": []}, part=2)
    return output


STAGES = {"score": {"model": "unused"}, "rewrite": {}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run gives."""
    output = prepare(tmp_path_factory.mktemp("whole"))
    with ChatServer(answer) as server:
        translate.run(config(output, {**STAGES, "translate": section(server.url)}))
        assert len(server.asked) == 32
    return output / "translate"


def test_every_english_row_is_translated_or_in_quarantine_with_a_reason(whole: Path) -> None:
    source = {item["id"]: item for item in [*rows(32), *rewritten(8)] if item["language"] == "en"}
    kept, bad = stream(whole / "kept"), stream(whole / "quarantine")
    expected_bad = {}
    for name, item in source.items():
        place = int(name.split("-")[1])
        if place % 10 in BAD:
            expected_bad[name] = BAD[place % 10][1]
            continue
        [new] = [new for new in kept if new["id"] == f"{name}#zh"]
        changes = {"text": chinese(place), "raw_text": item["text"], "origin": "translated", "score": None}
        assert new == {**item, "id": f"{name}#zh", "language": "zh", **changes}
    assert {item["id"]: item["reason"] for item in bad} == expected_bad
    assert len(kept) + len(bad) == len(source) == 32
    assert set(expected_bad.values()) == {reason for _, reason in BAD.values()}
    assert all(item["raw_text"] == source[item["id"]]["text"] for item in bad)
    counts = json.loads((whole / "report.json").read_text())["counts"]
    assert set(counts) == {"drawn-en", "web-en"}
    totals: Counter[str] = Counter()
    for languages in counts.values():
        totals.update(languages["en"])
    assert totals == Counter(expected_bad.values()) + Counter({KEPT: len(kept)})


FAULTS: tuple[Fault, ...] = (
    Status(500),
    Status(429, headers={"Retry-After": "0"}),
    Hang(0.6),
    Drop(),
    Drop(after=30),
    Body("not json"),
    Body('{"choices": []}'),
    Body(json.dumps({"choices": [{"message": {"content": "二"}, "finish_reason": "stop"}] * 2})),
)


def of_rows(questions: list[Question]) -> Counter[str]:
    """Question -> how often, without the probe."""
    return Counter(question.text for question in questions if "red circle" not in question.text)


def test_a_server_that_fails_in_every_way_and_dies_changes_nothing(whole: Path, tmp_path: Path) -> None:
    def plan(number: int, question: Question) -> Fault | None:
        if number == 25:
            return Die()
        return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 1 else None

    with ChatServer(answer, plan) as server:
        with pytest.raises(RuntimeError, match="ServerError"):
            translate.run(config(prepare(tmp_path), {**STAGES, "translate": section(server.url)}))
        before = of_rows(server.answered)
    assert before
    with ChatServer(answer, lambda number, _: FAULTS[number // 4 % 8] if number % 4 == 3 else None) as server:
        translate.run(config(tmp_path, {**STAGES, "translate": section(server.url, retries=4)}))
        after = of_rows(server.answered)
    assert not {*before} & {*after}
    assert sum((before + after).values()) == 32
    assert contents(tmp_path / "translate") == contents(whole)


def test_killed_and_run_again_gives_the_same_and_asks_only_the_rest(whole: Path, tmp_path: Path) -> None:
    def slow(question: Question) -> str:
        time.sleep(0.03)
        return answer(question)

    with ChatServer(slow) as server:
        sections = {**STAGES, "translate": section(server.url)}
        document = {"output": str(prepare(tmp_path / "out")), "executor": {"workers": 1}, **sections}
        (tmp_path / "config.json").write_text(json.dumps(document))
        command = [sys.executable, "-m", "training.corpus", "translate", "--config", str(tmp_path / "config.json")]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(server.answered) < 11:
            time.sleep(0.003)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 11 <= len(server.asked) < 32
        translate.run(config(tmp_path / "out", sections))
        assert 32 <= len(server.asked) <= 36  # what was under way when it was killed, four at most
    assert contents(tmp_path / "out" / "translate") == contents(whole)


def test_only_the_chosen_sources_are_translated_and_without_scores_the_clean_rows(tmp_path: Path) -> None:
    chosen = [row(place, source="laion", text=english(place)) for place in range(3)]
    finished(tmp_path, "clean", {"kept": [*chosen, *rows(8)]})
    with ChatServer(answer) as server:
        wanted = {"sources": ["laion"], **section(server.url)}
        report = translate.run(config(tmp_path, {"translate": wanted}))
        assert len(server.asked) == 3
    assert report.counts.as_dict() == {"laion": {"en": {KEPT: 3}}}
    with pytest.raises(ValueError, match=r"laoin.*drawn-en.*laion"):
        translate.run(config(tmp_path, {"translate": {"sources": ["laoin"], **section("http://127.0.0.1:9/v1")}}))


def test_a_caption_that_several_rows_have_is_asked_once(tmp_path: Path) -> None:
    same = [row(place, id=f"row-{place}", text=english(2)) for place in range(5)]
    finished(tmp_path, "clean", {"kept": same})
    with ChatServer(answer) as server:
        translate.run(config(tmp_path, {"translate": section(server.url)}))
        assert len(server.asked) == 1
    assert [item["id"] for item in stream(tmp_path / "translate" / "kept")] == [f"row-{place}#zh" for place in range(5)]


def test_translations_are_scored_again_if_asked(tmp_path: Path) -> None:
    folder = save_tiny_encoder("chinese_clip", tmp_path / "model")
    finished(tmp_path, "score", {"high": rows(16), "low": []}, part=8)
    scores = {"model": str(folder), "threshold": 0.0, "device": "cpu", "batch_size": 4}
    with ChatServer(answer) as server:
        sections = {"score": scores, "translate": {"rescore": True, **section(server.url)}}
        report = translate.run(config(tmp_path, sections))
    kept, bad = stream(tmp_path / "translate" / "kept"), stream(tmp_path / "translate" / "quarantine")
    assert {item["id"].removesuffix("#zh") for item in [*kept, *bad]} == {f"row-{n}" for n in range(16) if n % 4 != 3}
    scorer = Scorer(ScoreSettings(str(folder), device="cpu"))
    for item in rows(16):
        place = int(item["id"].split("-")[1])
        if item["language"] == "en" and place % 10 not in BAD:
            [(_, scored)] = scorer.scored([{**item, "language": "zh", "text": chinese(place)}])
            [found] = [new for new in [*kept, *bad] if new["id"].removesuffix("#zh") == item["id"]]
            assert found["score"] == pytest.approx(scored.score, abs=1e-6)
            assert found.get("reason", "") == ("" if scored.score >= 0 else "low_score")
    assert report.counts.total("low_score") and report.counts.total(KEPT)
    assert {item["reason"] for item in bad} >= {"untranslated", "repeated", "low_score"}
    with pytest.raises(ValueError, match="rescore"):
        translate.run(config(tmp_path, {"translate": {"rescore": True}}))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"server": {"url": "http://h/v1", "model": "m"}, "transformers": {}}, "not both"),
        ({"prompt": "Translate."}, "text"),
        ({"transformers": {"languages": ["zh"]}}, "two codes"),
        ({"transformers": {"beams": 0}}, "beams"),
        ({"sources": "laion"}, "sources"),
    ],
)
def test_impossible_settings_are_refused(section: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        translate.run(config(tmp_path, {"translate": section}))


def test_the_default_is_opus_mt_by_hub_id_and_commit() -> None:
    model = TranslateSettings().identity()["model"]
    assert (model["model"], model["revision"]) == (OPUS_EN_ZH, PINNED[OPUS_EN_ZH])
    assert OPUS_EN_ZH == "Helsinki-NLP/opus-mt-en-zh"


TEXTS = ["two dogs play", "a red circle and a blue square", "a dog", "the green grass", "a red circle"]


@pytest.fixture(scope="module", params=["marian", "m2m_100", "nllb", "t5"])
def translator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("translator"))


def model_settings(folder: Path, **changes: object) -> TranslationModel:
    return TranslationModel(str(folder), **{"beams": 2, "max_new_tokens": 8, "device": "cpu", **changes})


def test_padding_sorting_and_batches_change_no_translation(translator: Path) -> None:
    alone = TransformersTranslator(model_settings(translator, batch_size=1))
    together = TransformersTranslator(model_settings(translator, batch_size=3))
    assert together(TEXTS, TEXTS) == alone(TEXTS, TEXTS)


def test_a_translation_is_what_the_model_generates(translator: Path) -> None:
    """Greedy decoding, step by step, from the encoder's output and the language's token."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(translator).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(translator)
    kind = model.config.model_type
    target = None
    if kind == "m2m_100":
        nllb = "Nllb" in type(tokenizer).__name__
        tokenizer.src_lang = "eng_Latn" if nllb else "en"
        target = tokenizer.convert_tokens_to_ids("zho_Hans") if nllb else tokenizer.get_lang_id("zh")
    inputs = tokenizer(["a red circle"], return_tensors="pt")
    tokens = [model.config.decoder_start_token_id]
    with torch.inference_mode():
        for step in range(8):
            logits = model(**inputs, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
            if kind == "marian":
                logits[model.config.pad_token_id] = -torch.inf  # as its `bad_words_ids`
            end = model.generation_config.eos_token_id
            forced = end if step == 7 and model.generation_config.forced_eos_token_id is not None else None
            tokens.append(
                target if target is not None and step == 0 else int(logits.argmax()) if forced is None else forced
            )
            if tokens[-1] == end:
                break
    expected = tokenizer.decode(tokens[2 if target is not None else 1 :], skip_special_tokens=True).strip()
    [reply] = TransformersTranslator(model_settings(translator, beams=1))(["a red circle"], ["a"])
    assert reply.text == expected
    assert reply.reason == (None if tokens[-1] == end and len(tokens) < 9 else "cut_short")


def test_the_default_model_is_told_the_language_by_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("marian", tmp_path)
    monkeypatch.setattr("training.corpus.translators._PREFIXES", {str(folder): ">>cmn_Hans<< "})
    loaded = _loaded(model_settings(folder), "cpu")
    ids = loaded.tokenizer(loaded.prefix + "a dog")["input_ids"]
    assert loaded.tokenizer.convert_ids_to_tokens(ids)[0] == ">>cmn_Hans<<"
    assert _loaded(model_settings(folder, prefix="x "), "cpu").prefix == "x "


def test_a_source_longer_than_the_model_reads_is_that_rows_reason(tmp_path: Path) -> None:
    folder = save_tiny("marian", tmp_path)
    replies = TransformersTranslator(model_settings(folder))(["a dog", "a red dog " * 60], ["a", "b"])
    assert replies[0].reason in (None, "cut_short")
    assert replies[1].reason == "source_too_long"


@pytest.mark.parametrize("kind", ["m2m_100", "nllb"])
@pytest.mark.parametrize("languages", [("en", "xx"), ("xx", "zh")])
def test_a_language_that_the_model_does_not_know_is_refused(kind: str, languages: tuple, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path)
    with pytest.raises(ValueError, match="xx"):
        TransformersTranslator(model_settings(folder, languages=languages))(["a"], ["a"])


@pytest.mark.parametrize("kind", ["nothing", "clip"])
def test_what_is_no_translation_model_is_said_by_name(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model" if kind == "nothing" else save_tiny_encoder("clip", tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        TransformersTranslator(model_settings(folder))(["a dog"], ["a"])


def test_a_tiny_model_translates_a_part(tmp_path: Path) -> None:
    folder = save_tiny("marian", tmp_path / "model")
    finished(tmp_path, "clean", {"kept": rows(16)}, part=8)
    model = {"model": str(folder), "beams": 2, "max_new_tokens": 8, "device": "cpu"}
    report = translate.run(config(tmp_path, {"translate": {"transformers": model}}))
    kept, bad = stream(tmp_path / "translate" / "kept"), stream(tmp_path / "translate" / "quarantine")
    assert len(kept) + len(bad) == report.counts.total() == 12
    assert all(item["text"] for item in bad)
