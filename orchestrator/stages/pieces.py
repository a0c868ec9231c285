"""The way of the data through a stage: pieces of tensors, read and worked on by a few threads, taken in order.

A piece that only passes through needs no torch: its bytes are looked at (all finite?) and passed on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.checkpoint.bits import all_finite
from orchestrator.checkpoint.reader import read_words, row_ranges
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.stages.merge_plan import Output

if TYPE_CHECKING:
    from orchestrator.stages.change import Change

PIECE_BYTES = 2 * 2**20
"""Of the source, worked on at a time: it and its float32 copies fit into a core's caches."""

MAX_THREADS = 8
"""More would only wait for the disk."""

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # mallopt's, from glibc's malloc.h
_LARGE = 64 * 2**20

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of an output that is written as `dtype`, and what is done to them."""

    output: Output
    dtype: str
    start: int
    stop: int
    change: Change | None


@dataclass(frozen=True)
class Tally:
    """What was done to some rows.

    Attributes:
        before: sum of squares of the base's values.
        change: the same of what the adapters changed.
        rounding: the same of what going through NF4 changed.
        changed: elements that are written otherwise than the base has them.
    """

    before: float = 0.0
    change: float = 0.0
    rounding: float = 0.0
    changed: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.before + other.before,
            self.change + other.change,
            self.rounding + other.rounding,
            self.changed + other.changed,
        )


@dataclass(frozen=True)
class Worked:
    """A piece's bytes as they are written (a buffer)."""

    piece: Piece
    data: Any
    tally: Tally


def pieces(outputs: Iterable[tuple[Output, str]]) -> Iterator[Piece]:
    """The pieces of outputs, each with the type that it is written as, in order."""
    for output, dtype in outputs:
        change = _change(output)
        whole = change is not None and change.whole
        whole = whole or (output.nf4 is not None and output.nf4.needs_whole(output.source))
        limit = max(output.source.nbytes, 1) if whole else PIECE_BYTES
        for start, stop in row_ranges(output.source, limit):
            yield Piece(output, dtype, start, stop, change)


def _change(output: Output) -> Change | None:
    if not output.changes:
        return None
    from orchestrator.stages.change import Change

    return Change(output)


def work(piece: Piece) -> Worked:
    """A piece's data as they are to be written. For any thread.

    Raises:
        CheckpointError: NaN or infinite values in the source or in the result, or values beyond the written
            type's range.
    """
    output = piece.output
    if output.touched or output.nf4 is not None or piece.dtype != output.source.dtype:
        from orchestrator.stages.merge_tensor import computed

        return computed(piece)
    words = read_words(output.source, piece.start, piece.stop)
    check_finite(piece, words)
    return Worked(piece, words, Tally())


def check_finite(piece: Piece, words: Any) -> None:
    """Raises CheckpointError where the source's values (a buffer) are not all finite."""
    source = piece.output.source
    if not all_finite(words, source.dtype):
        raise CheckpointError(
            f"{shown(source.name)} in {shown(source.file, 400)} holds NaN or infinite values",
            "The model is damaged: download it again, or use an earlier checkpoint.",
        )


def thread_count() -> int:
    """The cores that this process may use, at most `MAX_THREADS`."""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """`map` over the pool's threads, results in order, never more than `ahead` items in memory."""
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def keep_memory_flat() -> None:
    """Fixes glibc's thresholds, so that its heap neither keeps nor fragments over blocks of very different sizes.

    By itself glibc raises the size from which a block is given back as soon as it is freed, after which whole
    tensors come from a heap that fragments: the peak then grows with the number of layers. A piece's buffers stay
    below the size: to map them anew for every piece would cost more than the arithmetic. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
