"""Prompts: from the configuration, a text file, a JSONL file or standard input."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import Config, folder
from orchestrator.errors import RequestError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]
# What a line of answers.jsonl says itself; a prompt's other fields are carried over beside it.
ANSWER_FIELDS = ("index", "answer", "finish_reason", "prompt_tokens", "completion_tokens", "ttft_s", "seconds")
# Of a prompts file: is it an object a line? Where the suffix does not tell, as of standard input, the first line does.
JSONL_SUFFIXES = {".jsonl": True, ".ndjson": True, ".json": True, ".txt": False}


@dataclass(frozen=True)
class Prompt:
    """One prompt: chat messages, and the fields of its line that are carried over to its answer."""

    index: int
    messages: list[Message]
    carried: dict[str, Any]

    @property
    def text(self) -> str:
        """The last message: what a person would call the prompt."""
        return self.messages[-1]["content"]

    def to_json(self) -> dict[str, Any]:
        return {**self.carried, "messages": self.messages}


def read_prompts(config: Config, default: Path | None) -> list[Prompt]:
    """The prompts of a request.

    Args:
        default: the file to read where the configuration names none; None: there has to be one.

    Raises:
        RequestError: none are given, the file is missing, empty or malformed (with the line).
    """
    if config.prompts.text is not None:
        texts = config.prompts.text if isinstance(config.prompts.text, list) else [config.prompts.text]
        prompts = [Prompt(i, [{"role": "user", "content": str(text)}], {}) for i, text in enumerate(texts)]
        source = "prompts.text"
    elif config.prompts.file == "-":
        source = "standard input"
        prompts = _parse(_decoded(sys.stdin.buffer.read(), source), source, jsonl=None)
    else:
        path = folder(config.prompts.file) if config.prompts.file is not None else default
        if path is None:
            raise RequestError(
                "there are no prompts",
                "Set prompts.text='...' or prompts.file=FILE (- for standard input), or task=chat.",
            )
        source = str(path)
        prompts = read_file(path, JSONL_SUFFIXES.get(path.suffix.lower()))
    if not prompts or not any(prompt.text.strip() for prompt in prompts):
        raise RequestError(
            f"{source} holds no prompt", "A .txt file has a prompt a line, a .jsonl file an object a line."
        )
    return prompts


def read_file(path: Path, jsonl: bool | None) -> list[Prompt]:
    """The prompts of a file; jsonl: is it an object a line? None: its first line tells.

    Raises:
        RequestError: it cannot be read, or a line is malformed.
    """
    return _parse(_read(path), str(path), jsonl)


def _read(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), f"prompts.file={path}")
    except OSError as error:
        raise RequestError(f"prompts.file={path}: {error.strerror}") from None


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{source}: byte {error.start} is not UTF-8") from None


def _parse(text: str, source: str, jsonl: bool | None) -> list[Prompt]:
    lines = [(number, line) for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if jsonl is None:  # standard input has no suffix
        jsonl = bool(lines) and lines[0][1].lstrip().startswith("{")
    if not jsonl:
        return [Prompt(i, [{"role": "user", "content": line}], {}) for i, (_, line) in enumerate(lines)]
    return [_prompt(i, line, f"{source} line {number}") for i, (number, line) in enumerate(lines)]


def _prompt(index: int, line: str, where: str) -> Prompt:
    try:
        value = json.loads(line, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, and no text
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise RequestError(f'{where} needs either "prompt" or "messages"')
    taken = [key for key in value if key in ANSWER_FIELDS]
    if taken:
        raise RequestError(
            f"{where} has a field {taken[0]!r}, as the answer's line has",
            "Give it another name: it is carried over.",
        )
    carried = {key: item for key, item in value.items() if key not in ("prompt", "messages")}
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise RequestError(f'{where}: "prompt" is not a text')
        return Prompt(index, [{"role": "user", "content": value["prompt"]}], carried)
    messages = value["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(item) for item in messages):
        raise RequestError(f'{where}: "messages" is a list of {{"role": {"|".join(ROLES)}, "content": text}}')
    return Prompt(index, messages, carried)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and item.get("role") in ROLES and isinstance(item.get("content"), str)
