"""The entry: the command line, Hydra, the run's folder, the task, the exit code."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from orchestrator import __version__
from orchestrator.errors import (
    INTERRUPTED,
    READER_GONE,
    ConfigError,
    DoesNotFitError,
    EngineUnavailableError,
    OrchestratorError,
    OutputError,
    RequestError,
    Terminated,
)
from orchestrator.report import streams

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Strings: a task's module is imported when it is asked for.
INSTALL = (
    "Install the program with its packages (python -m pip install -e . in its folder), or type that python's path."
)
TASKS = {
    "run": "orchestrator.tasks.run:run",
    "plan": "orchestrator.tasks.plan:plan",
    "convert": "orchestrator.tasks.convert:convert",
    "chat": "orchestrator.tasks.chat:chat",
    "serve": "orchestrator.tasks.serve:serve",
    "engine": "orchestrator.tasks.engine:engine",
    "artifacts": "orchestrator.tasks.artifacts:artifacts",
}


def conf_folder() -> Path:
    """conf/: package data in a wheel, beside the package in a source checkout or an editable install."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code (see orchestrator.errors)."""
    argv = sys.argv[1:] if argv is None else argv
    streams.prepare()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return _main(argv)
    except OrchestratorError as error:
        with contextlib.suppress(BrokenPipeError, OutputError):  # there is nobody to be told
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has gone: `... | head`
        return READER_GONE
    except ModuleNotFoundError as error:
        if error.name not in ("hydra", "omegaconf"):
            raise
        print(f"error: {error.name} is not installed for {sys.executable}. {INSTALL}", file=sys.stderr)
        return EngineUnavailableError.exit_code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # everything is closed: a second Ctrl-C has nothing to stop
        print("\ninterrupted", file=sys.stderr)
        exec("")  # CPython remembers one that passed through an exec (a dataclass being made), and would die of SIGINT
        return INTERRUPTED
    finally:
        streams.drop_unwritten()


def _main(argv: list[str]) -> int:
    code = 0
    try:
        if "--version" in argv:
            print(f"orchestrator {__version__}")
        else:
            code = _hydra(argv)
    except SystemExit:  # Hydra's, behind --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _hydra(argv: list[str]) -> int:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from orchestrator.config import Config
    from orchestrator.overrides import in_words, prepare

    try:
        Path.cwd()
    except FileNotFoundError:
        raise RequestError("the current folder has been removed", "Change to another one.") from None
    _check_launcher(argv)
    conf = conf_folder()
    ConfigStore.instance().store(name="config_schema", node=Config)
    sys.argv = [sys.argv[0], *prepare(argv, conf)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print its errors itself and exit 1; ours come from main

    failures: list[Exception] = []

    def job(tree: DictConfig) -> None:
        try:
            run_job(tree)
        except (OrchestratorError, BrokenPipeError) as error:  # Hydra would add a line of its own
            if _multirun():  # it goes on with the other jobs, and raises this one's error after them
                raise
            failures.append(error)

    try:
        hydra.main(config_path=str(conf), config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            in_words(_one_line(error).removeprefix("Error merging override ")), "See --help for the keys."
        ) from None
    except OrchestratorError:
        if "-m" in argv or "--multirun" in argv:
            return 1
        raise
    except OSError as error:  # the run's folder cannot be made
        if error.filename is None:
            raise
        raise RequestError(
            f"{error.filename}: {error.strerror}", "Set paths.runs=FOLDER to one that can be written."
        ) from None
    if failures:
        raise failures[0]
    return 0


def _check_launcher(argv: list[str]) -> None:
    """Says how the launcher of parallel sweeps is installed; Hydra would say that there is no such file."""
    if "hydra/launcher=joblib" in argv:
        try:
            importlib.import_module("hydra_plugins.hydra_joblib_launcher")
        except ModuleNotFoundError as error:
            raise EngineUnavailableError(
                f"hydra/launcher=joblib needs {error.name}, which is not installed here",
                "Type: pip install 'orchestrator[sweep]'",
            ) from None


def _multirun() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _one_line(error: Exception) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    lines = [line.strip() for text in (str(error), str(cause)) for line in text.splitlines() if line.strip()]
    noise = ("full_key:", "object_type=", "reference_type=", "See https", "LexerNoViableAlt", "To append to your")
    kept = [line for line in dict.fromkeys(lines) if not line.startswith(noise) and line.strip("^ ")]
    text = " ".join(kept[:2])
    if text.startswith("Ambiguous value"):
        return f"{kept[0].partition(chr(10))[0]}: a list has brackets; several values, a run of each, need -m"
    if not text or "token recognition error" in text or "viable alternative" in text or "mismatched input" in text:
        example = "'model.adapters=[{path: \"~/lora\"}]'"
        return f"{text or 'a value cannot be read'}: put quotes around texts and paths inside a list, {example}"
    return text


def run_job(tree: DictConfig) -> None:
    """One job: a single run, or one of a multirun. Its folder always ends with a status.json that tells how it went."""
    from hydra.core.hydra_config import HydraConfig

    from orchestrator.config import from_hydra
    from orchestrator.runfolder import RunFolder

    multirun = _multirun()
    folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    with folder.recorded():
        try:
            tree = folder.configuration(tree)
            config = from_hydra(tree)
            if config.task.name not in TASKS:
                raise ConfigError(f"task.name={config.task.name} is not one of {', '.join(TASKS)}")
            module, function = TASKS[config.task.name].split(":")
            getattr(importlib.import_module(module), function)(config, folder)
        except DoesNotFitError as error:
            if not multirun:  # in a sweep a width that does not fit is one of the results
                raise
            folder.failed(error)
            print(f"does not fit: {error}", file=sys.stderr)
        except OrchestratorError as error:
            if multirun:
                print(f"error: {error}", file=sys.stderr)
            raise
        except BrokenPipeError:
            raise
        except Exception as error:  # a bug of ours: said as one, with the traceback where it can be found
            logging.getLogger(__name__).exception("internal error")
            raise OrchestratorError(
                f"internal error: {type(error).__name__}: {error}",
                f"The traceback is in {folder.path / 'run.log'}.",
            ) from error
