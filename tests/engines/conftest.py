"""Checkpoints, plans and engines for the tests of this folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from orchestrator.backends.huggingface import HuggingFaceEngine
from orchestrator.backends.protocol import Delta, Event, Failed, Finished, LoadPlan, Request
from orchestrator.engine.handle import EngineProcess

HUGGINGFACE = "orchestrator.backends.huggingface:HuggingFaceEngine"
FAKE = "fakes:Fake"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama whose greedy answers never end by themselves."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"), end_token=False)


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tied"), tied=True)


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


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> HuggingFaceEngine:
    """The unquantized engine in this process; tests leave nothing in flight."""
    return load_engine(make_plan(checkpoint))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Starts engines in child processes and closes them."""
    started: list[EngineProcess] = []

    def begin(plan: LoadPlan, adapter: str = HUGGINGFACE, **changes: Any) -> EngineProcess:
        env = {"PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "2"}
        log = tmp_path / f"engine-{len(started)}.log"
        started.append(EngineProcess.start(sys.executable, adapter, plan, log, env, **changes))
        return started[-1]

    yield begin
    for process in started:
        process.close(timeout=0)


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
