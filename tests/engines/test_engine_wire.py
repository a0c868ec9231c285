"""The wire format: what goes in comes out, and damage is refused."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from asking import make_plan

from orchestrator.backends.protocol import Delta, Failed, Finished, Request, Score, Stats
from orchestrator.engine import wire

# A user's dict may look like a message of ours.
PLAN = replace(make_plan("m"), gpu_split=(22.0, 24.0), engine_args={"is": "Close", "a": [1, {"is": "x"}]})
SCORE = Score([-1.5, float("-inf")], [[1, 2], [3, 4]], [[-0.1, float("-inf")], [0.0, -2.0]], [0.0, 1e-30])
MESSAGES: list[wire.Message] = [
    wire.Load(PLAN, "fakes:Fake"),
    wire.Submit(Request("é\ud800🙂", [1, 2], 3, 0.5, 0.9, None, ["\n", "</s>"])),
    wire.Cancel("a"),
    wire.ScoreTokens(1, [1, 2, 3], 5),
    wire.GetStats(),
    wire.Close(),
    wire.Progress("loading", 0, 4),
    wire.Ready({"cpu": 1 << 40}, 1.0, 2.0, 3.0, {"torch": "2"}),
    wire.Events([Delta("a", [1], "x"), Finished("a", "stop", 1, 2, 0.1, 0.2, 0.3, 0.4), Failed("b", "no")]),
    wire.Events([]),
    wire.Scored(1, SCORE),
    wire.StatsReport(Stats(1, [2, 3], 4, 0.5, 6, 0.7)),
    wire.Fatal("ValueError", "no", "try", "Traceback"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_comes_back_equal(message: wire.Message) -> None:
    assert wire.decode(wire.encode(message)[4:]) == message


def test_a_nan_survives() -> None:
    back = wire.decode(wire.encode(wire.Scored(1, Score([math.nan], [], [], [math.inf])))[4:])
    assert isinstance(back, wire.Scored)
    assert math.isnan(back.score.logprobs[0])
    assert back.score.tail == [math.inf]


def test_pieces_of_any_size_make_the_same_messages() -> None:
    stream = b"".join(map(wire.encode, MESSAGES))
    for seed in range(20):
        chance = random.Random(seed)
        framer, found, start = wire.Framer(), list[wire.Message](), 0
        while start < len(stream):
            size = chance.choice([1, 2, 3, 5, 100, 10_000])
            found += framer.feed(stream[start : start + size])
            start += size
        assert found == MESSAGES


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"1",
        b'{"is": "Nobody"}',
        b'{"is": "Cancel"}',
        b'{"is": "Cancel", "id": "a", "more": 1}',
        b'{"is": "Events", "events": [1]}',
        b'{"is": "Submit", "request": null}',
        b'{"id": "a"}',
    ],
)
def test_what_is_not_a_message_is_refused(body: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(body)


def test_a_length_beyond_the_limit_is_damage() -> None:
    with pytest.raises(wire.WireError, match="damaged"):
        wire.Framer().feed(b"\xff\xff\xff\xff")


def test_what_json_does_not_have_is_refused_before_it_is_sent() -> None:
    with pytest.raises(wire.WireError, match="cannot send Cancel"):
        wire.encode(wire.Cancel(b"bytes"))  # type: ignore[arg-type]
