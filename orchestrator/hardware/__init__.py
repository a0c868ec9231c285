"""What the machine has, or what a profile says it has: GPUs, host memory, room on the disk. No torch."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config import HardwareConfig
from orchestrator.hardware.host import cpu_count, disk_room, host_memory
from orchestrator.hardware.lease import leases
from orchestrator.hardware.nvml import nvml_gpus
from orchestrator.hardware.profile import capped_gpus, capped_host, chosen_gpus, profile_gpus
from orchestrator.hardware.sharing import shared
from orchestrator.hardware.types import BF16, DRIVER_KEEPS, GIB, MIB, Disk, Gpu, Hardware, Holder, child_devices

__all__ = [
    "BF16",
    "DRIVER_KEEPS",
    "GIB",
    "MIB",
    "Disk",
    "Gpu",
    "Hardware",
    "Holder",
    "child_devices",
    "detect",
    "host_memory",
    "nvml_gpus",
    "profile_gpus",
]


def detect(config: HardwareConfig, *, planning: bool, artifacts: Path | None = None, idle: bool = False) -> Hardware:
    """The hardware that the request is for.

    Args:
        config: the `hardware` section.
        planning: a profile stands for the machine; otherwise it caps the machine's own GPUs.
        artifacts: the folder whose disk is looked at.
        idle: as if the runs that hold leases of the GPUs had ended.

    Raises:
        ConfigError: GPUs asked for that are not there, or caps that contradict what is.
        EngineUnavailableError: a real run asks for more GPUs than there are.
    """
    host_total, host_available = host_memory()
    notes: tuple[str, ...] = ()
    described = config.cards is not None and planning
    if described:
        gpus = profile_gpus(config)
        # A profile says nothing of a host, nor does the machine that plans: laptops plan for servers.
        host_total = host_available = max(host_total, sum(gpu.total for gpu in gpus))
        notes = (
            f"planned for the profile {config.profile}, not for this machine; its host memory is taken to be "
            f"{host_total / GIB:.0f} GiB, that of its cards together or of this machine, whichever is more",
        )
    else:
        found, notes = nvml_gpus() if config.profile != "cpu" else ((), ())
        if found:
            found, more = _with_leases(found, config, idle)
            notes += more
        gpus = chosen_gpus(found, config, notes)
        if gpus:
            gpus, more = capped_gpus(gpus, config)
        else:  # then the host is what the caps are about
            host_available, more = capped_host(host_total, host_available, config)
        notes += more
    disk = disk_room(artifacts) if artifacts is not None else None
    return Hardware(config.profile, gpus, host_total, host_available, cpu_count(), notes, disk, described)


def _with_leases(gpus: tuple[Gpu, ...], config: HardwareConfig, idle: bool) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The GPUs beside other runs: those with the most room first, unless the request has an order of its own."""
    held, notes = leases()
    if held:
        gpus = shared(gpus, held, idle=idle)
        if config.gpus is None and not isinstance(config.memory_gib, list):
            gpus = tuple(sorted(gpus, key=lambda gpu: -gpu.free))
    return gpus, notes
