"""The broker and the routes over it, for what a real engine does not do on demand."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from orchestrator.backends.protocol import Delta, Event, Failed, Finished, Request
from orchestrator.config import GenerationConfig
from orchestrator.errors import EngineError, RequestError
from orchestrator.server.app import MAX_BODY, create_app
from orchestrator.server.broker import AbandonedError, Broker
from orchestrator.server.errors import ServerStoppingError
from orchestrator.server.prepare import ServedModel


class Puppet:
    """An engine that does what a test says."""

    def __init__(self) -> None:
        self.steps: queue.Queue[list[Event] | Exception] = queue.Queue()
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def submit(self, request: Request) -> None:
        self.submitted.append(request.id)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def events(self, timeout: float | None = None) -> list[Event]:
        try:
            step = self.steps.get(timeout=timeout)
        except queue.Empty:
            return []
        if isinstance(step, Exception):
            raise step
        return step


def request(name: str, number: int) -> Request:
    return Request(name, [1], 1)


def end(name: str, reason: str = "stop") -> Finished:
    return Finished(name, reason, 2, 3, 0, 0, 0, 0)


@asynccontextmanager
async def started(puppet: Puppet, on_death: Callable[[], None] = lambda: None) -> AsyncIterator[Broker]:
    broker = Broker(puppet)
    broker.start(on_death)
    try:
        yield broker
    finally:
        broker.stop()


def in_loop(scene: Callable[[Puppet], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(Puppet()), 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_each_request_gets_its_own_events() -> None:
    async def scene(puppet: Puppet) -> None:
        async with started(puppet) as broker:
            one, two = await broker.open(request), await broker.open(request)
            puppet.steps.put([Delta(two.name, [1], "b"), Delta(one.name, [1], "a"), Delta("unknown", [1], "x")])
            puppet.steps.put([end(one.name), Failed(two.name, "the logits are not finite")])
            assert [event async for event in one] == [Delta(one.name, [1], "a"), end(one.name)]
            assert await anext(two) == Delta(two.name, [1], "b")
            with pytest.raises(EngineError, match="not finite"):
                await anext(two)
            one.close()
            counters = broker.counters
            assert (counters.requests, counters.finished, counters.failed, counters.cancelled) == (2, 1, 1, 0)
            assert puppet.cancelled == []

    in_loop(scene)


def test_a_ticket_that_is_closed_is_cancelled_once_and_its_tokens_count() -> None:
    async def scene(puppet: Puppet) -> None:
        async with started(puppet) as broker:
            ticket = await broker.open(request)
            ticket.close()
            ticket.close()
            with pytest.raises(AbandonedError):
                await anext(ticket)
            puppet.steps.put([end(ticket.name, "cancelled")])
            await until(lambda: broker.counters.completion_tokens == 3)
            assert puppet.cancelled == [ticket.name]
            assert (broker.counters.cancelled, broker.counters.finished) == (1, 0)

    in_loop(scene)


def test_a_request_that_is_given_up_while_it_is_made_reaches_no_engine() -> None:
    async def scene(puppet: Puppet) -> None:
        making, go = threading.Event(), threading.Event()

        def slow(name: str, number: int) -> Request:
            making.set()
            assert go.wait(10)
            return request(name, number)

        async with started(puppet) as broker:
            opening = asyncio.create_task(broker.open(slow))
            await until(making.is_set)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            go.set()
            await broker.open(request)
            assert len(puppet.submitted) == 1

    in_loop(scene)


def test_a_request_that_cannot_be_made_is_refused_alone() -> None:
    def impossible(name: str, number: int) -> Request:
        raise RequestError("no")

    async def scene(puppet: Puppet) -> None:
        async with started(puppet) as broker:
            with pytest.raises(RequestError):
                await broker.open(impossible)
            assert broker.counters.failed == 1
            await broker.open(request)
            assert len(puppet.submitted) == 1

    in_loop(scene)


@pytest.mark.parametrize("fault", [EngineError("its last words"), ZeroDivisionError("its last words")])
def test_a_dead_engine_ends_every_request_and_takes_no_more(fault: Exception) -> None:
    async def scene(puppet: Puppet) -> None:
        died = asyncio.Event()
        async with started(puppet, died.set) as broker:
            tickets = [await broker.open(request) for _ in range(3)]
            puppet.steps.put(fault)
            for ticket in tickets:
                with pytest.raises(EngineError, match="its last words"):
                    await anext(ticket)
            await died.wait()
            with pytest.raises(EngineError, match="its last words"):
                await broker.open(request)
            assert broker.counters.failed == 3

    in_loop(scene)


def test_a_broker_that_stops_ends_every_request() -> None:
    async def scene(puppet: Puppet) -> None:
        async with started(puppet) as broker:
            ticket = await broker.open(request)
        with pytest.raises(ServerStoppingError):
            await anext(ticket)
        with pytest.raises(ServerStoppingError):
            await broker.open(request)
        await until(lambda: puppet.cancelled == [ticket.name])

    in_loop(scene)


class Tokens:
    def encode_prompt(self, text: str) -> list[int]:
        if text == "bug":
            raise ZeroDivisionError
        return [1, 2]


@asynccontextmanager
async def served(broker: Broker) -> AsyncIterator[httpx.AsyncClient]:
    model = ServedModel("tiny", 16, 100, GenerationConfig(), Tokens())  # type: ignore[arg-type]
    app = httpx.ASGITransport(create_app(model, broker, None), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=app, base_url="http://tiny") as client:
        yield client


def test_health_is_bad_once_the_engine_has_died() -> None:
    async def scene(puppet: Puppet) -> None:
        died = asyncio.Event()
        async with started(puppet, died.set) as broker, served(broker) as client:
            assert (await client.get("/health")).status_code == 200
            puppet.steps.put(EngineError("its last words"))
            await died.wait()
            health = await client.get("/health")
            assert (health.status_code, health.json()["error"]) == (503, "its last words")
            refused = await client.post("/v1/completions", json={"prompt": "hi"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (500, "server_error")

    in_loop(scene)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_fails_in_the_engine_says_so(stream: bool) -> None:
    async def scene(puppet: Puppet) -> None:
        async with started(puppet) as broker, served(broker) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "stream": stream}))
            await until(lambda: bool(puppet.submitted))
            puppet.steps.put([Delta(puppet.submitted[0], [1], "a"), Failed(puppet.submitted[0], "not finite")])
            reply = await asking
            assert reply.status_code == (200 if stream else 500)
            assert "not finite" in reply.text
            assert "[DONE]" not in reply.text

    in_loop(scene)


def test_a_body_that_is_far_too_long_is_refused() -> None:
    async def scene(puppet: Puppet) -> None:
        async with started(puppet) as broker, served(broker) as client:
            headers = {"Content-Type": "application/json"}
            reply = await client.post("/v1/completions", content=b" " * (MAX_BODY + 1), headers=headers)
            assert (reply.status_code, reply.json()["error"]["type"]) == (413, "invalid_request_error")

    in_loop(scene)


def test_a_bug_is_a_500_and_the_server_goes_on() -> None:
    async def scene(puppet: Puppet) -> None:
        async with started(puppet) as broker, served(broker) as client:
            reply = await client.post("/v1/completions", json={"prompt": "bug"})
            assert reply.status_code == 500
            assert reply.json()["error"]["message"] == "internal error: ZeroDivisionError"
            assert puppet.submitted == []
            assert (await client.get("/health")).status_code == 200

    in_loop(scene)
