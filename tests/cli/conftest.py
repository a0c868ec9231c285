"""A store that all commands share, so that the embedded model is merged once; models made of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_models
from commands import Done, Orchestrator
from small_models import Llama

from orchestrator import embedded

LONG_WINDED = Llama(hidden=256, layers=4, heads=4, kv_heads=4, intermediate=512, vocab=4096, context=2048)
LARGE = Llama(hidden=1024, layers=24, heads=16, kv_heads=8, intermediate=2816, vocab=4096)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def orchestrator(tmp_path: Path, store: Path) -> Iterator[Orchestrator]:
    """A working folder of the test's own, and the store of all tests."""
    place = Orchestrator(tmp_path, store)
    yield place
    place.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    """A working folder for runs that several tests look at, and a store that no other test fills."""
    place = Orchestrator(tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("shared-artifacts"))
    yield place
    place.close()


@pytest.fixture(scope="session")
def default_run(shared: Orchestrator) -> Done:
    """`python -m orchestrator`, as it stands in the README, into an empty store."""
    return shared()


@pytest.fixture(scope="session")
def merged(shared: Orchestrator, default_run: Done) -> Path:
    """The embedded model with its adapter merged, as a folder of safetensors. Tests that change it copy it."""
    output = shared.folder / "merged"
    done = shared("task=convert", f"output.path={output}")
    assert done.code == 0, done.err
    return output


@pytest.fixture
def model(merged: Path, tmp_path: Path) -> Path:
    """A copy of the merged model, for a test to spoil."""
    return Path(shutil.copytree(merged, tmp_path / "model"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded base (.bin shards), for a test to spoil."""
    return Path(shutil.copytree(embedded.BASE, tmp_path / "base"))


@pytest.fixture(scope="session")
def long_winded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without an end token: its answers are as long as they may be."""
    folder = small_models.write_noise(tmp_path_factory.mktemp("long-winded"), LONG_WINDED)
    return with_tokenizer(folder)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 600 MB and an adapter for it: a second of merging or more."""
    folder = tmp_path_factory.mktemp("large")
    model = with_tokenizer(small_models.write_headers(folder / "base", LARGE))
    return model, small_models.write_adapter(folder / "adapter", LARGE)


def with_tokenizer(folder: Path) -> Path:
    for file in embedded.BASE.glob("*token*"):
        shutil.copy(file, folder)
    return folder
