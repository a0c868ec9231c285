"""run.resume: what a run was started with is what it goes on with, from wherever it is resumed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from commands import Done, Orchestrator

from orchestrator import embedded

AWKWARD = 'price ${oc.env:HOME}, "b" {c} ${d} \\'


def unanswered(run: Done) -> Path:
    """The run's folder as a kill before the first answer leaves it."""
    assert run.folder is not None
    (run.folder / "answers.jsonl").write_text("")
    return run.folder


def test_a_resumed_run_keeps_its_paths_its_settings_and_its_texts(orchestrator: Orchestrator, tmp_path: Path) -> None:
    store = tmp_path / "own-store"
    os.symlink(embedded.BASE, orchestrator.folder / "base")
    first = orchestrator(
        "model.path=base",
        f"model.adapter={embedded.ADAPTER}",
        "convert.dtype=float32",
        f"paths.artifacts={store}",
        "run.in_flight=2",
        "generation.max_tokens=4",
        f"prompts.text={AWKWARD}",
    )
    assert first.code == 0, first.err
    folder = unanswered(first)
    command = [part for part in orchestrator.command(f"run.resume={folder}") if not part.startswith("paths.")]
    done = subprocess.run(command, cwd="/", env=orchestrator.env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(store) in done.stderr
    assert "nothing to build" in done.stderr
    assert "2 in flight" in done.stderr
    [answer] = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert answer["prompt"] == AWKWARD


@pytest.mark.parametrize("harm", ["", "just a text", "model: {path: null}"])
def test_a_configuration_that_is_not_whole_is_refused(orchestrator: Orchestrator, default_run: Done, harm: str) -> None:
    folder = orchestrator.folder / "copy"
    folder.mkdir()
    (folder / "config.yaml").write_text(harm)
    done = orchestrator(f"run.resume={folder}")
    assert done.code == 2
    assert "config.yaml is not whole" in done.err


def test_a_run_that_is_alive_is_not_resumed(orchestrator: Orchestrator, long_winded: Path) -> None:
    running = orchestrator.start(
        f"model.path={long_winded}", "backend=transformers", "prompts.text=hi", "generation.max_tokens=1500"
    )
    running.until_answering()
    second = orchestrator(f"run.resume={running.folder}")
    assert second.code == 2
    assert "is being written by another process" in second.err
    running.interrupt()
    ended = running.done()
    assert ended.code == 130
    assert f"run.resume={running.folder}" in ended.err


def test_several_runs_are_not_resumed_at_once(orchestrator: Orchestrator, default_run: Done) -> None:
    done = orchestrator(f"run.resume={default_run.folder}", "-m")
    assert done.code == 2
    assert "-m makes several" in done.error
