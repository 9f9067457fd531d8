"""The local server, with real clients over a socket: right answers, or errors that say why."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from test_wrapped_language_model import FAMILIES
from tiny import TINY_CLIP
from transformers import AutoConfig

from vlmamba import checkpoints, serve
from vlmamba.config import VLMambaConfig
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.serving.engine import Answer, Engine, Ticket
from vlmamba.serving.requests import Job
from vlmamba_core.errors import UserError

fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

QUESTIONS = ("Is there a dog in the image?", "Describe the image.", "How many cars are there?")
LIMIT = 16


def png(seed: int) -> bytes:
    file = io.BytesIO()
    colors = [(seed * 40 % 256, 90, 200), (200, seed * 70 % 256, 30)]
    image = Image.new("RGB", (96, 64), colors[0])
    image.paste(colors[1], (10, 10, 40 + seed, 50))
    image.save(file, "PNG")
    return file.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def body(question: str, *pictures: bytes, **more) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url(data)}} for data in pictures]
    content = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": LIMIT, **more}


@pytest.fixture(scope="module")
def loaded():
    return checkpoints.load("nano")


@pytest.fixture(scope="module")
def address(loaded) -> Iterator[str]:
    from vlmamba.serving.app import create_app
    from vlmamba.serving.engine import Engine

    engine = Engine(*loaded)
    app = create_app(engine, "nano", body_seconds=1.0)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
    engine.close()


def expected(loaded, question: str, *pictures: bytes) -> str:
    """The answer of the harness's generator, one at a time."""
    images = [Image.open(io.BytesIO(data)) for data in pictures]
    prompt = loaded[1].conversation_prompt(question, len(pictures))
    request = Request(prompt, "x" if images else None, images or None)
    return GroupedGenerator(*loaded).generate([request], LIMIT, 1)[0]


def test_openais_own_client_whole_and_streamed(address, loaded):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["nano"]
    for question in QUESTIONS:
        asked = {"model": "nano", **body(question, png(1))}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == expected(loaded, question, png(1))
        assert whole.usage is not None and whole.usage.completion_tokens > 0
        pieces = client.chat.completions.create(**asked, stream=True)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == whole.choices[0].message.content


def test_two_hundred_at_once_are_answered_rightly(address, loaded):
    asked = [(QUESTIONS[n % 3], png(n % 7)) for n in range(200)]
    right = {pair: expected(loaded, *pair) for pair in set(asked)}
    assert len(set(right.values())) > 3  # a mix-up would show
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(timeout=120, limits=limits) as client, ThreadPoolExecutor(200) as pool:

        def ask(pair: tuple[str, bytes]) -> str:
            response = client.post(f"{address}/v1/chat/completions", json=body(*pair))
            return response.json()["choices"][0]["message"]["content"]

        answers = list(pool.map(ask, asked))
    assert answers == [right[pair] for pair in asked]


def test_rounds_several_pictures_and_none(address, loaded):
    two = httpx.post(f"{address}/v1/chat/completions", json=body(QUESTIONS[1], png(1), png(2)))
    content = two.json()["choices"][0]["message"]["content"]
    assert content == expected(loaded, QUESTIONS[1], png(1), png(2))
    none = httpx.post(f"{address}/v1/chat/completions", json=body("Is grass green?"))
    content = none.json()["choices"][0]["message"]["content"]
    assert content == expected(loaded, "Is grass green?")
    rounds = body(QUESTIONS[0], png(1))
    rounds["messages"] += [
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    assert httpx.post(f"{address}/v1/chat/completions", json=rounds).status_code == 200


def test_sampling_follows_its_seed_and_stop_strings_cut(address, loaded):
    sampled = body(QUESTIONS[1], png(3), temperature=1.5, seed=3)
    answers = [
        httpx.post(f"{address}/v1/chat/completions", json=sampled).json()["choices"][0]
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    whole = expected(loaded, QUESTIONS[1], png(3))
    first, second = whole.split()[:2]
    # the second begins before its last word is known
    cases = [(stop, stream) for stop in (second, f"{first} {second}") for stream in (False, True)]
    for stop, stream in cases:
        asked = body(QUESTIONS[1], png(3), stop=[stop], stream=stream)
        response = httpx.post(f"{address}/v1/chat/completions", json=asked)
        if stream:
            lines = [x[6:] for x in response.text.split("\n\n") if x and "[DONE]" not in x]
            chunks = [json.loads(line)["choices"][0] for line in lines]
            text = "".join(c["delta"].get("content", "") for c in chunks)
        else:
            text = response.json()["choices"][0]["message"]["content"]
        assert text.rstrip() == whole[: whole.index(stop)].rstrip()


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last message"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "'image_url'"),
        ({"stream_options": {"include_usage": "perhaps"}}, 400, "stream_options.include_usage"),
        ({"messages": [{"role": "developer", "content": "x"}]}, 400, "the last message"),
        ({"n": 2}, 400, "n is not supported"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "without content"),
        ({"repetition_penalty": 1.5}, 400, "repetition_penalty is not supported"),
        ({"ignore_eos": True, "min_tokens": 4}, 400, "is not supported"),
        ({"seed": 2**64}, 400, "seed"),
        ({"temperature": 1e-40}, 200, ""),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"model": "gpt"}, 404, "no model 'gpt'"),
        ({"anything": {"else": 1}}, 200, ""),
    ],
)
def test_odd_fields(address, change, status, reason):
    asked = body("Is it?", png(0)) | change
    response = httpx.post(f"{address}/v1/chat/completions", json=asked)
    assert response.status_code == status
    if status != 200:
        assert reason in response.json()["error"]["message"]


