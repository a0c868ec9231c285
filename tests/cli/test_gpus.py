"""Runs that share the GPUs of a machine. There are none: a run gets as far as its engine's start."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Orchestrator, gone
from leasing import Machine

WANTS = ("backend=transformers", "prompts.text=hi")
JOBLIB = importlib.util.find_spec("hydra_plugins") is not None
with_joblib = pytest.mark.skipif(not JOBLIB, reason="hydra-joblib-launcher is not installed")


@pytest.fixture
def machine(tmp_path: Path, orchestrator: Orchestrator) -> Iterator[Machine]:
    made = Machine(tmp_path, 24)
    orchestrator.more_env = made.env
    yield made
    made.close()


def test_a_run_waits_for_another_and_goes_on_when_it_is_gone(machine: Machine, orchestrator: Orchestrator) -> None:
    first = machine.run("runs/first", 23.5)
    assert first.said() == "GPU 0"
    second = orchestrator.start(*WANTS)
    second.until_state("waiting")
    assert second.family() == []
    first.process.kill()
    done = second.done()
    assert f" GiB on GPU 0, held by runs/first (pid {first.pid})" in done.err
    assert "loading in a process of its own" in done.err
    assert done.code in (1, 4), done.err  # no CUDA here
    assert sorted(path.name for path in machine.leases.iterdir()) == ["lock"]


def test_ctrl_c_ends_the_wait(machine: Machine, orchestrator: Orchestrator) -> None:
    machine.run("runs/first", 23.5).said()
    second = orchestrator.start(*WANTS)
    second.until_state("waiting")
    second.interrupt()
    done = second.done()
    assert done.code == 130
    assert done.json("status.json")["state"] == "interrupted"
    assert len(list(machine.leases.glob("*.lease"))) == 1


def test_a_plan_says_who_holds_the_memory(machine: Machine, orchestrator: Orchestrator) -> None:
    first = machine.run("runs/first", 20)
    first.said()
    done = orchestrator("task=plan")
    assert f"GPU 0: 20.00 GiB held by runs/first (pid {first.pid})" in done.out
    [gpu] = done.json("plan.json")["hardware"]["gpus"]
    assert gpu["held_by"] == [{"pid": first.pid, "name": "runs/first", "bytes": 20 * 2**30, "ours": False}]


def test_without_a_gpu_nothing_is_written(orchestrator: Orchestrator, tmp_path: Path) -> None:
    orchestrator.more_env = {"ORCHESTRATOR_LEASES": str(tmp_path / "leases")}
    done = orchestrator("hardware=cpu", "prompts.text=hi", "generation.max_tokens=1")
    assert done.code == 0, done.err
    assert not (tmp_path / "leases").exists()


@pytest.mark.skipif(JOBLIB, reason="hydra-joblib-launcher is installed")
def test_without_the_launcher_it_says_what_to_type(orchestrator: Orchestrator) -> None:
    done = orchestrator("-m", "hydra/launcher=joblib", "task=plan", "quant.bits=4,8")
    assert done.code == 4
    assert "pip install 'orchestrator[sweep]'" in done.error


@with_joblib
def test_the_jobs_of_a_sweep_run_at_a_time(orchestrator: Orchestrator) -> None:
    done = orchestrator("-m", "hydra/launcher=joblib", "task=plan", "hardware=cpu", "quant.bits=4,8")
    assert done.code == 0, done.err
    plans = sorted(orchestrator.runs.glob("*-sweep/*/plan.json"))
    assert [json.loads(plan.read_text())["bits"] for plan in plans] == [4, 8]
    pids = {json.loads(plan.with_name("status.json").read_text())["pid"] for plan in plans}
    assert len(pids) <= 2


@with_joblib
def test_a_sweep_shares_the_gpu(machine: Machine, orchestrator: Orchestrator) -> None:
    first = machine.run("runs/first", 23.5)
    first.said()
    sweep = orchestrator.start("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *WANTS, "quant.bits=16,32")

    def states() -> list[str]:
        files = orchestrator.runs.glob("*-sweep/*/status.json")
        return [json.loads(file.read_text())["state"] for file in files]

    sweep.until(lambda: states() == ["waiting", "waiting"])
    family = sweep.family()
    first.process.kill()
    done = sweep.done()
    assert done.err.count("loading in a process of its own") == 2
    assert done.code == 1  # no CUDA here
    assert gone(family)
    assert sorted(path.name for path in machine.leases.iterdir()) == ["lock"]
