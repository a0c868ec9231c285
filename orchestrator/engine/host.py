"""The child process: loads one engine's adapter, checks it, and serves the parent's commands.

Its life: Load -> Progress... -> Ready -> (Events | Scored | StatsReport)... -> Close, or Fatal at any point.
The main thread alone touches the engine; a second thread reads the socket and ends the process when the parent
is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import itertools
import math
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from socket import socket
from typing import cast

from orchestrator.backends.protocol import Delta, Engine, Event, Failed, Finished, LoadPlan, Request, Stats
from orchestrator.backends.table import BACKENDS
from orchestrator.engine import wire
from orchestrator.engine.placement import bytes_per_device, check_placement
from orchestrator.errors import EngineError, OrchestratorError

_READ_BYTES = 1 << 16
_IDLE_S = 0.5  # between two looks at an idle engine
_SEND_S = 0.01  # tokens of quicker steps travel together: a message costs the engine tens of microseconds
_SMOKE_TOKENS = [1, 2, 3, 4]  # ids that every vocabulary has
_WARM_IN_FLIGHT = 4  # the parent's usual number; more would cost a large model seconds
_MAX_MESSAGE = 600  # characters of a Fatal's line


def main(argv: list[str]) -> int:
    """Serves one parent, then ends the process without returning.

    Args:
        argv: `--fd N --parent PID`: the inherited socket, and who has to stay alive.
    """
    parser = argparse.ArgumentParser(prog="orchestrator-engine")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args(argv)
    faulthandler.enable()
    # Ctrl-C is the parent's to handle; workers of the engine inherit this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(args.fd, False)
    sock = socket(fileno=args.fd)
    inbox = Inbox()
    threading.Thread(target=_read, args=(sock, args.parent, inbox), name="parent", daemon=True).start()
    code = _run(inbox, wire.Sender(sock))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the clean-up of engines at exit hangs or aborts now and then, and everything is done.
    os._exit(code)


class Inbox:
    """Commands that have arrived."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[wire.Message | wire.WireError] = queue.SimpleQueue()

    def put(self, item: wire.Message | wire.WireError) -> None:
        self._queue.put(item)

    def get(self, timeout: float | None = None) -> wire.Message:
        """The next command, waiting for it.

        Raises:
            queue.Empty: none came within `timeout` seconds.
            WireError: the stream is damaged.
        """
        item = self._queue.get(timeout=timeout)
        if isinstance(item, wire.WireError):
            raise item
        return item

    def drain(self, wait: float = 0.0, gather: float = 0.0) -> list[wire.Message]:
        """Everything that is there, and what comes within `wait` seconds and close behind it, `gather` seconds each."""
        found: list[wire.Message] = []
        with contextlib.suppress(queue.Empty):
            if wait:
                found.append(self.get(timeout=wait))
            while True:
                found.append(self.get(timeout=gather))
        return found


def _read(sock: socket, parent: int, inbox: Inbox) -> None:
    """Turns bytes into commands until the parent is gone, then kills this process and all its workers."""
    framer = wire.Framer()
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    # A process that the parent forked may hold the parent's end open: watch the parent itself as well.
    with contextlib.suppress(OSError, AttributeError):  # no such call before Linux 5.3
        poll.register(os.pidfd_open(parent), select.POLLIN)
    try:
        while os.getppid() == parent:
            ready = [fd for fd, _ in poll.poll()]
            if sock.fileno() not in ready:
                break
            data = sock.recv(_READ_BYTES)
            if not data:
                break
            for message in framer.feed(data):
                inbox.put(message)
    except wire.WireError as error:
        inbox.put(error)
        return
    except OSError as error:
        print(f"lost the parent: {error}", file=sys.stderr, flush=True)
    _kill_group()


