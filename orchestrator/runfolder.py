"""The folder of one run: config.yaml, plan.json, result.json, status.json, run.log, answers.jsonl."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator import __version__
from orchestrator.config import folder
from orchestrator.errors import INTERRUPTED, READER_GONE, ConfigError, OrchestratorError, OutputError, RequestError
from orchestrator.hub.locate import EXPLICIT, hub_id
from orchestrator.overrides import PATH_KEYS, literal

HUB_KEYS = ("model.path", "model.adapter")  # those of the paths that may be hub ids


def write_json(path: Path, value: Any) -> None:
    """Writes JSON at once or not at all: a reader never sees half a file."""
    _replace(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class _Log(logging.FileHandler):
    """run.log; a run whose record cannot be kept ends."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        raise _unwritten(Path(self.baseFilename), error) from None


def _unwritten(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written ({error.strerror})", "Free some space there, or set paths.runs=FOLDER elsewhere."
    )


def _resumed(tree: DictConfig, saved: Path) -> DictConfig:
    """The configuration that a run was started with, and on top what was typed beside run.resume.

    Raises:
        ConfigError: it cannot be read, or is not whole.
    """
    from hydra.core.hydra_config import HydraConfig

    try:
        values = yaml.safe_load(saved.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not {"model", "task", "prompts"} <= set(values):
            raise ConfigError(f"{saved} is not whole", "Start a new run.")
        merged = OmegaConf.merge(tree, _literal(values))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{saved} cannot be read: {str(error).splitlines()[0]}") from None
    for override in HydraConfig.get().overrides.task:
        key = override.partition("=")[0].lstrip("+~")
        OmegaConf.update(merged, key, OmegaConf.select(tree, key))
    assert isinstance(merged, DictConfig)
    return merged


def _literal(value: Any) -> Any:
    """Texts of a saved configuration as they stand: nothing in them is an interpolation."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return literal(value) if isinstance(value, str) else value


def _kept_path(path: str, *, may_be_hub: bool) -> str:
    """Absolute; a hub id as the same from anywhere: a folder of that name elsewhere would win over it."""
    hub = hub_id(path) if may_be_hub else None
    return f"{EXPLICIT}{hub}" if hub else str(folder(path))


class RunFolder:
    """One run's folder, made by Hydra."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._status: dict[str, Any] = {"state": "starting", "pid": os.getpid(), "started": time.time()}

    def configuration(self, tree: DictConfig) -> DictConfig:
        """The run's configuration: what was composed, or with run.resume what the run was started with.

        Raises:
            ConfigError: the resumed run's config.yaml cannot be read.
        """
        if tree.run.resume is not None:
            return _resumed(tree, self.path / "config.yaml")
        kept = OmegaConf.to_container(tree, resolve=True)
        assert isinstance(kept, dict)
        if kept["server"]["api_key"] is not None:  # a secret has no place in a folder that is passed around
            kept["server"]["api_key"] = "(not kept)"
        for key in PATH_KEYS:  # a run can be resumed from anywhere
            section, _, name = key.rpartition(".")
            place: Any = kept
            for part in section.split("."):
                place = place[part]
            if place[name] not in (None, "-") and (key != "backend.python" or "/" in place[name]):
                place[name] = _kept_path(place[name], may_be_hub=key in HUB_KEYS)
        for adapter in kept["model"]["adapters"]:
            adapter["path"] = _kept_path(adapter["path"], may_be_hub=True)
        _replace(self.path / "config.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
        return tree

    def pin(self, commit: str | None, adapters: list[str | None]) -> None:
        """Puts the hub's commits into config.yaml: a branch may move before the run is resumed, its answers may not."""
        if not any((commit, *adapters)):
            return
        file = self.path / "config.yaml"
        kept = yaml.safe_load(file.read_text(encoding="utf-8"))
        model = kept["model"]
        if model["adapter"] is not None:
            model["adapters"].insert(0, {"path": model["adapter"]})
            model["adapter"] = None
        for place, pinned in ((model, commit), *zip(model["adapters"], adapters, strict=True)):
            place["revision"] = pinned or place.get("revision")
        _replace(file, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))

    def write(self, name: str, value: Any) -> None:
        """Writes one of the run's JSON files.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            write_json(self.path / name, value)
        except OSError as error:
            raise _unwritten(self.path / name, error) from None

    def status(self, state: str, **more: Any) -> None:
        """Says what the run is doing now, for whoever watches status.json."""
        self._status.update(state=state, updated=time.time(), **more)
        self.write("status.json", {"version": __version__, **self._status})

    def failed(self, error: OrchestratorError) -> None:
        """Records how the run failed."""
        self._ended("does_not_fit" if error.exit_code == 3 else "failed", error.exit_code, error=str(error))

    def _ended(self, state: str, exit_code: int, **more: Any) -> None:
        with suppress(OutputError):  # what it ended with is told all the same
            self.status(state, exit_code=exit_code, **more)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keeps run.log, and status.json to the end, whichever end it is."""
        handler = _Log(self.path / "run.log", encoding="utf-8")
        assert handler.stream is not None  # it opens at once
        try:  # of a run that is resumed twice, or while it still runs
            fcntl.flock(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handler.close()
            raise RequestError(f"{self.path} is being written by another process", "Wait for it to end.") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        logging.getLogger("orchestrator").setLevel(logging.INFO)
        self.status("running")
        try:
            yield
            if self._status["state"] != "does_not_fit":
                self.status("done", exit_code=0)
        except OrchestratorError as error:
            self.failed(error)
            with suppress(OutputError):
                logging.getLogger(__name__).error("%s", error)
            raise
        except KeyboardInterrupt:
            self._ended("interrupted", INTERRUPTED)
            raise
        except BrokenPipeError:  # whoever read the output has gone
            self._ended("interrupted", READER_GONE)
            raise
        except SystemExit:  # a library's
            self._ended("interrupted", 1)
            raise
        finally:
            root.removeHandler(handler)
            with suppress(OSError):  # of a full disk, which was told
                handler.close()
