"""The folder of one run: config.yaml, plan.json, result.json, status.json, run.log, answers.jsonl."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from orchestrator import __version__
from orchestrator.errors import ConfigError, OrchestratorError


def write_json(path: Path, value: Any) -> None:
    """Writes JSON at once or not at all: a reader never sees half a file."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


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
            saved = self.path / "config.yaml"
            try:
                merged = OmegaConf.merge(tree, OmegaConf.load(saved), {"run": tree.run, "paths": tree.paths})
            except Exception as error:  # YAML and OmegaConf raise a family of their own each
                raise ConfigError(f"{saved} cannot be read: {str(error).splitlines()[0]}") from None
            assert isinstance(merged, DictConfig)
            return merged
        kept = tree.copy()
        if kept.server.api_key is not None:  # a secret has no place in a folder that is passed around
            kept.server.api_key = "(not kept)"
        OmegaConf.save(kept, self.path / "config.yaml", resolve=True)
        return tree

    def write(self, name: str, value: Any) -> None:
        """Writes one of the run's JSON files."""
        write_json(self.path / name, value)

    def status(self, state: str, **more: Any) -> None:
        """Says what the run is doing now, for whoever watches status.json."""
        self._status.update(state=state, updated=time.time(), **more)
        write_json(self.path / "status.json", {"version": __version__, **self._status})

    def failed(self, error: OrchestratorError) -> None:
        """Records how the run failed."""
        state = "does_not_fit" if error.exit_code == 3 else "failed"
        self.status(state, exit_code=error.exit_code, error=str(error))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keeps run.log, and status.json to the end, whichever end it is."""
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
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
            logging.getLogger(__name__).error("%s", error)
            raise
        except KeyboardInterrupt:
            self.status("interrupted", exit_code=130)
            raise
        finally:
            root.removeHandler(handler)
            handler.close()
