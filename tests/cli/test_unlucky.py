"""Unlucky surroundings: closed streams, narrow encodings, a folder that is gone, awkward values. Never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Done, Orchestrator, read_lines

HI = ["prompts.text=What does len do?", "generation.max_tokens=4"]


def shell(orchestrator: Orchestrator, argv: list[str], more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command with a shell's redirections."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {more}', "bash", *orchestrator.command(*argv)],
        cwd=orchestrator.folder,
        env={**orchestrator.env(), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_reader_that_goes_away_costs_no_answer(orchestrator: Orchestrator, default_run: Done) -> None:
    done = shell(orchestrator, [], "| head -1")
    assert "Traceback" not in done.stderr
    [run] = orchestrator.runs.iterdir()
    assert len(read_lines(run / "answers.jsonl")) == 8
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_a_reader_that_goes_away_from_a_plan_ends_it_quietly(orchestrator: Orchestrator) -> None:
    for argv in (["task=plan"], ["--help"]):
        done = shell(orchestrator, argv, "2>err | true; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED="1")
        assert done.returncode == 141, done.stderr
        said = (orchestrator.folder / "err").read_text()
        assert not any(word in said.lower() for word in ("error", "traceback", "pipe"))
    done = shell(orchestrator, ["task=plan"], "| head -3")
    assert len(done.stdout.splitlines()) == 3
    assert "Plan: " in done.stdout
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())
    run = min(orchestrator.runs.iterdir())
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 141)
    assert (run / "plan.json").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [["task=plan"], ["task=artifacts"], ["--help"], ["--version"], ["--cfg", "job"]])
def test_a_full_device_costs_one_line(orchestrator: Orchestrator, argv: list[str], unbuffered: str) -> None:
    done = shell(orchestrator, argv, "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: cannot write to the output: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_notes_that_cannot_be_written_cost_nothing_else(orchestrator: Orchestrator) -> None:
    done = shell(orchestrator, ["task=plan"], "2> /dev/full")
    assert (done.returncode, done.stderr) == (0, "")
    assert "What could run it" in done.stdout
    done = shell(orchestrator, ["task=foo"], "2> /dev/full")
    assert (done.returncode, done.stderr) == (2, "")


def test_answers_that_cannot_be_shown_are_kept(orchestrator: Orchestrator, merged: Path) -> None:
    argv = [f"model.path={merged}", "prompts.text=[one, two]", "generation.max_tokens=4"]
    done = shell(orchestrator, argv, "> /dev/full")
    assert done.returncode == 1
    [run] = orchestrator.runs.iterdir()
    answers = run / "answers.jsonl"
    said = f"cannot write to the output: No space left on device. All answers are in {answers}."
    assert done.stderr.splitlines()[-1] == f"error: {said}"
    assert len(read_lines(answers)) == 2
    assert (run / "result.json").exists()
    assert json.loads((run / "status.json").read_text())["error"] == said


def test_without_its_packages_it_says_how_to_install_them(orchestrator: Orchestrator) -> None:
    script = "import sys; sys.modules['hydra'] = None; from orchestrator.app import main; sys.exit(main(['task=plan']))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=orchestrator.env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert done.stderr.startswith(f"error: hydra is not installed for {sys.executable}. Install the program")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_a_closed_stream_is_nowhere(orchestrator: Orchestrator, closed: str) -> None:
    done = shell(orchestrator, ["task=plan"], closed)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_an_encoding_that_lacks_a_character_shows_a_question_mark(orchestrator: Orchestrator, merged: Path) -> None:
    argv = [f"model.path={merged}", "prompts.text=len €?", "generation.max_tokens=4"]
    done = shell(orchestrator, argv, "", PYTHONIOENCODING="latin1")
    assert done.returncode == 0, done.stderr
    assert "> len ??" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["model.path=~nosuch/x", *HI], "there is no folder"),
        (["paths.runs="], "paths.runs= is empty"),
        (["hardware.cards=3", "task=plan"], "belongs to a named profile"),
        (["hardware.gpus=[0,0]", "task=plan"], "names a GPU twice"),
        (["task.name=foo"], "task.name=foo is not one of run, plan"),
        (["quant.bits=4,8", *HI], "need -m"),
        (["--chat"], "--chat is not an option. Did you mean task=chat?"),
        (["quant=int8", "quant.double=true", *HI], "no engine runs"),
        (["model.path=x", "model.adapters=[{path: ~/lora}]", *HI], "put quotes around"),
        (["model.path=x", "model.adapters=[{path: a, weight: 0}]", *HI], "not a number other than 0"),
        (["-m", "quant.bits=4,8", "prompts.file=-"], "is for one run"),
    ],
)
def test_an_awkward_value_costs_one_line(orchestrator: Orchestrator, argv: list[str], said: str) -> None:
    done = orchestrator(*argv)
    assert done.code == 2, done.err
    assert said in done.error


@pytest.mark.parametrize("task", ["plan", "run", "convert"])
@pytest.mark.parametrize("folder", ["file", "file/x", "/proc/foo/bar"])
def test_a_store_that_cannot_be_written_is_told_by_the_plan_too(
    orchestrator: Orchestrator, task: str, folder: str
) -> None:
    (orchestrator.folder / "file").write_text("")
    done = orchestrator(f"task={task}", f"paths.artifacts={folder}")
    path = orchestrator.folder / folder
    assert done.code == 2
    assert done.error.startswith(f"error: paths.artifacts={path} cannot be written (")
    assert done.error.endswith("Set paths.artifacts=FOLDER to one that can.")
    assert "merging" not in done.err
    assert done.json("status.json")["exit_code"] == 2
    if task == "plan":
        assert "What could run it, best first" in done.out  # all that it has to say all the same
        assert done.json("plan.json")["fits"]


def test_a_plan_leaves_nothing_in_the_store(orchestrator: Orchestrator) -> None:
    store = orchestrator.folder / "new" / "store"
    assert orchestrator("task=plan", f"paths.artifacts={store}").code == 0
    assert not (orchestrator.folder / "new").exists()


@pytest.mark.parametrize("folder", ["file", "file/x", "/proc/foo"])
def test_runs_that_cannot_be_kept_are_told(orchestrator: Orchestrator, folder: str) -> None:
    (orchestrator.folder / "file").write_text("")
    done = orchestrator("task=plan", f"paths.runs={folder}")
    assert done.code == 2
    assert done.error.endswith("Set paths.runs=FOLDER to one that can be written.")


@pytest.mark.parametrize("output", ["file/x", "x" * 300, "/proc/foo/bar"])
def test_an_output_that_cannot_be_written_is_told_before_the_merge(orchestrator: Orchestrator, output: str) -> None:
    (orchestrator.folder / "file").write_text("")
    done = orchestrator("task=convert", f"output.path={output}", f"paths.artifacts={orchestrator.folder / 'store'}")
    assert done.code == 2
    assert "output.path=" in done.error
    assert "merg" not in done.err


def test_editing_an_output_changes_neither_the_store_nor_the_source(orchestrator: Orchestrator, merged: Path) -> None:
    copy = orchestrator.folder / "copy"
    assert orchestrator("task=convert", f"model.path={merged}", f"output.path={copy}").code == 0
    config = copy / "config.json"
    before = (merged / "config.json").read_bytes()
    config.write_bytes(config.read_bytes().replace(b"silu", b"relu"))
    assert (merged / "config.json").read_bytes() == before
    weights = next(copy.glob("*.safetensors"))
    assert weights.stat().st_nlink == 1
    verified = orchestrator("task=artifacts", "artifacts.action=verify")
    assert verified.code == 0, verified.out


def test_a_sweep_leaves_a_text_whole(orchestrator: Orchestrator) -> None:
    done = orchestrator("-m", "quant.bits=4,8", "prompts.text=Hello, world", "task=plan")
    assert done.code == 0, done.err
    [sweep] = orchestrator.runs.iterdir()
    assert sorted(p.name for p in sweep.iterdir() if p.is_dir()) == ["0", "1"]


def test_the_version_is_ours(orchestrator: Orchestrator) -> None:
    assert orchestrator("--version").out.startswith("orchestrator ")


def test_a_folder_that_is_gone_is_one_line(orchestrator: Orchestrator) -> None:
    gone = orchestrator.folder / "gone"
    gone.mkdir()
    command = 'cd "$0" && rmdir "$0" && "$@"'
    argv = ["bash", "-c", command, str(gone), *orchestrator.command("task=plan")]
    done = subprocess.run(argv, env=orchestrator.env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: the current folder has been removed" in done.stderr
