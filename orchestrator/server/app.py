"""The routes: OpenAI's chat completions and completions, the list of models, and health."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.backends.protocol import Delta, Finished
from orchestrator.errors import OrchestratorError
from orchestrator.server.broker import AbandonedError, Broker, Ticket
from orchestrator.server.errors import body_of, error_body, status_of
from orchestrator.server.prepare import ServedModel, check_model, engine_request
from orchestrator.server.replies import DONE, Reply, sse
from orchestrator.server.types import ChatRequest, CompletionRequest

MAX_BODY = 64 << 20  # bytes: more than the longest context's text, less than what would hurt
CLIENT_GONE = 499  # nobody reads it


def create_app(model: ServedModel, broker: Broker, api_key: str | None) -> FastAPI:
    """The application. The broker has to be started on the event loop that serves it."""
    # Nothing is reported to anybody, also where the environment would set that up.
    silent: Any = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(openapi_url=None, telemetry=silent)
    app.add_middleware(Gate, key=api_key)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)

    created = int(time.time())

    @app.get("/health")
    async def health() -> JSONResponse:
        if broker.error is not None:
            return JSONResponse({"status": "error", "error": str(broker.error)}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = {"id": model.name, "object": "model", "created": created, "owned_by": "orchestrator"}
        return {"object": "list", "data": [{**served, "max_model_len": model.max_context}]}

    @app.post("/v1/chat/completions", max_body_size=MAX_BODY)
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await answer(body, http)

    @app.post("/v1/completions", max_body_size=MAX_BODY)
    async def complete(body: CompletionRequest, http: Request) -> Response:
        return await answer(body, http)

    async def answer(body: ChatRequest | CompletionRequest, http: Request) -> Response:
        check_model(model, body.model)
        ticket = await broker.open(partial(engine_request, model, body))
        reply = Reply(ticket.name, model.name, isinstance(body, ChatRequest), body.usage_in_stream)
        return AnswerStream(ticket, reply) if body.stream else await _whole(ticket, reply, http)

    return app


async def _whole(ticket: Ticket, reply: Reply, http: Request) -> Response:
    """The answer in one piece; a client that goes away meanwhile ends it in the engine."""
    watch = asyncio.create_task(_close_when_gone(ticket, http))
    texts: list[str] = []
    try:
        async for event in ticket:
            match event:
                case Delta(text=text):
                    texts.append(text)
                case Finished():
                    return JSONResponse(reply.whole("".join(texts), event))
    except AbandonedError:
        pass
    finally:
        watch.cancel()
        ticket.close()
    return Response(status_code=CLIENT_GONE)


async def _close_when_gone(ticket: Ticket, http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    ticket.close()


class AnswerStream(StreamingResponse):
    """The answer as server-sent events; a client that goes away ends it in the engine."""

    def __init__(self, ticket: Ticket, reply: Reply) -> None:
        # Proxies would collect the events otherwise.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(ticket, reply), headers=headers, media_type="text/event-stream")
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the generator: one that was never begun runs no finally
            self._ticket.close()


async def _events(ticket: Ticket, reply: Reply) -> AsyncIterator[str]:
    if first := reply.first():
        yield sse(first)
    try:
        async for event in ticket:
            match event:
                case Delta(text=text):
                    if text:
                        yield sse(reply.words(text))
                case Finished():
                    for chunk in reply.last(event):
                        yield sse(chunk)
                    yield DONE
    except OrchestratorError as error:  # the status has been sent: the stream says it, and has no [DONE]
        yield sse(body_of(error))


class Gate:
    """Refuses what comes without the key, or is far too long, before its body is read. /health is open."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["path"] != "/health" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            message = "the API key is wrong or missing; send the header Authorization: Bearer KEY"
            return _error(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        # The framework's own limit, which also counts what comes without a length, does not answer in OpenAI's way.
        if int(headers.get(b"content-length", 0)) > MAX_BODY:
            return _error(413, f"the body is longer than {MAX_BODY} bytes")
        return None


def _error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status, headers)


async def _on_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, OrchestratorError)
    return JSONResponse(body_of(error), status_of(error))


async def _on_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{http.method} {http.url.path}: {error.detail}", headers=error.headers)


async def _on_bug(http: Request, error: Exception) -> Response:
    return _error(500, f"internal error: {type(error).__name__}")  # the traceback is in run.log


async def _on_invalid(http: Request, error: Exception) -> Response:
    """A body that is not as the types say: every problem in the message, the first one's parameter in `param`."""
    assert isinstance(error, RequestValidationError)
    problems = [_problem(problem) for problem in error.errors()]
    param, code, _ = problems[0]
    return _error(400, "; ".join(dict.fromkeys(message for _, _, message in problems)), param, code)


def _problem(problem: Mapping[str, Any]) -> tuple[str | None, str, str]:
    """The parameter, the code and the message of one of pydantic's errors."""
    context = problem.get("ctx", {})
    names = [part for part in problem["loc"] if part != "body"]
    param = context.get("param") or "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in names)[1:]
    match problem["type"]:
        case "extra_forbidden":
            return param, "unknown_parameter", f"{param} is not a parameter that is known here"
        case "unsupported_parameter" | "invalid_value":
            return param, problem["type"], problem["msg"]
        case "json_invalid":
            return None, "invalid_json", f"the body is not JSON: {context.get('error', '')}"
        case _ if not param:
            return None, "invalid_json", "the body is not a JSON object (with Content-Type: application/json)"
        case "value_error":
            return param, "invalid_value", f"{param} {context['error']}"
    return param, "invalid_value", f"{param}: {problem['msg']}"


HANDLERS = {
    OrchestratorError: _on_error,
    HTTPException: _on_http_error,
    RequestValidationError: _on_invalid,
    Exception: _on_bug,
}
