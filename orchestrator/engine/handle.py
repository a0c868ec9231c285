"""The parent's side of one engine process: start, ask, notice its death, end it with all that it started."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import socket, socketpair
from types import TracebackType
from typing import Self, TypeVar

from orchestrator import errors
from orchestrator.backends.protocol import Event, LoadPlan, Request, Score, Stats
from orchestrator.engine import wire
from orchestrator.engine.in_flight import Held, InFlight
from orchestrator.engine.process import ChildProcess, child_environment
from orchestrator.errors import EngineError, EngineUnavailableError, OrchestratorError, RequestError

OnProgress = Callable[[wire.Progress], None]
_Reply = TypeVar("_Reply", wire.Ready, wire.Events, wire.Scored, wire.StatsReport)

_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
_READ_BYTES = 1 << 18
_EXIT_S = 2.0  # from the end of its socket to the end of the process: the kernel closes files first

# The child's exceptions that are more than "the engine stopped".
_KINDS: dict[str, type[OrchestratorError]] = {
    "ModuleNotFoundError": EngineUnavailableError,
    "EngineUnavailableError": EngineUnavailableError,
    "CheckpointError": errors.CheckpointError,
    "DoesNotFitError": errors.DoesNotFitError,
    "OutOfMemoryError": errors.OutOfMemoryError,  # torch's has the same name
}
# As a root cause, whatever was raised because of it.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|\bMemoryError\b|can't allocate memory|_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_LESS = "Ask for less (model.max_context, run.in_flight, quant.bits)"


class EngineProcess:
    """One engine in a child process: a context manager, consumed by one thread; cancel and submit by any.

    Once the process is gone, every method but close raises the error that it ended with (EngineError, or what
    `wait_ready` lists).
    """

    def __init__(
        self, plan: LoadPlan, log: Path, child: ChildProcess, sock: socket, on_progress: OnProgress | None
    ) -> None:
        """For `start` only."""
        self.plan = plan
        self.log = log
        self._child = child
        self._sock = sock
        self._on_progress = on_progress
        self._sender = wire.Sender(sock)
        self._framer = wire.Framer()
        self._arrived: list[wire.Message] = []  # read from the socket, not yet asked for
        self._in_flight = InFlight()
        self._lock = threading.Lock()  # of _in_flight
        self._phase = "loading"  # afterwards "scoring" or ""
        self._scores = 0
        self._error: OrchestratorError | None = None
        self._closed = False

    @classmethod
    def start(
        cls,
        python: str,
        adapter: str,
        plan: LoadPlan,
        log: Path,
        env: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> EngineProcess:
        """Starts the child and sends it the plan; `wait_ready` waits for it.

        Args:
            python: the interpreter that has the engine's packages.
            adapter: "module:Class"; a module that is not ours is looked for on the child's own path.
            plan: what to load and where.
            log: the file that gets everything the child prints, appended to.
            env: variables on top of this process's own.
            on_progress: called by wait_ready.

        Raises:
            EngineUnavailableError: there is no such interpreter.
        """
        ours, theirs = socketpair()
        fd = theirs.fileno()
        command = [python, str(_BOOTSTRAP), "--fd", str(fd), "--parent", str(os.getpid())]
        try:
            child = ChildProcess.start(command, child_environment(python, env or {}), log, fd)
        except OSError as error:
            ours.close()
            raise EngineUnavailableError(
                f"cannot start the {plan.backend} engine with {python}: {error.strerror}",
                "Set backend.python to an interpreter that has the engine",
            ) from error
        finally:
            theirs.close()
        engine = cls(plan, log, child, ours, on_progress)
        try:
            engine._send(wire.Load(plan, adapter))
        except BaseException:
            engine.close(timeout=0)
            raise
        return engine

    @property
    def pid(self) -> int:
        """The child's process id, which is also its group's."""
        return self._child.pid

    def wait_ready(self, timeout: float | None = None) -> wire.Ready:
        """Waits until the engine has loaded, was checked and is warm.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            EngineError: it did not load as planned, died, or was not ready in time.
            EngineUnavailableError: a package that it needs is not installed.
            CheckpointError, DoesNotFitError, OutOfMemoryError: as the engine reported.
        """
        ready = self._await(wire.Ready, timeout)
        if ready is None:
            raise EngineError(f"the {self.plan.backend} engine was not ready after {timeout:g} s", f"See {self.log}")
        self._phase = ""
        return ready

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: its id is in flight already.
        """
        with self._lock:
            if request.id in self._in_flight:
                raise RequestError(f"a request with the id {request.id!r} is in flight already")
            self._in_flight.add(request)
        self._send(wire.Submit(request))

    def cancel(self, request_id: str) -> None:
        """Ends a request at the engine's next step; its Finished("cancelled") still comes through events."""
        self._send(wire.Cancel(request_id))

    def events(self, timeout: float | None = None) -> list[Event]:
        """The events of one engine step; empty after `timeout` seconds without any (None: waits on)."""
        report = self._await(wire.Events, timeout)
        if report is None:
            return []
        with self._lock:
            self._in_flight.take(report.events)
        return report.events

    @property
    def held(self) -> Held:
        """The most that its requests held at a time, by the events that were taken."""
        with self._lock:
            return self._in_flight.most

    def score(self, tokens: list[int], top_k: int) -> Score:
        """Log-probabilities of given tokens; events that come meanwhile are kept for `events`.

        Raises:
            RequestError: fewer than 2 tokens, or more than plan.max_context.
        """
        if not 2 <= len(tokens) <= self.plan.max_context:
            raise RequestError(
                f"{len(tokens)} tokens to score; from 2 to {self.plan.max_context} (model.max_context) can be"
            )
        self._scores += 1
        self._phase = "scoring"
        self._send(wire.ScoreTokens(self._scores, tokens, top_k))
        while True:
            report = self._await(wire.Scored, None)
            assert report is not None  # without a timeout it waits
            if report.id == self._scores:  # an older one belongs to a call that was interrupted
                self._phase = ""
                return report.score

    def stats(self) -> Stats:
        """What the child used so far; its counters begin after the warm-up, its peaks with its life."""
        self._send(wire.GetStats())
        report = self._await(wire.StatsReport, None)
        assert report is not None  # without a timeout it waits
        return report.stats

    def close(self, timeout: float = 10.0) -> None:
        """Ends the child and its process group: politely, and by force after `timeout` seconds. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._error is None and timeout > 0:
                self._child.note_shared_memory()  # engines end some of their own processes by force
                self._send(wire.Close())
                self._child.wait(timeout)
        finally:  # also when a Ctrl-C interrupts the wait
            self._child.kill()
            self._sock.close()
            self._error = self._error or EngineError(f"the {self.plan.backend} engine is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error or a Ctrl-C nobody waits for the answers in flight.
        self.close(timeout=10.0 if error is None else 0)

    def _send(self, message: wire.Command) -> None:
        if self._error is not None:
            raise self._error
        # A child that has died is reported by the next read: what it still sent comes first.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sender.send(message)

    def _await(self, kind: type[_Reply], timeout: float | None) -> _Reply | None:
        """The next report of one kind, others are kept; None after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for position, report in enumerate(self._arrived):
                if isinstance(report, kind):
                    del self._arrived[position]
                    return report
            if self._error is not None:
                raise self._error
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._read(left):
                return None

    def _read(self, timeout: float | None) -> bool:
        """Takes in what the child sent, or its death. False if nothing happened in `timeout` seconds."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if self._child.pidfd is not None:  # a worker may hold the other end of the socket open
            poll.register(self._child.pidfd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)]
        if not ready:
            return False
        data = b""
        if self._sock.fileno() in ready:
            with contextlib.suppress(ConnectionResetError):
                data = self._sock.recv(_READ_BYTES)
        try:
            messages = self._framer.feed(data)
        except wire.WireError as error:
            self._end(f"sent something that is not a message: {error}")
            return True
        for message in messages:
            self._take(message)
        if not data and self._error is None:
            self._died()
        return True

    def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Progress():
                if self._on_progress is not None:
                    self._on_progress(message)
            case wire.Fatal(kind, text, hint, _):
                doing = self._doing()
                self._child.wait(_EXIT_S)
                error = _KINDS.get(kind, EngineError)
                if error is EngineError and _OUT_OF_MEMORY.search(text):
                    error = errors.OutOfMemoryError
                if error is errors.OutOfMemoryError:
                    hint = hint or _LESS
                self._end(f"stopped while {doing}: {text}", hint, error)
            case _:
                self._arrived.append(message)

    def _died(self) -> None:
        """Its end of the socket is closed, or it has exited, without a word."""
        doing = self._doing()
        words = self._child.last_words()
        said = f"its last words: {words}" if words else "it wrote nothing to its log"
        if not self._child.wait(_EXIT_S):
            self._end(f"closed its connection while {doing}; {said}")
            return
        code = self._child.kill()
        if code >= 0:
            self._end(f"exited with code {code} while {doing}; {said}")
            return
        name = signal.Signals(-code).name if -code in signal.valid_signals() else "unknown"
        memory = "The kernel may have run out of memory (dmesg tells). " if -code == signal.SIGKILL else ""
        self._end(f"was killed by signal {-code} ({name}) while {doing}; {said}", memory)

    def _end(self, what: str, hint: str = "", kind: type[OrchestratorError] = EngineError) -> None:
        self._child.kill()
        hint = f"{hint.rstrip('. ')}. " if hint else ""
        self._error = kind(f"the {self.plan.backend} engine {what}", f"{hint}Its log: {self.log}")

    def _doing(self) -> str:
        with self._lock:
            return self._phase or ("answering" if self._in_flight else "waiting for requests")