def streamed(address: str, asked: dict) -> tuple[list[dict], str]:
    """The events of a stream, and the words in them."""
    response = httpx.post(f"{address}/v1/chat/completions", json=asked | {"stream": True})
    *lines, last = [line[6:] for line in response.text.split("\n\n") if line]
    assert last == "[DONE]"
    events = [json.loads(line) for line in lines]
    words = [c["delta"].get("content", "") for event in events for c in event["choices"]]
    return events, "".join(words)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stream_counts_and_ends_as_the_whole_answer_does(question, address):
    """At the limit too, and where the answer has exactly as many tokens as are allowed."""
    where = f"{address}/v1/chat/completions"
    asked = body(question, png(4)) | {"stream_options": {"include_usage": True}}
    made = httpx.post(where, json=asked).json()["usage"]["completion_tokens"]
    for limit in {1, max(1, made - 1), made, made + 1}:
        asked["max_tokens"] = limit
        whole = httpx.post(where, json=asked).json()
        events, text = streamed(address, asked)
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text == whole["choices"][0]["message"]["content"]
        reason = whole["choices"][0]["finish_reason"]
        assert events[-2]["choices"][0]["finish_reason"] == reason
        assert (events[-1]["choices"], events[-1]["usage"]) == ([], whole["usage"])
        assert whole["usage"]["completion_tokens"] == min(limit, made)
        assert reason == ("stop" if limit > made else "length")
    del asked["stream_options"]
    assert not [event for event in streamed(address, asked)[0] if "usage" in event]


def test_a_streamed_request_makes_its_tensors_where_the_model_is(tokenizer):
    """What names no device is made elsewhere here, as it is beside a model on a GPU."""
    from vlmamba.serving.engine import Engine, Ticket
    from vlmamba.serving.requests import Job

    class Elsewhere(Engine):
        def _one(self, ticket):
            with torch.device("meta"):
                return super()._one(ticket)

    text = AutoConfig.for_model("llama", **FAMILIES["llama"] | {"vocab_size": 320})
    config = VLMambaConfig(text_config=text, vision_config=dict(TINY_CLIP))
    model = VLMambaForConditionalGeneration(config).eval()
    processor = VLMambaProcessor.from_config(config, tokenizer)
    request = Request(processor.conversation_prompt("Is grass green?", 0))
    ended: queue.Queue = queue.Queue()
    engine = Elsewhere(model, processor)
    for temperature in (0.0, 1.0):
        job = Job(request, 4, temperature, seed=1)
        engine.put(Ticket(job, ended.put, on_text=lambda text: None))
        answer = ended.get(timeout=60)
        assert not isinstance(answer, Exception), answer
    engine.close()
    assert answer.completion_tokens


def test_a_stop_string_is_the_reason_even_at_the_limit(address, loaded):
    first = expected(loaded, QUESTIONS[1], png(3)).split()[0]
    asked = body(QUESTIONS[1], png(3), stop=[first[-1]]) | {"max_tokens": 3}
    whole = httpx.post(f"{address}/v1/chat/completions", json=asked).json()["choices"][0]
    assert whole["finish_reason"] == "stop"


def test_what_a_stop_string_cuts_off_is_not_counted(address, loaded):
    """As many tokens as a stream has taken when it sees the string, which ends both."""
    whole = expected(loaded, QUESTIONS[1], png(3))
    asked = body(QUESTIONS[1], png(3), stop=[whole.split()[2]])
    asked["stream_options"] = {"include_usage": True}
    answer = httpx.post(f"{address}/v1/chat/completions", json=asked).json()
    events, text = streamed(address, asked)
    assert answer["choices"][0]["message"]["content"] == text.rstrip() != whole
    assert answer["usage"] == events[-1]["usage"]
    assert answer["usage"]["completion_tokens"] < LIMIT


