"""The messages between the parent and an engine's process: length-prefixed JSON over a socket.

A message is a frozen dataclass; on the wire it is `{"is": its class, its fields...}` behind four bytes of length.
Standard library only: the child runs this file in the interpreter of any engine.

Floats that are not finite survive: both ends are Python's json, which writes and reads `NaN`, `Infinity` and
`-Infinity` (a score of a masked token is -inf, and a broken engine's NaN must reach whoever checks for it).
"""

from __future__ import annotations

import json
import struct
import threading
from dataclasses import dataclass
from socket import socket
from typing import Any, get_args, get_origin, get_type_hints

from orchestrator.backends.protocol import (
    Delta,
    Event,
    Failed,
    Finished,
    LoadPlan,
    Request,
    Score,
    Stats,
)

_LENGTH = struct.Struct(">I")
_TAG = "is"  # no field has this name
MAX_BYTES = 1 << 30  # of one message; a longer one is a damaged stream


class WireError(ValueError):
    """Bytes that are not a message of ours."""


# --- commands: parent to child


@dataclass(frozen=True)
class Load:
    """The first command. `adapter` is "module:Class"."""

    plan: LoadPlan
    adapter: str


@dataclass(frozen=True)
class Submit:
    request: Request


@dataclass(frozen=True)
class Cancel:
    id: str


@dataclass(frozen=True)
class ScoreTokens:
    id: int
    tokens: list[int]
    top_k: int


@dataclass(frozen=True)
class GetStats:
    pass


@dataclass(frozen=True)
class Close:
    pass


# --- reports: child to parent


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of the start are behind; `what` runs now."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """Loaded, checked and warm. `placement`: device -> bytes that really lie there; times in seconds."""

    placement: dict[str, int]
    load_s: float
    smoke_s: float
    warmup_s: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Events:
    events: list[Event]


@dataclass(frozen=True)
class Scored:
    id: int
    score: Score


@dataclass(frozen=True)
class StatsReport:
    stats: Stats


@dataclass(frozen=True)
class Fatal:
    """The child's last report. `kind`: the exception's class; `message`: one line; `hint`: what to do about it."""

    kind: str
    message: str
    hint: str
    traceback: str


Command = Load | Submit | Cancel | ScoreTokens | GetStats | Close
Report = Progress | Ready | Events | Scored | StatsReport | Fatal
Message = Command | Report

_PARTS = (LoadPlan, Request, Delta, Finished, Failed, Score, Stats)
_KINDS: dict[str, type[Any]] = {c.__name__: c for c in (*get_args(Command), *get_args(Report), *_PARTS)}


def _to_rebuild(hint: Any) -> bool:
    """True where JSON loses the type: a tuple, one of our dataclasses. A dict is the user's and stays as it is."""
    if get_origin(hint) is dict:
        return False
    return hint in _KINDS.values() or get_origin(hint) is tuple or any(map(_to_rebuild, get_args(hint)))


_HINTS = {
    cls: {name: hint for name, hint in get_type_hints(cls).items() if _to_rebuild(hint)} for cls in _KINDS.values()
}


def _plain(value: Any) -> Any:
    nested = _HINTS.get(type(value))
    if nested is not None:
        plain = {_TAG: type(value).__name__, **vars(value)}  # this runs for each token: no copy of what is flat
        for name in nested:
            plain[name] = _plain(plain[name])
        return plain
    if isinstance(value, list | tuple) and value and type(value[0]) in _HINTS:
        return [_plain(item) for item in value]
    return value


def _rebuild(hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        item = get_args(hint)[0]
        items = [_rebuild(item, v) for v in value] if _to_rebuild(item) else value
        return tuple(items) if get_origin(hint) is tuple else items
    return _from_plain(value)


def _from_plain(value: Any) -> Any:
    try:
        cls = _KINDS[value.pop(_TAG)]
        for name, hint in _HINTS[cls].items():
            value[name] = _rebuild(hint, value[name])
        return cls(**value)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise WireError(f"not a message: {str(value)[:200]} ({error!r})") from error


def encode(message: Message) -> bytes:
    """The message's bytes, length first.

    Raises:
        WireError: it holds something that JSON does not, or is longer than MAX_BYTES.
    """
    try:
        body = json.dumps(_plain(message), separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise WireError(f"cannot send {type(message).__name__}: {error}") from error
    if len(body) > MAX_BYTES:
        raise WireError(f"{type(message).__name__} has {len(body)} bytes, more than {MAX_BYTES}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message of the bytes behind a length.

    Raises:
        WireError: they are not one.
    """
    try:
        value = json.loads(body)
    except ValueError as error:
        raise WireError(f"not JSON: {body[:200]!r}") from error
    message: Message = _from_plain(value)
    return message


class Framer:
    """Cuts a stream of bytes, in pieces of any size, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Every message that is complete with these bytes.

        Raises:
            WireError: the stream is damaged; nothing after it can be read.
        """
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_BYTES:
                raise WireError(f"a message of {length} bytes: the stream is damaged")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(decode(bytes(self._buffer[start + _LENGTH.size : end])))
            start = end
        del self._buffer[:start]
        return messages


class Sender:
    """Writes whole messages to a socket; any thread may send."""

    def __init__(self, sock: socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends one message; blocks while the other end does not read.

        Raises:
            OSError: the other end is gone.
            WireError: the message cannot be encoded.
        """
        data = encode(message)
        with self._lock:
            self._sock.sendall(data)
