"""How vLLM is started where a neighbour on the GPU ends meanwhile: a fault that cannot be had on a CPU."""

from __future__ import annotations

import pytest

from orchestrator.backends.vllm import VllmEngine, started

NEIGHBOUR = "AssertionError: Error in memory profiling. Initial free memory 138.77 GiB, current free memory 139.0 GiB."


class Start:
    """Raises what it was given, one after another, then returns."""

    def __init__(self, *errors: str) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise RuntimeError(self.errors.pop(0))
        return "engine"


def test_it_is_started_again_where_a_neighbour_ended(capfd: pytest.CaptureFixture[str]) -> None:
    start = Start(NEIGHBOUR, NEIGHBOUR)
    assert started(start, str) == "engine"
    assert start.calls == 3
    assert capfd.readouterr().err.count("started again") == 2


def test_not_for_ever() -> None:
    start = Start(*[NEIGHBOUR] * 5)
    with pytest.raises(RuntimeError, match="memory profiling"):
        started(start, str)
    assert start.calls == 3


def test_another_failure_is_told_at_once() -> None:
    start = Start(NEIGHBOUR, "ValueError: No available memory for the cache blocks.")
    with pytest.raises(RuntimeError, match="No available memory"):
        started(start, str)
    assert start.calls == 2


def test_a_neighbour_that_never_ends_is_told_with_what_to_do() -> None:
    told = VllmEngine()._failure(RuntimeError(NEIGHBOUR))
    assert "gave GPU memory back while vLLM measured" in told.message
    assert "hardware.gpus" in told.hint


def test_a_neighbour_that_took_the_cache_is_told_too() -> None:
    """What a neighbour takes while vLLM measures is counted as vLLM's: an 8B had -0.03 GiB left for its cache so."""
    engine = VllmEngine()
    squeezed = engine._failure(RuntimeError("ValueError: No available memory for the cache blocks. Try increasing `x`"))
    assert "starting on the same GPU, run it again" in squeezed.hint
    full = engine._failure(RuntimeError("ValueError: Free memory on device is less than desired GPU memory"))
    assert "again" not in full.hint
