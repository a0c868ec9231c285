"""What an engine needs here to build its CUDA extension at its first use: said before anything is installed or loaded.

The same places are looked at, in the same order, as by torch (torch/utils/cpp_extension.py, _find_cuda_home and
get_cxx_compiler), which does the building.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import EngineUnavailableError

_CUDA_HOME = Path("/usr/local/cuda")  # torch's last guess
# In the interpreter, without importing torch: whether the extension is there as a package, and torch's CUDA.
_ASK = """
import importlib.util, json, pathlib, re, sys
torch = importlib.util.find_spec("torch")
version = pathlib.Path(torch.origin).with_name("version.py") if torch and torch.origin else None
cuda = re.search(r"^cuda\\b.*= *'([\\d.]+)'", version.read_text(), re.M) if version and version.is_file() else None
print(json.dumps([importlib.util.find_spec(sys.argv[1]) is not None, cuda[1] if cuda else ""]))
"""


def require_build(python: str, extension: str) -> None:
    """Checks that an interpreter has an engine's extension, or can build it.

    Args:
        extension: the module that is built where it is not installed.

    Raises:
        EngineUnavailableError: neither; with what is missing.
    """
    done = subprocess.run([python, "-c", _ASK, extension], capture_output=True, text=True)
    installed, cuda = json.loads(done.stdout) if not done.returncode else (False, "")
    if not installed:
        require_tools(extension, cuda, os.environ)


def require_tools(extension: str, cuda: str, environ: Mapping[str, str]) -> None:
    """Checks that nvcc and a C++ compiler are here.

    Args:
        cuda: the CUDA version that torch is built for, of which nvcc has to have the major part; "": not known.

    Raises:
        EngineUnavailableError: one of them is missing, or nvcc is of another CUDA.
    """
    problems = [problem for problem in (_nvcc(cuda, environ), _compiler(environ)) if problem]
    if problems:
        toolkit = f"CUDA toolkit {cuda}".rstrip()
        raise EngineUnavailableError(
            f"{extension} is built at its first use, and {'; '.join(problems)}",
            f"Install the {toolkit} (conda install -c nvidia cuda-toolkit, or NVIDIA's packages) and g++, and set "
            f"CUDA_HOME to the toolkit's folder; or install a prebuilt {extension} for this torch.",
        )


def _nvcc(cuda: str, environ: Mapping[str, str]) -> str:
    """What is wrong with nvcc, or ""."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=environ.get("PATH"))
    nvcc = Path(home, "bin", "nvcc") if home else Path(found) if found else _CUDA_HOME / "bin" / "nvcc"
    if not nvcc.is_file():
        return f"CUDA_HOME={home} has no bin/nvcc" if home else f"there is no nvcc (CUDA_HOME, PATH, {_CUDA_HOME})"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{nvcc} does not start ({type(error).__name__})"
    release = re.search(r"release ([\d.]+)", said)
    if cuda and release and release[1].split(".")[0] != cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {release[1]} where torch is built for {cuda}"
    return ""


def _compiler(environ: Mapping[str, str]) -> str:
    """What is wrong with the C++ compiler, or ""."""
    name = environ.get("CXX") or "c++"
    if shutil.which(name, path=environ.get("PATH")):
        return ""
    return f"CXX={name} is not there" if environ.get("CXX") else "there is no C++ compiler (c++)"