def test_a_client_that_leaves_takes_its_request_along(loaded):
    """Whole answers as streamed ones: nobody behind it waits for what nobody wants."""
    from starlette.requests import Request as Asked

    from vlmamba.serving.app import create_app

    class Kept:
        def __init__(self) -> None:
            self.tickets: list[Ticket] = []

        processor, state_bytes = loaded[1], 0

        def put(self, ticket: Ticket) -> None:
            self.tickets.append(ticket)

    engine = Kept()
    app = create_app(engine, "nano")
    content = json.dumps(body("Is it?")).encode()
    told: list[dict] = [{"type": "http.request", "body": content, "more_body": False}]
    told.append({"type": "http.disconnect"})
    scope = {"type": "http", "method": "POST", "headers": [], "path": "/v1/chat/completions"}

    async def receive() -> dict:
        return told.pop(0)

    endpoint = next(r.endpoint for r in app.routes if r.path == "/v1/chat/completions")
    asyncio.run(endpoint(Asked(scope, receive)))
    assert [ticket.abandoned.is_set() for ticket in engine.tickets] == [True]


def test_what_was_left_is_not_answered_even_where_it_was_taken_from_the_queue(loaded):
    engine = Engine(*loaded)
    ends: list[Answer | Exception] = []
    left = Ticket(Job(Request("hello"), 4), ends.append)
    left.abandoned.set()
    engine._answer([left, Ticket(Job(Request("hello"), 4), ends.append)])
    engine.close()
    assert len(ends) == 1 and isinstance(ends[0], Answer)


@pytest.mark.parametrize(
    ("size", "reason"),
    [((2_000_000, 1), "padded to a square"), ((8000, 8000), "of more than 50000000 pixels")],
)
def test_a_small_file_of_a_huge_picture_is_refused_before_it_is_decoded(address, size, reason):
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    response = httpx.post(f"{address}/v1/chat/completions", json=body("Is it?", file.getvalue()))
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_so_are_many_large_ones(monkeypatch, loaded):
    from vlmamba.serving import requests

    monkeypatch.setattr(requests, "MAX_SQUARES", 2 * 96 * 96)
    asked = requests.ChatRequest.model_validate(body("Which?", png(1), png(2)))
    assert len(requests.read(asked, loaded[1], 8, 4096).request.pictures) == 2
    asked = requests.ChatRequest.model_validate(body("Which?", png(1), png(2), png(3)))
    with pytest.raises(requests.BadRequest, match="padded to a square"):
        requests.read(asked, loaded[1], 8, 4096)


@pytest.mark.parametrize("words", [40_000, 4_000_000])
def test_a_prompt_beyond_the_limit_is_refused(address, words):
    response = httpx.post(f"{address}/v1/chat/completions", json=body("ha " * words), timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "more than 32768 tokens" in error["message"]


def test_a_message_may_be_a_picture_alone(address):
    asked = body("What is this?")
    picture = {"type": "image_url", "image_url": {"url": url(png(1))}}
    for first in ([picture], [{"type": "text", "text": ""}, picture]):
        messages = [{"role": "user", "content": first}, *asked["messages"]]
        response = httpx.post(f"{address}/v1/chat/completions", json=asked | {"messages": messages})
        assert response.status_code == 200


def test_an_earlier_turn_may_have_no_words(address):
    asked = body("What is this?", png(1))
    asked["messages"].insert(0, {"role": "assistant", "content": None})
    asked["messages"].insert(0, {"role": "user", "content": "hello"})
    for part in asked["messages"][-1]["content"]:
        part.setdefault("text", None)
    assert httpx.post(f"{address}/v1/chat/completions", json=asked).status_code == 200


def test_pictures_in_every_form_of_a_data_url(address):
    one = base64.b64encode(png(1)).decode()
    forms = [
        f"data:image/png;charset=utf-8;base64,{one}",
        f"data:image/PNG;BASE64,{one}",
        "data:image/png;base64," + base64.encodebytes(png(1)).decode(),
    ]
    where, found = f"{address}/v1/chat/completions", set()
    for link in [url(png(1)), *forms]:
        asked = body("Describe.")
        asked["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": link}})
        found.add(httpx.post(where, json=asked).json()["choices"][0]["message"]["content"])
    assert len(found) == 1


