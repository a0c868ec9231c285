"""Kills and interruptions: nothing hangs, nothing is left behind, nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, Done, Orchestrator, Started, gone, read_lines

pytestmark = pytest.mark.slow

Large = tuple[Path, Path]


def answering(orchestrator: Orchestrator, model: Path, *argv: str) -> Started:
    """A run that has begun to print a long answer."""
    more = argv or ("prompts.text=[one, two, three]", "generation.max_tokens=1900")
    started = orchestrator.start(f"model.path={model}", "backend=transformers", *more)
    started.until_answering()
    return started


def merging(orchestrator: Orchestrator, large: Large, store: Path) -> Started:
    """A merge of seconds into a store of its own, stopped at the first shard that is finished."""
    started = start_merge(orchestrator, large, store)
    started.until(lambda: bool(list(store.glob("*.partial/*.safetensors.done"))))
    return started


def start_merge(orchestrator: Orchestrator, large: Large, store: Path) -> Started:
    orchestrator.store = store
    base, adapter = large
    return orchestrator.start(
        "task=convert", f"model.path={base}", f"model.adapter={adapter}", "convert.shard_size=20MB"
    )


# The engine's process dies


def test_an_engine_that_is_killed_ends_the_run_at_once_with_its_last_words(
    orchestrator: Orchestrator, long_winded: Path
) -> None:
    started = answering(orchestrator, long_winded)
    started.engine().kill()
    killed = time.monotonic()
    done = started.done()
    assert time.monotonic() - killed < 5
    assert done.code == 1
    assert "killed by signal 9" in done.error
    assert "engine.log" in done.error
    status = done.json("status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1)


# We die


def test_a_run_that_is_killed_takes_its_engine_with_it(orchestrator: Orchestrator, long_winded: Path) -> None:
    started = answering(orchestrator, long_winded)
    family = started.family()
    assert family
    started.kill()
    assert gone(family)


def test_a_merge_that_is_killed_is_continued_by_the_next_run(
    orchestrator: Orchestrator, large: Large, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    started = merging(orchestrator, large, store)
    family = started.family()
    started.kill()
    started.done()
    assert gone(family)
    assert not list(store.glob("*/manifest.json"))
    done = start_merge(orchestrator, large, store).done()
    assert done.code == 0, done.err
    [report] = done.json("result.json")["reports"].values()
    assert report["kept"]
    assert report["kept"][0].startswith("model-00001-")
    last = report["kept"][0].rpartition("-")[2]  # 00004.safetensors
    assert f"model-{last.removesuffix('.safetensors')}-of-{last}" not in report["kept"]
    assert not list(store.glob("*.partial"))
    verified = orchestrator("task=artifacts", "artifacts.action=verify")
    assert verified.code == 0, verified.out


def test_a_run_that_is_killed_is_resumed_and_answers_nothing_twice(
    orchestrator: Orchestrator, long_winded: Path
) -> None:
    prompts = orchestrator.folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"question\u2028{i}", "id": i}, ensure_ascii=False) + "\n" for i in range(9))
    )
    argv = [f"prompts.file={prompts}", "run.in_flight=2", "generation.max_tokens=150"]
    started = answering(orchestrator, long_winded, *argv)
    folder = started.folder
    assert folder is not None
    answers = folder / "answers.jsonl"
    started.until(lambda: len(read_lines(answers)) >= 3)
    started.kill()
    started.done()
    before = read_lines(answers)
    assert 3 <= len(before) < 9
    prompts.unlink()
    done = orchestrator(f"run.resume={folder}")
    assert done.code == 0, done.err
    after = read_lines(answers)
    assert [(a["index"], a["id"], a["prompt"]) for a in after] == [(i, i, f"question\u2028{i}") for i in range(9)]
    assert [a for a in after if a["index"] in {b["index"] for b in before}] == sorted(before, key=lambda b: b["index"])
    assert all(a["completion_tokens"] == 150 for a in after)
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert done.folder is None  # it went on in its own folder
    finished = orchestrator(f"run.resume={folder}")
    assert finished.code == 0, finished.err
    assert read_lines(answers) == after


# Two at once


def test_two_runs_that_want_the_same_model_build_it_once(
    orchestrator: Orchestrator, large: Large, tmp_path: Path
) -> None:
    first = merging(orchestrator, large, tmp_path / "store")
    seen = set(orchestrator.runs.iterdir())
    second = start_merge(orchestrator, large, tmp_path / "store")
    done = [first.done(), second.done()]
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    results = [json.loads((run / "result.json").read_text()) for run in orchestrator.runs.iterdir()]
    assert len(results) == len(seen) + 1 == 2
    assert sorted(len(result["stages_run"]) for result in results) == [0, 1]
    assert len({result["output"] for result in results}) == 1


# Ctrl-C


def interrupted(started: Started, number: int = signal.SIGINT) -> Done:
    """Interrupts a run, which has to end at once, with everything that it started."""
    family = started.family()
    started.process.send_signal(number)
    done = started.done(timeout=10)
    assert done.code == 130, done.err
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1] == "interrupted"
    status = done.json("status.json")
    assert (status["state"], status["exit_code"]) == ("interrupted", 130)
    assert gone(family)
    return done


def test_ctrl_c_in_a_merge(orchestrator: Orchestrator, large: Large, tmp_path: Path) -> None:
    interrupted(merging(orchestrator, large, tmp_path / "store"))
    assert not list((tmp_path / "store").glob("*/manifest.json"))


@pytest.mark.parametrize("seconds", [0.05, 1.5], ids=["at its start", "in its middle"])
def test_ctrl_c_while_the_engine_loads(orchestrator: Orchestrator, long_winded: Path, seconds: float) -> None:
    started = orchestrator.start(f"model.path={long_winded}", "prompts.text=hi", "backend=transformers")
    started.until_state("loading")
    started.until(lambda: bool(started.family()))
    time.sleep(seconds)
    interrupted(started)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interruption_while_it_answers_keeps_what_is_finished(
    orchestrator: Orchestrator, long_winded: Path, number: int
) -> None:
    argv = ["prompts.text=[a, b, c, d, e, f]", "run.in_flight=1", "generation.max_tokens=300"]
    started = answering(orchestrator, long_winded, *argv)
    folder = started.folder
    assert folder is not None
    started.until(lambda: len(read_lines(folder / "answers.jsonl")) >= 1)
    done = interrupted(started, number)
    assert done.answers[0]["completion_tokens"] == 300


def test_ctrl_c_inside_an_exec_ends_with_130_too(tmp_path: Path) -> None:
    """As while a dataclass is being made by an import. (A module: of a script CPython does not ask how it ended.)"""
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from orchestrator import app\n"
        "app._hydra = lambda argv: exec('raise KeyboardInterrupt')\n"
        "sys.exit(app.main([]))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run([sys.executable, "-m", "interrupted"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")