def _kill_group() -> None:
    """SIGKILL for this process and everything it started (the parent made it the leader of its own group)."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _run(inbox: Inbox, outbox: wire.Sender) -> int:
    """The process boundary: whatever goes wrong inside becomes a Fatal."""
    try:
        load = inbox.get()
        if not isinstance(load, wire.Load):
            raise EngineError(f"the first command was {type(load).__name__}, not Load")
        engine = _adapter(load.adapter)
        ready = _start(engine, load.plan, outbox)
        warm = engine.stats()
        # What is loaded stays: the garbage collector need not go through it again and again between two steps.
        gc.collect()
        gc.freeze()
        outbox.send(ready)
        _serve(engine, warm, inbox, outbox)
        engine.close()
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        hint = error.hint if isinstance(error, OrchestratorError) else ""
        fatal = wire.Fatal(type(error).__name__, root_cause(error), hint, text)
        with contextlib.suppress(OSError):  # nobody is left to be told
            outbox.send(fatal)
        return 1
    return 0


def _adapter(name: str) -> Engine:
    module, _, cls = name.partition(":")
    return cast(Engine, getattr(importlib.import_module(module), cls)())


def root_cause(error: BaseException) -> str:
    """One line: what was raised and, where that came from something else, the innermost cause."""
    inner = error
    seen = {id(error)}
    while True:
        cause = inner.__cause__ or (None if inner.__suppress_context__ else inner.__context__)
        if cause is None or id(cause) in seen:
            break
        seen.add(id(cause))
        inner = cause
    lines = [_one_line(e) for e in dict.fromkeys((error, inner))]
    return ", because of ".join(lines)[:_MAX_MESSAGE]


def _one_line(error: BaseException) -> str:
    if isinstance(error, OrchestratorError):
        return error.message
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _start(engine: Engine, plan: LoadPlan, outbox: wire.Sender) -> wire.Ready:
    """Loads, checks the placement, answers once to prove it works and once more to be warm."""
    times = [time.monotonic()]

    def done(step: int, what: str) -> None:
        times.append(time.monotonic())
        outbox.send(wire.Progress(what, step, 4))

    outbox.send(wire.Progress("loading the weights", 0, 4))
    engine.load(plan)
    done(1, "checking where every tensor is")
    placement = engine.placement()
    check_placement(plan, placement)
    done(2, "answering a few tokens")
    _smoke(engine, plan)
    done(3, "warming up")
    _generate(engine, "warm-up", min(plan.max_in_flight, _WARM_IN_FLIGHT))
    done(4, "ready")
    load, _, smoke, warm = (end - begin for begin, end in itertools.pairwise(times))
    return wire.Ready(bytes_per_device(placement), load, smoke, warm, engine.versions())


def _smoke(engine: Engine, plan: LoadPlan) -> None:
    score = engine.score(_SMOKE_TOKENS, 1)
    numbers = (*score.logprobs, *score.tail, *(p for row in score.top_logprobs for p in row))
    if not all(map(math.isfinite, numbers)):
        raise EngineError(
            "the model gave a probability that is not finite on its first tokens",
            f"Its weights hold NaN{_or_overflow(plan)}",
        )
    _generate(engine, "smoke", 1)


def _or_overflow(plan: LoadPlan) -> str:
    """What else gives numbers that are not finite, and what to type then: a dtype that this engine has."""
    files = "check the files (convert.verify=true reads a merge back)"
    row = BACKENDS.get(plan.backend)
    if plan.dtype == "float32" or row is None:
        return f": {files}"
    overflow = f", or overflow in {plan.dtype}: {files}"
    if row.dtypes and "float32" not in row.dtypes:
        other = "backend=bitsandbytes quant.bits=4 on the model before it was quantized"
        return f"{overflow}, or type {other}: {plan.backend} computes in {' or '.join(row.dtypes)} only"
    if plan.method in row.half:
        return f": {files}" if plan.dtype == "bfloat16" else f"{overflow}, or set model.dtype=bfloat16"
    return f"{overflow}, or set model.dtype=float32{' quant.bits=32' * (plan.method == 'none')}"


def _generate(engine: Engine, name: str, count: int) -> None:
    """Answers a few tokens, `count` times at once: other kernels run for a batch than for one sequence."""
    for number in range(count):
        engine.submit(Request(f"{name} {number}", list(_SMOKE_TOKENS), max_tokens=4))
    while count:
        for event in engine.events():
            if isinstance(event, Failed):
                raise EngineError(f"the {name} answer failed: {event.message}")
            count -= isinstance(event, Finished)


def _serve(engine: Engine, warm: Stats, inbox: Inbox, outbox: wire.Sender) -> None:
    """Steps the engine while anything is in flight, else waits for a command. Returns on Close.

    An idle engine is looked at too: one that has died says so in its events.
    """
    in_flight: set[str] = set()
    outgoing = _Outgoing(outbox)
    try:
        while True:
            for command in inbox.drain() if in_flight else inbox.drain(_IDLE_S, engine.gather_s):
                match command:
                    case wire.Submit(request):
                        in_flight.add(request.id)
                        engine.submit(request)
                    case wire.Cancel(request_id):
                        engine.cancel(request_id)
                    case wire.ScoreTokens(number, tokens, top_k):
                        outbox.send(wire.Scored(number, engine.score(tokens, top_k)))
                    case wire.GetStats():
                        outbox.send(wire.StatsReport(_since(warm, engine.stats())))
                    case wire.Close():
                        return
                    case _:
                        raise EngineError(f"{type(command).__name__} is not a command")
            events = engine.events()
            in_flight.difference_update(e.id for e in events if not isinstance(e, Delta))
            outgoing.add(events)
    finally:  # also where the engine has failed: what it has answered is answered
        outgoing.flush()


class _Outgoing:
    """Events on their way to the parent. Those of quick steps travel together; an answer's end does not wait."""

    def __init__(self, outbox: wire.Sender) -> None:
        self._outbox = outbox
        self._waiting: list[Event] = []
        self._sent = 0.0

    def add(self, events: list[Event]) -> None:
        """Sends them or keeps them for the next; a step without any sends what there is."""
        self._waiting += events
        only_deltas = bool(events) and all(isinstance(event, Delta) for event in events)
        if not only_deltas or time.monotonic() - self._sent >= _SEND_S:
            self.flush()

    def flush(self) -> None:
        """Sends what there is.

        Raises:
            OSError: the parent is gone.
        """
        if self._waiting:
            self._outbox.send(wire.Events(joined(self._waiting)))
            self._waiting, self._sent = [], time.monotonic()


def joined(events: list[Event]) -> list[Event]:
    """The same events, with one delta for each request; they come first, as none comes behind its request's end."""
    deltas: dict[str, Delta] = {}
    ends: list[Event] = []
    for event in events:
        if not isinstance(event, Delta):
            ends.append(event)
        elif event.id in deltas:
            before = deltas[event.id]
            deltas[event.id] = Delta(event.id, before.tokens + event.tokens, before.text + event.text)
        else:
            deltas[event.id] = event
    return [*deltas.values(), *ends]


def _since(warm: Stats, now: Stats) -> Stats:
    """The counters without the smoke pass and the warm-up; peaks are of the whole life."""
    return replace(
        now,
        prefill_tokens=now.prefill_tokens - warm.prefill_tokens,
        prefill_s=now.prefill_s - warm.prefill_s,
        decode_tokens=now.decode_tokens - warm.decode_tokens,
        decode_s=now.decode_s - warm.decode_s,
    )
