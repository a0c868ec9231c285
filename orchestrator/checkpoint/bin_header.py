"""The tensors of a PyTorch `.bin`: where each lies in the uncompressed zip that `torch.save` writes."""

import hashlib
import math
import shlex
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.bin_pickle import PickledTensor, Storage, interpret
from orchestrator.checkpoint.tensors import DTYPES, MAX_BYTES, Header, TensorInfo
from orchestrator.checkpoint.trust import IncompleteError, file_size, shown
from orchestrator.errors import CheckpointError

MAX_PICKLE = 16 * 2**20
"""Largest data.pkl in bytes: it holds names and shapes only, about 150 bytes a tensor."""

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4sHHHHHLLLHH")
_AGAIN = "Download it again."


@dataclass(frozen=True)
class _Archive:
    file: Path
    where: str
    size: int
    folder: str
    entries: dict[str, zipfile.ZipInfo]

    def data(self, name: str) -> tuple[int, int]:
        """Offset in the file and size, in bytes, of a stored entry's data."""
        entry = self.entries.get(f"{self.folder}/{name}")
        if entry is None:
            raise CheckpointError(f"{self.where} has no entry {shown(name)} that its pickle names", _AGAIN)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{self.where}: the entry {shown(name)} is compressed: refused")
        if entry.flag_bits & 1:
            raise CheckpointError(f"{self.where}: the entry {shown(name)} is encrypted: refused")
        start = self._after_local_header(entry)
        if start + entry.file_size > self.size:
            raise IncompleteError(f"{self.where}: the entry {shown(name)} ends beyond the file", _AGAIN)
        return start, entry.file_size

    def _after_local_header(self, entry: zipfile.ZipInfo) -> int:
        # The local header's own name and padding count: they differ from the central directory's.
        with self.file.open("rb") as stream:
            stream.seek(entry.header_offset)
            raw = stream.read(_LOCAL_HEADER.size)
        if len(raw) < _LOCAL_HEADER.size or raw[:4] != _ZIP_MAGIC:
            raise CheckpointError(f"{self.where} is a damaged zip at byte {entry.header_offset:,}", _AGAIN)
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
        return entry.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)

    def read(self, name: str, limit: int) -> bytes:
        start, size = self.data(name)
        if size > limit:
            raise CheckpointError(f"{self.where}: {shown(name)} takes {size:,} bytes, at most {limit:,} are read")
        with self.file.open("rb") as stream:
            stream.seek(start)
            return stream.read(size)


def read_bin_header(file: Path) -> Header:
    """The tensors of a zip `.bin`, in the order of its state dict. Nothing in the file is executed.

    Raises:
        IncompleteError: the file is truncated.
        CheckpointError: another format, a pickle with more than tensors in it, or contradictions.
    """
    where = shown(file, 400)
    try:
        archive = _open(file, where)
        _check_byteorder(archive)
        pickle = archive.read("data.pkl", MAX_PICKLE)
        state = _state_dict(interpret(pickle, where), where)
        tensors = tuple(_place(archive, name, value) for name, value in state.items())
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror}") from error
    return Header(tensors, hashlib.sha256(pickle).hexdigest())


def _open(file: Path, where: str) -> _Archive:
    size = file_size(file)
    with file.open("rb") as stream:
        start = stream.read(len(_LEGACY_MAGIC))
    if not start.startswith(_ZIP_MAGIC):
        raise _not_a_zip(file, where, size, start)
    try:
        with zipfile.ZipFile(file) as zipped:
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
        raise CheckpointError(f"{where} is a zip, but not one of torch.save: it has {len(folders)} data.pkl")
    if f"{folders[0]}/constants.pkl" in entries:
        raise CheckpointError(f"{where} is a TorchScript program, not weights", "Save the model's state_dict().")
    return _Archive(file, where, size, folders[0], entries)


def _not_a_zip(file: Path, where: str, size: int, start: bytes) -> CheckpointError:
    if size == 0:
        return IncompleteError(f"{where} is empty", _AGAIN)
    if not start.startswith(_LEGACY_MAGIC):
        return CheckpointError(f"{where} is not a PyTorch checkpoint", _AGAIN)
    name = shlex.quote(shown(file, 400))
    code = "import sys, torch; f = sys.argv[1]; torch.save(torch.load(f, weights_only=True), f + '.new')"
    return CheckpointError(
        f"{where} is in PyTorch's format from before version 1.6, which is not read here",
        f'Save it again: python -c "{code}" {name} && mv {name}.new {name}',
    )


def _check_byteorder(archive: _Archive) -> None:
    if f"{archive.folder}/byteorder" in archive.entries:
        order = archive.read("byteorder", 16)
        if order != b"little":
            raise CheckpointError(f"{archive.where} was saved big-endian", "Save it again on a little-endian machine.")


def _state_dict(value: object, where: str) -> dict[str, PickledTensor]:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds no state dict", "Save the model's state_dict().")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, PickledTensor):
            raise CheckpointError(
                f"{where}: {shown(name)} is no tensor ({shown(type(tensor).__name__)})",
                "Save the model's state_dict().",
            )
    return value


def _place(archive: _Archive, name: str, tensor: PickledTensor) -> TensorInfo:
    what = f"tensor {shown(name)} in {archive.where}"
    item = DTYPES[tensor.dtype].size
    available = _storage_bytes(archive, tensor.storage)
    nbytes = math.prod(tensor.shape) * item
    if nbytes > MAX_BYTES or nbytes > available[1]:
        raise CheckpointError(f"{what} claims more elements than its storage of {available[1]:,} bytes has")
    offset = available[0] + tensor.offset * item
    info = TensorInfo(name, tensor.dtype, tensor.shape, archive.file, offset, nbytes, tensor.strides)
    if nbytes and tensor.offset * item + info.span > available[1]:
        raise CheckpointError(f"{what} reaches beyond its storage of {available[1]:,} bytes")
    return info


def _storage_bytes(archive: _Archive, storage: Storage) -> tuple[int, int]:
    start, size = archive.data(f"data/{storage.key}")
    wanted = storage.elements * (DTYPES[storage.dtype].size if storage.dtype else 1)
    if size != wanted:
        raise CheckpointError(
            f"{archive.where}: the storage {shown(storage.key)} has {size:,} bytes, not {wanted:,}", _AGAIN
        )
    return start, size
