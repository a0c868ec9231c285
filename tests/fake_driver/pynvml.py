"""pynvml of the machine that the JSON file $FAKE_GPUS describes: for processes of their own, in PYTHONPATH.

A list of cards: {"gib": 24, "held": bytes, "compute": [[pid, bytes], ...]}. Constants and errors are pynvml's own.
"""

# mypy: ignore-errors
import importlib.machinery
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

_HERE = Path(__file__).parent
_spec = importlib.machinery.PathFinder.find_spec("pynvml", [p for p in sys.path if Path(p or ".").resolve() != _HERE])
_real = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_real)
globals().update({name: value for name, value in vars(_real).items() if not name.startswith("__")})
KEEPS = 450 * 2**20


def _card(index):
    return json.loads(Path(os.environ["FAKE_GPUS"]).read_text())[index]


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(json.loads(Path(os.environ["FAKE_GPUS"]).read_text()))


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetPciInfo(index):
    return SimpleNamespace(domain=0, bus=index, device=0)


def nvmlDeviceGetUUID(index):
    return f"GPU-{index:08d}"


def nvmlDeviceGetName(index):
    return "a card"


def nvmlDeviceGetCudaComputeCapability(index):
    return [8, 6]


def nvmlDeviceGetMigMode(index):
    raise _real.NVMLError(_real.NVML_ERROR_NOT_SUPPORTED)


def nvmlDeviceGetMemoryInfo(index, version=None):
    card = _card(index)
    total = int(card["gib"] * 2**30)
    held = card.get("held", sum(size for _, size in card.get("compute", ())))
    return SimpleNamespace(total=total, free=total - KEEPS - held, used=held, reserved=KEEPS)


def nvmlDeviceGetComputeRunningProcesses(index):
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in _card(index).get("compute", ())]


def nvmlDeviceGetGraphicsRunningProcesses(index):
    return []
