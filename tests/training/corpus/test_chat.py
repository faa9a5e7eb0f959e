"""The client of OpenAI-compatible servers, against a server on 127.0.0.1 that fails in every way the issue names."""

from __future__ import annotations

import email.utils
import io
import json
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.training.corpus.chat_server import Body, ChatServer, Die, Drop, Fault, Hang, Status, Trickle
from tests.training.corpus.chat_server import Question as Asked
from training.corpus.chat import ChatClient, Question, Reply, ServerError, ServerSettings, data_url
from training.corpus.journal import Journal

PROBE = Question("probe", "Are you there?")


def settings(server: ChatServer, **changes: object) -> ServerSettings:
    quick = {"first_wait": 0.01, "longest_wait": 0.05, "retries": 3, "timeout": 2.0, "concurrency": 4}
    return ServerSettings(server.url, "tiny", **{**quick, **changes})


def questions(number: int) -> list[Question]:
    return [Question(f"row-{place}", f"question {place}") for place in range(number)]


def ask(client_settings: ServerSettings, asked: list[Question], journal: Path) -> list[Reply]:
    with Journal(journal) as answers:
        return ChatClient(client_settings, seed=7).ask(asked, answers, PROBE)


def echo(question: Asked) -> str:
    return f"answer to {question.text}"


def answers(number: int) -> list[Reply]:
    return [Reply(f"answer to question {place}") for place in range(number)]


def test_answers_come_in_the_order_of_the_questions(tmp_path: Path) -> None:
    def slow_first(question: Asked) -> str:
        time.sleep(0.2 if question.text == "question 0" else 0)
        return echo(question)

    with ChatServer(slow_first) as server:
        assert ask(settings(server), questions(6), tmp_path / "a.jsonl") == answers(6)
        assert len(server.asked) == 6


def test_requests_are_deterministic_and_carry_the_image_as_it_is(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    with ChatServer(echo) as server:
        once = settings(server, options={"chat_template_kwargs": {"enable_thinking": False}}, max_tokens=9)
        ask(once, [Question("a", "什么？", buffer.getvalue())], tmp_path / "a.jsonl")
        [question] = server.asked
    assert question.image == buffer.getvalue()
    assert question.text == "什么？"
    rest = {name: value for name, value in question.payload.items() if name != "messages"}
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    assert rest == {"model": "tiny", "temperature": 0.0, "seed": 7, "max_tokens": 9, **thinking}


def test_no_more_questions_are_under_way_than_allowed(tmp_path: Path) -> None:
    def slow(question: Asked) -> str:
        time.sleep(0.03)
        return echo(question)

    with ChatServer(slow) as server:
        ask(settings(server, concurrency=3), questions(12), tmp_path / "a.jsonl")
        assert 1 < server.most_at_once <= 3


WELL_FORMED = json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}] * 2})


