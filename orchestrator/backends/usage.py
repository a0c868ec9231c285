"""What an engine's process has used, and what it is made of. torch is imported when a GPU is asked about."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from collections.abc import Iterable
from pathlib import Path


def host_peak() -> int:
    """Peak resident memory of this process, bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: the next line answers as well
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# torch's old name and its new one, which 2.9 does not read for CUDA. The allocator reads them when it is first used.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def one_segment() -> None:
    """Lets torch's allocator grow one segment instead of keeping many that no tensor fits; what a user set stays.

    On an H200 an 8B took 0.1 to 1.3 GiB less in transformers and bitsandbytes, and 1.8 GiB less in exllamav2's 16 bits:
    benchmarks/results/plan_accuracy_segments.json beside plan_accuracy_segment.json.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ.update(dict.fromkeys(_ALLOCATOR, "expandable_segments:True"))


def gpu_peaks() -> list[int]:
    """The allocator's peak on each visible GPU, bytes."""
    import torch

    return [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, CUDA and those of the packages that are installed."""
    import torch

    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
