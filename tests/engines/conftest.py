"""Checkpoints, plans and engines for the tests of this folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from asking import HUGGINGFACE, load_engine, make_plan

from orchestrator.backends.huggingface import HuggingFaceEngine
from orchestrator.backends.protocol import LoadPlan
from orchestrator.config import Config, ConvertConfig, PathsConfig
from orchestrator.engine.handle import EngineProcess
from orchestrator.pipeline import merged
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import find_places, open_source


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama whose greedy answers never end by themselves."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"), end_token=False)


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def merged_embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, merged by our pipeline in float32."""
    config = Config(
        convert=ConvertConfig(dtype="float32"),
        paths=PathsConfig(artifacts=str(tmp_path_factory.mktemp("artifacts"))),
    )
    config, source = open_source(config, find_places(config, latest=True))
    return merged(config, source, RunFolder(tmp_path_factory.mktemp("run"))).path


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> HuggingFaceEngine:
    """The unquantized engine in this process; tests leave nothing in flight."""
    return load_engine(make_plan(checkpoint))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Starts engines in child processes and closes them."""
    started: list[EngineProcess] = []

    def begin(plan: LoadPlan, adapter: str = HUGGINGFACE, **changes: Any) -> EngineProcess:
        env = {"PYTHONPATH": os.path.dirname(__file__)}
        log = tmp_path / f"engine-{len(started)}.log"
        started.append(EngineProcess.start(sys.executable, adapter, plan, log, env, **changes))
        return started[-1]

    yield begin
    for process in started:
        process.close(timeout=0)
