"""What an engine's requests hold, counted from their events."""

from __future__ import annotations

from orchestrator.backends.protocol import Delta, Failed, Finished, Request
from orchestrator.engine.in_flight import Held, InFlight


def end(name: str) -> Finished:
    return Finished(name, "stop", 0, 0, 0, 0, 0, 0)


def test_the_most_at_a_time_counts() -> None:
    requests = InFlight()
    for name, prompt in (("a", 10), ("b", 20), ("waits", 1000)):
        requests.add(Request(name, [1] * prompt, 5))
    requests.take([Delta("a", [7], "x"), Delta("b", [7, 8], "xy")])
    assert requests.most == Held(2, 30, 33)
    requests.take([Delta("a", [7], "x"), end("a")])  # an end comes behind its last token
    assert requests.most == Held(2, 30, 34)
    requests.take([Delta("b", [7], "x"), end("b"), Failed("waits", "no")])
    assert requests.most == Held(2, 30, 34)
    assert not requests


def test_what_is_not_known_is_not_counted() -> None:
    requests = InFlight()
    requests.take([Delta("late", [7], "x"), end("late")])
    assert requests.most == Held()
    assert "late" not in requests
