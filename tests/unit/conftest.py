"""What the plan's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from composing import hydra_ready

from orchestrator import calibration
from orchestrator.config import PathsConfig, folder
from orchestrator.engine import interpreters
from orchestrator.plan import exl2_attention


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    """`composed` works within it."""
    with hydra_ready():
        yield


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runs of whoever tests have taken says nothing to a test."""
    read, theirs = calibration.read, folder(PathsConfig().artifacts)
    monkeypatch.setattr(calibration, "read", lambda root: calibration.History({}) if root == theirs else read(root))


@pytest.fixture(autouse=True)
def _nothing_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what the interpreters of whoever tests have beside their engines."""
    monkeypatch.setattr(exl2_attention, "lacks", lambda python: "")


@pytest.fixture
def no_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that keep nothing free, for tests whose numbers are about something else."""
    monkeypatch.setattr(calibration, "margin", lambda *given: calibration.Margin(0, "not looked at"))


@pytest.fixture
def every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every engine is installed."""
    monkeypatch.setattr(interpreters, "missing_here", lambda backend: [])
