"""The judge client against a real HTTP server, and the scores that it makes possible."""

from __future__ import annotations

import argparse
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from harness.models import endpoint
from harness.runs.schema import score_task
from harness.scoring import judge as judging
from harness.scoring.judge import Judge, evaluate
from tasks import load
from vlmamba_core.errors import UserError
from vlmamba_core.folder import Journal

KEY = "sk-secret-1234567890"
Answer = Callable[[dict], "str | tuple[int, dict, bytes]"]


class Server:
    """An OpenAI-compatible server on this machine; `answer(body)` makes each reply."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: "1.0"
        self.requests: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {k.lower(): v for k, v in self.headers.items()}
                outer.requests.append({"path": self.path, "headers": headers, **body})
                answer = outer.answer(body)
                if isinstance(answer, str):
                    message = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                    answer = (200, {}, json.dumps(message).encode())
                code, extra, content = answer
                self.send_response(code)
                for name, value in extra.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def judge(server, monkeypatch) -> Judge:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    return Judge(server.url, "judge-1", "TEST_JUDGE_KEY", timeout_s=10, sleep=lambda _: None)


def test_request_and_reply(server, judge):
    server.answer = lambda body: " 0.5 "
    assert judge.ask("How good is it?", temperature=0.5, max_tokens=3) == " 0.5 "
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["messages"] == [{"role": "user", "content": "How good is it?"}]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge-1", 0.5, 3)
    assert request["headers"]["authorization"] == f"Bearer {KEY}"


def test_the_key_is_optional_and_a_full_address_is_understood(server):
    Judge(f"{server.url}/chat/completions", "judge-1").ask("?")
    assert server.requests[0]["path"] == "/v1/chat/completions"
    assert "authorization" not in server.requests[0]["headers"]


def test_a_busy_service_is_asked_again(server, judge):
    replies = iter([(429, {"Retry-After": "7"}, b""), (503, {}, b""), "0.9"])
    waited: list[float] = []
    server.answer = lambda body: next(replies)
    patient = Judge(judge.url, judge.model, judge.key_variable, sleep=waited.append)
    assert patient.ask("?") == "0.9"
    assert waited == [7.0, endpoint.WAITS_S[1]]


@pytest.mark.parametrize(
    ("answer", "message", "asked"),
    [
        ((401, {}, KEY.encode()), "answered HTTP 401: check the key in TEST_JUDGE_KEY", 1),
        ((404, {}, b""), "answered HTTP 404", 1),
        ((500, {}, b""), "answered HTTP 500", 1 + len(endpoint.WAITS_S)),
        ((302, {"Location": "http://127.0.0.1:1/elsewhere"}, b""), "answered HTTP 302", 1),
        ((200, {}, b"<html>"), "sent no chat completion", 1),
        ((200, {}, b'{"choices": []}'), "sent no chat completion", 1),
        ((200, {}, b"[1]"), "sent no chat completion", 1),
    ],
)
def test_failures_are_one_clear_line_without_the_key(server, judge, answer, message, asked):
    server.answer = lambda body: answer
    with pytest.raises(UserError, match=message) as caught:
        judge.ask("?")
    assert len(server.requests) == asked
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_says_nothing_is_left_after_a_while(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        judge = Judge(url, "judge-1", timeout_s=0.05, sleep=lambda _: None)
        with pytest.raises(UserError, match=r"is out of reach \(.*timed out\)"):
            judge.ask("?")


def test_a_refusal_without_end_is_read_in_part(server, judge):
    server.answer = lambda body: (404, {}, b'{"error": "' + b"x" * 2**18 + b'"}')
    with pytest.raises(UserError, match="answered HTTP 404$"):
        judge.ask("?")


def test_nothing_is_logged(server, judge, caplog):
    server.answer = lambda body: (500, {}, KEY.encode())
    with caplog.at_level("DEBUG"), pytest.raises(UserError):
        judge.ask("?")
    assert KEY not in caplog.text


@pytest.mark.parametrize("after", ["soon", "Fri, 01 Jan 2100 00:00:00 GMT", "-5", "1e9", "nan"])
def test_a_strange_retry_after_is_kept_within_reason(server, judge, after):
    waited: list[float] = []
    server.answer = lambda body: (503, {"Retry-After": after}, b"")
    with pytest.raises(UserError, match="HTTP 503"):
        Judge(judge.url, judge.model, judge.key_variable, sleep=waited.append).ask("?")
    assert len(waited) == len(endpoint.WAITS_S)
    assert all(0 <= seconds <= endpoint.LONGEST_WAIT_S for seconds in waited)


def test_nobody_there(monkeypatch):
    waited: list[float] = []
    judge = Judge("http://127.0.0.1:9/v1", "judge-1", sleep=waited.append)
    with pytest.raises(UserError, match=r"is out of reach \("):
        judge.ask("?")
    assert waited == list(endpoint.WAITS_S)


def test_null_content_is_an_empty_reply(server, judge):
    server.answer = lambda body: (200, {}, b'{"choices": [{"message": {"content": null}}]}')
    assert judge.ask("?") == ""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("api.openai.com", "not a web address"),
        ("file:///etc/passwd", "not a web address"),
        ("https://me:sk-1@host/v1", "credentials"),
        ("https://host/v1?key=sk-1", "credentials"),
    ],
)
def test_addresses_are_checked_and_not_repeated(url, message):
    with pytest.raises(UserError, match=message) as caught:
        Judge(url, "judge-1")
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  ", "sk-\n1", "schlüssel"])
def test_a_bad_key_variable_is_named(monkeypatch, value):
    monkeypatch.delenv("TEST_JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_JUDGE_KEY", value)
    with pytest.raises(UserError, match="environment variable TEST_JUDGE_KEY"):
        Judge("http://127.0.0.1:9/v1", "judge-1", "TEST_JUDGE_KEY").ask("?")


def test_the_key_is_in_no_record(judge):
    assert KEY not in repr(judge)
    assert judge.settings() == {"judge_url": judge.url, "judge_model": "judge-1"}


def test_options(judge, monkeypatch):
    parser = argparse.ArgumentParser()
    judging.add_arguments(parser)
    tasks = [load("gqa"), load("mmvet")]
    assert judging.from_arguments(parser.parse_args([]), tasks) is None
    args = parser.parse_args(["--judge", judge.url, "--judge-model", "m", "--judge-key-env", "K"])
    monkeypatch.delenv("K", raising=False)
    with pytest.raises(UserError, match="environment variable K is not set"):
        judging.from_arguments(args, tasks)
    monkeypatch.setenv("K", KEY)
    assert judging.from_arguments(args, tasks) == Judge(judge.url, "m", "K")
    with pytest.raises(
        UserError,
        match="'gqa' needs no judge; --judge is for llava_bench, mmbench, mmbench_cn, mmvet",
    ):
        judging.from_arguments(args, tasks[:1])


def mmvet_documents() -> list[dict]:
    rows = [("a dog", "rec"), ("42<OR>forty-two", "ocr,math"), ("left", "rec,spat"), (None, "rec")]
    return [
        {"question_id": f"v1_{i}", "question": f"Q{i}?", "answer": answer, "capability": needs}
        for i, (answer, needs) in enumerate(rows)
    ]


@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_mmvet_is_graded(server, judge, protocol):
    grades = {"Q0? | a dog": "1.0", "Q1? | 42 <OR> forty-two": "0.4 or so", "Q2? | left": "0.1\n"}
    server.answer = lambda body: next(
        grade for row, grade in grades.items() if row in body["messages"][0]["content"]
    )
    task = load("mmvet")
    report = evaluate(task, mmvet_documents(), ["A dog.\n", "42", "right", ""], protocol, judge)
    assert report.metrics == pytest.approx(
        {"score": 0.5, "rec/score": 0.55, "ocr/score": 0.4, "math/score": 0.4, "spat/score": 0.1}
    )
    assert (report.n, report.excluded) == (3, {"no reference answer": 1})
    assert report.notes == ["graded by judge-1"]
    assert [case and case.score for case in report.cases] == [1.0, 0.4, 0.1, None]
    assert KEY not in repr(report)


@pytest.mark.parametrize(("protocol", "attempts"), [("paper", 5), ("lmms", 4)])
def test_mmvet_counts_what_the_judge_cannot_grade(server, judge, protocol, attempts):
    server.answer = lambda body: "I cannot say"
    report = evaluate(load("mmvet"), mmvet_documents()[:1], ["a dog"], protocol, judge)
    assert (report.metrics["score"], len(server.requests)) == (0.0, attempts)
    assert "1 answers got no readable grade and count as 0" in report.notes
    assert [r["temperature"] for r in server.requests][-1] == 1.5


@pytest.mark.parametrize(("protocol", "asked"), [("paper", 2), ("lmms", 1)])
def test_mmvet_asks_again_where_the_grade_stands_behind_a_space(server, judge, protocol, asked):
    server.answer = lambda body: " 0.5" if len(server.requests) == 1 else "0.7"
    report = evaluate(load("mmvet"), mmvet_documents()[:1], ["a dog"], protocol, judge)
    assert (report.metrics["score"], len(server.requests)) == (0.7 if asked == 2 else 0.5, asked)


def test_mmbench_asks_about_unread_answers_only(server, judge):
    server.answer = lambda body: "B." if "furry" in body["messages"][0]["content"] else "Z"
    doc = {"question": "What is it?", "hint": None, "A": "cat", "B": "dog", "answer": "B"}
    docs = [{**doc, "index": i, "category": "c", "L2-category": "l2"} for i in range(3)]
    report = evaluate(load("mmbench"), docs, ["B", "a furry friend", "no idea"], "paper", judge)
    assert report.metrics["vanilla_accuracy"] == pytest.approx(2 / 3)
    assert len(server.requests) == 2
    assert "judge-1 was asked about 2 answers and named an option for 1" in report.notes


def mmvet_rows(n: int) -> tuple[list[dict], list[str]]:
    kinds = {"question": "What?", "answer": "two", "capability": "rec"}
    return [{"question_id": f"v1_{i}", **kinds} for i in range(n)], [
        f"answer {i}" for i in range(n)
    ]


def test_grades_are_kept_as_they_come(server, judge, tmp_path):
    docs, predictions = mmvet_rows(5)
    replies = iter(["1.0", "0.5", (401, {}, b'{"error": {"message": "quota used up"}}')])
    server.answer = lambda body: next(replies)
    judge.kept = Journal(tmp_path / "replies.jsonl")
    with pytest.raises(UserError, match="HTTP 401.*quota used up; the replies so far are kept"):
        evaluate(load("mmvet"), docs, predictions, "paper", judge)
    again = Judge(judge.url, judge.model, judge.key_variable, kept=Journal(judge.kept._path))
    server.requests.clear()
    server.answer = lambda body: "0.0"
    report = evaluate(load("mmvet"), docs, predictions, "paper", again)
    assert [case.score for case in report.cases] == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert len(server.requests) == 3


def test_an_answer_that_the_server_refuses_is_not_graded(server, judge, tmp_path):
    docs, predictions = mmvet_rows(3)
    refusal = {"error": {"code": "content_filter", "message": f"filtered {KEY}"}}

    def answer(body):
        if "answer 1" in body["messages"][0]["content"]:
            return 400, {}, json.dumps(refusal).encode()
        return "0.5"

    server.answer = answer
    judge.kept = Journal(tmp_path / "replies.jsonl")
    report = evaluate(load("mmvet"), docs, predictions, "paper", judge)
    assert report.excluded == {"not graded: the judge refused": 1}
    assert (report.n, report.metrics["score"]) == (2, 0.5)
    assert "the judge refused 1 answers (HTTP 400: filtered ***)" in report.notes
    assert len(judge.kept) == 2  # the refused one is asked again next time
    server.answer = lambda body: (400, {}, json.dumps(refusal).encode())
    judge.kept = None
    with pytest.raises(UserError, match=r"refused every answer \(3\): HTTP 400: filtered \*\*\*"):
        evaluate(load("mmvet"), docs, predictions, "paper", judge)


def test_newer_parameter_names(server, judge):
    def answer(body):
        for old, told in (("max_tokens", "use 'max_completion_tokens'"), ("temperature", "")):
            if old in body:
                reason = f"Unsupported parameter: '{old}'; {told}"
                return 400, {}, json.dumps({"error": {"message": reason}}).encode()
        return "0.7"

    server.answer = answer
    assert judge.ask("?", max_tokens=3) == "0.7"
    assert server.requests[-1]["max_completion_tokens"] == endpoint.REASONING_TOKENS
    judge.ask("again?")
    assert len(server.requests) == 4  # what was learnt is kept


def test_a_reply_in_parts(server, judge):
    parts = [{"type": "text", "text": "0."}, {"type": "text", "text": "5"}]
    reply = {"choices": [{"message": {"content": parts}}]}
    server.answer = lambda body: (200, {}, json.dumps(reply).encode())
    assert judge.ask("?") == "0.5"


@pytest.mark.parametrize("protocol", ["paper", "lmms"])
def test_a_file_says_which_answers_are_not_graded(server, judge, protocol):
    docs, predictions = mmvet_rows(3)

    def answer(body):
        return (400, {}, b"{}") if "answer 1" in body["messages"][0]["content"] else "0.5"

    server.answer = answer
    result, samples = score_task(load("mmvet"), docs, predictions, protocol, judge=judge)
    assert [(s.score, s.excluded) for s in samples] == [
        (0.5, None),
        (None, "not graded"),
        (0.5, None),
    ]
    assert (result.n, result.excluded) == (2, {"not graded: the judge refused": 1})


def test_a_server_that_takes_no_answer_is_not_asked_about_all(server, judge):
    server.answer = lambda body: (400, {}, b'{"error": {"message": "no such deployment"}}')
    with pytest.raises(UserError, match=r"every answer \(10\): HTTP 400: no such deployment"):
        evaluate(load("mmvet"), *mmvet_rows(30), "paper", judge)
    assert len(server.requests) == 10


def test_mmbench_goes_on_after_a_refused_answer(server, judge):
    def answer(body):
        if "furry" in body["messages"][0]["content"]:
            return 400, {}, b'{"error": "filtered"}'
        return "B"

    server.answer = answer
    doc = {"question": "What is it?", "hint": None, "A": "cat", "B": "dog", "answer": "B"}
    docs = [{**doc, "index": i, "category": "c", "L2-category": "l2"} for i in range(2)]
    report = evaluate(load("mmbench"), docs, ["a furry friend", "it barks"], "paper", judge)
    assert report.metrics["vanilla_accuracy"] == 0.5
    assert "refused 1 more (HTTP 400: filtered)" in report.notes[-1]


def test_a_limit_that_the_model_does_not_support_is_renamed(server, judge):
    def answer(body):
        told = {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported."}}
        return (400, {}, json.dumps(told).encode()) if "max_tokens" in body else "1.0"

    server.answer = answer
    assert judge.ask("?") == "1.0"
    assert "max_completion_tokens" in server.requests[-1]


def test_replies_that_cannot_be_kept_are_refused_before_the_first_is_paid_for(
    server, judge, tmp_path
):
    parser = argparse.ArgumentParser()
    judging.add_arguments(parser)
    options = ["--judge", judge.url, "--judge-replies", str(tmp_path)]  # a folder
    with pytest.raises(UserError, match="cannot be kept in .*--judge-replies"):
        judging.from_arguments(parser.parse_args(options), [load("mmvet")])
    options[-1] = str(tmp_path / "replies.jsonl")
    judging.from_arguments(parser.parse_args(options), [load("mmvet")])
    assert not server.requests
