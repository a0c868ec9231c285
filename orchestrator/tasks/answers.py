"""answers.jsonl: a line an answer, written as answers finish, in the order of the prompts at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from orchestrator.errors import RequestError
from orchestrator.prompts import Prompt


class AnswersFile:
    """The answers of one run; what an earlier, killed process wrote is kept.

    Raises:
        RequestError: a line in the middle of the file is damaged (a half last line is what a kill leaves: dropped).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered: dict[int, dict[str, Any]] = {}
        if path.exists():
            self._read()
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                answer = json.loads(line)
                self.answered[int(answer["index"])] = answer
            except (ValueError, KeyError, TypeError):
                raise RequestError(f"{self.path} line {number} is not an answer", "Remove that line.") from None
        if whole != data:
            os.truncate(self.path, len(whole))

    def add(self, prompt: Prompt, answer: dict[str, Any]) -> None:
        """Appends one answer; it survives a kill from here on."""
        line = {**prompt.carried, "index": prompt.index, "prompt": prompt.text, **answer}
        self.answered[prompt.index] = line
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Puts the lines into the order of the prompts."""
        self._file.close()
        part = self.path.with_name(f".{self.path.name}.part")
        lines = (json.dumps(self.answered[i], ensure_ascii=False) + "\n" for i in sorted(self.answered))
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(self.path)
