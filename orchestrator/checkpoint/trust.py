"""Reading what strangers wrote: bounded files, plain JSON, names that fit one line of a message."""

import json
import reprlib
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError

JSON_LIMIT = 64 * 2**20
"""Largest JSON file that is read, in bytes (an index of 500,000 tensors takes about 50 MB)."""


JSON_TOKENS = 2**22
"""Most commas and brackets in one JSON file (a tensor takes about ten): three bytes can make an object of eighty."""


class IncompleteError(CheckpointError):
    """Weights that are not all there: a missing or truncated file. Another format may still be whole."""


def shown(value: object, limit: int = 120) -> str:
    """A name out of a stranger's file, fit for one line: control characters escaped, cut at `limit`."""
    # The text of a list may be as long as the file, or too deeply nested to be written out.
    text = reprlib.repr(value) if isinstance(value, (list, dict, tuple)) else str(value)
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cut)


def as_json(value: object, limit: int = 40) -> str:
    """A value out of a JSON file, for a message: a text in its quotes, so that "8" is not taken for 8."""
    return shown(f'"{value}"' if isinstance(value, str) else value, limit)


def file_size(file: Path) -> int:
    """Size in bytes of a regular file (links are followed).

    Raises:
        IncompleteError: there is no such file.
        CheckpointError: it is not a regular file, or it may not be read.
    """
    try:
        found = file.is_file()
        size = file.stat().st_size if found else 0
    except OSError as error:
        raise CheckpointError(f"{shown(file, 400)} cannot be read: {error.strerror}") from error
    if found:
        return size
    if file.exists():
        raise CheckpointError(f"{shown(file, 400)} is not a regular file")
    dangling = " (a link to a file that is gone)" if file.is_symlink() else ""
    raise IncompleteError(f"{shown(file, 400)} is missing{dangling}", "Download the model again.")


def read_bytes(file: Path, limit: int) -> bytes:
    """The whole of a small file.

    Raises:
        CheckpointError: missing, unreadable, or larger than `limit` bytes.
    """
    size = file_size(file)
    if size > limit:
        raise CheckpointError(f"{shown(file, 400)} takes {size:,} bytes; at most {limit:,} are read")
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{shown(file, 400)} cannot be read: {error.strerror}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{shown(twice)}' is there twice")
    return result


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object out of `data`; `where` names it in messages. A key given twice is an error.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, of too many pieces, or not an object.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > JSON_TOKENS:
        raise CheckpointError(f"{where} is JSON of more than {JSON_TOKENS:,} pieces: refused")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else shown(error)
        raise CheckpointError(f"{where} is not valid JSON: {why}", "Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__} where an object is expected")
    return value


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds (see `parse_object`)."""
    return parse_object(read_bytes(file, JSON_LIMIT), shown(file, 400))
