"""Whether exllamav2's interpreter has flash-attn: without it there is one answer at a time, and no tensor parallel.

It is asked without importing anything there: a plan takes less than a second, and flash-attn would bring torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import cache

from orchestrator.backends.exl2_setup import FLASH_ATTENTION
from orchestrator.engine.process import child_environment

WANTED = "2.6"  # of what is installed now, which has softcapping too; FLASH_ATTENTION is the least that does
_ASK_S = 60.0
# The engine imports both (backends/exl2_setup.py). pip: an interpreter that uv made has none.
_ASK = """
import importlib.metadata as metadata, importlib.util as util, json
there = [all(map(util.find_spec, ("flash_attn", "flash_attn_2_cuda"))), util.find_spec("pip") is not None]
try:
    version = metadata.version("flash-attn")
except metadata.PackageNotFoundError:
    version = ""
print(json.dumps([*there, version]))
"""


def lacks(python: str) -> str:
    """Why exllamav2 in this interpreter would not have flash-attn, and how to add it; "" where it would, or where that
    cannot be found out: its engine says then what it is."""
    if "EXLLAMA_NO_FLASH_ATTN" in os.environ:  # which its process inherits
        return "flash-attn is not used, as EXLLAMA_NO_FLASH_ATTN is set"
    return _asked(python)


@cache  # a plan asks for each candidate and context that it tries
def _asked(python: str) -> str:
    environment = child_environment(python, {})
    try:
        done = subprocess.run(
            [python, "-c", _ASK], env=environment, capture_output=True, text=True, timeout=_ASK_S, check=True
        )
        there, pip, version = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    found = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if there and not (found and found < FLASH_ATTENTION):
        return ""
    what = f"flash-attn {version} is too old" if there else "flash-attn is not installed"
    return f"{what} in {python} (to add it: {_install(python, pip)})"


def _install(python: str, pip: bool) -> str:
    command = f"{python} -m pip install" if pip else f"uv pip install --python {python}"
    needs = "it takes a wheel of its torch, or nvcc and a compiler"
    return f"{command} 'flash-attn>={WANTED}' --no-build-isolation; {needs}"
