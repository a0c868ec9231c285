"""One request inside an engine: what a new token means for it, its text, its times, its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from orchestrator.backends.protocol import Delta, Event, Failed, Finished, Request
from orchestrator.backends.text import AnswerText


class Row:
    """One request, from its submission to its last event."""

    def __init__(self, request: Request, decode: Callable[[list[int]], str]) -> None:
        self.request = request
        self.cancelled = False
        self.done = False
        self.count = 0  # tokens made
        self.submitted = time.monotonic()
        self.started: float | None = None  # of its prefill
        self._text = AnswerText(decode, request.stop)
        self._first: float | None = None
        self._last = 0.0

    def take(self, token: int, finite: bool, ends: Collection[int]) -> list[Event]:
        """The events of one step that gave this token."""
        if self.done:
            return []
        if self.cancelled:
            return self.finish("cancelled")
        if not finite:
            self.done = True
            return [Failed(self.request.id, f"the logits of token {self.count + 1} are not finite")]
        self._last = time.monotonic()
        self._first = self._first or self._last
        self.count += 1
        ended = token in ends or token in self.request.stop_tokens
        text = "" if ended else self._text.push(token)
        if ended or self._text.stopped:
            return self.finish("stop", token, text)
        if self.count >= self.request.max_tokens:
            return self.finish("length", token, text)
        return [Delta(self.request.id, [token], text)]

    def finish(self, reason: str, token: int | None = None, text: str = "") -> list[Event]:
        """The last events: what was held back of the text, then the end."""
        self.done = True
        if not self._text.stopped:
            text += self._text.flush()
        if self._text.stopped and reason == "length":
            reason = "stop"
        tokens = [] if token is None else [token]
        last: list[Event] = [Delta(self.request.id, tokens, text)] if tokens or text else []
        return [*last, self._finished(reason)]

    def _finished(self, reason: str) -> Finished:
        now = time.monotonic()
        started = now if self.started is None else self.started
        first = now if self._first is None else self._first
        return Finished(
            self.request.id,
            reason,
            prompt_tokens=len(self.request.tokens),
            completion_tokens=self.count,
            queue_s=started - self.submitted,
            prefill_s=first - started,
            decode_s=max(0.0, self._last - first),
            ttft_s=first - self.submitted,
        )


def problem(request: Request, max_context: int, vocabulary: int) -> str:
    """Why a request cannot be answered; "" where it can."""
    if not request.tokens:
        return "the prompt is empty"
    if request.max_tokens < 1:
        return f"max_tokens is {request.max_tokens}; at least 1 is needed"
    if len(request.tokens) + request.max_tokens > max_context:
        return (
            f"{len(request.tokens)} tokens of prompt and {request.max_tokens} of answer are more than "
            f"the {max_context} of model.max_context"
        )
    # On a GPU such a token would end the whole process.
    if min(request.tokens) < 0 or max(request.tokens) >= vocabulary:
        return f"the prompt has a token outside of the vocabulary of {vocabulary}"
    if any(not 0 <= token < vocabulary for token in request.stop_tokens):
        return f"a stop token is outside of the vocabulary of {vocabulary}"
    return ""
