"""The objects that clients get: OpenAI's, whole and in chunks."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from orchestrator.backends.protocol import Finished

DONE = "data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> str:
    """One server-sent event. JSON escapes line ends, so that it is one line."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(end: Finished) -> dict[str, int]:
    """The counts of tokens of one answer."""
    total = end.prompt_tokens + end.completion_tokens
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": total,
    }


@dataclass(frozen=True)
class Reply:
    """One answer's identity, from which the objects of either route are made."""

    name: str
    model: str
    chat: bool
    with_usage: bool = False  # in a stream: after the last chunk
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        """The answer in one piece."""
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {**self._head(""), "choices": [_choice(content, end.reason)], "usage": usage(end)}

    def first(self) -> dict[str, Any] | None:
        """The chunk before the first word; only chats have one."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self.chat else None

    def words(self, text: str) -> dict[str, Any]:
        """A chunk with more of the answer."""
        return self._chunk({"delta": {"content": text}} if self.chat else {"text": text}, None)

    def last(self, end: Finished) -> list[dict[str, Any]]:
        """The chunk with the reason of the end and, where it was asked for, the one with the usage."""
        chunks = [self._chunk({"delta": {}} if self.chat else {"text": ""}, end.reason)]
        if self.with_usage:
            chunks.append({**self._head(".chunk"), "choices": [], "usage": usage(end)})
        return chunks

    def _chunk(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        chunk = {**self._head(".chunk"), "choices": [_choice(content, reason)]}
        return {**chunk, "usage": None} if self.with_usage else chunk

    def _head(self, suffix: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", f"chat.completion{suffix}") if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.name}", "object": kind, "created": self.created, "model": self.model}


def _choice(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}
