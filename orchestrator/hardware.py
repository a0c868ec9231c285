"""What the machine has, or what a profile says it has: GPUs, host memory. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil

from orchestrator.config import HardwareConfig
from orchestrator.errors import ConfigError, EngineUnavailableError

GIB = 2**30
MIB = 2**20
# What the driver keeps of a 24,576 MiB card: NVML's total less what an idle card without a display lets a
# process allocate. A conservative round figure; a real card's own is read from NVML.
DRIVER_KEEPS = 450 * MIB


@dataclass(frozen=True)
class Gpu:
    """One GPU. `free` and `total` in bytes; `index` is the engine's ("cuda:index"), after CUDA_VISIBLE_DEVICES."""

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Hardware:
    """A machine. `host_total` and `host_available` in bytes, under the cgroup's limit where there is one."""

    profile: str
    gpus: tuple[Gpu, ...]
    host_total: int
    host_available: int
    cpus: int
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """Where engines run: "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"


def detect(config: HardwareConfig, *, planning: bool) -> Hardware:
    """The hardware that the request is for.

    Args:
        config: the `hardware` section.
        planning: a profile stands for the machine; otherwise it caps the machine's own GPUs.

    Raises:
        ConfigError: GPUs asked for by an index that the machine does not have.
        EngineUnavailableError: a real run asks for more GPUs than there are.
    """
    host_total, host_available = host_memory()
    reserve = int(config.reserve_gib * GIB)
    wants_gpus = config.profile != "cpu"
    gpus, notes = nvml_gpus() if wants_gpus else ((), ())
    if config.cards is not None and planning:
        gpus, notes = (
            profile_gpus(config),
            (f"planned for the profile {config.profile}, not for this machine",),
        )
        host_available = host_total  # what runs here now says nothing about that machine
    elif config.cards is not None:
        if len(gpus) < config.cards:
            raise EngineUnavailableError(
                f"hardware={config.profile} runs on {config.cards} GPUs, and this machine has {len(gpus)}",
                "Add task=plan to plan for it, or use hardware=auto.",
            )
        gpus = gpus[: config.cards]
    gpus = _chosen(gpus, config.gpus)
    capped = tuple(_capped(gpu, config, reserve, planning) for gpu in gpus)
    if not capped:  # then the host is what the caps are about
        cap = host_total if config.memory_gib is None else int(config.memory_gib * GIB)
        host_available = max(0, min(host_available, cap) - reserve)
    return Hardware(config.profile, capped, host_total, host_available, len(os.sched_getaffinity(0)), notes)


def profile_gpus(config: HardwareConfig) -> tuple[Gpu, ...]:
    """The cards of a named profile: memory as sold, less what the driver keeps; the oldest generation sold so."""
    total = int((config.memory_gib or 24) * GIB)
    card = Gpu(0, f"{config.memory_gib:g} GiB card", total, total - DRIVER_KEEPS, (8, 6))
    return tuple(replace(card, index=i) for i in range(config.cards or 0))


def _chosen(gpus: tuple[Gpu, ...], indexes: list[int] | None) -> tuple[Gpu, ...]:
    if indexes is None:
        return gpus
    missing = [i for i in indexes if not 0 <= i < len(gpus)]
    if missing:
        have = ", ".join(str(gpu.index) for gpu in gpus) or "none"
        raise ConfigError(f"hardware.gpus={indexes}: there is no GPU {missing[0]}; this machine has {have}")
    return tuple(gpus[i] for i in indexes)


def _capped(gpu: Gpu, config: HardwareConfig, reserve: int, planning: bool) -> Gpu:
    free = gpu.free - reserve
    if config.memory_gib is not None and not (planning and config.cards is not None):
        cap = int(config.memory_gib * GIB) - DRIVER_KEEPS
        free = min(free, cap - reserve)
    return replace(gpu, free=max(0, free))


def nvml_gpus() -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The machine's GPUs through NVML (those of CUDA_VISIBLE_DEVICES), and a note where there are none."""
    try:
        import pynvml
    except ImportError:
        return (), ("nvidia-ml-py is not installed: planned for the CPU",)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), (f"no NVIDIA GPU here ({error}): planned for the CPU",)
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    by_name = {str(i): h for i, h in enumerate(handles)} | {str(pynvml.nvmlDeviceGetUUID(h)): h for h in handles}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [part.strip() for part in visible.split(",") if part.strip()]
        # As CUDA has it: what follows a name that is not there is not visible either.
        handles = list(takewhile(lambda handle: handle is not None, (_match(part, by_name) for part in wanted)))
    gpus = []
    for index, handle in enumerate(handles):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        gpus.append(Gpu(index, str(pynvml.nvmlDeviceGetName(handle)), memory.total, memory.free, tuple(capability)))
    return tuple(gpus), ()


def _match(part: str, by_name: dict[str, Any]) -> Any | None:
    exact = by_name.get(part)
    if exact is not None:
        return exact
    return next((h for name, h in by_name.items() if part.startswith("GPU-") and name.startswith(part)), None)


def host_memory() -> tuple[int, int]:
    """(total, available) bytes of host memory, under the cgroup's limit."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit, used = _cgroup()
    if limit is not None and limit < total:
        total, available = limit, min(available, max(0, limit - used))
    return total, available


def _cgroup() -> tuple[int | None, int]:
    """(limit, bytes in use) of this process's cgroup (v2, then v1), or (None, 0)."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit = Path(limit_file).read_text().strip()
            if limit != "max":
                return int(limit), int(Path(used_file).read_text())
        except (OSError, ValueError):
            continue
    return None, 0
