"""One engine, many coroutines: a thread takes the engine's events, each request's queue gets its own.

Three threads: the event loop (all bookkeeping, so that nothing here needs a lock), the consumer (waits for the
engine), and the sender (tokenizes, submits and cancels, in this order: a request is never cancelled before it is
submitted, and tokenizers are not made for several threads).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from orchestrator.backends.protocol import Delta, Event, Failed, Finished, Request
from orchestrator.errors import EngineError, OrchestratorError
from orchestrator.server.errors import ServerStoppingError

_POLL_S = 0.2  # how soon the consumer notices that it is to stop

MakeRequest = Callable[[str, int], Request]  # from its id and its number


class Source(Protocol):
    """What the broker needs of an EngineProcess."""

    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def events(self, timeout: float | None = None) -> list[Event]: ...


class AbandonedError(Exception):
    """The ticket was closed while its answer was being made: nobody waits for it."""


@dataclass
class Counters:
    """What has been served. Tokens are those of cancelled requests too."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Ticket:
    """One request's events, for one coroutine, which has to close it."""

    def __init__(self, name: str, broker: Broker) -> None:
        self.name = name
        self._broker = broker
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Delta | Finished:
        """Deltas, then Finished.

        Raises:
            OrchestratorError: the request failed, the engine died, or the server stops.
            AbandonedError: the ticket was closed.
        """
        if self._ended:
            raise StopAsyncIteration
        event = await self._queue.get()
        self._ended = not isinstance(event, Delta)
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Failed):
            raise EngineError(event.message)
        return event

    def close(self) -> None:
        """Cancels the request in the engine, unless it has ended. Idempotent; on the event loop."""
        self._broker.abandon(self)

    def put(self, event: Event | Exception) -> None:
        """For the broker."""
        self._queue.put_nowait(event)


class Broker:
    """Requests of any number of coroutines through one engine. Every method is for the event loop's thread."""

    def __init__(self, engine: Source) -> None:
        self.counters = Counters()
        self.error: OrchestratorError | None = None  # why no more requests are taken
        self._engine = engine
        self._tickets: dict[str, Ticket] = {}
        self._stopped = threading.Event()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="sender")
        self._consumer = threading.Thread(target=self._consume, name="consumer", daemon=True)

    def start(self, on_death: Callable[[], None]) -> None:
        """Begins to take events; `on_death` is called on the event loop when the engine has died."""
        self._loop = asyncio.get_running_loop()
        self._on_death = on_death
        self._consumer.start()

    async def open(self, make: MakeRequest) -> Ticket:
        """Makes a request (in the sender's thread: tokenizing may take a while) and submits it.

        Raises:
            OrchestratorError: as `make` says, or no more requests are taken.
        """
        if self.error is not None:
            raise self.error
        ticket = Ticket(uuid.uuid4().hex, self)
        number = self.counters.requests
        self.counters.requests += 1
        self._tickets[ticket.name] = ticket
        try:
            await self._loop.run_in_executor(self._sender, self._submit, ticket.name, number, make)
        except OrchestratorError:
            if self._tickets.pop(ticket.name, None) is not None:
                self.counters.failed += 1
            raise
        except BaseException:
            self.abandon(ticket)
            raise
        return ticket

    def _submit(self, name: str, number: int, make: MakeRequest) -> None:
        request = make(name, number)
        if name in self._tickets:
            self._engine.submit(request)

    def abandon(self, ticket: Ticket) -> None:
        """For Ticket.close."""
        if self._tickets.pop(ticket.name, None) is not None:
            self.counters.cancelled += 1
            ticket.put(AbandonedError())
            self._cancel(ticket.name)

    def _cancel(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):  # the sender has been shut down
            self._sender.submit(self._engine.cancel, name)

    def refuse(self, error: OrchestratorError) -> None:
        """Takes no more requests, and ends those that are in flight, with this error."""
        self.error = self.error or error
        tickets, self._tickets = self._tickets, {}
        for name, ticket in tickets.items():
            self.counters.failed += 1
            ticket.put(error)
            self._cancel(name)

    def stop(self) -> None:
        """Ends the threads. The engine is the caller's again."""
        self.refuse(ServerStoppingError("the server is stopping"))
        self._stopped.set()
        self._consumer.join()
        self._sender.shutdown(wait=False)  # a send to an engine that hangs ends with the engine

    def _consume(self) -> None:
        """The consumer's thread."""
        try:
            while not self._stopped.is_set():
                events = self._engine.events(timeout=_POLL_S)
                if events:
                    self._loop.call_soon_threadsafe(self._deliver, events)
        except OrchestratorError as error:
            self._loop.call_soon_threadsafe(self._died, error)
        except Exception as error:  # a bug of ours: without a consumer every client would wait for ever
            logging.getLogger(__name__).exception("internal error")
            died = EngineError(f"internal error: {type(error).__name__}: {error}", "The traceback is in run.log.")
            self._loop.call_soon_threadsafe(self._died, died)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Finished):  # of a cancelled request too
                self.counters.prompt_tokens += event.prompt_tokens
                self.counters.completion_tokens += event.completion_tokens
            ticket = self._tickets.get(event.id)
            if ticket is None:
                continue
            if not isinstance(event, Delta):
                del self._tickets[event.id]
                self.counters.finished += isinstance(event, Finished)
                self.counters.failed += isinstance(event, Failed)
            ticket.put(event)

    def _died(self, error: OrchestratorError) -> None:
        self.refuse(error)
        self._on_death()
