"""What a machine is to the planner. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

GIB = 2**30
MIB = 2**20
# What the driver keeps of a 24,576 MiB card: NVML's total less what an idle card without a display lets a
# process allocate. A conservative round figure; a real card's own is read from NVML.
DRIVER_KEEPS = 450 * MIB
BF16 = (8, 0)  # the compute capability from which cards compute in bfloat16
FOR_THE_CPU = ": planned for the CPU"  # ends the note that says why there is no GPU


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU. `name` and `held` are None where they cannot be read; `ours`: this
    process, or one that it started."""

    pid: int
    name: str | None
    held: int | None
    ours: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"pid": self.pid, "name": self.name, "bytes": self.held, "ours": self.ours}


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance.

    Attributes:
        index: the engine's ("cuda:index"), after CUDA_VISIBLE_DEVICES.
        free: what this run may take: what is free there now, less the caps of the configuration.
        held: what all processes hold there, seen or not.
        pinned: of a MIG instance, what CUDA_VISIBLE_DEVICES has to be for a child process to get it; "": as it is here.
    """

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int]
    uuid: str = ""
    held: int = 0
    held_by: tuple[Holder, ...] = ()
    pinned: str = ""

    @property
    def key(self) -> str:
        """What names it to every run on the machine, whatever each of them may see."""
        return self.uuid or f"GPU {self.index}"

    @property
    def unnamed(self) -> int:
        """What is held there by nobody that can be named: processes of other containers, the driver's bookkeeping."""
        return self.held - sum(holder.held or 0 for holder in self.held_by)

    @property
    def capability_text(self) -> str:
        """As NVIDIA writes it: 8.6."""
        return ".".join(map(str, self.capability))

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "name": self.name,
            "uuid": self.uuid,
            "total": self.total,
            "free": self.free,
            "capability": self.capability_text,
            "held": self.held,
            "held_by": [holder.to_json() for holder in self.held_by],
        }


def child_devices(gpus: Iterable[Gpu]) -> dict[str, str]:
    """What is set in the environment of a child process so that it sees the same devices as this one."""
    pins = [gpu.pinned for gpu in gpus if gpu.pinned]
    return {"CUDA_VISIBLE_DEVICES": ",".join(pins)} if pins else {}


@dataclass(frozen=True)
class Disk:
    """The file system that artifacts are written to; `path`: the folder that was asked about."""

    path: str
    total: int
    free: int

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "total": self.total, "free": self.free}


@dataclass(frozen=True)
class Hardware:
    """A machine. `host_total` and `host_available` are under the cgroups' limits where there are any; `described`: a
    profile stands for it, and nothing that is installed here says anything of it."""

    profile: str
    gpus: tuple[Gpu, ...]
    host_total: int
    host_available: int
    cpus: int
    notes: tuple[str, ...] = ()
    disk: Disk | None = None
    described: bool = False

    @property
    def device(self) -> str:
        """Where engines run: "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "gpus": [gpu.to_json() for gpu in self.gpus],
            "host": {"total": self.host_total, "available": self.host_available, "cpus": self.cpus},
            "disk": self.disk.to_json() if self.disk is not None else None,
            "notes": list(self.notes),
        }
