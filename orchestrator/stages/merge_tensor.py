"""One tensor's way through a merge: rows in, arithmetic in float32, one cast, bytes out."""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch

from orchestrator.checkpoint.bits import all_finite
from orchestrator.checkpoint.reader import TensorReader
from orchestrator.checkpoint.tensors import DTYPES
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.stages.change import Change
from orchestrator.stages.merge_plan import Output

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


class Merged:
    """What becomes of one tensor, and what changed on the way (known once its pieces are used up)."""

    def __init__(self, output: Output, dtype: str) -> None:
        self.output = output
        self.info = output.source
        self.dtype = dtype
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
        if not self.output.touched:
            return []
        relative = math.sqrt(self.after / self.before) if self.before else None
        return [
            {
                "tensor": self.output.name,
                "relative_change": relative,
                "changed": self.changed / max(self.info.parameters, 1),
                "used": list(self.output.used),
            }
        ]


def pieces(reader: TensorReader, merged: Merged) -> Iterator[Any]:
    """The written bytes of a tensor, some rows at a time.

    Raises:
        CheckpointError: NaN or infinite values in the base or in the result, or beyond the written dtype's range.
    """
    dtype = getattr(torch, DTYPES[merged.dtype].torch)
    change = Change(reader, merged.output) if merged.output.touched else None
    replaced = merged.output.replaced
    for start, rows in reader.rows(merged.info, ROWS_BYTES):
        if not all_finite(_bytes(rows), merged.info.dtype):
            raise CheckpointError(
                f"{shown(merged.output.name)} in {shown(merged.info.file, 400)} holds NaN or infinite values",
                "The model is damaged: download it again, or use an earlier checkpoint.",
            )
        new = rows
        if change is not None:
            compute = _compute_dtype(merged.info.dtype)
            new = change.apply(rows.to(compute, copy=True), start)
            old = (reader.read(replaced)[start : start + len(rows)] if replaced else rows).to(compute)
        written = new.to(dtype)
        if change is not None:
            merged.note(old, new, written)
        data = _bytes(written)
        if written is not rows and not all_finite(data, merged.dtype):
            raise _overflow(merged, new)
        yield data


def _compute_dtype(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "F64" else torch.float32


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _overflow(merged: Merged, new: torch.Tensor) -> CheckpointError:
    name = shown(merged.output.name)
    largest = float(new.abs().max())
    if not math.isfinite(largest):
        return CheckpointError(
            f"merging makes {name} infinite or NaN", "Give the adapter a smaller weight, or check its training."
        )
    what = DTYPES[merged.dtype].torch
    return CheckpointError(
        f"{name} does not fit into {what}: its largest value is {largest:.4g}", "Set convert.dtype=bfloat16."
    )
