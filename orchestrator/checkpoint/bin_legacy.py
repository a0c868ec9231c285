"""The file that `torch.save` wrote before PyTorch 1.6: several pickles in a row, then the storages' bytes.

The pickles are: a magic number, a version, facts about the machine, the object, the keys of its storages. Then
follows, for each key in that order, its number of elements (8 bytes little-endian) and its bytes. So every
offset is known from the pickles; offsets need not be multiples of anything.
"""

import hashlib

from orchestrator.checkpoint.bin_pickle import MAX_PICKLE, Pickled, Storage, interpret
from orchestrator.checkpoint.bin_storages import Contents
from orchestrator.checkpoint.files import Opened, Stream
from orchestrator.checkpoint.trust import IncompleteError, shown
from orchestrator.errors import CheckpointError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
LEGACY_MAGIC = b"\x8a\x0a" + _MAGIC_NUMBER.to_bytes(10, "little") + b"."
"""The number as the first pickle has it, after the few bytes with which a pickle of its protocol begins."""

_VERSION = 1001
_MAX_LINE = 4096
_AGAIN = "Download it again."


class _Pickles:
    """The first bytes of the file: a reader that no pickle can ask for more than MAX_PICKLE in all."""

    def __init__(self, stream: Stream, where: str) -> None:
        self._stream = stream
        self._where = where
        self.position = 0

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        self._check(size)
        data = self._stream.read(size)
        if len(data) < size:
            raise self._truncated()
        self.position += size
        return data

    def readline(self) -> bytes:
        self._check(_MAX_LINE)
        line = self._stream.readline(_MAX_LINE)
        if not line.endswith(b"\n") and len(line) < _MAX_LINE:
            raise self._truncated()
        self.position += len(line)
        return line

    def next(self) -> Pickled:
        return interpret(self, self._where, legacy=True)

    def _check(self, size: int) -> None:
        if self.position + size > MAX_PICKLE:
            raise CheckpointError(f"{self._where}: its pickles take more than the {MAX_PICKLE:,} bytes that are read")

    def _truncated(self) -> IncompleteError:
        return IncompleteError(f"{self._where} is truncated: it ends inside its pickles", _AGAIN)


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins with `start` is of this format."""
    return LEGACY_MAGIC in start[:32] and start[:1] == b"\x80"


def read_legacy(opened: Opened) -> Contents:
    """What the file holds, and where its storages lie. Its stream stands at the start.

    The number before each storage is not looked at in a remote file: it would be a request for each.

    Raises:
        IncompleteError: the file is truncated.
        CheckpointError: another version, a big-endian machine's, or contradictions.
    """
    stream, where, size = opened.stream, opened.where, opened.size
    pickles = _Pickles(stream, where)
    _check_machine(pickles, where)
    saved = pickles.next()
    keys = _checked_keys(pickles.next().value, saved.storages, where)
    regions: dict[str, tuple[int, int]] = {}
    start = pickles.position
    for key in keys:
        storage = saved.storages[key]
        if not opened.remote:
            _check_count(stream, start, storage, where)
        regions[key] = (start + 8, storage.nbytes)
        start += 8 + storage.nbytes
        if start > size:
            raise IncompleteError(f"{where} is truncated: at least {start - size:,} of its bytes are missing", _AGAIN)
    if start < size:
        raise CheckpointError(f"{where} has {size - start:,} bytes more than its pickles describe", _AGAIN)
    stream.seek(0)
    return Contents(saved.value, regions, hashlib.sha256(stream.read(pickles.position)).hexdigest())


def _check_machine(pickles: _Pickles, where: str) -> None:
    magic, version, system = (pickles.next().value for _ in range(3))
    if magic != _MAGIC_NUMBER or version != _VERSION or not isinstance(system, dict):
        raise CheckpointError(f"{where} does not begin as torch.save's files do, in version {_VERSION}", _AGAIN)
    if system.get("little_endian") is not True:
        raise CheckpointError(f"{where} was saved big-endian", "Save it again on a little-endian machine.")


def _checked_keys(keys: object, storages: dict[str, Storage], where: str) -> list[str]:
    # Text before it goes into a set: hashing a deeply nested tuple would overflow the C stack.
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{where} has no list of its storages", _AGAIN)
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        other = min(set(keys) ^ set(storages), default="one of them")
        raise CheckpointError(f"{where} does not list each of its storages once: {shown(other, 40)}", _AGAIN)
    return keys


def _check_count(stream: Stream, start: int, storage: Storage, where: str) -> None:
    stream.seek(start)
    raw = stream.read(8)
    count = int.from_bytes(raw, "little")
    if len(raw) < 8:
        raise IncompleteError(f"{where} is truncated: the storage {shown(storage.key)} is missing", _AGAIN)
    if count != storage.elements:
        raise CheckpointError(
            f"{where}: the storage {shown(storage.key)} has {count:,} elements, not {storage.elements:,}", _AGAIN
        )
