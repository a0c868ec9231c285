"""A child process in a session of its own: start, wait without reaping, end with all its workers, last words."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_TAIL_BYTES = 1 << 16
_MAX_WORDS = 300
_TERM_S = 1.0  # between SIGTERM and SIGKILL
_NAP_S = 0.02
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# As multiprocessing, NCCL and vLLM name it.
_SHARED_MEMORY = re.compile(r"\s(/dev/shm/(?:psm_|sem\.mp-|nccl-|vllm_)\S+)$", re.MULTILINE)
# Parts of lines that libraries write and that nothing follows from.
_NOISE = (
    "Failed to load CPU gemm_4bit_forward from kernels-community",  # bitsandbytes: it computes another way
)
_CRASH = "Fatal Python error"  # faulthandler's first line; stacks and lists of modules follow it


def child_environment(python: str, extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment plus `extra`, without what would bring its packages into another interpreter."""
    env = dict(os.environ)
    if os.path.abspath(python) != os.path.abspath(sys.executable):
        for name in ("PYTHONPATH", "PYTHONHOME"):
            env.pop(name, None)
    if os.path.dirname(python):  # the programs of its packages: torch builds extensions with ninja
        env["PATH"] = os.pathsep.join([*filter(None, [env.get("PATH")]), os.path.dirname(os.path.abspath(python))])
    # A killed process loses what it has buffered, and its last words are what the user needs.
    return {**env, "PYTHONUNBUFFERED": "1", **extra}


class ChildProcess:
    """A process that leads its own session, and so its own process group, with output to a log file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, log_start: int) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start
        self._shared: set[Path] = set()
        self.pidfd: int | None = None  # readable when the process has exited; none before Linux 5.3
        with contextlib.suppress(OSError, AttributeError):
            self.pidfd = os.pidfd_open(process.pid)

    @classmethod
    def start(cls, command: Sequence[str], env: Mapping[str, str], log: Path, fd: int) -> ChildProcess:
        """Starts `command`, which inherits `fd`; its output is appended to `log`.

        Raises:
            OSError: it cannot be started.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[fd],
                close_fds=True,
                start_new_session=True,
            )
            return cls(process, log, output.tell())

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout: float) -> bool:
        """Whether it has exited within `timeout` seconds. It is not reaped: its pid keeps naming its group."""
        if self.pidfd is not None:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            return bool(poll.poll(max(timeout, 0) * 1000))
        deadline = time.monotonic() + timeout
        while not self._exited():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_NAP_S)
        return True

    def _exited(self) -> bool:
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # reaped: SIGCHLD is ignored in this process
            return True

    def note_shared_memory(self) -> None:
        """Remembers what its group has mapped, for `kill` to remove: a killed process leaves it for ever."""
        self._shared |= _shared_memory(self.pid)

    def kill(self) -> int:
        """Ends the process (SIGTERM, after a second SIGKILL) and what is left of its group; reaps it.

        Returns:
            Its exit code, negative for a signal. Idempotent.
        """
        if self._process.returncode is None:
            try:
                self.note_shared_memory()
                if not self.wait(0):
                    self._signal(signal.SIGTERM)
                    self.wait(_TERM_S)
            finally:  # also when a Ctrl-C interrupts the wait
                self._signal(signal.SIGKILL)
                for path in self._shared:
                    path.unlink(missing_ok=True)
                self._process.wait()
                self._close_pidfd()
        return self._process.returncode

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _close_pidfd(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def last_words(self) -> str:
        """The last line that it wrote to its log (a crash's own line, if there is one); "" if it wrote none.

        Known noise of libraries is no word of its own.
        """
        try:
            with self._log.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, log.tell() - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [line for part in _ESCAPES.sub("", text).splitlines() if (line := part.strip())]
        lines = [line for line in lines if not any(noise in line for noise in _NOISE)]
        crashes = [line for line in lines if line.startswith(_CRASH)]
        return (crashes or lines or [""])[-1][:_MAX_WORDS]


def _shared_memory(group: int) -> set[Path]:
    """Files of shared memory that a process group has mapped."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                maps = (process / "maps").read_text()
                found |= {Path(name) for name in _SHARED_MEMORY.findall(maps)}
        except OSError:
            continue  # it has ended, or is not ours to look at
    return found
