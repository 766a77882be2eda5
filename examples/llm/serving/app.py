"""The app: OpenAI's paths, each to what answers it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ..errors import EngineError
from ..reading.families import family_of
from .api_error import ApiError, of_findings
from .asking.bodies import ChatBody, CompletionBody, DetokenizeBody, EmbeddingsBody, TokenizeBody
from .asking.order import inputs_of, messages_of, order_of_chat, order_of_completion
from .asking.tooling import fitted, messages_for, texts_of
from .guarding.guard import Guard
from .guarding.guarded import Guarded, error_reply
from .limits import Limits
from .metrics import Metrics
from .page import page
from .replying.answering import Reply
from .replying.event_stream import EventStream, unless_left
from .replying.replies import Envelope, Json, embeddings_document, models
from .replying.sse import to_json
from .replying.writers import ChatWriter, PlainWriter
from .working.worker import Worker

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def document(content: Json) -> Response:
    """JSON."""
    return Response(to_json(content), media_type="application/json")


class Api:
    """What answers each path. Thread rules: the event loop's."""

    def __init__(self, worker: Worker, limits: Limits, metrics: Metrics) -> None:
        self._worker, self._limits, self._metrics = worker, limits, metrics
        self._created = int(time.time())

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """An answer to messages."""
        facts = self._worker.engine.facts
        order = fitted(order_of_chat(body, _owner(request)), facts.template)
        answer = await self._worker.answer(order)
        envelope = Envelope("chat.completion", facts.name, family_of(facts.template))
        texts = texts_of(order, answer.ready, facts.template)
        writer = ChatWriter(envelope, texts, logprobs=bool(body.logprobs))
        reply = Reply(answer, writer, envelope, order.n)
        return await self._reply(reply, body, request)

    async def completion(self, body: CompletionBody, request: Request) -> Response:
        """What follows a text."""
        facts = self._worker.engine.facts
        order = order_of_completion(body, _owner(request))
        answer = await self._worker.answer(order)
        writer = PlainWriter(order.count, logprobs=body.logprobs is not None)
        reply = Reply(answer, writer, Envelope("text_completion", facts.name), order.n)
        return await self._reply(reply, body, request)

    async def embeddings(self, body: EmbeddingsBody, request: Request) -> Response:
        """A vector of each input."""
        return await unless_left(self._embed(body), request.receive)

    async def _embed(self, body: EmbeddingsBody) -> Response:
        engine, inputs = self._worker.engine, inputs_of(body)
        self._limits.check_inputs(inputs)
        prompts = await self._worker.prepare(
            lambda: [engine.tokenize(one, special=True) for one in inputs]
        )
        found = await self._worker.prepare(lambda: engine.embed(prompts))
        try:
            # One by one: others have their passes between those that it takes.
            vectors = [await self._worker.run(lambda _: next(found)) for _ in prompts]
        except EngineError as error:
            raise ApiError(429, str(error), headers={"retry-after": "1"}) from error
        packed, tokens = body.encoding_format == "base64", sum(map(len, prompts))
        return document(embeddings_document(engine.facts.name, vectors, tokens, packed=packed))

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Ids of a text, or of messages in the chat template."""
        engine = self._worker.engine
        prompt: Any = body.content
        if body.messages is not None:
            prompt = messages_for(messages_of(body.messages), engine.facts.template)
        self._limits.check_prompt(prompt)
        special = bool(body.add_special)
        ids = await self._worker.prepare(lambda: engine.tokenize(prompt, special=special))
        return document({"tokens": list(ids), "count": len(ids)})

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """The text of ids."""
        engine = self._worker.engine
        self._limits.check_prompt(body.tokens)
        text = await self._worker.prepare(lambda: engine.detokenize(body.tokens))
        return document({"content": text})

    async def models(self) -> Response:
        """The one model."""
        facts = self._worker.engine.facts
        more = {"max_model_len": facts.max_length, "where": dict(facts.where)}
        return document(models(facts.name, self._created, **more))

    async def health(self) -> Response:
        """200 as soon as orders are taken."""
        _ = self._worker.engine
        return document({"status": "ok"})

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._metrics.text(), media_type=METRICS_TYPE)

    async def _reply(
        self, reply: Reply, body: ChatBody | CompletionBody, request: Request
    ) -> Response:
        def leave() -> None:
            self._worker.leave(reply.answer)

        if body.stream:
            options = body.stream_options
            reply.usage_asked = options is not None and bool(options.include_usage)
            return EventStream(reply.stream(self._limits.ping_seconds), leave, self._limits)

        async def whole() -> Response:
            return document(await reply.whole())

        try:
            return await unless_left(whole(), request.receive)
        finally:
            leave()


def _owner(request: Request) -> str:
    return str(request.scope.get("state", {}).get("owner", ""))


def make_app(
    worker: Worker, guard: Guard, limits: Limits, metrics: Metrics, *, embeddings: bool = False
) -> FastAPI:
    """The app of a worker, which it starts and closes; with ``embeddings`` it has a path for them.

    Nothing of it loads from elsewhere: it has /openapi.json, but no pages that show it.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await worker.drain(0)
            await asyncio.get_running_loop().run_in_executor(None, worker.close)

    app = FastAPI(
        title="layer-streamer", docs_url=None, redoc_url=None, redirect_slashes=False,
        lifespan=life,
    )  # fmt: skip
    api = Api(worker, limits, metrics)
    post: dict[str, Callable[..., Awaitable[Response]]] = {
        "/v1/chat/completions": api.chat, "/v1/completions": api.completion,
        "/tokenize": api.tokenize, "/detokenize": api.detokenize,
    }  # fmt: skip
    if embeddings:
        post["/v1/embeddings"] = api.embeddings
    get: dict[str, Callable[..., Awaitable[Response]]] = {
        "/v1/models": api.models,
        "/health": api.health,
        "/metrics": api.metrics,
        "/": page,
    }
    for method, paths in (("POST", post), ("GET", get)):
        for path, handler in paths.items():
            app.add_api_route(path, handler, methods=[method], response_model=None)
    _tell_errors(app)
    app.add_middleware(Guarded, guard=guard, limits=limits, hear=metrics.hear_reply)
    if guard.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(guard.origins), allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )  # fmt: skip
    return app


def _tell_errors(app: FastAPI) -> None:
    """All errors in OpenAI's shape."""

    async def of_api(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_reply(error)

    async def of_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = [{**one, "loc": one["loc"][1:]} for one in error.errors()]
        if error.body in (None, b"") or found[0]["type"] == "json_invalid":
            return error_reply(ApiError(400, "the body is not JSON", code="invalid_json"))
        return error_reply(of_findings(found, error.body))

    async def of_path(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return error_reply(ApiError(error.status_code, str(error.detail), headers=headers))

    async def of_us(_: Request, error: Exception) -> Response:
        return error_reply(ApiError(500, f"internal error ({type(error).__name__})"))

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(RequestValidationError, of_body)
    app.add_exception_handler(HTTPException, of_path)
    app.add_exception_handler(Exception, of_us)
