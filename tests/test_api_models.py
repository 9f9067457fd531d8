"""A model behind an OpenAI-compatible endpoint, with a server that the test starts."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from harness.models.api import ApiModel
from harness.models.base import Limits, Picture, Request
from harness.models.endpoint import Endpoint
from harness.models.resumable import Resumable
from vlmamba_core.errors import UserError
from vlmamba_core.folder import AnswerJournal

KEY = "sk-very-secret"
LIMITS = Limits(7, ("\n\n",))


class Server:
    """Answers each request with what `reply(body, number)` gives: (status, body, headers)."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.most_at_once = self._now = 0
        self.reply: Callable[[dict, int], tuple] = lambda body, number: said(question(body))
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers) | {"path": self.path})
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                status, content, headers = outer.reply(body, number)
                with lock:
                    outer._now -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                payload = json.dumps(content).encode()
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def said(text: str, **more) -> tuple:
    return 200, {"choices": [{"message": {"content": text}}], **more}, {}


def refused(status: int, message: str, **headers: str) -> tuple:
    return status, {"error": {"message": message}}, headers


def question(body: dict) -> str:
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def requests(n: int) -> list[Request]:
    pictures = [
        Picture(f"k{i}", lambda i=i: Image.new("RGB", (3, 2), (i, 10, 20))) for i in range(3)
    ]
    return [Request("t", i, f"q{i}", tuple(pictures[: i % 3]), LIMITS) for i in range(n)]


def model(server: Server, waits: list[float] | None = None, **options) -> ApiModel:
    record = [] if waits is None else waits
    return ApiModel(Endpoint(server.url, "m", sleep=record.append, **options), concurrency=4)


def test_questions_and_pictures_arrive_and_answers_come_back_in_order(server):
    server.reply = lambda body, number: said(f" {question(body)}!\n\nmore")
    assert Resumable(model(server)).answer(requests(9)) == [f"q{i}!" for i in range(9)]
    body = next(body for body in server.bodies if question(body) == "q5")
    assert {k: v for k, v in body.items() if k != "messages"} == {
        "model": "m",
        "max_tokens": 7,
        "stop": ["\n\n"],
        "temperature": 0.0,
    }
    colors = []
    for part in body["messages"][0]["content"][:-1]:
        head, _, data = part["image_url"]["url"].partition(",")
        assert (part["type"], head) == ("image_url", "data:image/png;base64")
        colors.append(Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)))
    assert colors == [(0, 10, 20), (1, 10, 20)]
    assert {header["path"] for header in server.headers} == {"/v1/chat/completions"}


def test_several_are_under_way_at_a_time(server):
    together = threading.Barrier(4, timeout=20)

    def reply(body: dict, number: int) -> tuple:
        together.wait()
        return said("yes")

    server.reply = reply
    assert Resumable(model(server)).answer(requests(8)) == ["yes"] * 8
    assert server.most_at_once == 4


def test_a_busy_server_is_asked_again_when_it_says(server):
    def reply(body: dict, number: int) -> tuple:
        return (
            refused(429, "slow down", **{"Retry-After": "7"}),
            refused(503, "loading"),
            said("done"),
        )[number]

    server.reply = reply
    waits: list[float] = []
    assert Resumable(model(server, waits)).answer(requests(1)) == ["done"]
    assert waits == [7.0, 2.0]


def test_a_refused_item_is_counted_with_the_servers_reason(server, tmp_path):
    def reply(body: dict, number: int) -> tuple:
        refusals = {"q1": (400, "too long"), "q2": (403, "flagged"), "q3": (404, "gone")}
        found = refusals.get(question(body))
        return refused(*found) if found else said("fine")

    server.reply = reply
    around = Resumable(model(server), AnswerJournal(tmp_path))
    assert around.answer(requests(5)) == ["fine", None, None, None, "fine"]
    assert sorted(around.events) == [
        "t: row 2: not answered: HTTP 400: too long",
        "t: row 3: not answered: HTTP 403: flagged",
        "t: row 4: not answered: HTTP 404: gone",
    ]
    server.bodies.clear()
    server.reply = lambda body, number: said("now")
    again = Resumable(model(server), AnswerJournal(tmp_path))
    assert again.answer(requests(5)) == ["fine", "now", "now", "now", "fine"]
    assert len(server.bodies) == 3  # nothing that has its answer is asked again


