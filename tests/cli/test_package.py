"""What is installed: a wheel holds all that it needs, and the console script is the same program."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import small_models
from commands import ROOT

from orchestrator import __version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built without a network."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("orchestrator", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.whl")
    return built


def run(folder: Path, packages: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(packages), "HOME": str(folder)}
    command = [sys.executable, "-m", "orchestrator", *argv]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
        names = archive.namelist()
    inside = "import orchestrator.app; print(orchestrator.app.conf_folder())"
    where = subprocess.run(
        [sys.executable, "-c", inside], cwd=tmp_path, env={"PYTHONPATH": str(packages)}, capture_output=True
    )
    assert where.stdout.decode().strip() == str(packages / "orchestrator" / "conf")
    done = run(tmp_path, packages, "task=plan")
    assert done.returncode == 0, done.stderr
    assert "the embedded model" in done.stderr
    model = small_models.write_headers(tmp_path / "model", small_models.Llama())
    assert run(tmp_path, packages, "task=plan", f"model.path={model}", "hardware=4x24gb").returncode == 0
    assert run(tmp_path, packages, "task=engine").returncode == 0
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "tools/"))]
    assert "orchestrator/py.typed" in names


@pytest.mark.slow
def test_a_wheel_is_small_and_says_its_version(wheel: Path) -> None:
    assert wheel.name == f"orchestrator-{__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 12e6


def test_the_console_script_is_the_program(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "orchestrator"
    try:
        importlib.metadata.distribution("orchestrator")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("orchestrator is not installed in this environment")
    done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "GROUP=NAME" in done.stdout
    assert subprocess.run([script, "quant.bitz=4"], cwd=tmp_path, capture_output=True).returncode == 2
