"""Calibration texts of the user's: .txt, .jsonl or .parquet, of which exllamav2's converter reads the last only.

Standard library only: the plan looks at the beginning of a file before anything long starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError

SUFFIXES = (".parquet", ".txt", ".jsonl")
_ROLES = ("system", "user", "assistant", "tool")
_ANSWERS = ("answer", "completion", "response")  # beside "prompt"
_PIECE = 4096  # characters
_MAGIC = b"PAR1"  # at both ends of a .parquet file

Text = str | list[dict[str, str]]  # as it stands, or a conversation

_FORMS = 'an object a line with "text", "prompt" or "messages"'


def check_texts(file: Path) -> None:
    """Looks at the beginning of a calibration file.

    Raises:
        ConfigError: it is of no kind that is read, has no text, or its first line is malformed.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"quant.calibration.file={file} is not one of {', '.join(SUFFIXES)}")
    if not file.stat().st_size:
        raise ConfigError(f"quant.calibration.file={file} is empty", "Leave it out for the engine's own texts.")
    if file.suffix.lower() == ".parquet":
        _check_parquet(file)
    elif next(texts(file), None) is None:
        raise ConfigError(f"quant.calibration.file={file} holds no text: only blank lines")


def _check_parquet(file: Path) -> None:
    """Its first and last four bytes: who reads the rest comes later.

    Raises:
        ConfigError: it is none.
    """
    try:
        with file.open("rb") as stream:
            begins = stream.read(len(_MAGIC))
            stream.seek(max(0, file.stat().st_size - len(_MAGIC)))
            whole = begins == stream.read() == _MAGIC
    except OSError as error:
        raise ConfigError(f"quant.calibration.file={file}: {error.strerror}") from None
    if not whole:
        raise ConfigError(f"quant.calibration.file={file} is no whole .parquet file, whatever its name says")


def texts(file: Path) -> Iterator[Text]:
    """The texts of a .txt file (a text a line) or a .jsonl file, one at a time; blank lines are left out.

    Raises:
        ConfigError: it cannot be read, or a line is malformed (named).
    """
    read = _entry if file.suffix.lower() == ".jsonl" else _line
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield read(line.rstrip("\r\n"), f"quant.calibration.file={file} line {number}")
    except UnicodeDecodeError:
        raise ConfigError(f"quant.calibration.file={file} is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"quant.calibration.file={file}: {error.strerror}") from None


def _line(line: str, where: str) -> Text:
    return line


def _entry(line: str, where: str) -> Text:
    try:
        value = json.loads(line)
        if "\\u" in line:  # half of a surrogate pair is JSON, and no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where} holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}", f"It takes {_FORMS}.") from None
    value = value if isinstance(value, dict) else {}
    if isinstance(value.get("text"), str):
        return str(value["text"])
    if isinstance(value.get("prompt"), str):
        answer = next((value[key] for key in _ANSWERS if isinstance(value.get(key), str)), None)
        asked = {"role": "user", "content": value["prompt"]}
        return [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]
    messages = value.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return [{"role": message["role"], "content": message["content"]} for message in messages]
    raise ConfigError(f"{where} has no text", f"It takes {_FORMS}.")


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and item.get("role") in _ROLES and isinstance(item.get("content"), str)


def pieces(found: Iterable[str]) -> Iterator[str]:
    """Texts joined, a line break behind each, into pieces of some thousand characters.

    The converter cuts its rows from all tokens one after the other, whatever text they are of, and copies them all for
    each piece that it reads.
    """
    held: list[str] = []
    size = 0
    for text in found:
        held.append(f"{text}\n")
        size += len(text) + 1
        if size >= _PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)
