"""Safetensors files written one tensor at a time: shapes are known first, so the header is written first.

The format: https://github.com/huggingface/safetensors#format. A file appears under its own name only when all
of it is on the disk.
"""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from orchestrator.checkpoint.tensors import DTYPES
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import StageError

INDEX_NAME = "model.safetensors.index.json"
FLUSH_BYTES = 64 * 2**20
"""So much is written before the disk is told to take it."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a file to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size


@dataclass(frozen=True)
class Shard:
    """One file to be written, its tensors in the order of their data."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def header(self) -> bytes:
        """The file's first bytes, up to the data; padded to 8 bytes so that the data are aligned."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for tensor in self.tensors:
            end = start + tensor.nbytes
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


def plan_shards(tensors: Sequence[tuple[str, str, tuple[int, ...]]], shard_size: int) -> list[Shard]:
    """The files for (name, dtype, shape) in their order, each of at most `shard_size` bytes of data.

    A tensor that is larger than that gets a file of its own. Within a file the wider types come first, so
    that every tensor starts at a multiple of its element's size (readers view the data in place).

    Raises:
        StageError: a tensor has the name that the format keeps for itself.
    """
    groups: list[list[PlannedTensor]] = []
    used = 0
    for name, dtype, shape in tensors:
        if name == "__metadata__":
            raise StageError("a tensor named __metadata__ cannot be written: the format keeps that name")
        tensor = PlannedTensor(name, dtype, tuple(shape))
        if not groups or used + tensor.nbytes > shard_size:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        ordered = sorted(group, key=lambda tensor: -DTYPES[tensor.dtype].size)
        shards.append(Shard(name, tuple(ordered)))
    return shards


class ShardWriter:
    """Writes one shard as `<name>.part` and renames it when it is whole; a context manager.

    Left without `finish`, it removes what it wrote. While the next data come, what was written goes to the disk in
    the background: the flush at the end has little left to wait for.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self.final = folder / shard.name
        self.part = folder / f"{shard.name}.part"
        self._digest = xxhash.xxh3_128()
        self._waiting = list(reversed(shard.tensors))
        self._missing = 0  # bytes of the tensor that is being written
        self._stream: FileIO | None = None
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flush: Future[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> Self:
        self._stream = self.part.open("wb", buffering=0)
        try:
            self._put(memoryview(self.shard.header))
        except OSError:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, name: str, piece: Any) -> None:
        """The next bytes (a buffer) of the tensor that is being written, or the first ones of the shard's next.

        Raises:
            StageError: another tensor was due, or there are more bytes than it has.
        """
        if memoryview(piece).nbytes == 0:
            return
        view = memoryview(piece).cast("B")
        if self._missing == 0:
            self._skip_empty()
            self._missing = self._waiting[-1].nbytes if self._waiting else 0
        due = self._waiting[-1].name if self._waiting else "the end"
        if due != name:
            raise StageError(f"{self.part} expected {shown(due)}, was given {shown(name)}")
        if len(view) > self._missing:
            raise StageError(f"{self.part}: {shown(name)} has {len(view) - self._missing:,} bytes too many")
        self._put(view)
        self._missing -= len(view)
        if self._missing == 0:
            self._waiting.pop()

    def finish(self) -> str:
        """Flushes the file to the disk and gives it its name. Returns its digest (XXH3-128, in hex).

        Raises:
            StageError: a tensor was not written, or not whole.
        """
        if self._missing == 0:
            self._skip_empty()
        if self._waiting or self._stream is None:
            left = shown(self._waiting[-1].name) if self._waiting else "everything"
            raise StageError(f"{self.part} is not whole: {left} was not written to its end")
        self._flusher.shutdown(wait=True)
        if self._flush is not None:
            self._flush.result()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        self.part.replace(self.final)
        sync_folder(self.final.parent)
        return self._digest.hexdigest()

    def _skip_empty(self) -> None:
        while self._waiting and self._waiting[-1].nbytes == 0:
            self._waiting.pop()

    def _discard(self) -> None:
        self._flusher.shutdown(wait=True, cancel_futures=True)
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
            self.part.unlink(missing_ok=True)

    def _put(self, data: memoryview) -> None:
        if self._stream is None:
            raise StageError(f"{self.part} is not open")
        self._digest.update(data)
        self._unflushed += len(data)
        while data:
            data = data[self._stream.write(data) :]
        if self._unflushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()  # raises what the disk said
            self._flush = self._flusher.submit(_to_disk, self._stream.fileno())
            self._unflushed = 0


def _to_disk(descriptor: int) -> None:
    """Flushes, and gives the pages back: they serve for what is written next, which halves the time of a large merge,
    and a result does not push everything else out of the cache."""
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's names to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Writes a small file whole or not at all (a `.part` beside it, flushed, renamed)."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes `model.safetensors.index.json` for several shards; for one it removes a stale index."""
    file = folder / INDEX_NAME
    if len(shards) == 1:
        file.unlink(missing_ok=True)
        return
    index = {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }
    write_text(file, json.dumps(index, indent=2) + "\n")
