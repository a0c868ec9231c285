"""The texts that exllamav2's converter is calibrated with: its own, or a file of the user's as it reads them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.backends.exl2_texts import check_texts, pieces, texts
from orchestrator.checkpoint.digest import digest
from orchestrator.config import Config, folder
from orchestrator.engine.process import child_environment
from orchestrator.errors import ConfigError, StageError
from orchestrator.tokenizer import Tokenizer, count_tokens

ROWS, MEASURED_ROWS = 100, 16  # of a file: the converter's own defaults
_PLANNED = 2_000_000  # characters that a plan counts the tokens of: half a second
_LESS = 0.95  # of what is wanted: how many tokens by tokenizer.json alone are too few for certain
_CHILD = Path(__file__).with_name("parquet_child.py")


@dataclass(frozen=True)
class Calibration:
    """A file of the user's, and how much of it is used.

    Attributes:
        rows: rows of tokens that are quantized with; up to 16 of them are measured with.
        length: tokens of a row.
    """

    file: Path
    rows: int
    length: int
    chat_template: str | None
    trust_remote_code: bool

    @classmethod
    def of(cls, config: Config, length: int) -> Calibration | None:
        """None: the engine's own texts."""
        asked = config.quant.calibration
        if asked.file is None:
            return None
        model = config.model
        return cls(folder(asked.file), asked.rows or ROWS, length, model.chat_template, model.trust_remote_code)

    def identity(self) -> dict[str, Any]:
        """What a measurement's key says of it."""
        said: dict[str, Any] = file_identity(self.file)
        if not self._is_parquet:
            said["format"] = self.file.suffix.lower()
        if self.file.suffix.lower() == ".jsonl" and self.chat_template is not None:
            said["chat_template"] = file_identity(folder(self.chat_template))
        return said

    def arguments(self, where: Path) -> list[str]:
        """The converter's, for a file that `write` has put into `where`."""
        rows = ["-r", str(self.rows), "-mr", str(min(self.rows, MEASURED_ROWS))]
        return ["-c", str(self.file if self._is_parquet else self._written(where)), *rows]

    def look(self, model: Path | None) -> None:
        """What a plan sees of it: every line, and tokens that are far too few. Of .parquet its ends only.

        Conversations, which take the chat template, and more than some megabytes of text are not counted: `check` does.

        Args:
            model: the folder of the tokenizer; None where it is not on this machine.

        Raises:
            ConfigError: a line cannot be read; or it has too few tokens, with what to type.
        """
        check_texts(self.file)
        if self._is_parquet:
            return
        held: list[str] = []
        characters, whole = 0, model is not None and not self.trust_remote_code  # which may count otherwise
        for text in texts(self.file):  # to the end, as all of it is converted
            if not whole or not isinstance(text, str) or characters > _PLANNED:
                whole = False
                continue
            held.append(text)
            characters += len(text)
        if whole and model is not None:
            count = count_tokens(model, pieces(held), self._wanted)
            if count is not None and count < _LESS * self._wanted:
                raise self._too_few(count, "about ")

    def check(self, model: Path, python: str) -> None:
        """Reads it to its end, and counts its tokens with the model's tokenizer as far as they are needed.

        Raises:
            ConfigError: it has too few, with what to type; or it cannot be read.
            CheckpointError: the model's tokenizer cannot be loaded.
        """
        check_texts(self.file)
        tokenizer = self._tokenizer(model)
        count = 0
        for text in self._parquet(python) if self._is_parquet else self._pieces(tokenizer):
            if count < self._wanted:
                count += len(tokenizer.encode_text(text))
        if count < self._wanted:
            raise self._too_few(count)

    @property
    def _wanted(self) -> int:
        return self.rows * self.length

    def _too_few(self, count: int, about: str = "") -> ConfigError:
        return ConfigError(
            f"quant.calibration.file={self.file} has {about}{count:,} tokens, and quant.calibration.rows={self.rows} "
            f"of quant.calibration.length={self.length} take {self._wanted:,}",
            _fewer(count, self.length),
        )

    def write(self, where: Path, model: Path, python: str) -> None:
        """Writes it as the converter reads it, if it is not in that form already.

        Raises:
            StageError: the engine's interpreter cannot write it.
        """
        file = self._written(where)
        if self._is_parquet or file.exists():
            return
        part = file.with_name(f".{file.name}")
        lines = "".join(f"{json.dumps(piece)}\n" for piece in self._pieces(self._tokenizer(model)))
        done = subprocess.run([*_command(python), "write", part], input=lines, **_child(python))
        if done.returncode or not part.exists():
            raise StageError(f"{self.file} cannot be written as .parquet: {_last(done.stderr)}")
        part.replace(file)

    @property
    def _is_parquet(self) -> bool:
        return self.file.suffix.lower() == ".parquet"

    def _written(self, where: Path) -> Path:
        return where / f"{self.file.stem}.parquet"  # the result's config.json will name it

    def _tokenizer(self, model: Path) -> Tokenizer:
        return Tokenizer(model, self.chat_template, self.trust_remote_code)

    def _pieces(self, tokenizer: Tokenizer) -> Iterator[str]:
        found = (text if isinstance(text, str) else tokenizer.conversation(text) for text in texts(self.file))
        return pieces(found)

    def _parquet(self, python: str) -> Iterator[str]:
        done = subprocess.run([*_command(python), "read", self.file], **_child(python))
        if done.returncode:
            raise ConfigError(f"quant.calibration.file={self.file} cannot be read as .parquet: {_last(done.stderr)}")
        return map(json.loads, done.stdout.splitlines())


def file_identity(file: Path) -> dict[str, Any]:
    """Size and digest of a file of the user's, for a key."""
    return {"size": file.stat().st_size, "xxh3_128": digest(file)}


def _fewer(count: int, length: int) -> str:
    """What to type for a file of so many tokens."""
    if count >= length:
        return f"Type quant.calibration.rows={count // length}, or give more text."
    if count >= 128:
        return f"Type quant.calibration.rows=1 quant.calibration.length={count // 128 * 128}, or give more text."
    return "Give more text, or leave quant.calibration.file out for the engine's own."


def _command(python: str) -> list[str | Path]:
    return [python, "-P", _CHILD]  # -P: not our stages on its path


def _child(python: str) -> dict[str, Any]:
    return {"env": child_environment(python, {}), "capture_output": True, "text": True, "encoding": "utf-8"}


def _last(words: str) -> str:
    lines = words.strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
