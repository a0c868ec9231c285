"""task=engine: an interpreter of its own for an engine, from a pinned list that ships in the package."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from orchestrator.checkpoint.digest import digest
from orchestrator.config import Config, did_you_mean, folder
from orchestrator.engine.cuda_build import require_tools
from orchestrator.engine.interpreters import MANIFEST, Pins, backends_of, interpreter, known, lacking
from orchestrator.engine.process import child_environment
from orchestrator.errors import ConfigError, EngineUnavailableError, RequestError, StageError
from orchestrator.report.console import console, note
from orchestrator.runfolder import RunFolder, write_json

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
log = logging.getLogger(__name__)


def engine(config: Config, run: RunFolder) -> None:
    """Makes <paths.engines>/<engine.name>/, or says what there is where no name is given.

    Raises:
        ConfigError: there is no pinned list of that name.
        EngineUnavailableError: this machine lacks what it takes to build it, or it was installed and still lacks what
            its backends need.
        StageError: the installation failed, with its last line.
    """
    name = config.engine.name
    if name is None:
        _list(config)
        return
    if name not in known():
        raise ConfigError(f"engine.name={name} is not one of {', '.join(known())}", did_you_mean(name, known()))
    made = folder(config.paths.engines) / name
    pins = Pins.read(name)
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(made.parent / f".{name}.lock"):
            built = not _up_to_date(made, pins)
            if built:
                if pins.builds:
                    require_tools(*pins.builds, os.environ)
                run.status("installing")
                _make(made, pins, run)
    except OSError as error:
        raise RequestError(
            f"paths.engines={made.parent} cannot be written ({error.strerror})", "Set paths.engines=FOLDER."
        ) from None
    note(f"{name}: {'made' if built else 'found, nothing to do'} -> {made / 'bin' / 'python'}")
    for line in _wanted(name, made / "bin" / "python"):
        note(line)
    run.write("result.json", {"engine": name, "python": str(made / "bin" / "python"), "built": built})


def _wanted(name: str, python: Path) -> Iterator[str]:
    """What its backends can do without, but not as well: it is said, and not installed unasked."""
    for backend in backends_of(name):
        if said := lacking(backend, str(python)):
            yield f"note: {backend.name} answers one request at a time here, and has no parallel.tensor: {said}"


def _up_to_date(made: Path, pins: Pins) -> bool:
    import json

    try:
        manifest = json.loads((made / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest.get("pins") == digest(pins.path))


def _make(made: Path, pins: Pins, run: RunFolder) -> None:
    """A virtual environment is not relocatable, so it is made in its place; the manifest at the end makes it valid."""
    started = time.monotonic()
    shutil.rmtree(made, ignore_errors=True)
    uv = shutil.which("uv")
    name = pins.path.stem
    python = made / "bin" / "python"
    note(f"making an interpreter in {made} from {pins.path.name} (minutes; its log is {run.path / 'install.log'})")
    _run(
        [sys.executable, "-m", "venv", str(made)]
        if uv is None
        else [uv, "venv", "--python", sys.executable, str(made)],
        run,
    )
    _run(install_command(pins, python, uv), run, pins.hint)
    _check(pins, python, run)
    seconds = round(time.monotonic() - started, 1)
    write_json(made / MANIFEST, {"name": name, "pins": digest(pins.path), "seconds": seconds})


def install_command(pins: Pins, python: Path, uv: str | None) -> list[str]:
    """The command that installs a pinned list into an interpreter."""
    if uv is None:
        # Python compiles what it imports: for the thousands of files of a large engine pip takes a minute.
        installer = [str(python), "-m", "pip", "install", "--no-compile"]
    else:
        installer = [uv, "pip", "install", "--python", str(python)]
    return [*installer, *(["--no-deps"] if pins.no_deps else []), "-r", str(pins.path)]


def _run(command: list[str], run: RunFolder, hint: str = "") -> None:
    log_path = run.path / "install.log"
    with log_path.open("ab") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=_dies_with_us()
        )
    if done.returncode:
        lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines or ["it said nothing"]
        raise StageError(
            f"the installation failed: {errors[-1].strip()[:300]}", f"{hint}{' ' * bool(hint)}Its log: {log_path}"
        )


def _dies_with_us() -> Callable[[], None] | None:
    """For a child between fork and exec: the kernel kills it when this thread, our main one, has gone. Linux only."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it went before the call
            os._exit(1)

    return die_with_parent


def _check(pins: Pins, python: Path, run: RunFolder) -> None:
    """Imports what its backends need: a package can be there and broken by another one.

    Raises:
        EngineUnavailableError: with the last line of what was said; install.log has all of it.
    """
    name = pins.path.stem
    packages = sorted({package for backend in backends_of(name) for package in backend.packages})
    command = [str(python), "-c", f"import {', '.join(packages)}"]
    done = subprocess.run(command, env=child_environment(str(python), {}), capture_output=True, text=True)
    if done.returncode:
        log_path = run.path / "install.log"
        with log_path.open("a", encoding="utf-8") as out:
            out.write(f"{shlex.join(command)}\n{done.stdout}{done.stderr}\n")
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        hint = f"{pins.hint}{' ' * bool(pins.hint)}Its log: {log_path}"
        raise EngineUnavailableError(f"{name} was installed and cannot be imported: {words}", hint)


def _list(config: Config) -> None:
    from rich.table import Table

    table = Table(title="Interpreters for engines", title_justify="left", header_style="bold")
    for column in ("engine.name", "serves", "state", "python"):
        table.add_column(column, overflow="fold")
    for name in known():
        made = folder(config.paths.engines) / name
        state = "made" if _up_to_date(made, Pins.read(name)) else "not made"
        backends = backends_of(name)
        here = [b.name for b in backends if interpreter(b, config, "cpu") == sys.executable]
        if here and state == "not made":
            state = "not needed: this Python has it"
        table.add_row(name, ", ".join(b.name for b in backends), state, str(made / "bin" / "python"))
    console(sys.stdout).print(table)
