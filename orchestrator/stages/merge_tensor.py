"""One piece's way through a merge: rows in, arithmetic in float32, one cast, bytes out."""

import math
from typing import Any

import numpy as np
import torch

from orchestrator.checkpoint.bits import all_finite
from orchestrator.checkpoint.reader import read_rows
from orchestrator.checkpoint.tensors import DTYPES, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.stages.nf4 import as_trained
from orchestrator.stages.pieces import Piece, Tally, Worked, check_finite

_F16_MAX = 65504.0


def one_thread() -> None:
    """For a pool's threads: each is one of several, torch needs none of its own."""
    torch.set_num_threads(1)


def computed(piece: Piece) -> Worked:
    """The rows with the adapters' changes, cast to what is written (see `pieces.work`)."""
    source, nf4 = piece.output.source, piece.output.nf4
    stored = read_rows(source, piece.start, piece.stop)
    compute = torch.float64 if source.dtype == "F64" else torch.float32
    new = stored.to(compute, copy=True)
    square = _square(new)
    if not math.isfinite(square):
        check_finite(piece, _words(stored))
    rounding = 0.0
    if nf4 is not None:
        old, new = new, as_trained(stored, nf4)
        rounding = _square(new - old)
    change = piece.change.square(piece.start, piece.stop) if piece.change is not None else 0.0
    before = new.clone() if change is None else None
    if piece.change is not None:
        new = piece.change.apply(new, piece.start)
    if before is not None:
        change = _square(new - before)
    written = new.to(getattr(torch, DTYPES[piece.dtype].torch))
    _check_range(piece, new, written)
    if piece.output.dtype:  # of another shape than the base's: there is nothing to compare it with
        tally = Tally(changed=written.numel())
    elif piece.output.replaced is not None:
        tally = _replaced(piece, piece.output.replaced, new, written)
    else:
        tally = Tally(square, change or 0.0, rounding, _differing(stored, written))
    return Worked(piece, _words(written), tally)


def _replaced(piece: Piece, base: TensorInfo, new: torch.Tensor, written: torch.Tensor) -> Tally:
    stored = read_rows(base, piece.start, piece.stop)
    old = stored.to(new.dtype)
    return Tally(_square(old), _square(new - old), 0.0, _differing(stored, written))


def _differing(stored: torch.Tensor, written: torch.Tensor) -> int:
    """How many elements are written otherwise than they are stored."""
    return int(np.count_nonzero(_words(stored.to(written.dtype)) != _words(written)))


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