def test_a_server_that_is_lost_costs_no_answer(server, tmp_path):
    server.reply = lambda body, number: (
        refused(500, "broken") if question(body) in ("q5", "q6") else said("fine")
    )
    with pytest.raises(UserError, match="answered HTTP 500: broken"):
        Resumable(model(server), AnswerJournal(tmp_path)).answer(requests(7))
    server.bodies.clear()
    server.reply = lambda body, number: said("now")
    answers = Resumable(model(server), AnswerJournal(tmp_path)).answer(requests(7))
    assert answers == ["fine"] * 5 + ["now"] * 2
    assert sorted(question(body) for body in server.bodies) == ["q5", "q6"]


def test_a_server_that_refuses_everything_is_an_error(server):
    server.reply = lambda body, number: refused(404, "no model m")
    with pytest.raises(UserError, match="none of the first 10 questions: HTTP 404: no model m"):
        Resumable(model(server)).answer(requests(30))


def test_newer_names_of_parameters_are_learned_from_the_refusal(server):
    def reply(body: dict, number: int) -> tuple:
        if "max_tokens" in body:
            return refused(400, "max_tokens is not supported, use max_completion_tokens")
        if "temperature" in body:
            return refused(400, "temperature does not support 0")
        return said("yes")

    server.reply = reply
    assert Resumable(model(server)).answer(requests(6)) == ["yes"] * 6
    assert "max_completion_tokens" in server.bodies[-1]


@pytest.mark.parametrize(
    "reason",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 16. This model's maximum context "
        "length is 4096 tokens and your request has 4090 input tokens.",  # vLLM
        "max_tokens is too large: 16. This model supports at most 8 completion tokens.",
    ],
)
def test_one_question_that_is_too_long_changes_no_other_one(server, reason):
    def reply(body: dict, number: int) -> tuple:
        return refused(400, reason) if question(body) == "q0" else said("yes")

    server.reply = reply
    assert Resumable(model(server)).answer(requests(4)) == [None] + ["yes"] * 3
    assert {body.get("max_tokens") for body in server.bodies} == {server.bodies[0]["max_tokens"]}


def test_a_reply_without_content_is_an_empty_answer(server):
    """mlx_lm's server leaves it out where a model only reasoned."""
    reasoned = {"role": "assistant", "reasoning": "hm"}
    empty = 200, {"choices": [{"index": 0, "message": reasoned, "finish_reason": "length"}]}, {}

    def reply(body: dict, number: int) -> tuple:
        return empty if question(body) == "q1" else said("yes")

    server.reply = reply
    assert Resumable(model(server)).answer(requests(3)) == ["yes", "", "yes"]


def test_who_thinks_until_the_limit_gets_a_longer_one(server):
    """Reasoning parsers of vLLM and SGLang: the thoughts are no content, but of the limit."""

    def reply(body: dict, number: int) -> tuple:
        if body["max_tokens"] < 1024:
            message = {"content": None, "reasoning_content": "hm, what"}
            return 200, {"choices": [{"message": message, "finish_reason": "length"}]}, {}
        return said("yes")

    server.reply = reply
    assert Resumable(model(server)).answer(requests(9)) == ["yes"] * 9


def failed(code: int | None, inside: bool, text: str = "The answ") -> tuple:
    """What a router gives for a model that broke off: HTTP 200."""
    error = {"message": "Provider returned error"} | ({} if code is None else {"code": code})
    choice = {"message": {"content": text}, "finish_reason": "error"}
    found = {"choices": [choice | {"error": error}]} if inside else {"error": error}
    return 200, found, {}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("code", [502, None])
def test_an_answer_that_broke_off_is_asked_again(code, inside, server, tmp_path):
    server.reply = lambda body, number: failed(code, inside) if number == 0 else said("whole")
    waits: list[float] = []
    assert Resumable(model(server, waits)).answer(requests(1)) == ["whole"]
    assert waits == [1.0]


