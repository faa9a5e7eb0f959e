"""The stage `rewrite`: against a server that fails and dies, and with tiny BLIP-2 models; nothing lost or doubled."""

from __future__ import annotations

import dataclasses
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
import safetensors.torch
import torch
import transformers

from tests.eval.tiny_models import save_tiny as save_tiny_encoder
from tests.training.corpus.chat_server import Body, ChatServer, Die, Drop, Fault, Hang, Question, Status
from tests.training.corpus.pairs import config, contents, finished, picture, row, stream
from tests.training.corpus.tiny_generators import save_tiny
from training.corpus import rewrite
from training.corpus.chat import Reply
from training.corpus.config import CorpusConfig, ExecutorSettings
from training.corpus.engine import KEPT
from training.corpus.pinned import BLIP_2, PINNED
from training.corpus.rewrite import RewriteSettings
from training.corpus.rewriters import CaptionModel, TransformersRewriter
from training.corpus.scorer import Scorer, ScoreSettings


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder("clip", tmp_path_factory.mktemp("clip"))


def low_rows(number: int) -> list[dict]:
    """Rows of the low-score stream; every third is Chinese."""
    rows = []
    for place in range(number):
        chinese = place % 3 == 2
        text = f"{place}号图片，一只狗" if chinese else f"picture {place} of some dog"
        rows.append(row(place, "zh" if chinese else "en", id=f"row-{place}", text=text, score=0.0625))
    return rows


BAD = {
    5: ("I'm sorry, but I can't describe this picture.", "refusal"),
    6: ("Это картинка с собакой и мячом", "wrong_language"),
    7: ("a dog and a dog and a dog and a dog", "repeated"),
    8: ("Answer with the caption alone. Do not guess who people are, nor places.", "prompt_echo"),
    9: ("", "empty"),
}
"""Last digit of a row -> what the model says, and what is counted for it."""


def new_caption(place: int, chinese: bool) -> str:
    if place % 10 in BAD:
        return BAD[place % 10][0]
    return (
        f"一张很多彩色小点的图片，编号{place}。" if chinese else f"A noisy picture with small colourful dots, {place}."
    )


def answer(question: Question) -> str:
    """As a model would that reads the instructions: in their language, with the numbers of the raw caption."""
    raw = re.search(r"<caption>(.*)</caption>", question.text)
    if raw is None:
        return "A red circle."
    assert question.image is not None
    place = int(re.search(r"\d+", raw[1])[0])
    return new_caption(place, "请用中文" in question.text)


def sections(clip: Path, server: str, **changes: object) -> dict:
    quick = {"first_wait": 0.01, "longest_wait": 0.02, "retries": 2, "timeout": 0.5, "concurrency": 4}
    return {
        "score": {"model": str(clip), "threshold": 0.0, "device": "cpu", "batch_size": 8},
        "rewrite": {"server": {"url": server, "model": "tiny", **quick, **changes}},
    }


def corpus(output: Path, clip: Path, server: str, rows: int = 40, **changes: object) -> CorpusConfig:
    if not (output / "score").exists():
        finished(output, "score", {"high": [], "low": low_rows(rows)}, part=10)
    return config(output, sections(clip, server, **changes))


