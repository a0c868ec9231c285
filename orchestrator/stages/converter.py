"""An engine's own converter as a process that cannot outlive us: its progress, its last error, never its exit code."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import socketpair
from typing import Any

from orchestrator.engine.process import ChildProcess, child_environment
from orchestrator.errors import DoesNotFitError, EngineUnavailableError, StageError


@dataclass(frozen=True)
class Status:
    """Where a converter is.

    Attributes:
        stage: as it calls it itself.
        done: how much of the stage, 0 to 1.
        module: the one that it works on; "" where it names none.
        left_s: seconds until the stage's last module is done; None: not known (yet).
    """

    stage: str
    done: float
    module: str = ""
    left_s: float | None = None


OnStatus = Callable[[Status], None]

_CHILD = Path(__file__).with_name("converter_child.py")
# Of exllamav2: "[STATUS]{...}[/STATUS]", and then " -- Layer: model.layers.3 (MLP)" once the module is loaded.
_PROGRESS = re.compile(rb"\[STATUS\](\{.*?\})\[/STATUS\]|^ -- Layer: (.+)$", re.MULTILINE)
# Of exllamav2: " ## ..." and " ** ..."; of Python: the last line of a traceback.
_ERROR = re.compile(
    r"^\s*(?:##|\*\* Error:)\s*(\S.*)$|^((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt)\b.*)$"
)
_FULL = ("OutOfMemoryError", "out of memory")
_POLL_S = 0.25
_STEPS = 2  # modules that were done before it is said how long the others will take
_TAIL_BYTES = 1 << 18
_MAX_ERROR = 300


def convert(
    python: str,
    module: str,
    arguments: Sequence[str],
    log: Path,
    on_status: OnStatus,
    env: Mapping[str, str] | None = None,
    limits: Sequence[int] = (),
    watch: Callable[[], None] = lambda: None,
) -> Failure:
    """Runs a converter to its end, whatever that is: the caller judges by the files.

    Args:
        python: the interpreter that has the converter.
        log: gets everything that it prints, appended.
        env: variables on top of this process's own.
        limits: bytes that it may take of each visible GPU; empty: all that there is.
        watch: called again and again while it runs, and when it has ended.

    Returns:
        What to say if the files are not there: why it ended.

    Raises:
        EngineUnavailableError: there is no such interpreter.
    """
    ours, theirs = socketpair()
    fd = theirs.fileno()
    command = [python, str(_CHILD), "--fd", str(fd), "--parent", str(os.getpid())]
    command += ["--limits", ",".join(map(str, limits))] if limits else []
    start = log.stat().st_size if log.exists() else 0
    try:
        child = ChildProcess.start([*command, module, *arguments], child_environment(python, env or {}), log, fd)
    except OSError as error:
        ours.close()
        raise EngineUnavailableError(
            f"cannot start {module} with {python}: {error.strerror}",
            "Set backend.python to an interpreter that has the engine.",
        ) from error
    finally:
        theirs.close()
    statuses = _Statuses(log, start, on_status)
    try:
        while not child.wait(_POLL_S):
            statuses.read()
            watch()
    finally:  # also when a Ctrl-C interrupts the wait
        code = child.kill()
        ours.close()
        watch()
    statuses.read()
    return Failure(module, code, log, start)


class NewLines:
    """The lines of a growing log, whole ones only.

    Args:
        start: bytes of it that are there already, and are no news.
    """

    def __init__(self, log: Path, start: int) -> None:
        self._log = log
        self._at = start
        self._rest = b""

    def read(self) -> bytes:
        """Those since the previous call; nothing where the log is not there."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return b""
        self._at += len(data)
        lines, _, self._rest = (self._rest + data).rpartition(b"\n")
        return lines


class _Statuses:
    """The progress that a growing log tells."""

    def __init__(self, log: Path, start: int, on_status: OnStatus) -> None:
        self._lines = NewLines(log, start)
        self._on_status = on_status
        self._now = Status("", 0.0)
        self._pace = _Pace(0.0, 0.0)

    def read(self) -> None:
        """Reports where the converter is, if it has gone on since the previous call."""
        clock = time.monotonic()
        gone_on = [self._take(found[1], found[2], clock) for found in _PROGRESS.finditer(self._lines.read())]
        if any(gone_on):
            self._on_status(self._now)

    def _take(self, status: bytes | None, module: bytes | None, clock: float) -> bool:
        """Takes in one line; whether it is to be reported: between two modules, the next one's name is yet to come."""
        if module is not None:
            self._now = Status(self._now.stage, self._now.done, module.decode(errors="replace"), self._pace.left_s)
            return True
        try:
            said: dict[str, Any] = json.loads(status or b"")
            stage, done = str(said["stage"]), min(1.0, max(0.0, float(said["completion"])))
        except (ValueError, KeyError, TypeError):
            return False  # a line that only looks like one
        same = stage == self._now.stage
        if not same:
            self._pace = _Pace(clock, done)
        self._pace.step(clock, done)
        module_follows = same and bool(self._now.module) and done < 1
        self._now = Status(stage, done, self._now.module if module_follows else "")
        return not module_follows


class _Pace:
    """How long a stage goes on, by its modules in this run: what an earlier run has done took this one no time.

    Args:
        clock: seconds, when the stage began or was gone on with.
        done: how much of it there was then.
    """

    def __init__(self, clock: float, done: float) -> None:
        self._begun = self._last = (clock, done)
        self._steps = 0

    def step(self, clock: float, done: float) -> None:
        """Notes how much is done now."""
        if done > self._last[1]:
            self._steps += 1
            self._last = (clock, done)

    @property
    def left_s(self) -> float | None:
        """Seconds; None before there is one of each kind: an attention and an MLP take unlike times."""
        seconds, done = (now - then for now, then in zip(self._last, self._begun, strict=True))
        if self._steps < _STEPS or seconds <= 0:
            return None
        return (1 - self._last[1]) * seconds / done


class Failure:
    """Why a converter ended, for when its files are not what they should be."""

    def __init__(self, module: str, code: int, log: Path, start: int) -> None:
        self.code = code
        self.log = log
        self._module = module
        self._start = start

    def text(self) -> str:
        """What it wrote in this run, as far as it is near the end."""
        try:
            with self.log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(self._start, file.tell() - _TAIL_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def last_error(self) -> str:
        """The last line that is an error; else the last line that it wrote; "" if it wrote none."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        for line in reversed(lines):
            match = _ERROR.match(line)
            if match:
                return (match[1] or match[2]).strip()[:_MAX_ERROR]
        plain = [line.strip() for line in lines if not line.startswith("[STATUS]")]
        return plain[-1][:_MAX_ERROR] if plain else ""

    def error(self, missing: str) -> StageError | DoesNotFitError:
        """The error for a result that is not whole.

        Args:
            missing: what is wrong with the result.
        """
        said = self.last_error()
        hint = f"Its log: {self.log}"
        if any(sign in said for sign in _FULL):
            return DoesNotFitError(
                f"the conversion ran out of GPU memory ({said})",
                "Free the GPU, raise hardware.memory_gib, or set quant.calibration.length=1024 (its need grows with "
                f"the width of the model and with the length). {hint}",
            )
        how = f"ended with code {self.code}"
        if self.code < 0:
            how = f"was killed by signal {-self.code}"
            if self.code == -9:
                hint = f"The kernel may have run out of memory (dmesg tells); run it again and it continues. {hint}"
        words = f"; its last error: {said}" if said else "; it wrote nothing to its log"
        return StageError(f"{self._module} {how} and {missing}{words}", hint)
