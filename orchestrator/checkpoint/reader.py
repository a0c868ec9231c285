"""One tensor at a time out of checkpoint files, without the files ever being in memory.

Files are mapped; a tensor is copied once; the pages behind it are given back. torch is imported only when a
tensor is asked for: raw bytes need none.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from orchestrator.checkpoint.tensors import DTYPES, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_OPEN = 16
"""Files kept mapped; the one opened first is closed for the next."""

_BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_TORCH_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


class TensorReader:
    """Reads tensors by their `TensorInfo`; a context manager, not for several threads at once."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._lent: TensorInfo | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._maps:
            self._close(next(iter(self._maps)))

    def read(self, info: TensorInfo) -> "torch.Tensor":
        """A copy of the whole tensor on the CPU, contiguous whatever its strides were.

        Raises:
            CheckpointError: the file is gone or has become shorter.
        """
        tensors = [tensor for _, tensor in self.rows(info, max(info.nbytes, 1))]
        return tensors[0]

    def rows(self, info: TensorInfo, limit: int) -> Iterator[tuple[int, "torch.Tensor"]]:
        """The tensor as copies of consecutive rows (of its first dimension), with the first row's number.

        Args:
            limit: bytes of one piece; a single row may be larger.

        Raises:
            CheckpointError: the file is gone or has become shorter.
        """
        if info.parameters == 0 or not info.shape:
            yield 0, self._copy(info, None)
            return
        step = max(limit * info.shape[0] // info.nbytes, 1)
        for start in range(0, info.shape[0], step):
            yield start, self._copy(info, slice(start, min(start + step, info.shape[0])))

    def raw(self, info: TensorInfo) -> memoryview:
        """The bytes of a contiguous tensor where they lie in the mapped file: no copy, read-only.

        Its pages are given back at the next call; a view that is kept stays valid and reads them again.

        Raises:
            CheckpointError: not contiguous, or the file is gone or has become shorter.
        """
        if not info.contiguous:
            raise CheckpointError(f"tensor {shown(info.name)} in {info.file} is not contiguous")
        mapped = self._map(info)
        self._lent = info
        return memoryview(mapped)[info.offset : info.offset + info.nbytes]

    def data(self, info: TensorInfo) -> Any:
        """The bytes of any tensor as a buffer in row-major order: `raw`, or a copy of a strided one."""
        return self.raw(info) if info.contiguous else np.ascontiguousarray(self._strided(info))

    def _strided(self, info: TensorInfo) -> "np.ndarray[Any, Any]":
        size = DTYPES[info.dtype].size
        return np.ndarray(
            info.shape,
            dtype=_BITS[size],
            buffer=self._map(info),
            offset=info.offset,
            strides=[step * size for step in info.strides],
        )

    def _copy(self, info: TensorInfo, rows: slice | None) -> "torch.Tensor":
        import torch

        size = DTYPES[info.dtype].size
        dtype = getattr(torch, DTYPES[info.dtype].torch)
        if info.parameters == 0:
            return torch.empty(info.shape, dtype=dtype)
        source = self._strided(info)
        wanted = source if rows is None else source[rows]
        result = torch.empty(wanted.shape, dtype=dtype)
        result.view(getattr(torch, _TORCH_BITS[size])).numpy().view(_BITS[size])[...] = wanted
        self._release(info, rows)
        return result

    def _release(self, info: TensorInfo, rows: slice | None) -> None:
        mapped = self._maps.get(info.file)
        if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, end = info.offset, info.offset + info.span
        if rows is not None and info.contiguous:
            row = info.nbytes // info.shape[0]
            start, end = info.offset + rows.start * row, info.offset + rows.stop * row
        start -= start % mmap.PAGESIZE
        # Pages shared with a neighbour are read again from the file if they are wanted.
        mapped.madvise(mmap.MADV_DONTNEED, start, min(end, len(mapped)) - start)

    def _map(self, info: TensorInfo) -> mmap.mmap:
        if self._lent is not None:
            self._release(self._lent, None)
            self._lent = None
        if info.file not in self._maps:
            if len(self._maps) >= MAX_OPEN:
                self._close(next(iter(self._maps)))
            try:
                with info.file.open("rb") as stream:
                    self._maps[info.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{info.file} cannot be read: {error}") from error
        mapped = self._maps[info.file]
        if info.offset + info.span > len(mapped):
            raise CheckpointError(f"{info.file} has become shorter since its header was read")
        return mapped

    def _close(self, file: Path) -> None:
        mapped = self._maps.pop(file)
        try:
            mapped.close()
        except BufferError:
            return  # a view of it is still in use: the mapping goes when that does
