"""A command line composed to a Config as the program does it, without running anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from orchestrator.app import conf_folder
from orchestrator.config import Config, from_hydra
from orchestrator.overrides import prepare

CONF = conf_folder()


@contextmanager
def hydra_ready() -> Iterator[None]:
    """Hydra with the project's configuration folder, for `composed` to be called inside."""
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="config_schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*argv: str) -> Config:
    """The checked configuration of a command line."""
    overrides = [a for a in prepare(list(argv), CONF) if not a.startswith(("-", "hydra."))]
    return from_hydra(compose("config", overrides=overrides))
