"""Commands as a user types them: `python -m orchestrator ...` in a folder of its own, started, watched, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    folder: Path | None  # the run's folder; None where the command did not get so far

    @property
    def error(self) -> str:
        """The one line that a mistake costs."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        assert "Traceback" not in self.err + self.out
        return lines[0]

    def json(self, name: str) -> Any:
        """One of the run's files."""
        assert self.folder is not None, self.err
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    @property
    def answers(self) -> list[dict[str, Any]]:
        """answers.jsonl"""
        assert self.folder is not None, self.err
        return read_lines(self.folder / "answers.jsonl")


class Started:
    """A command that runs. Its files and its processes can be watched."""

    def __init__(self, process: subprocess.Popen[str], runs: Path, before: set[Path]) -> None:
        self.process = process
        self._runs = runs
        self._before = before

    @property
    def folder(self) -> Path | None:
        new = set(self._runs.glob("*")) - self._before
        return next(iter(new), None)

    def state(self) -> str:
        """What status.json says; empty before there is one."""
        try:
            assert self.folder is not None
            return str(json.loads((self.folder / "status.json").read_text())["state"])
        except (OSError, AssertionError):
            return ""

    def until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        """Waits for a condition while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.process.communicate()}"
            assert time.monotonic() < deadline, f"still not after {seconds} s; the state is {self.state()!r}"
            time.sleep(0.01)

    def until_state(self, state: str) -> None:
        self.until(lambda: self.state() == state)

    def until_answering(self) -> None:
        """Waits until it answers and the first words have been printed."""
        self.until_state("answering")
        time.sleep(0.3)

    def engine(self) -> psutil.Process:
        """The engine's process."""
        [child] = psutil.Process(self.process.pid).children()
        return child

    def family(self) -> list[psutil.Process]:
        """Everything that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def interrupt(self) -> None:
        """Ctrl-C"""
        self.process.send_signal(signal.SIGINT)

    def done(self, timeout: float = 60) -> Done:
        out, err = self.process.communicate(timeout=timeout)
        return Done(self.process.returncode, out, err, self.folder)


class Orchestrator:
    """A place to type commands in: a working folder, a store and a folder for runs."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder = folder
        self.store = store
        self.runs = folder / "runs"
        self.started: list[Started] = []
        self.more_env: dict[str, str] = {}

    def __call__(self, *argv: str, stdin: str = "", timeout: float = 120) -> Done:
        """Types a command and waits for its end."""
        return self.start(*argv, stdin=stdin).done(timeout)

    def start(self, *argv: str, stdin: str | None = None) -> Started:
        """Types a command."""
        before = set(self.runs.glob("*"))
        process = subprocess.Popen(
            self.command(*argv),
            cwd=self.folder,
            env=self.env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear_interrupts,
        )
        assert process.stdin is not None
        if stdin is not None:
            process.stdin.write(stdin)
            process.stdin.close()
            process.stdin = None
        self.started.append(Started(process, self.runs, before))
        return self.started[-1]

    def command(self, *argv: str) -> list[str]:
        given = {argument.partition("=")[0] for argument in argv}
        places = {"paths.artifacts": self.store, "paths.runs": self.runs, "paths.engines": self.folder / "engines"}
        more = [f"{key}={path}" for key, path in places.items() if key not in given]
        return [sys.executable, "-m", "orchestrator", *argv, *more]

    def env(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(self.folder), "COLUMNS": "110", **self.more_env}

    def close(self) -> None:
        """Ends what a failed test has left behind."""
        for started in self.started:
            if started.process.poll() is None:
                family = started.family()
                started.kill()
                for process in family:
                    if process.is_running():
                        process.kill()
                started.process.communicate()


def hear_interrupts() -> None:
    """A shell's background job, as these tests may be run, ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def gone(processes: list[psutil.Process], seconds: float = 5) -> bool:
    """Whether all of these have ended within so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive if process.is_running())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a half last line is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
