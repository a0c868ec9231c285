"""stdout and stderr as the program needs them: an output that is closed, full or gone is no error of the program's."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from orchestrator.errors import OutputError


class Output(io.TextIOWrapper):
    """A stream that says of its errors that they are the output's; BrokenPipeError (`... | head`) stays one."""

    def write(self, text: str) -> int:
        with _told():
            return super().write(text)

    def flush(self) -> None:
        with _told():
            super().flush()


class Notes(Output):
    """stderr: where it cannot be written, notes are lost and nothing else; it goes on nowhere."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except (BrokenPipeError, OutputError):
            silence(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except (BrokenPipeError, OutputError):
            silence(self)
            super().flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to the output: {error.strerror}") from None


def prepare() -> None:
    """Streams that were closed (>&-) are nowhere; what a stream's encoding lacks is shown as "?", not an error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for name, kind in (("stdout", Output), ("stderr", Notes)):
        stream = getattr(sys, name)
        # Not those of somebody who has put others there.
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _wrapped(stream, kind))


def _wrapped(stream: io.TextIOWrapper, kind: type[Output]) -> Output:
    encoding, lines, at_once = stream.encoding, stream.line_buffering, stream.write_through
    return kind(stream.detach(), encoding, "replace", line_buffering=lines, write_through=at_once)


def drop_unwritten() -> None:
    """Gives up what cannot be written: Python would try again when it ends, and exit with another code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, OutputError):
            silence(stream)


def silence(stream: TextIO) -> None:
    """Sends what is still written to a stream nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
