"""What a machine lacks for an engine that builds its extension here; and the pinned lists, which pip takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name

from orchestrator.engine import cuda_build
from orchestrator.engine.cuda_build import require_build, require_tools
from orchestrator.engine.interpreters import Pins, backends_of, known
from orchestrator.engine.process import child_environment
from orchestrator.errors import EngineUnavailableError
from orchestrator.tasks.engine import install_command

NVCC = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {}, V13.0.48"


def tool(folder: Path, name: str, says: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    (folder / name).chmod(0o755)


@pytest.fixture(autouse=True)
def _no_toolkit_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "_CUDA_HOME", tmp_path / "nowhere")


@pytest.mark.parametrize("how", ["PATH", "CUDA_HOME", "CUDA_PATH", "the usual place"])
def test_a_toolkit_is_found_where_torch_finds_it(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", "c++")
    tool(tmp_path / "cuda" / "bin", "nvcc", NVCC.format("13.1"))
    path = {"PATH": f"{tmp_path / 'bin'}:/bin"}
    if how == "PATH":
        path["PATH"] += f":{tmp_path / 'cuda' / 'bin'}"
    elif how == "the usual place":
        monkeypatch.setattr(cuda_build, "_CUDA_HOME", tmp_path / "cuda")
    else:
        path[how] = str(tmp_path / "cuda")
    require_tools("exllamav2_ext", "13.0", path)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, r"there is no nvcc \(CUDA_HOME, PATH, .*nowhere\)$"),
        ({"CUDA_HOME": "/opt/nothing"}, "CUDA_HOME=/opt/nothing has no bin/nvcc"),
        ({"CUDA_HOME": "{}/old"}, r"old/bin/nvcc is of CUDA 12\.4 where torch is built for 13\.0"),
        ({"CUDA_HOME": "{}/new", "CXX": "clang++-99"}, r"CXX=clang\+\+-99 is not there"),
        ({"CUDA_HOME": "{}/new", "PATH": "/nowhere"}, r"there is no C\+\+ compiler \(c\+\+\)"),
        ({"PATH": "/nowhere"}, r"there is no nvcc .*; there is no C\+\+ compiler"),
    ],
)
def test_what_is_missing(tmp_path: Path, environ: dict[str, str], message: str) -> None:
    tool(tmp_path / "bin", "c++")
    tool(tmp_path / "old" / "bin", "nvcc", NVCC.format("12.4"))
    tool(tmp_path / "new" / "bin", "nvcc", NVCC.format("13.0"))
    given = {"PATH": str(tmp_path / "bin")} | {key: value.format(tmp_path) for key, value in environ.items()}
    with pytest.raises(EngineUnavailableError) as caught:
        require_tools("exllamav2_ext", "13.0", given)
    assert re.search(message, caught.value.message)
    assert "Install the CUDA toolkit 13.0" in caught.value.hint
    assert caught.value.exit_code == 4


def test_an_extension_that_is_installed_needs_no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(EngineUnavailableError, match="some_ext is built at its first use, and there is no nvcc"):
        require_build(sys.executable, "some_ext")
    (tmp_path / "some_ext.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    require_build(sys.executable, "some_ext")


def test_torchs_cuda_is_read_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0'\ncuda: Optional[str] = '12.8'\n")
    tool(tmp_path / "cuda" / "bin", "nvcc", NVCC.format("13.0"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(EngineUnavailableError, match=r"is of CUDA 13\.0 where torch is built for 12\.8"):
        require_build(sys.executable, "some_ext")


def pinned(pins: Pins) -> list[Requirement]:
    """What a list names, for this machine."""
    lines = [line.partition("#")[0].strip() for line in pins.path.read_text().splitlines()]
    named = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return [requirement for requirement in named if requirement.marker is None or requirement.marker.evaluate()]


@pytest.mark.parametrize("name", known())
def test_a_pinned_list(name: str) -> None:
    pins = Pins.read(name)
    wanted = pinned(pins)
    names = [requirement.name.lower().replace("_", "-") for requirement in wanted]
    assert len(set(names)) == len(names) > 0
    for requirement in wanted:
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
    assert backends_of(name)


@pytest.fixture(scope="module")
def newer_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pip that can read what wheels ask for without downloading them."""
    folder = tmp_path_factory.mktemp("pip")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--target", str(folder), "pip>=25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the engines' wheels are for Linux")
@pytest.mark.parametrize("name", known())
def test_a_pinned_list_can_be_installed(name: str, newer_pip: Path, tmp_path: Path) -> None:
    """By pip's own resolver, with the command of task=engine; of a wheel only its metadata is downloaded."""
    pins, report = Pins.read(name), tmp_path / "report.json"
    command = install_command(pins, Path(sys.executable), None)
    command += ["--dry-run", "--ignore-installed", "--no-input", "--report", str(report)]
    command += ["--only-binary", ":all:", "--use-feature", "fast-deps"]
    environ = {**os.environ, "PYTHONPATH": str(newer_pip)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    chosen = {canonicalize_name(package["name"]): package["version"] for package in found}
    for requirement in pinned(pins):
        assert requirement.specifier.contains(chosen[canonicalize_name(requirement.name)], prereleases=True), (
            requirement
        )


def test_what_exllamav2_is_pinned_with() -> None:
    pins = Pins.read("exllamav2")
    lines = [line for line in pins.path.read_text().splitlines() if line and not line.startswith("#")]
    found = {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}
    assert found["exllamav2"] == Specifier("==0.3.2")  # the version that the stage, the plan and the layout are of
    assert pins.builds == ("exllamav2_ext", "13.0")
    (backend,) = backends_of("exllamav2")
    assert set(backend.packages) <= set(found)
    assert "ninja" in found


def test_the_programs_of_an_interpreters_packages_are_found() -> None:
    env = child_environment("/opt/engine/bin/python", {})
    assert env["PATH"].split(os.pathsep)[-1] == "/opt/engine/bin"
    assert child_environment("python3", {})["PATH"] == os.environ["PATH"]