@pytest.mark.parametrize(
    "fault",
    [
        Status(500),
        Status(502),
        Status(503),
        Status(429, headers={"Retry-After": "0"}),
        Status(408),
        Drop(),
        Drop(after=20),
        Body("{"),
        Body("<html>502</html>"),
        Body("[]"),
        Body('{"choices": []}'),
        Body('{"choices": [{}]}'),
        Body('{"choices": [{"message": {"content": null}}]}'),
        Body('{"choices": [{"message": {"content": {"a": 1}}}]}'),
        Body('{"error": "overloaded"}'),
        Body(WELL_FORMED),  # two answers to one question
        Hang(0.4),
        Trickle(0.05),
    ],
    ids=str,
)
def test_a_fault_that_passes_costs_a_retry_and_no_row(fault: Fault, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def plan(number: int, question: Asked) -> Fault | None:
        seen[question.text] += 1
        return fault if question.text == "question 2" and seen[question.text] <= 2 else None

    with ChatServer(echo, plan) as server:
        assert ask(settings(server, timeout=0.3), questions(5), tmp_path / "a.jsonl") == answers(5)
    assert seen == {**{f"question {place}": 1 for place in range(5)}, "question 2": 3}


def test_waits_double_and_follow_what_the_server_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("training.corpus.chat.time.sleep", waits.append)
    plans: dict[int, Fault] = {
        0: Status(503),
        1: Status(503),
        2: Status(429, headers={"Retry-After": "30"}),
        3: Status(503, headers={"Retry-After": email.utils.formatdate(time.time() + 40, usegmt=True)}),
        4: Status(429, headers={"Retry-After": "4000"}),
        5: Status(429, headers={"Retry-After": "soon"}),
    }
    with ChatServer(echo, lambda number, question: plans.get(number)) as server:
        patient = settings(server, first_wait=1.0, longest_wait=60.0, retries=6)
        assert ask(patient, questions(1), tmp_path / "a.jsonl") == answers(1)
    assert waits[:3] == [1.0, 2.0, 30.0]
    assert 38 <= waits[3] <= 40
    assert waits[4:] == [60.0, 32.0]


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_refused_question_is_given_up_at_once(code: int, tmp_path: Path) -> None:
    def plan(number: int, question: Asked) -> Fault | None:
        return Status(code, "cannot read this image") if question.text == "question 1" else None

    with ChatServer(echo, plan) as server:
        replies = ask(settings(server), questions(3), tmp_path / "a.jsonl")
        assert Counter(question.text for question in server.asked)["question 1"] == 1
    assert replies == [answers(3)[0], Reply(None, "server_refused"), answers(3)[2]]


@pytest.mark.parametrize("fault", [Status(500), Hang(0.3), Body("{"), Drop(after=9)], ids=str)
def test_a_question_that_breaks_the_server_is_given_up_after_all_others(fault: Fault, tmp_path: Path) -> None:
    def plan(number: int, question: Asked) -> Fault | None:
        return fault if question.text in ("question 1", "question 4") else None

    with ChatServer(echo, plan) as server:
        replies = ask(settings(server, retries=1, timeout=0.2), questions(8), tmp_path / "a.jsonl")
        asked = Counter(question.text for question in server.asked)
    bad = Reply(None, "server_failed")
    assert replies == [bad if place in (1, 4) else reply for place, reply in enumerate(answers(8))]
    assert asked["question 1"] == asked["question 4"] == 4  # two rounds of two tries
    assert all(asked[f"question {place}"] == 1 for place in (0, 2, 3, 5, 6, 7))


@pytest.mark.parametrize(
    "fault",
    [Status(401, "wrong key sk-secret-1"), Status(404, "no model tiny"), Status(307, headers={"Location": "/x"})],
)
def test_a_wrong_setup_stops_at_once_and_does_not_tell_the_key(
    fault: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_CHAT_KEY", "sk-secret-1")
    with ChatServer(echo, lambda number, question: fault) as server:
        keyed = settings(server, api_key_env="TEST_CHAT_KEY", concurrency=1)
        with pytest.raises(ServerError, match=str(fault.code)) as caught:
            ask(keyed, questions(5), tmp_path / "a.jsonl")
        assert len(server.asked) == 1
        assert server.asked[0].key == "sk-secret-1"
    assert "sk-secret" not in str(caught.value)
    assert "sk-secret" not in repr(keyed) + (tmp_path / "a.jsonl").read_text()


def test_a_key_that_is_not_set_is_said_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_CHAT_KEY", raising=False)
    with pytest.raises(ValueError, match="TEST_CHAT_KEY"):
        ChatClient(ServerSettings("http://127.0.0.1:1/v1", "tiny", api_key_env="TEST_CHAT_KEY"))


def test_a_server_that_takes_no_image_stops_the_stage_instead_of_dropping_every_row(tmp_path: Path) -> None:
    with ChatServer(echo, lambda number, question: Status(400, "this model reads no images")) as server:
        with pytest.raises(ServerError, match="reads no images"):
            ask(settings(server), questions(5), tmp_path / "a.jsonl")


@pytest.mark.parametrize("fault", [Status(500), Status(429), Hang(0.3), Body("{}")], ids=str)
def test_a_server_that_stops_working_stops_the_stage(fault: Fault, tmp_path: Path) -> None:
    with ChatServer(echo, lambda number, question: fault if number >= 3 else None) as server:
        with pytest.raises(ServerError, match="run the stage again"):
            ask(settings(server, retries=1, timeout=0.2, concurrency=1), questions(40), tmp_path / "a.jsonl")
        assert len(server.asked) == 3 + 2 + 2  # one question and the probe, two tries each: not all forty


def test_a_dead_server_loses_nothing_and_the_next_run_asks_only_the_rest(tmp_path: Path) -> None:
    journal = tmp_path / "a.jsonl"
    with ChatServer(echo, lambda number, question: Die() if number == 9 else None) as server:
        with pytest.raises(ServerError):
            ask(settings(server), questions(30), journal)
        before = {question.text for question in server.answered}
    assert 3 <= len(before) <= 12
    # Another server, elsewhere, with another patience: the answers that are there stay.
    with ChatServer(echo) as server:
        assert ask(settings(server, retries=0), questions(30), journal) == answers(30)
        assert {question.text for question in server.asked} == {f"question {place}" for place in range(30)} - before
        assert len(server.asked) == 30 - len(before)
        assert ask(settings(server, retries=0), questions(30), journal) == answers(30)
        assert len(server.asked) == 30 - len(before)


def test_nobody_at_the_port_is_a_server_error(tmp_path: Path) -> None:
    with ChatServer() as server:
        pass
    with pytest.raises(ServerError, match=r"refused|Refused"):
        ask(settings(server), questions(3), tmp_path / "a.jsonl")


def test_another_prompt_or_temperature_is_another_question(tmp_path: Path) -> None:
    with ChatServer(echo) as server:
        ask(settings(server), questions(2), tmp_path / "a.jsonl")
        ask(settings(server, temperature=0.5), questions(2), tmp_path / "a.jsonl")
        ask(settings(server), [Question("row-0", "another")], tmp_path / "a.jsonl")
        assert len(server.asked) == 5


def test_a_torn_journal_gives_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        for row in ("a", "b", "c"):
            journal.add(row, "key", {"text": f"文字 {row}", "finish": "stop"})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            found = [journal.find(row, "key") is not None for row in ("a", "b", "c")]
            # A line without its line break is whole if its JSON is.
            assert sum(found) in (whole[:cut].count(b"\n"), whole[:cut].count(b"\n") + 1)
            assert found == sorted(found, reverse=True)
            journal.add("d", "key", {"text": "d", "finish": None})
        with Journal(path) as journal:
            assert journal.find("d", "key") == {"text": "d", "finish": None}


def test_lines_of_a_journal_that_are_no_answers_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[]\n"x"\n{"row": "a"}\n{"row": "a", "key": "k", "answer": {"text": 3, "finish": null}}\n\x00\n')
    with Journal(path) as journal:
        assert journal.find("a", "k") is None


@pytest.mark.parametrize(("finish", "reason"), [("length", "cut_short"), ("content_filter", "filtered")])
def test_an_answer_that_did_not_end_says_so(finish: str, reason: str, tmp_path: Path) -> None:
    with ChatServer(echo, finish=finish) as server:
        assert ask(settings(server), questions(1), tmp_path / "a.jsonl") == [Reply("answer to question 0", reason)]


def test_a_message_with_a_refusal_is_filtered(tmp_path: Path) -> None:
    body = json.dumps({"choices": [{"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}]})
    with ChatServer(echo, lambda number, question: Body(body)) as server:
        assert ask(settings(server), questions(1), tmp_path / "a.jsonl") == [Reply("", "filtered")]


def test_half_of_a_surrogate_pair_does_not_reach_a_file(tmp_path: Path) -> None:
    body = '{"choices": [{"message": {"content": "a \\ud83d dog"}, "finish_reason": "stop"}]}'
    with ChatServer(echo, lambda number, question: Body(body)) as server:
        [reply] = ask(settings(server), questions(1), tmp_path / "a.jsonl")
    assert reply.text == "a ? dog"


def test_an_endless_answer_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.corpus.chat.MAX_ANSWER_BYTES", 1000)
    with ChatServer(lambda question: "x" * 2000 if question.text == "question 0" else "fine") as server:
        replies = ask(settings(server, retries=0), questions(2), tmp_path / "a.jsonl")
    assert replies == [Reply(None, "server_failed"), Reply("fine")]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"url": "127.0.0.1:8000"}, "http"),
        ({"url": "http://user:word@host/v1"}, "credentials"),
        ({"url": "http://host/v1?key=abc"}, "credentials"),
        ({"concurrency": 0}, "at least 1"),
        ({"timeout": 0}, "timeout"),
        ({"temperature": -1.0}, "temperature"),
        ({"options": {"seed": 3}}, "seed"),
    ],
)
def test_impossible_settings_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServerSettings(**{"url": "http://host/v1", "model": "tiny", **values})


def test_what_is_no_image_of_a_server_is_not_sent() -> None:
    with pytest.raises(ValueError, match="JPEG"):
        data_url(b"BM....")
