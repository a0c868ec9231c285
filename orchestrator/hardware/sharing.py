"""What leases leave of the GPUs: free is less what they ask for and have not taken yet."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import psutil

from orchestrator.hardware.lease import Lease
from orchestrator.hardware.types import Gpu, Holder


def shared(gpus: tuple[Gpu, ...], held: list[Lease], *, idle: bool) -> tuple[Gpu, ...]:
    """The GPUs with all that leases ask for as held, by their runs.

    Args:
        idle: instead, the GPUs as they are when those runs have ended.
    """
    families = {one.pid: _family(one.pid) for one in held}
    return tuple(_shared(gpu, [one for one in held if gpu.key in one.gpus], families, idle) for gpu in gpus)


def _shared(gpu: Gpu, held: list[Lease], families: dict[int, set[int]], idle: bool) -> Gpu:
    if not held:
        return gpu
    taken = [_taken(gpu, families[one.pid]) for one in held]
    shares = [one.gpus[gpu.key] for one in held]
    # Of the runs whose processes NVML does not name, only what they hold together is known.
    unnamed = [share for share, size in zip(shares, taken, strict=True) if size is None]
    grown = max(0, gpu.unnamed - min((share.others for share in unnamed), default=gpu.unnamed))
    together = min(grown, sum(share.asked for share in unnamed))
    if idle:
        ours = set().union(*(families[one.pid] for one in held))
        here = together + sum(size or 0 for size in taken)
        others = tuple(holder for holder in gpu.held_by if holder.pid not in ours)
        return replace(gpu, free=gpu.free + here, held=gpu.held - here, held_by=others)
    coming = [max(0, share.asked - (size or 0)) for share, size in zip(shares, taken, strict=True)]
    missing = sum(coming) - together
    runs = tuple(Holder(one.pid, one.what, size) for one, size in zip(held, coming, strict=True) if size)
    return replace(gpu, free=max(0, gpu.free - missing), held=gpu.held + missing, held_by=(*gpu.held_by, *runs))


def _taken(gpu: Gpu, family: set[int]) -> int | None:
    """What a run's processes hold; None where NVML does not tell."""
    sizes = [holder.held for holder in gpu.held_by if holder.pid in family]
    return sum(size or 0 for size in sizes) if sizes and None not in sizes else None


def _family(pid: int) -> set[int]:
    """A process and all that it has started."""
    with suppress(psutil.Error):
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return {pid}
