"""A model behind an OpenAI-compatible endpoint (vLLM, SGLang, transformers serve, an API).

    python -m harness.run --tasks pope --model api:http://localhost:8000/v1,model=llava

Images go along as PNG in data: URLs; the server's own template stands around a question.  Several
requests are under way at a time.  A request that the server refuses (HTTP 4xx) is counted with the
server's reason.  Settings: model, key_env (the environment variable with the key), timeout
(seconds), concurrency.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from harness.models import spec
from harness.models.base import EvalModel, Limits, OnDone, Picture, Request
from harness.models.endpoint import Endpoint, Refused, Reply
from harness.models.registry import ModelOptions
from vlmamba_core.errors import UserError

CONCURRENCY = 8  # requests under way at a time
MOST_STOPS = 4  # OpenAI's limit; the answer is cut at the others here
SETTINGS: spec.Settings = {"model": str, "key_env": str, "timeout": float, "concurrency": int}


def load(name: str, options: ModelOptions) -> EvalModel:
    """The model at URL,model=NAME,... . Raises UserError."""
    options.refuse(
        "api", "revision", "device", "dtype", "backend", "blind", "temperature", "quantize"
    )
    if options.template is not None:
        raise UserError(
            "--template: an api: server puts its own template around a question; start it with "
            "another (vLLM: --chat-template)"
        )
    return ApiModel.from_spec(name)


class ApiModel(EvalModel):
    """Answers of a server at temperature 0. Raises UserError for an address that is none."""

    depends_on_batch = False  # how many are under way is not what the server is told

    def __init__(self, endpoint: Endpoint, concurrency: int = CONCURRENCY) -> None:
        if concurrency < 1:
            raise UserError(f"concurrency={concurrency}; expected at least 1")
        endpoint.authorization()  # a key that is missing is told before anything is sent
        self.endpoint, self.batch_size = endpoint, concurrency
        self.name = f"{endpoint.model} at {endpoint.url}"

    @classmethod
    def from_spec(cls, text: str) -> ApiModel:
        """URL,model=NAME[,key_env=VAR][,timeout=SECONDS][,concurrency=N]."""
        url, found = spec.read(text, SETTINGS)
        if not found.get("model"):
            raise UserError(f"api:{text} names no model; expected api:URL,model=NAME")
        endpoint = Endpoint(
            url, found["model"], found.get("key_env"), timeout_s=found.get("timeout", 120.0)
        )
        return cls(endpoint, found.get("concurrency", CONCURRENCY))

    def provenance(self) -> dict[str, Any]:
        """The address and the model's name: what is behind them is the server's affair."""
        return {"url": self.endpoint.url, "model": self.endpoint.model, "images": "png"}

    def describe(self) -> dict[str, Any]:
        """Where the answers came from."""
        return {"endpoint": self.provenance(), "template": {"name": "the server's"}}

    def answer(
        self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done: OnDone
    ) -> None:
        """Ask for all, `batch_size` at a time.

        Raises UserError where the server cannot be used (any more); what has come by then is kept.
        """
        urls: dict[str, str] = {}
        with ThreadPoolExecutor(batch_size) as pool:
            going: dict[Future[Reply], int] = {}
            try:
                for index, request in enumerate(requests):
                    if len(going) >= batch_size:
                        self._take(going, on_done)
                    messages = _messages(request, urls)
                    going[pool.submit(self._ask, messages, limits)] = index
                while going:
                    self._take(going, on_done)
            except BaseException:
                self._take_finished(going, on_done)
                raise

    def generate_tokens(self, request: Request, new_tokens: int) -> int | None:
        """Ask for an answer of up to `new_tokens`; how many came, where the server says."""
        messages = _messages(request, {})
        return self.endpoint.chat(messages, new_tokens).tokens

    def _ask(self, messages: list[dict[str, Any]], limits: Limits) -> Reply:
        stop = limits.until[:MOST_STOPS]
        return self.endpoint.chat(messages, limits.max_new_tokens, stop)

    def _take(self, going: dict[Future[Reply], int], on_done: OnDone) -> None:
        """Wait for at least one reply and hand on what there is."""
        done, _ = wait(going, return_when=FIRST_COMPLETED)
        failed: BaseException | None = None
        for future in done:
            index = going.pop(future)
            error = future.exception()
            if isinstance(error, Refused):
                on_done(index, None, str(error))
            elif error is not None:
                failed = error
            else:
                on_done(index, future.result().text)
        if failed is not None:
            raise failed

    def _take_finished(self, going: dict[Future[Reply], int], on_done: OnDone) -> None:
        """After a failure: wait for what is under way and keep the answers that come of it."""
        for future in going:
            future.cancel()
        for future, index in going.items():
            if not future.cancelled() and future.exception() is None:
                on_done(index, future.result().text)


def _messages(request: Request, urls: dict[str, str]) -> list[dict[str, Any]]:
    """One user's turn: the pictures, then the question. urls: by picture, filled here."""
    content: list[dict[str, Any]] = []
    for picture in request.pictures:
        if picture.key not in urls:
            urls[picture.key] = _data_url(picture)
        content.append({"type": "image_url", "image_url": {"url": urls[picture.key]}})
    if not content:
        return [{"role": "user", "content": request.prompt}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": request.prompt}]}]


def _data_url(picture: Picture) -> str:
    file = io.BytesIO()
    picture.image.convert("RGB").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
