"""The zip that `torch.save` writes since PyTorch 1.6: one pickle, and each storage as an uncompressed entry."""

import hashlib
import io
import struct
import zipfile
from dataclasses import dataclass
from typing import Any, cast

from orchestrator.checkpoint.bin_pickle import MAX_PICKLE, Storage, interpret
from orchestrator.checkpoint.bin_storages import Contents, refuse_overlaps, resave
from orchestrator.checkpoint.files import Opened, Stream
from orchestrator.checkpoint.trust import IncompleteError, shown
from orchestrator.errors import CheckpointError

MAX_DIRECTORY = 16 * 2**20
"""Largest directory of a zip in bytes, about 100 an entry: Python makes an object of a kilobyte of each."""

ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4sHHHHHLLLHH")
_AGAIN = "Download it again."


class _Stingy:
    """A file whose single reads are bounded: `zipfile` believes the size that a directory claims."""

    def __init__(self, stream: Stream, where: str) -> None:
        self._stream = stream
        self._where = where
        self.seek = stream.seek
        self.tell = stream.tell
        self.seekable = stream.seekable

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise CheckpointError(
                f"{self._where}: its zip directory takes {size:,} bytes, at most {MAX_DIRECTORY:,} are read", _AGAIN
            )
        return self._stream.read(MAX_DIRECTORY if size < 0 else size)


@dataclass(frozen=True)
class _Archive:
    opened: Opened
    where: str
    folder: str
    entries: dict[str, zipfile.ZipInfo]

    def data(self, name: str, *, exactly: bool = True) -> tuple[int, int]:
        """Offset in the file and size, in bytes, of a stored entry's data.

        Args:
            exactly: False: by the directory alone, which does not know how much padding lies before the data.
        """
        entry = self.entries.get(f"{self.folder}/{name}")
        if entry is None:
            raise CheckpointError(f"{self.where} has no entry {shown(name)} that its pickle names", _AGAIN)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{self.where}: the entry {shown(name)} is compressed: refused")
        if entry.flag_bits & 1:
            raise CheckpointError(f"{self.where}: the entry {shown(name)} is encrypted: refused")
        start = self._after_local_header(entry) if exactly else entry.header_offset + _LOCAL_HEADER.size
        if start + entry.file_size > self.opened.size:
            raise IncompleteError(f"{self.where}: the entry {shown(name)} ends beyond the file", _AGAIN)
        return start, entry.file_size

    def _after_local_header(self, entry: zipfile.ZipInfo) -> int:
        # The local header's own name and padding count: they differ from the central directory's.
        raw = b""
        if 0 <= entry.header_offset < self.opened.size:
            self.opened.stream.seek(entry.header_offset)
            raw = self.opened.stream.read(_LOCAL_HEADER.size)
        if len(raw) < _LOCAL_HEADER.size or raw[:4] != ZIP_MAGIC:
            raise CheckpointError(f"{self.where} is a damaged zip at byte {entry.header_offset:,}", _AGAIN)
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
        return entry.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)

    def read(self, name: str, limit: int) -> bytes:
        start, size = self.data(name)
        if size > limit:
            raise CheckpointError(f"{self.where}: {shown(name)} takes {size:,} bytes, at most {limit:,} are read")
        self.opened.stream.seek(start)
        return self.opened.stream.read(size)


def read_zip(opened: Opened) -> Contents:
    """What the zip holds, and where its storages lie. In a remote file these places are as good as its directory.

    Raises:
        IncompleteError: the file is truncated.
        CheckpointError: not one of torch.save's, or contradictions.
    """
    where = opened.where
    archive = _open(opened, where)
    _check_byteorder(archive)
    pickle = archive.read("data.pkl", MAX_PICKLE)
    found = interpret(io.BytesIO(pickle), where)
    regions = {key: _region(archive, storage) for key, storage in found.storages.items()}
    refuse_overlaps([archive.data("data.pkl"), *regions.values()], where)
    return Contents(found.value, regions, hashlib.sha256(pickle).hexdigest())


def _open(opened: Opened, where: str) -> _Archive:
    try:
        with zipfile.ZipFile(cast(Any, _Stingy(opened.stream, where))) as zipped:
            listed = zipped.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise IncompleteError(
            f"{where} is truncated or damaged: its zip directory is not at its end ({shown(error, 60)})",
            _AGAIN,
        ) from error
    entries = {entry.filename: entry for entry in listed}
    if len(entries) != len(listed):
        raise CheckpointError(f"{where} has two entries of one name in its zip: refused")
    folders = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise CheckpointError(f"{where} is a zip, but not one of torch.save: it has {len(folders)} data.pkl", _AGAIN)
    if f"{folders[0]}/constants.pkl" in entries:
        loaded = "torch.jit.load(f, map_location='cpu').state_dict()"
        raise CheckpointError(
            f"{where} is a TorchScript program, not weights",
            f"If you trust it, save its weights: {resave(where, loaded)}",
        )
    return _Archive(opened, where, folders[0], entries)


def _check_byteorder(archive: _Archive) -> None:
    if f"{archive.folder}/byteorder" in archive.entries:
        order = archive.read("byteorder", 16)
        if order != b"little":
            raise CheckpointError(f"{archive.where} was saved big-endian", "Save it again on a little-endian machine.")


def _region(archive: _Archive, storage: Storage) -> tuple[int, int]:
    start, size = archive.data(f"data/{storage.key}", exactly=not archive.opened.remote)
    if size != storage.nbytes:
        raise CheckpointError(
            f"{archive.where}: the storage {shown(storage.key)} has {size:,} bytes, not {storage.nbytes:,}", _AGAIN
        )
    return start, size
