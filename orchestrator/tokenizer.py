"""Messages to tokens, once, in the parent: every engine gets the same tokens for the same prompt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.config import folder
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.prompts import Message

# One of these makes a folder one with a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.tiktoken",
)


def check_tokenizer(path: Path) -> None:
    """Refuses a folder without a tokenizer, before anything long.

    Raises:
        CheckpointError: none of the files that hold one is there.
    """
    files = {p.name for p in path.iterdir()}
    if not files & set(TOKENIZER_FILES) and not any(name.endswith(".tiktoken") for name in files):
        raise CheckpointError(
            f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}, ...)",
            "Copy the tokenizer's files from the model that it was trained from.",
        )


def count_tokens(path: Path, texts: Iterable[str], enough: int) -> int | None:
    """Tokens of texts, up to `enough`, by a folder's tokenizer.json alone: a plan has no time for transformers.

    transformers may count a few more or less, as it has rules of its own for some models.

    Returns:
        None where there is no such file, or none that can be read: who loads the tokenizer says what is wrong with it.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    import tokenizers

    try:
        plain = tokenizers.Tokenizer.from_file(str(file))
        plain.no_truncation()  # the file may say both, and transformers goes by neither
        plain.no_padding()
        count = 0
        for text in texts:
            if count >= enough:
                break
            count += len(plain.encode(text, add_special_tokens=False).ids)
    except Exception:  # a stranger's file: what its reader raises has no limit
        return None
    return count


class Tokenizer:
    """transformers' tokenizer of a model folder, and its chat template.

    Raises:
        CheckpointError: the tokenizer cannot be loaded.
        ConfigError: model.chat_template cannot be read.
    """

    def __init__(self, path: Path, chat_template: str | None, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # a stranger's files: what their reader raises has no limit
            message = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"the tokenizer in {path} cannot be loaded: {message[0]}") from error
        if chat_template is not None:
            self._tokenizer.chat_template = _template(chat_template)

    @property
    def has_template(self) -> bool:
        """Whether messages go through a chat template; otherwise they are plain text, one after the other."""
        return self._tokenizer.chat_template is not None

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a text as it stands, nothing added."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a text for the model to go on with, with what the tokenizer begins one with."""
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def encode(self, messages: list[Message], *, answer: bool = True) -> list[int]:
        """The tokens of a conversation, ready for the model to answer (or, without `answer`, complete).

        Raises:
            ConfigError: the chat template refuses these messages (a role that it lacks, say).
        """
        if not self.has_template:
            return self.encode_prompt(self.conversation(messages))
        return self.encode_text(self.conversation(messages, answer=answer))

    def conversation(self, messages: list[Message], *, answer: bool = False) -> str:
        """The text of a conversation, up to where the model would answer (`answer`) or as it was.

        Raises:
            ConfigError: see `encode`.
        """
        if not self.has_template:
            return "\n".join(message["content"] for message in messages)
        try:
            return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False))
        except Exception as error:  # a template is a stranger's program: it can divide by zero
            raise ConfigError(f"the chat template refuses these messages: {error}") from None


def _template(value: str) -> str:
    path = folder(value)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"model.chat_template={value}: {reason}", "Give a Jinja file.") from None
