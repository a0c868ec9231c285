"""Tokens to text, one at a time: whole characters only, and nothing of a stop string.

Not tokenizers' DecodeStream, which works in the same way: with byte-fallback vocabularies it raises "Invalid prefix"
as soon as a model writes bytes that are no character, and slow tokenizers have no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"  # what decoders give for a part of a character


class Detokenizer:
    """The text of a growing list of tokens; in the end it is `decode` of the whole list.

    Only where a byte-fallback decoder takes back a character, because later bytes make its run invalid, what was
    shown stays.

    Args:
        decode: the tokenizer's own decoding, without special tokens and without cleaning up spaces.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []  # the last that gave text (decoders look at neighbours), then the pending
        self._read = 0  # how many of them have been shown
        self._shown = ""  # and their text

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(_HALF) or len(text) <= len(self._shown):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """The text of what is still pending: the answer is over."""
        return self._show(self._decode(self._tokens))

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        self._shown = self._decode(self._tokens)
        return new


class StopFilter:
    """Ends a text before the first of its stop strings; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """What can be shown now. After a hit nothing can."""
        if self.hit:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        # The one that is complete first, so that the pieces in which the text comes make no difference.
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.hit = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back: the answer is over without a hit."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class AnswerText:
    """One answer's text as it is shown: a Detokenizer behind a StopFilter."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._filter = StopFilter(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.hit

    def push(self, token: int) -> str:
        """The text to show after one more token."""
        return self._filter.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """The rest of the text: the answer is over."""
        return self._filter.push(self._detokenizer.flush()) + self._filter.flush()
