"""What the plan's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from composing import hydra_ready

from orchestrator.engine import interpreters


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    """`composed` works within it."""
    with hydra_ready():
        yield


@pytest.fixture
def every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every engine is installed."""
    monkeypatch.setattr(interpreters, "missing_here", lambda backend: [])
