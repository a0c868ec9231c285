"""The machine's GPUs through NVML: what they are, what is free, and who holds the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.hardware.types import DRIVER_KEEPS, FOR_THE_CPU, Gpu, Holder
from orchestrator.hardware.visible import NAME, Card, pinned, visible

DRIVER = Path("/proc/driver/nvidia/version")  # there while the kernel has the driver, with or without its library

# What NVML's errors mean to a person.
MEANINGS = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": "no NVIDIA GPU here",
    "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA driver is not loaded",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the NVIDIA driver was updated under a running kernel: restart the machine",
    "NVML_ERROR_NO_PERMISSION": "this user may not use the NVIDIA driver (/dev/nvidia*)",
    "NVML_ERROR_GPU_IS_LOST": "a GPU has fallen off the bus: restart the machine",
    "NVML_ERROR_RESET_REQUIRED": "a GPU needs a reset",
}
WITHOUT_LIBRARY = (
    "the NVIDIA driver is here and its library NVML is not; in a container, set "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
)


@dataclass(frozen=True)
class _Card:
    """A GPU as NVML has it, with the MIG instances on it (None: MIG is off)."""

    handle: Any
    bus: tuple[int, ...]
    name: str
    uuid: str
    capability: tuple[int, int]
    instances: tuple[Any, ...] | None
    instance_uuids: tuple[str, ...]
    old_names: tuple[str, ...]

    def named(self) -> Card:
        return Card(self.uuid, None if self.instances is None else self.instance_uuids, self.old_names)


def nvml_gpus() -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The GPUs that a CUDA process would see here, in its order, and notes; without any, a note says why."""
    try:
        import pynvml
    except ImportError:
        return (), (f"nvidia-ml-py is not installed{FOR_THE_CPU}",)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), (f"{_meaning(pynvml, error)} ({error}){FOR_THE_CPU}",)
    try:
        return _read(pynvml)
    except pynvml.NVMLError as error:
        return (), (f"{_meaning(pynvml, error)} ({error}){FOR_THE_CPU}",)
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _meaning(nvml: Any, error: Any) -> str:
    code = getattr(error, "value", None)
    name = next((name for name in MEANINGS if getattr(nvml, name) == code), None)
    if name == "NVML_ERROR_LIBRARY_NOT_FOUND" and DRIVER.exists():
        return WITHOUT_LIBRARY
    return MEANINGS[name] if name is not None else "NVML does not answer"


def _read(nvml: Any) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    notes: list[str] = []
    cards: list[_Card] = []
    for i in range(nvml.nvmlDeviceGetCount()):
        try:
            cards.append(_card(nvml, nvml.nvmlDeviceGetHandleByIndex(i)))
        except nvml.NVMLError as error:
            notes.append(f"GPU {i} is left out: {_meaning(nvml, error)} ({error})")
    if not cards:
        return (), (f"{notes[0] if notes else 'the NVIDIA driver has no GPU'}{FOR_THE_CPU}",)
    cards.sort(key=lambda card: card.bus)  # as CUDA numbers them with CUDA_DEVICE_ORDER=PCI_BUS_ID
    named, value = [card.named() for card in cards], os.environ.get(NAME)
    places, said = visible(named, value)
    notes += [*said, *_order_note(cards)]
    gpus: list[Gpu] = []
    for index, place in enumerate(places):
        card = cards[place.card]
        handle = card.handle if place.instance is None or card.instances is None else card.instances[place.instance]
        try:
            gpus.append(_gpu(nvml, index, handle, card, pinned(named, place, value)))
        except nvml.NVMLError as error:  # CUDA numbers it all the same
            notes.append(f"GPU {index} ({card.name}) is left out: {_meaning(nvml, error)} ({error})")
    if not gpus:
        return (), (f"{notes[0]}{FOR_THE_CPU}", *notes[1:])
    return tuple(gpus), tuple(notes)


def _order_note(cards: list[_Card]) -> list[str]:
    order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # what engines get where it is not set
    if order == "PCI_BUS_ID" or len({card.name for card in cards}) < 2:
        return []
    return [f"CUDA_DEVICE_ORDER={order} may number unequal GPUs otherwise than this plan: set it to PCI_BUS_ID"]


def _card(nvml: Any, handle: Any) -> _Card:
    pci = nvml.nvmlDeviceGetPciInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    instances, uuid = _instances(nvml, handle), str(nvml.nvmlDeviceGetUUID(handle))
    return _Card(
        handle,
        (pci.domain, pci.bus, pci.device),
        str(nvml.nvmlDeviceGetName(handle)),
        uuid,
        (major, minor),
        instances,
        tuple(str(nvml.nvmlDeviceGetUUID(instance)) for instance in instances or ()),
        tuple(_old_name(nvml, uuid, instance) for instance in instances or ()),
    )


def _old_name(nvml: Any, uuid: str, instance: Any) -> str:
    """As drivers before 470 name a MIG instance; "" where its numbers cannot be asked."""
    with suppress(nvml.NVMLError):
        numbers = nvml.nvmlDeviceGetGpuInstanceId(instance), nvml.nvmlDeviceGetComputeInstanceId(instance)
        return f"MIG-{uuid}/{numbers[0]}/{numbers[1]}"
    return ""


def _instances(nvml: Any, handle: Any) -> tuple[Any, ...] | None:
    """The MIG instances of a GPU; None where MIG is off, or the card does not know it."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return None
    if current != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    found = []
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(nvml.NVMLError):  # a slot without an instance
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))
    return tuple(found)


def _gpu(nvml: Any, index: int, handle: Any, card: _Card, pin: str) -> Gpu:
    total, free, held = memory(nvml, handle)
    return Gpu(
        index,
        str(nvml.nvmlDeviceGetName(handle)),
        total,
        free,
        card.capability,  # of the card: NVML need not know an instance's
        str(nvml.nvmlDeviceGetUUID(handle)),
        held,
        _holders(nvml, handle),
        pin,
    )


def memory(nvml: Any, handle: Any) -> tuple[int, int, int]:
    """(total, free, held by processes). Drivers before 510 do not tell what they keep for themselves."""
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return info.total, info.free, info.used
    except nvml.NVMLError:
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
        return info.total, info.free, max(0, info.used - DRIVER_KEEPS)


def processes(nvml: Any, handle: Any) -> dict[int, int | None]:
    """Process id -> bytes of a GPU. Those of other containers and, on some systems, users are not told."""
    held: dict[int, int | None] = {}
    asks: tuple[Callable[[Any], list[Any]], ...] = (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    )
    for ask in asks:
        with suppress(nvml.NVMLError):  # not every card and user may ask
            held |= {process.pid: process.usedGpuMemory for process in ask(handle)}
    return held


def _holders(nvml: Any, handle: Any) -> tuple[Holder, ...]:
    """The processes on a GPU, largest first."""
    held = processes(nvml, handle)
    ours = _ours() if held else set()
    found = [Holder(pid, _process_name(pid), size, pid in ours) for pid, size in held.items()]
    return tuple(sorted(found, key=lambda holder: -(holder.held or 0)))


def _ours() -> set[int]:
    with suppress(psutil.Error):
        return {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    return {os.getpid()}


def _process_name(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name() or None
    except psutil.Error:  # of another container, or gone since
        return None
