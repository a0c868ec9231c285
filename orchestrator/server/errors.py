"""The server's own errors, and the body that every error has: OpenAI's."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import OrchestratorError, RequestError


class ParameterError(RequestError):
    """One parameter of a request is wrong.

    Args:
        param: its name.
        code: OpenAI's word for what is wrong with it.
        status: the HTTP status.
    """

    def __init__(self, message: str, param: str, code: str, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class ServerStoppingError(OrchestratorError):
    """The server was told to stop before the answer was finished."""


def status_of(error: OrchestratorError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, ParameterError):
        return error.status
    if isinstance(error, ServerStoppingError):
        return 503
    return 400 if isinstance(error, RequestError) else 500


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What a client gets in place of an answer."""
    # What a client sent may be in the message, and JSON can send what UTF-8 cannot.
    message, param = _utf8(message), None if param is None else _utf8(param)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _utf8(text: str) -> str:
    return text.encode(errors="replace").decode()


def body_of(error: OrchestratorError) -> dict[str, Any]:
    """An error of ours as a client gets it."""
    param, code = (error.param, error.code) if isinstance(error, ParameterError) else (None, None)
    return error_body(status_of(error), str(error), param, code)
