"""One piece's way through a merge: rows in, arithmetic in float32, one cast, bytes out."""

import math
from typing import Any

import numpy as np
import torch

from orchestrator.checkpoint.bits import all_finite
from orchestrator.checkpoint.reader import read_rows
from orchestrator.checkpoint.tensors import DTYPES
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.stages.pieces import Piece, Tally, Worked, check_finite

_F16_MAX = 65504.0


def one_thread() -> None:
    """For a pool's threads: each is one of several, torch needs none of its own."""
    torch.set_num_threads(1)


def computed(piece: Piece) -> Worked:
    """The rows with the adapters' changes, cast to what is written (see `pieces.work`)."""
    source = piece.output.source
    stored = read_rows(source, piece.start, piece.stop)
    compute = torch.float64 if source.dtype == "F64" else torch.float32
    new = stored.to(compute, copy=True)
    square = _square(new)
    if not math.isfinite(square):
        check_finite(piece, _words(stored))
    if piece.change is not None:
        new = piece.change.apply(new, piece.start)
    written = new.to(getattr(torch, DTYPES[piece.dtype].torch))
    _check_range(piece, new, written)
    return Worked(piece, _words(written), _tally(piece, stored, square, new, written))


def _tally(piece: Piece, stored: torch.Tensor, square: float, new: torch.Tensor, written: torch.Tensor) -> Tally:
    replaced = piece.output.replaced
    if not piece.output.touched:
        return Tally()
    if piece.output.dtype:  # of another shape than the base's: there is nothing to compare it with
        return Tally(changed=written.numel())
    if replaced is not None:
        stored = read_rows(replaced, piece.start, piece.stop)
        square = _square(stored.to(new.dtype))
    old = stored.to(new.dtype, copy=True)
    before = stored if stored.dtype == written.dtype else old.to(written.dtype, copy=True)
    changed = int(np.count_nonzero(_words(before) != _words(written)))
    return Tally(square, _square(torch.sub(new, old, out=old)), changed)


def _square(rows: torch.Tensor) -> float:
    flat = rows.reshape(-1)
    return float(torch.dot(flat, flat))


def _words(rows: torch.Tensor) -> Any:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return rows.reshape(-1).view(kind).numpy()


def _check_range(piece: Piece, new: torch.Tensor, written: torch.Tensor) -> None:
    """Raises CheckpointError unless everything written is finite."""
    # No element is larger than the root of the sum of squares: mostly this one pass is enough.
    limit = _F16_MAX if piece.dtype == "F16" else math.inf
    if _square(new) < limit**2 or all_finite(_words(written), piece.dtype):
        return
    name, largest = shown(piece.output.name), float(new.abs().max())
    if not math.isfinite(largest):
        raise CheckpointError(
            f"merging makes {name} infinite or NaN", "Give the adapter a smaller weight, or check its training."
        )
    what = DTYPES[piece.dtype].torch
    raise CheckpointError(
        f"{name} does not fit into {what}: its largest value is {largest:.4g}", "Set convert.dtype=bfloat16."
    )
