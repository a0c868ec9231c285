"""task=engine: an interpreter of its own, made from the pinned list, really runs the engine."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import Orchestrator, gone

from orchestrator.checkpoint.digest import digest
from orchestrator.engine.interpreters import MANIFEST, Pins
from orchestrator.errors import EngineUnavailableError
from orchestrator.runfolder import RunFolder
from orchestrator.tasks import engine


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interpreter_is_made_once_and_runs_the_engine(orchestrator: Orchestrator) -> None:
    engines = orchestrator.folder / "engines"
    make = ["task=engine", "engine.name=transformers", f"paths.engines={engines}"]
    made = orchestrator(*make, timeout=800)
    assert made.code == 0, made.err
    assert made.json("result.json")["built"] is True
    again = orchestrator(*make)
    assert again.json("result.json")["built"] is False

    python = engines / "transformers" / "bin" / "python"
    run = orchestrator("backend=transformers", f"backend.python={python}", "prompts.text=What does len do?")
    assert run.code == 0, run.err
    assert run.answers[0]["answer"].strip()

    (engines / "transformers" / MANIFEST).unlink()  # as a kill in the middle of the installation leaves it
    shutil.rmtree(engines / "transformers" / "bin")
    listed = orchestrator("task=engine", f"paths.engines={engines}")
    assert "transformers" in listed.out
    assert " made " not in listed.out.split("transformers")[1].split("\n")[0]


def test_an_installation_that_fails_says_why_and_leaves_nothing_that_counts(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UV_CACHE_DIR", str(orchestrator.folder / "cache"))
    engines = orchestrator.folder / "engines"
    done = orchestrator("task=engine", "engine.name=transformers", f"paths.engines={engines}")
    assert done.code == 1
    assert "installation failed" in done.error
    assert not (engines / "transformers" / MANIFEST).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own doing")
def test_an_installer_dies_with_the_command_that_started_it(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = orchestrator.folder / "bin" / "uv"  # an installer that is slow, and deaf to everything but a SIGKILL
    uv.parent.mkdir()
    uv.write_text(f"#!{sys.executable}\nimport signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n")
    with uv.open("a") as file:
        file.write("print('installing', flush=True)\ntime.sleep(60)\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
    started = orchestrator.start("task=engine", "engine.name=transformers")
    started.until(lambda: any("installing" in log.read_text() for log in orchestrator.runs.glob("*/install.log")))
    family = started.family()
    assert family
    started.kill()
    assert gone(family)


def test_what_an_interpreter_could_have_beside_its_list_is_said(orchestrator: Orchestrator) -> None:
    made = orchestrator.folder / "engines" / "exllamav2"
    python = made / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # ours, which has no flash-attn
    python.chmod(0o755)
    (made / MANIFEST).write_text(json.dumps({"pins": digest(Pins.read("exllamav2").path)}))
    done = orchestrator("task=engine", "engine.name=exllamav2", f"paths.engines={made.parent}")
    assert done.code == 0, done.err
    last = done.err.strip().splitlines()[-1]
    assert "exllamav2 answers one request at a time here, and has no parallel.tensor: flash-attn is not" in last
    assert f"{python} -m pip install 'flash-attn>=2.6' --no-build-isolation" in last


def test_all_that_a_failed_check_says_is_in_the_log(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf 'Traceback\\n  where it was\\nImportError: undefined symbol\\n' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(EngineUnavailableError, match="cannot be imported: ImportError: undefined symbol") as caught:
        engine._check(Pins.read("exllamav2"), python, RunFolder(tmp_path))
    log = tmp_path / "install.log"
    assert str(log) in caught.value.hint
    assert "Traceback\n  where it was\nImportError: undefined symbol\n" in log.read_text()
    assert f"{python} -c 'import " in log.read_text()