def test_what_the_server_itself_does_wrong_is_said_in_openais_form(loaded):
    from fastapi.testclient import TestClient

    from vlmamba.serving.app import create_app

    class Broken:
        processor, state_bytes = loaded[1], 0

        def put(self, ticket: Ticket) -> None:
            raise RuntimeError("inner words")

    client = TestClient(create_app(Broken(), "nano"), raise_server_exceptions=False)
    response = client.post("/v1/chat/completions", json=body("Is it?"))
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed: RuntimeError"


def test_what_is_not_here_is_said_in_openais_form(address):
    for method, path in (("POST", "/v1/completions"), ("POST", "/v1/responses"), ("GET", "/x")):
        response = httpx.request(method, f"{address}{path}", json={})
        assert response.status_code == 404
        message = response.json()["error"]["message"]
        assert message.startswith(f"no {method} {path} here; there are GET /v1/models")
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{address}/v1/models/nano").json()["id"] == "nano"
    other = httpx.get(f"{address}/v1/models/gpt")
    assert other.status_code == 404 and "there is 'nano'" in other.json()["error"]["message"]


def test_developer_is_another_word_for_system(address):
    where, found = f"{address}/v1/chat/completions", []
    for role in ("system", "developer"):
        asked = body(QUESTIONS[1], png(2))
        asked["messages"].insert(0, {"role": role, "content": "You are a poet."})
        found.append(httpx.post(where, json=asked).json()["choices"][0]["message"]["content"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("/etc/passwd", "others are not opened"),
        ("file:///etc/passwd", "others are not opened"),
        ("http://127.0.0.1:9/a.png", "others are not opened"),
        ("data:image/png;base64,???", "not base64"),
        ("data:image/png;base64,\u00e9\u00e9", "not base64"),
        (url(b"no picture"), "cannot be read"),
        (url(png(1)[:60]), "cannot be read"),
    ],
)
def test_pictures_that_are_none(address, link, reason):
    asked = body("Is it?")
    asked["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": link}})
    response = httpx.post(f"{address}/v1/chat/completions", json=asked)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_bodies_that_are_no_json_too_large_or_too_slow(address):
    where = f"{address}/v1/chat/completions"
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"messages": ' + b"[" * 100_000):
        assert httpx.post(where, content=content).status_code == 400
    large = httpx.post(where, content=iter([bytes(2**20)] * 50))  # no length given beforehand
    assert large.status_code == 413
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        )
        assert b"408" in slow.recv(4096).split(b"\r\n")[0]


def test_the_page_loads_nothing_from_elsewhere(address):
    page = httpx.get(address).text
    assert "Drop a picture" in page
    assert "http://" not in page and "https://" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port must be at least 1"),
        (["--dtype", "int8"], "unknown dtype 'int8'; known, nearest first: auto"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert serve.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_what_may_begin_a_stop_string_is_held_back():
    job = Job(Request("hello"), 8, stop=("Question:", "\n\n"))
    assert job.sure("a cat\nQuest") == "a cat\n"
    assert job.sure("a cat\n") == "a cat"
    assert job.sure("a cat Questions") == "a cat Questions"
    long = Job(Request("hello"), 8, stop=("cat" * 10**6,))
    started = time.process_time()
    for _ in range(100):
        assert long.sure("a cat") == "a "
    assert time.process_time() - started < 1  # of the text's length, not of the string's


def test_a_client_cannot_bring_a_tag_in_the_pieces_of_another(address):
    asked = body("a <im<image>age> here?", png(3))
    assert httpx.post(f"{address}/v1/chat/completions", json=asked).status_code == 200


def test_one_request_that_fails_spoils_no_other_one(loaded):
    engine = Engine(*loaded)
    ends: list[Answer | Exception] = []
    for prompt in ("hello", "<image> is none"):
        asked = Ticket(Job(Request(prompt), 4), ends.append)
        engine._answer([asked, asked] if prompt == "hello" else [asked])
    assert [type(end) for end in ends] == [Answer, Answer, UserError]
    ends.clear()
    together = [Ticket(Job(Request(p), 4), ends.append) for p in ("hello", "<image> is none")]
    engine._answer(together)
    assert [type(end) for end in ends] == [Answer, UserError]
    engine.close()


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_the_page_keeps_each_conversation_to_itself():
    """One question at a time; "New" ends the answer; what broke off is no answer."""
    page = files("vlmamba.serving") / "page.html"
    script = Path(__file__).with_name("page.js")
    done = subprocess.run(["node", script, page], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        ["asked", 1, True],
        ["after New", "", False],
        ["broken off", ""],
        ["answered", "user assistant", False],
        ["pictures", "1 1 1 1", "messages", "1 1 1 3"],
    ]
