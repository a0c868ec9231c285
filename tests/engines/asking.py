"""Plans for tiny models, and asking an engine: what the tests of this folder share beside fixtures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.backends.huggingface import HuggingFaceEngine
from orchestrator.backends.protocol import Delta, Event, Failed, Finished, LoadPlan, Request

HUGGINGFACE = "orchestrator.backends.huggingface:HuggingFaceEngine"
FAKE = "fakes:Fake"


def make_plan(folder: Path | str, method: str = "none", **changes: Any) -> LoadPlan:
    """A plan for the CPU in float32. The weights are rough: the tolerance of 1 MiB covers a tiny model."""
    plan = LoadPlan(
        model=str(folder),
        backend="transformers" if method == "none" else "bitsandbytes",
        method=method,
        bits={"none": 32.0, "int8": 8.0}.get(method, 4.0),
        dtype="float32",
        max_context=512,
        max_in_flight=8,
        device_map={"": "cpu"},
        weights={"cpu": 900_000},
    )
    return replace(plan, **changes)


def load_engine(plan: LoadPlan) -> HuggingFaceEngine:
    engine = HuggingFaceEngine()
    engine.load(plan)
    return engine


def answer(source: Any, requests: list[Request]) -> dict[str, Answer]:
    """Submits to an engine (here or in a child) and reads to the end of all answers."""
    for request in requests:
        source.submit(request)
    answers = {request.id: Answer() for request in requests}
    while not all(a.end for a in answers.values()):
        for event in source.events():
            answers[event.id].take(event)
    return answers


class Answer:
    """One answer as a client sees it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.end: Finished | Failed | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, event: Event) -> None:
        assert self.end is None, f"{event} after {self.end}"
        if isinstance(event, Delta):
            self.tokens += event.tokens
            self.pieces.append(event.text)
        else:
            self.end = event
