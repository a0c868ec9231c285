"""Tensors out of checkpoint files, some rows at a time, without the files ever being in memory.

Contiguous data are read, not mapped: a file that becomes shorter is then an error and no signal, and what is
read counts as memory only while it is worked on. Only strided tensors are mapped. torch is imported only when
a tensor is asked for: raw bytes need none.
"""

import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.tensors import DTYPES, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

_AGAIN = "Was it changed while it was read? Run it again."
_BITS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def row_ranges(info: TensorInfo, limit: int) -> Iterator[tuple[int, int]]:
    """The tensor's rows (of its first dimension) in ranges of at most `limit` bytes; a single row may be larger.

    A tensor without dimensions is one row; one without elements has none to read and is a range of its own.
    """
    rows = info.shape[0] if info.shape else 1
    step = max(limit * rows // info.nbytes, 1) if info.nbytes else max(rows, 1)
    for start in range(0, max(rows, 1), step):
        yield start, min(start + step, rows)


def read_words(info: TensorInfo, start: int, stop: int) -> "np.ndarray[Any, Any]":
    """Rows `start` to `stop` of a tensor as unsigned words of its element's size, in row-major order.

    Shape (stop - start, ...), or () for a tensor without dimensions. For any thread.

    Raises:
        CheckpointError: the file is gone or has become shorter.
    """
    import numpy as np

    shape = (stop - start, *info.shape[1:]) if info.shape else ()
    words: np.ndarray[Any, Any] = np.empty(shape, dtype=_BITS[DTYPES[info.dtype].size])
    if words.size:
        _fill(info, start, words)
    return words


def read_rows(info: TensorInfo, start: int, stop: int) -> "torch.Tensor":
    """As `read_words`, as a tensor of the stored type on the CPU."""
    import torch

    dtype = getattr(torch, DTYPES[info.dtype].torch)
    words = read_words(info, start, stop)
    if not words.size:
        return torch.empty(words.shape, dtype=dtype)
    return torch.frombuffer(words, dtype=dtype).reshape(words.shape)


def read_tensor(info: TensorInfo) -> "torch.Tensor":
    """The whole tensor on the CPU, contiguous whatever its strides were.

    Raises:
        CheckpointError: the file is gone or has become shorter.
    """
    return read_rows(info, 0, info.shape[0] if info.shape else 1)


def _fill(info: TensorInfo, start: int, words: "np.ndarray[Any, Any]") -> None:
    try:
        with info.file.open("rb", buffering=0) as stream:
            if info.contiguous:
                _read_into(info, stream.fileno(), start, words)
            else:
                _gather(info, stream.fileno(), start, words)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or shown(error)
        raise CheckpointError(f"{shown(info.file, 400)} cannot be read: {why}", _AGAIN) from error


def _read_into(info: TensorInfo, descriptor: int, start: int, words: "np.ndarray[Any, Any]") -> None:
    offset = info.offset + start * (info.nbytes // info.shape[0] if info.shape else 0)
    left = words.data.cast("B")
    while left:
        count = os.preadv(descriptor, [left], offset)
        if count == 0:
            raise _shorter(info)
        left, offset = left[count:], offset + count


def _gather(info: TensorInfo, descriptor: int, start: int, words: "np.ndarray[Any, Any]") -> None:
    import numpy as np

    size = DTYPES[info.dtype].size
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
        if info.offset + info.span > len(mapped):
            raise _shorter(info)
        strides = [step * size for step in info.strides]
        source: np.ndarray[Any, Any] = np.ndarray(info.shape, words.dtype, mapped, info.offset, strides)
        words[...] = source[start : start + len(words)] if info.shape else source
        del source  # or the mapping could not be closed


def _shorter(info: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{shown(info.file, 400)} has become shorter since its header was read", _AGAIN)
