"""An engine's own converter as a process that cannot outlive us: its progress, its last error, never its exit code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import socketpair
from typing import Any

from orchestrator.engine.process import ChildProcess, child_environment
from orchestrator.errors import DoesNotFitError, EngineUnavailableError, StageError

OnStatus = Callable[[str, float], None]  # the stage's name, how much of it is done (0 to 1)

_CHILD = Path(__file__).with_name("converter_child.py")
_STATUS = re.compile(rb"\[STATUS\](\{.*?\})\[/STATUS\]")
# Of exllamav2: " ## ..." and " ** ..."; of Python: the last line of a traceback.
_ERROR = re.compile(
    r"^\s*(?:##|\*\* Error:)\s*(\S.*)$|^((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt)\b.*)$"
)
_FULL = ("OutOfMemoryError", "out of memory")
_POLL_S = 0.25
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


class _Statuses:
    """The status lines of a growing log."""

    def __init__(self, log: Path, start: int, on_status: OnStatus) -> None:
        self._log = log
        self._at = start
        self._on_status = on_status
        self._rest = b""

    def read(self) -> None:
        """Reports the last status line since the previous call, if there is one."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return
        self._at += len(data)
        lines, _, self._rest = (self._rest + data).rpartition(b"\n")
        found = _STATUS.findall(lines)
        if not found:
            return
        try:
            status: dict[str, Any] = json.loads(found[-1])
            self._on_status(str(status["stage"]), min(1.0, max(0.0, float(status["completion"]))))
        except (ValueError, KeyError, TypeError):
            return  # a line that only looks like one


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
