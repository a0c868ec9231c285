"""What every benchmark writes beside its numbers: the hardware, the versions, the time."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from orchestrator.config import HardwareConfig
from orchestrator.hardware import detect
from orchestrator.pipeline import versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "safetensors", "hydra-core", "exllamav2", "vllm")


def cpu_model() -> str:
    """The processor's name as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    hardware = detect(HardwareConfig(), planning=False)
    return {
        "when": time.strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": [gpu.name for gpu in hardware.gpus],
        "host_gib": round(hardware.host_total / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions(*PACKAGES),
    }


def save(name: str, result: dict[str, Any], measured_on: dict[str, Any] | None = None) -> Path:
    """Writes results/<name>.json; measured_on: the environment, where it is not this one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    where = measured_on or environment()
    path.write_text(json.dumps({"environment": where, **result}, indent=1) + "\n", encoding="utf-8")
    return path
