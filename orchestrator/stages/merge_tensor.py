"""One tensor's way through a merge: rows in, arithmetic in float32, one cast, bytes out."""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch

from orchestrator.checkpoint.adapter import LoraTarget, ReplaceTarget, Target
from orchestrator.checkpoint.bits import all_finite
from orchestrator.checkpoint.reader import TensorReader
from orchestrator.checkpoint.tensors import DTYPES, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

ROWS_BYTES = 16 * 2**20
"""Bytes of the source that are worked on at a time; float32 copies make it about eight times that in memory."""

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # mallopt's, from glibc's malloc.h
_LARGE = 2**20


def give_memory_back() -> None:
    """Makes glibc return every large block as soon as it is freed.

    Its own threshold grows with the blocks that are freed, up to 32 MiB, after which tensors' buffers come from a
    heap that fragments: the peak then grows with the number of layers. Elsewhere than on glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _LARGE)


def check_weight(target: Target, weight: float, others: list[tuple[float, Target]], where: str) -> None:
    """Raises CheckpointError where an adapter's weight, or several adapters together, have no meaning."""
    if not math.isfinite(weight):
        raise CheckpointError(f"{where}: the adapter's weight is {weight}, not a finite number")
    replaces = isinstance(target, ReplaceTarget)
    if replaces and weight != 1:
        raise CheckpointError(
            f"{where}: {shown(target.tensor)} replaces the base's, which a weight of {weight} cannot scale",
            "Give it the weight 1.",
        )
    if others and (replaces or any(isinstance(other, ReplaceTarget) for _, other in others)):
        raise CheckpointError(
            f"{where}: {shown(target.tensor)} is replaced by one adapter and changed by another",
            "Merge one adapter only.",
        )


class Merged:
    """What becomes of one tensor, and what changed on the way (known once its pieces are used up)."""

    def __init__(self, info: TensorInfo, dtype: str, changes: list[tuple[float, Target]]) -> None:
        self.info = info
        self.dtype = dtype
        self.changes = changes
        self.before = self.after = 0.0
        self.changed = 0

    def note(self, old: torch.Tensor, new: torch.Tensor, written: torch.Tensor) -> None:
        """Adds some rows to the norms: `old` and `new` as computed, `written` as cast."""
        self.before += float(torch.linalg.vector_norm(old)) ** 2
        self.after += float(torch.linalg.vector_norm(new - old)) ** 2
        self.changed += int(torch.count_nonzero(old.to(written.dtype) != written))

    def report(self) -> list[dict[str, Any]]:
        """One JSON-able entry where an adapter had a part in it; else none.

        `relative_change` is |W' - W| / |W| (Frobenius), before the cast; None for a base of zeros.
        `changed` is the share of elements whose written value differs from the base's.
        """
        if not self.changes:
            return []
        relative = math.sqrt(self.after / self.before) if self.before else None
        used = sorted(name for _, target in self.changes for name in target.consumed)
        return [
            {
                "tensor": self.info.name,
                "relative_change": relative,
                "changed": self.changed / max(self.info.parameters, 1),
                "used": used,
            }
        ]


def pieces(reader: TensorReader, merged: Merged) -> Iterator[Any]:
    """The written bytes of a tensor, some rows at a time.

    Raises:
        CheckpointError: NaN or infinite values in the base or in the result, or beyond the written dtype's range.
    """
    dtype = getattr(torch, DTYPES[merged.dtype].torch)
    change = _Change(reader, merged.changes) if merged.changes else None
    for start, rows in reader.rows(merged.info, ROWS_BYTES):
        if not all_finite(_bytes(rows), merged.info.dtype):
            raise CheckpointError(
                f"{shown(merged.info.name)} in {shown(merged.info.file, 400)} holds NaN or infinite values",
                "The model is damaged: download it again, or use an earlier checkpoint.",
            )
        new = rows
        if change is not None:
            old = rows.to(_compute_dtype(merged.info.dtype))
            new = change.apply(old, start)
        written = new.to(dtype)
        if change is not None:
            merged.note(old, new, written)
        data = _bytes(written)
        if written is not rows and not all_finite(data, merged.dtype):
            raise _overflow(merged, new)
        yield data


class _Change:
    """The adapters' tensors for one weight, read once."""

    def __init__(self, reader: TensorReader, changes: list[tuple[float, Target]]) -> None:
        self.value: torch.Tensor | None = None
        self.lora: list[tuple[LoraTarget, float, torch.Tensor, torch.Tensor]] = []
        for weight, target in changes:
            if isinstance(target, ReplaceTarget):
                self.value = reader.read(target.value)
            else:
                a, b = reader.read(target.a).float(), reader.read(target.b).float()
                self.lora.append((target, target.scale * weight, a, b))

    def apply(self, old: torch.Tensor, start: int) -> torch.Tensor:
        """The new values of the rows `old`, of which `start` is the first one's number."""
        if self.value is not None:
            return self.value[start : start + len(old)].to(old.dtype)
        new = old.clone()
        for target, scale, a, b in self.lora:
            rows = slice(start, start + len(old))
            delta = (b @ a[:, rows]).T if target.transposed else b[rows] @ a
            new += delta * scale
        return new


def _compute_dtype(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "F64" else torch.float32


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _overflow(merged: Merged, new: torch.Tensor) -> CheckpointError:
    name = shown(merged.info.name)
    largest = float(new.abs().max())
    if not math.isfinite(largest):
        return CheckpointError(
            f"merging makes {name} infinite or NaN", "Give the adapter a smaller weight, or check its training."
        )
    what = DTYPES[merged.dtype].torch
    return CheckpointError(
        f"{name} does not fit into {what}: its largest value is {largest:.4g}", "Set convert.dtype=bfloat16."
    )
