"""The web application: the page, /v1/models and /v1/chat/completions.

Bodies above a size and clients that send slower than a limit are refused before anything is read
into the model; a client that leaves takes its request along.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from vlmamba.serving.engine import Answer, Engine, Full, Ticket, describe
from vlmamba.serving.requests import BadRequest, ChatRequest, first, read

MEBIBYTE = 2**20
ENDPOINTS = ("GET /v1/models", "POST /v1/chat/completions")


def create_app(
    engine: Engine,
    name: str,
    max_body: int = 32 * MEBIBYTE,
    body_seconds: float = 30.0,
    answer_seconds: float = 300.0,
    default_tokens: int = 128,
    most_tokens: int = 32_768,
) -> FastAPI:
    """The application for one model.

    max_body: bytes of a request.  body_seconds: for sending it.  answer_seconds: for its answer,
    waiting included.  most_tokens: of a prompt, its pictures' included.
    """
    app = FastAPI(title=f"{name} (VL-Mamba)", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return (files("vlmamba.serving") / "page.html").read_text(encoding="utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = {"id": name, "object": "model", "created": 0, "owned_by": "vlmamba"}
        return {"object": "list", "data": [one | describe(engine)]}

    @app.get("/v1/models/{model:path}")
    async def model_named(model: str) -> Response:
        if model != name:
            return refusal(404, f"no model {model!r} here; there is {name!r}")
        return JSONResponse((await models())["data"][0])

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        return refusal(error.status_code, f"no {where} here; there are {', '.join(ENDPOINTS)}")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return refusal(500, f"the server failed: {type(error).__name__}")

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            async with asyncio.timeout(body_seconds):
                content = await _body(request, max_body)
        except TimeoutError:
            return refusal(408, f"the request was not sent within {body_seconds:.0f} s")
        except TooLarge:
            return refusal(413, f"the request is larger than {max_body // MEBIBYTE} MiB")
        try:
            asked = ChatRequest.model_validate_json(content)
            if asked.model not in (None, name):
                return refusal(404, f"no model {asked.model!r} here; there is {name!r}")
            job = await asyncio.to_thread(
                read, asked, engine.processor, default_tokens, most_tokens
            )
        except ValidationError as error:
            return refusal(400, first(error.errors(include_url=False)))
        except BadRequest as error:
            return refusal(400, str(error), error.code)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def tell(what: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(events.put_nowait, what)

        ticket = Ticket(job, tell, tell if asked.stream else None)
        try:
            engine.put(ticket)
        except Full:
            return refusal(503, "too many requests wait; try again later")
        if asked.stream:
            told = asked.stream_options is not None and asked.stream_options.include_usage
            stream = _events(ticket, events, name, engine.state_bytes if told else None)
            return StreamingResponse(stream, media_type="text/event-stream")
        answered, left = (asyncio.ensure_future(one) for one in (events.get(), _left(request)))
        try:
            done, _ = await asyncio.wait(
                (answered, left), timeout=answer_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ticket.abandoned.set()
            left.cancel()
        if answered not in done:
            answered.cancel()
            return refusal(504, f"no answer within {answer_seconds:.0f} s")
        answer = answered.result()
        if isinstance(answer, Exception):
            return refusal(500, f"the model failed: {type(answer).__name__}")
        return JSONResponse(_completion(answer, name, engine.state_bytes))

    return app


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class TooLarge(Exception):
    """A body above the limit."""


async def _body(request: Request, most: int) -> bytes:
    """The body; raises TooLarge as soon as that is known."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise TooLarge
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise TooLarge
    return bytes(content)


def refusal(status: int, reason: str, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form; code: its own word for the reason, where it has one."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(
        {"error": {"message": reason, "type": kind, "code": code or status}}, status
    )


def _completion(answer: Answer, name: str, state_bytes: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": _reason(answer)}
    return _envelope("chat.completion", name, [choice]) | _cost(answer, state_bytes)


async def _events(
    ticket: Ticket, events: asyncio.Queue[Any], name: str, state_bytes: int | None
) -> AsyncIterator[str]:
    """Server-sent events: the words as they come, the cost, then [DONE].

    state_bytes: None where the client has not asked for the cost.
    """
    kind, identity = "chat.completion.chunk", {"id": _id()}
    try:
        opening = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": opening, "finish_reason": None}
        yield _event(_envelope(kind, name, [choice]) | identity)
        while True:
            what = await events.get()
            if isinstance(what, str):
                choice = {"index": 0, "delta": {"content": what}, "finish_reason": None}
                yield _event(_envelope(kind, name, [choice]) | identity)
                continue
            if isinstance(what, Exception):
                reason = f"the model failed: {type(what).__name__}"
                yield _event({"error": {"message": reason, "type": "server_error", "code": 500}})
            else:
                choice = {"index": 0, "delta": {}, "finish_reason": _reason(what)}
                yield _event(_envelope(kind, name, [choice]) | identity)
                if state_bytes is not None:
                    cost = _cost(what, state_bytes)
                    yield _event(_envelope(kind, name, []) | identity | cost)
            yield "data: [DONE]\n\n"
            return
    finally:  # also when the client has left
        ticket.abandoned.set()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _envelope(kind: str, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    created = int(time.time())
    return {"id": _id(), "object": kind, "created": created, "model": name, "choices": choices}


def _id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex[:24]}"


def _reason(answer: Answer) -> str:
    return "stop" if answer.ended else "length"


def _cost(answer: Answer, state_bytes: int) -> dict[str, Any]:
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": total,
        },
        "seconds": round(answer.seconds, 4),
        "state_bytes": state_bytes,
    }