@pytest.fixture(scope="module")
def whole(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run gives."""
    output = tmp_path_factory.mktemp("whole")
    with ChatServer(answer) as server:
        rewrite.run(corpus(output, clip, server.url))
        assert len(server.asked) == 40
    return output / "rewrite"


def test_every_row_is_kept_with_its_new_score_or_dropped_with_a_reason(whole: Path, clip: Path) -> None:
    rows = {item["id"]: item for item in low_rows(40)}
    kept, dropped = stream(whole / "kept"), stream(whole / "dropped")
    ids = [item["id"] for item in [*kept, *dropped]]
    assert sorted(ids) == sorted(rows)
    assert len(set(ids)) == 40
    scorer = Scorer(ScoreSettings(str(clip), device="cpu"))
    expected: dict[str, str] = {}
    for place, item in enumerate(rows.values()):
        text = new_caption(place, item["language"] == "zh")
        reason = BAD.get(place % 10, (None, None))[1]
        if place % 10 in (7, 8) and item["language"] == "zh":  # what is said there is English
            reason = "wrong_language"
        if reason is None:
            [(_, scored)] = scorer.scored([{**item, "text": text}])
            reason = None if scored.score >= 0 else "low_score"
            found = next(new for new in [*kept, *dropped] if new["id"] == item["id"])
            assert found["score"] == pytest.approx(scored.score, abs=1e-6)
            assert found["text"] == text
        if reason is None:
            [new] = [new for new in kept if new["id"] == item["id"]]
            assert new == {**item, "text": text, "raw_text": item["text"], "origin": "rewritten", "score": new["score"]}
        else:
            expected[item["id"]] = reason
    assert {item["id"]: item["reason"] for item in dropped} == expected
    assert all(item["raw_text"] == rows[item["id"]]["text"] for item in dropped)
    counts = json.loads((whole / "report.json").read_text())["counts"]
    totals = Counter()
    for languages in counts.values():
        for outcomes in languages.values():
            totals.update(outcomes)
    assert totals == Counter(expected.values()) + Counter({KEPT: len(kept)})
    assert {"refusal", "wrong_language", "repeated", "prompt_echo", "empty", "low_score"} == set(expected.values())
    assert kept


def test_the_model_sees_the_picture_and_the_instructions_of_the_language(clip: Path, tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        rewrite.run(corpus(tmp_path, clip, server.url, rows=3))
        asked = {re.search(r"<caption>(.*)</caption>", question.text)[1]: question for question in server.asked}
    assert {text: question.image for text, question in asked.items()} == {
        item["text"]: picture(place) for place, item in enumerate(low_rows(3))
    }
    assert "in English" in asked["picture 0 of some dog"].text
    assert "中文" in asked["2号图片，一只狗"].text


FAULTS: tuple[Fault, ...] = (
    Status(500),
    Status(503, headers={"Retry-After": "0"}),
    Status(429),
    Hang(0.6),
    Drop(),
    Drop(after=30),
    Body("{"),
    Body('{"choices": []}'),
    Body(json.dumps({"choices": [{"message": {"content": "two"}, "finish_reason": "stop"}] * 2})),
)


def test_a_server_that_fails_in_every_way_and_dies_changes_nothing(whole: Path, clip: Path, tmp_path: Path) -> None:
    def plan(number: int, question: Question) -> Fault | None:
        if number == 33:
            return Die()
        return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 1 else None

    with ChatServer(answer, plan) as server:
        with pytest.raises(RuntimeError, match="ServerError"):
            rewrite.run(corpus(tmp_path, clip, server.url))
        before = of_rows(server.answered)
    assert before
    assert set(before.values()) == {1}
    assert (tmp_path / "rewrite" / "counts" / "00000.json").is_file()  # a finished part stays
    assert not (tmp_path / "rewrite" / "report.json").exists()

    def other_plan(number: int, question: Question) -> Fault | None:
        return FAULTS[number // 4 % len(FAULTS)] if number % 4 == 3 else None

    with ChatServer(answer, other_plan) as server:
        two = ExecutorSettings("local", workers=2)
        rewrite.run(dataclasses.replace(corpus(tmp_path, clip, server.url, retries=4), executor=two))
        after = of_rows(server.answered)
    assert not {*before} & {*after}  # nothing is asked again
    assert sum((before + after).values()) == 40
    assert contents(tmp_path / "rewrite") == contents(whole)


def of_rows(questions: list[Question]) -> Counter[str]:
    """Question -> how often, without the probe."""
    return Counter(question.text for question in questions if "<caption>" in question.text)


def test_a_run_again_asks_nothing_and_changes_nothing(whole: Path, clip: Path) -> None:
    before = contents(whole)
    with ChatServer(answer) as server:
        rewrite.run(corpus(whole.parent, clip, server.url))
        assert not server.asked
    assert contents(whole) == before


def test_killed_and_run_again_gives_the_same_and_asks_only_the_rest(whole: Path, clip: Path, tmp_path: Path) -> None:
    def slow(question: Question) -> str:
        time.sleep(0.03)
        return answer(question)

    with ChatServer(slow) as server:
        corpus(tmp_path / "out", clip, server.url)
        file = tmp_path / "config.json"
        document = {"output": str(tmp_path / "out"), "executor": {"workers": 1}, **sections(clip, server.url)}
        file.write_text(json.dumps(document))
        command = [sys.executable, "-m", "training.corpus", "rewrite", "--config", str(file)]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(server.answered) < 14:
            time.sleep(0.003)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed_at = len(server.asked)
        assert 14 <= killed_at < 40
        rewrite.run(corpus(tmp_path / "out", clip, server.url))
        # What was under way when it was killed, four at most.
        assert 40 <= len(server.asked) <= 44
    assert contents(tmp_path / "out" / "rewrite") == contents(whole)


def test_a_key_is_used_and_written_nowhere(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWRITE_KEY", "sk-do-not-tell")

    def plan(number: int, question: Question) -> Fault | None:
        return Die() if number == 8 else None

    with ChatServer(answer, plan) as server:
        with pytest.raises(RuntimeError) as caught:
            rewrite.run(corpus(tmp_path, clip, server.url, api_key_env="TEST_REWRITE_KEY"))
        assert {question.key for question in server.asked} == {"sk-do-not-tell"}
    assert "sk-do-not-tell" not in str(caught.value)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"ServerError" in written  # the log of the task that failed was looked through
    assert b"sk-do-not-tell" not in written


def test_a_row_that_the_server_refuses_or_breaks_at_is_dropped_with_that_reason(clip: Path, tmp_path: Path) -> None:
    faults: dict[str, Fault] = {"picture 1 ": Status(400), "2号": Status(500), "picture 3 ": Hang(0.6)}

    def plan(number: int, question: Question) -> Fault | None:
        return next((fault for text, fault in faults.items() if text in question.text), None)

    with ChatServer(answer, plan) as server:
        report = rewrite.run(corpus(tmp_path, clip, server.url, rows=5, retries=1))
    reasons = {item["id"]: item["reason"] for item in stream(tmp_path / "rewrite" / "dropped")}
    assert {name: reasons[name] for name in ("row-1", "row-2", "row-3")} == {
        "row-1": "server_refused",
        "row-2": "server_failed",
        "row-3": "server_failed",
    }
    assert report.counts.total() == 5


def test_large_pictures_and_other_formats_are_sent_as_jpeg(clip: Path, tmp_path: Path) -> None:
    rows = [
        row(0, image={"bytes": picture(0, "BMP"), "path": None}, text="picture 0"),
        row(1, image={"bytes": picture(1), "path": None}, text="picture 1"),
    ]
    finished(tmp_path, "score", {"high": [], "low": rows})
    with ChatServer(answer) as server:
        values = sections(clip, server.url)
        values["rewrite"]["image_side"] = 32
        rewrite.run(config(tmp_path, values))
        assert all(question.image.startswith(b"\xff\xd8\xff") for question in server.asked)
        assert len(server.asked) == 2


def test_other_settings_in_the_same_folder_are_refused_but_another_server_is_not(clip: Path, tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        rewrite.run(corpus(tmp_path, clip, server.url, rows=3))
        rewrite.run(corpus(tmp_path, clip, "http://127.0.0.1:9/v1", rows=3))
        with pytest.raises(ValueError, match="temperature"):
            rewrite.run(corpus(tmp_path, clip, server.url, rows=3, temperature=0.7))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"server": {"url": "http://h/v1", "model": "m"}, "transformers": {}}, "not both"),
        ({"prompts": {"en": "Describe it."}}, "raw"),
        ({"image_side": 3}, "image_side"),
        ({"server": {"model": "m"}}, "url"),
    ],
)
def test_impossible_settings_are_refused(section: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        rewrite.run(config(tmp_path, {"score": {}, "rewrite": section}))


def test_without_scores_there_is_nothing_to_rewrite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="score"):
        rewrite.run(config(tmp_path, {"rewrite": {}}))


def test_the_default_is_blip_2_by_hub_id_and_commit() -> None:
    model = RewriteSettings().identity()["model"]
    assert (model["model"], model["revision"]) == (BLIP_2, PINNED[BLIP_2])
    assert BLIP_2 == "Salesforce/blip2-opt-2.7b"


@pytest.fixture(scope="module", params=["blip-2 with opt", "blip-2 with t5", "blip"])
def captioner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("captioner"))


def test_padding_and_batches_change_no_caption(captioner: Path) -> None:
    rows = [row(place) for place in range(5)]
    prompts = [f"caption: {'a red circle ' * place}" for place in range(5)]
    alone = TransformersRewriter(CaptionModel(str(captioner), beams=2, max_new_tokens=6, batch_size=1, device="cpu"))
    together = TransformersRewriter(CaptionModel(str(captioner), beams=2, max_new_tokens=6, device="cpu"))
    replies = together(rows, prompts)
    assert replies == alone(rows, prompts)
    assert all(reply.reason in (None, "cut_short") and "caption" not in reply.text for reply in replies)


def test_the_picture_decides_the_caption(tmp_path: Path) -> None:
    folder = save_tiny("blip-2 with opt", tmp_path)
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():  # random weights hardly look at the picture
        for parameter in [*model.vision_model.parameters(), *model.qformer.parameters()]:
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
        model.language_projection.weight.normal_(std=3)
    model.save_pretrained(folder)
    rewriter = TransformersRewriter(CaptionModel(str(folder), beams=1, max_new_tokens=8, device="cpu"))
    replies = rewriter([row(place) for place in range(8)], ["a"] * 8)
    assert len({reply.text for reply in replies}) > 1


def test_a_tiny_blip_2_rewrites_a_part(clip: Path, tmp_path: Path) -> None:
    folder = save_tiny("blip-2 with opt", tmp_path / "model")
    finished(tmp_path, "score", {"high": [], "low": low_rows(12)}, part=6)
    values = sections(clip, "http://127.0.0.1:9/v1")
    model = {"model": str(folder), "beams": 2, "max_new_tokens": 12, "device": "cpu"}
    checks = {"script_share": 0.0, "min_characters": {"en": 0}, "keep_terms": 0.0}
    values["rewrite"] = {"transformers": model, "checks": checks}
    report = rewrite.run(config(tmp_path, values))
    kept, dropped = stream(tmp_path / "rewrite" / "kept"), stream(tmp_path / "rewrite" / "dropped")
    assert {item["id"] for item in [*kept, *dropped]} == {item["id"] for item in low_rows(12)}
    assert report.counts.total() == len(kept) + len(dropped) == 12
    assert report.counts.total("no_prompt") == 4  # BLIP-2 knows no Chinese


def test_a_prompt_longer_than_the_model_reads_is_that_rows_reason(tmp_path: Path) -> None:
    folder = save_tiny("blip", tmp_path)
    settings = CaptionModel(str(folder), beams=1, max_new_tokens=6, device="cpu")
    replies = TransformersRewriter(settings)([row(0), row(1)], ["a dog", "a dog " * 100])
    assert replies[0].text
    assert replies[1] == Reply(None, "prompt_too_long")


@pytest.mark.parametrize("kind", ["nothing", "clip", "no weights"])
def test_what_is_no_caption_model_is_said_by_name(kind: str, clip: Path, tmp_path: Path) -> None:
    folder = {"nothing": tmp_path / "nothing", "clip": clip}.get(kind) or save_tiny(
        "blip-2 with opt", tmp_path / "model"
    )
    if kind == "no weights":
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights.pop("language_projection.weight")
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        TransformersRewriter(CaptionModel(str(folder), device="cpu"))([row(0)], ["a"])
