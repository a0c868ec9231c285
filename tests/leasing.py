"""A machine with GPUs that are not there, and runs that lease them: processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOLDING = ROOT / "tests" / "unit" / "holding.py"


class Machine:
    """Cards of so many GiB, and a folder for the leases of their runs."""

    def __init__(self, folder: Path, *gib: float) -> None:
        self.leases = folder / "leases"
        self._file = folder / "gpus.json"
        self._cards: list[dict[str, Any]] = [{"gib": size} for size in gib]
        self._runs: list[Run] = []
        self._write()

    @property
    def env(self) -> dict[str, str]:
        """What a process on this machine has in its environment."""
        paths = os.pathsep.join(map(str, (ROOT / "tests" / "fake_driver", ROOT)))
        return {"PYTHONPATH": paths, "FAKE_GPUS": str(self._file), "ORCHESTRATOR_LEASES": str(self.leases)}

    def card(self, index: int, **values: Any) -> None:
        """Changes what NVML says of a card."""
        self._cards[index] |= values
        self._write()

    def run(self, name: str, gib: float, *gpus: int) -> Run:
        """A run that leases so much of a GPU."""
        self._runs.append(Run([sys.executable, str(HOLDING), name, str(gib), *map(str, gpus)], self.env))
        return self._runs[-1]

    def close(self) -> None:
        for run in self._runs:
            run.process.kill()
            run.process.wait()
            for stream in (run.process.stdin, run.process.stdout):
                assert stream is not None
                stream.close()

    def _write(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self._cards))
        part.replace(self._file)


class Run:
    """A process that holds a lease, or waits for it."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        """The next line; waits for it."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        """Lets it end as it should."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0