def test_an_answer_that_is_withheld_is_no_answer(server, tmp_path):
    filtered = {"message": {"content": None}, "finish_reason": "content_filter"}
    kinds = {"q1": (200, {"choices": [filtered]}, {}), "q2": failed(400, True)}
    server.reply = lambda body, number: kinds.get(question(body), said("fine"))
    around = Resumable(model(server), AnswerJournal(tmp_path))
    assert around.answer(requests(4)) == ["fine", None, None, "fine"]
    assert sorted(around.events) == [
        "t: row 2: not answered: the reply was withheld by the server's content filter",
        "t: row 3: not answered: error 400: Provider returned error",
    ]


def test_stop_strings_that_a_model_does_not_take_are_cut_here(server):
    def reply(body: dict, number: int) -> tuple:
        if "stop" in body:
            return refused(400, "Unsupported parameter: 'stop' is not supported with this model.")
        return said("yes\n\nno")

    server.reply = reply
    assert Resumable(model(server)).answer(requests(6)) == ["yes"] * 6
    assert "stop" not in server.bodies[-1]


@pytest.mark.parametrize("after", ["0", "-1"])
def test_a_server_that_says_at_once_is_given_time(after, server):
    def reply(body: dict, number: int) -> tuple:
        return refused(429, "busy", **{"Retry-After": after}) if number < 3 else said("done")

    server.reply = reply
    waits: list[float] = []
    assert Resumable(model(server, waits)).answer(requests(1)) == ["done"]
    assert waits == [1.0, 2.0, 4.0]


def test_another_concurrency_asks_nothing_again(server, tmp_path):
    for concurrency, asked in ((8, 6), (2, 0)):
        server.bodies.clear()
        made = ApiModel(Endpoint(server.url, "m"), concurrency=concurrency)
        Resumable(made, AnswerJournal(tmp_path)).answer(requests(6))
        assert len(server.bodies) == asked


def test_the_key_is_sent_and_in_no_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)

    def reply(body: dict, number: int) -> tuple:
        if question(body) == "q0":
            return refused(400, f"bad request by {KEY}")
        return said(f"I got {KEY}")

    server.reply = reply
    made = model(server, key_variable="SOME_KEY")
    around = Resumable(made, AnswerJournal(tmp_path))
    answers = around.answer(requests(3))
    assert {header["Authorization"] for header in server.headers} == {f"Bearer {KEY}"}
    told = [answers, around.events, made.provenance(), made.describe(), repr(made.endpoint)]
    told += [file.read_text() for file in tmp_path.iterdir() if file.is_file()]
    assert KEY not in repr(told) and "***" in repr(answers)
    server.reply = lambda body, number: refused(401, f"wrong key {KEY}")
    with pytest.raises(UserError, match="check the key in SOME_KEY") as error:
        Resumable(made).answer(requests(1))
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("localhost:8000,model=m", "not a web address"),
        ("http://me:pw@host/v1,model=m", "holds credentials"),
        ("http://host/v1", "names no model; expected api:URL,model=NAME"),
        ("http://host/v1,model=m,key_env=sk-abc", "not the key itself"),
        ("http://host/v1,model=m,key_env=NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE is not set"),
        ("http://host/v1,modle=m", "unknown setting 'modle'; known, nearest first: model"),
        ("http://host/v1,model=m,concurrency=0", "expected at least 1"),
        ("http://host/v1,model=m,timeout=soon", "timeout='soon' .* cannot be read"),
        ("http://host/v1,model", "is no setting"),
    ],
)
def test_what_cannot_be_used_is_one_line(text, problem):
    with pytest.raises(UserError, match=problem):
        ApiModel.from_spec(text)


def test_a_page_that_is_no_endpoint_is_one_line(server):
    server.reply = lambda body, number: (200, ["hello"], {})
    with pytest.raises(UserError, match="sent no chat completion"):
        Resumable(model(server)).answer(requests(1))


@pytest.mark.parametrize("after", ["soon", "Fri, 01 Jan 2100 00:00:00 GMT", "nan"])
def test_a_wait_that_is_no_number_is_the_usual_one(server, after):
    replies = iter([refused(529, "overloaded", **{"Retry-After": after}), said("yes")])
    server.reply = lambda body, number: next(replies)
    waits: list[float] = []
    assert Resumable(model(server, waits)).answer(requests(1)) == ["yes"]
    assert waits == [1.0]
