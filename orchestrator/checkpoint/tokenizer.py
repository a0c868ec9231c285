"""A folder's tokenizer: which files it is, and how many tokens it knows. It is never run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.folder import carried_files
from orchestrator.checkpoint.trust import JSON_LIMIT, read_bytes, read_object, shown
from orchestrator.errors import CheckpointError

_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
)
"""Those of the carried files that belong together: never some of one folder and some of another."""

_WHOLE = ("tokenizer.json", "vocab.json", "vocab.txt")
_WHOLE_ENDS = (".model", ".tiktoken")
"""Files of which one is enough to tell the tokens."""


def tokenizer_files(path: Path) -> tuple[Path, ...]:
    """The files of a folder's tokenizer, sorted by name."""
    return tuple(file for file in carried_files(path) if any(file.match(pattern) for pattern in _FILES))


def has_tokenizer(path: Path) -> bool:
    """Whether a folder holds a tokenizer, not only settings of one."""
    return any(file.name in _WHOLE or file.name.endswith(_WHOLE_ENDS) for file in tokenizer_files(path))


def chat_template(path: Path) -> str | None:
    """A folder's chat template as text: chat_template.jinja, or what tokenizer_config.json says; None without one.

    Raises:
        CheckpointError: a file that is damaged.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        return read_bytes(file, JSON_LIMIT).decode("utf-8", "replace")
    settings = path / "tokenizer_config.json"
    found = read_object(settings).get("chat_template") if settings.is_file() else None
    return None if found is None else found if isinstance(found, str) else json.dumps(found, sort_keys=True)


def token_count(path: Path) -> int | None:
    """One more than the largest token number of a folder's tokenizer; None where its files do not say in JSON.

    Raises:
        CheckpointError: a file that is damaged, or a token number that is none.
    """
    numbers: list[Any] = []
    whole = False
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        file = path / name
        if file.is_file():
            numbers += _numbers(read_object(file), name)
            whole = whole or (name in _WHOLE and bool(numbers))
    for number in numbers:
        if type(number) is not int or not 0 <= number < 2**31:
            raise CheckpointError(
                f"{shown(path, 400)}: its tokenizer gives a token the number {shown(number, 40)}",
                "Save the tokenizer again (save_pretrained).",
            )
    return max(numbers) + 1 if whole else None


def _numbers(content: dict[str, Any], name: str) -> Iterable[Any]:
    if name != "tokenizer.json":
        return content.values()
    model, added = content.get("model"), content.get("added_tokens")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    known: list[Any] = []
    if isinstance(tokens, dict):
        known += tokens.values()
    elif isinstance(tokens, list):
        known += range(len(tokens))
    if isinstance(added, list):
        known += [token.get("id") for token in added if isinstance(token, dict)]
    return known
