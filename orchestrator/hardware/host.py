"""The host: memory and processors under the cgroups' limits, room on the disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.hardware.types import Disk

PROC = Path("/proc/self")


@dataclass(frozen=True)
class _Files:
    """The memory files of one version of cgroups. `cache`: the page cache that is given back first, in memory.stat."""

    limits: tuple[str, ...]
    used: str
    cache: str


# memory.high slows a process down to a halt instead of killing it: nothing to plan beyond. Swap is not counted.
MEMORY_FILES = {
    2: _Files(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def host_memory() -> tuple[int, int]:
    """(total, available) bytes of host memory, under every cgroup that this process is in."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in memory_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of this process's cgroup and of every one above it, where there is a limit.

    A limit above is shared with the neighbours: it counts with what they use. Page cache that the kernel gives
    back on demand is not in use, or reading a large checkpoint would look like a full host.
    """
    for version, folder in cgroups("memory"):
        files = MEMORY_FILES[version]
        limits = [limit for name in files.limits if (limit := _number(folder / name)) is not None]
        used = _number(folder / files.used)
        if limits and used is not None:
            yield min(limits), max(0, used - _stat(folder / "memory.stat", files.cache))


def cpu_count() -> int:
    """Processors that this process may use: its affinity, under the cgroups' quotas."""
    counts = [len(os.sched_getaffinity(0))]
    for version, folder in cgroups("cpu"):
        quota = _quota_v2(folder) if version == 2 else _quota_v1(folder)
        if quota is not None:
            counts.append(max(1, math.ceil(quota)))
    return min(counts)


def disk_room(folder: Path) -> Disk | None:
    """The file system that `folder` is on, or will be on once it is made; None where it cannot be asked."""
    for place in (folder, *folder.parents):
        try:
            room = shutil.disk_usage(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return Disk(str(folder), room.total, room.free)
    return None


def cgroups(controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's cgroup of a controller and of every one above it that can be seen.

    A machine may have both versions at once, each with some of the controllers.
    """
    try:
        lines = (PROC / "cgroup").read_text().splitlines()
        mounts = [line.split() for line in (PROC / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = 1 if controllers else 2
        if not path or (version == 1 and controller not in controllers.split(",")):
            continue
        for root, place in _mounted(mounts, version, controller):
            folder = _inside(path, root, place)
            while True:
                yield version, folder
                if folder == place:
                    break
                folder = folder.parent
            break  # mounted twice, it is the same tree


def _mounted(mounts: list[list[str]], version: int, controller: str) -> Iterator[tuple[str, Path]]:
    """(the cgroup that is mounted, where): proc(5) has the fields."""
    for mount in mounts:
        if "-" not in mount[6:]:
            continue
        kind, _, options = (*mount[mount.index("-", 6) + 1 :], "", "", "")[:3]
        if kind == ("cgroup2" if version == 2 else "cgroup") and (version == 2 or controller in options.split(",")):
            yield mount[3], Path(mount[4])


def _inside(path: str, root: str, place: Path) -> Path:
    """The folder of the cgroup `path` in a mount of `root`; the mount's own where the path lies outside it."""
    inside = Path(path)
    if inside.is_relative_to(root) and ".." not in inside.parts:
        folder = place / inside.relative_to(root)
        if folder.is_dir():
            return folder
    return place


def _quota_v2(folder: Path) -> float | None:
    parts = _text(folder / "cpu.max").split()
    return _ratio(*parts) if len(parts) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """Processors; None for "max", -1, and what is not there."""
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None  # "max": no limit


def _stat(file: Path, name: str) -> int:
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
