"""A run's folder on a disk that is full (/dev/full stands for it)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from orchestrator.errors import DoesNotFitError, OutputError
from orchestrator.runfolder import RunFolder

ADVICE = "set paths.runs=FOLDER elsewhere"


def full(folder: Path, name: str) -> RunFolder:
    """A run whose file of that name cannot be written."""
    (folder / name).symlink_to("/dev/full")
    return RunFolder(folder)


def test_a_result_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"plan\.json cannot be written \(No space left on device\)") as caught:
        full(tmp_path, ".plan.json.part").write("plan.json", {})
    assert ADVICE in str(caught.value)
    assert not (tmp_path / "plan.json").exists()


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    run = full(tmp_path, "run.log")
    with pytest.raises(OutputError, match=r"run\.log cannot be written \(No space left on device\)"), run.recorded():
        logging.getLogger("orchestrator").info("text")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    kept = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    assert str(tmp_path / "run.log") not in [handler.baseFilename for handler in kept]


def test_a_status_that_cannot_be_written(tmp_path: Path) -> None:
    run = full(tmp_path, ".status.json.part")
    with pytest.raises(OutputError, match=r"status\.json cannot be written"), run.recorded():
        raise AssertionError("it began")


def test_what_a_run_ended_with_is_told_all_the_same(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def fails() -> None:
        with run.recorded():
            (tmp_path / ".status.json.part").symlink_to("/dev/full")
            raise DoesNotFitError("too large")

    with pytest.raises(DoesNotFitError, match="too large"):
        fails()
