"""The header of a safetensors file, checked as if an attacker had written it.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length N,
N bytes of JSON, then the data; offsets count from the start of the data, without gaps or overlaps.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.files import Opened, Stream, open_file
from orchestrator.checkpoint.tensors import DTYPES, MAX_BYTES, MAX_DIMS, Header, TensorInfo, row_major
from orchestrator.checkpoint.trust import IncompleteError, parse_object, shown
from orchestrator.errors import CheckpointError

MAX_HEADER = 100_000_000
"""The format's own limit, in bytes."""

_ENTRY = {"dtype", "shape", "data_offsets"}
_AGAIN = "Download it again."


def read_safetensors_header(file: Path) -> Header:
    """The header of a safetensors file of this machine; see `safetensors_header`."""
    with open_file(file) as opened:
        return safetensors_header(opened)


def safetensors_header(opened: Opened) -> Header:
    """The tensors of a safetensors file. Only the header is read.

    Raises:
        IncompleteError: the file is truncated; the message says by how many bytes.
        CheckpointError: it is not a safetensors file, or its header contradicts itself or the file.
    """
    where = opened.where
    data = _header_bytes(opened.stream, opened.size, where)
    entries = parse_object(data, f"the header of {where}")
    _check_metadata(entries.pop("__metadata__", {}), where)
    start = 8 + len(data)
    tensors = [_tensor(name, entry, opened.file, start, where) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(tensors, start, opened.size, where)
    return Header(tuple(tensors), hashlib.sha256(data).hexdigest())


def _header_bytes(stream: Stream, size: int, where: str) -> bytes:
    if size < 8:
        raise IncompleteError(f"{where} is truncated: it has {size} bytes, not even a header", _AGAIN)
    length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{where} is not a safetensors file: it claims a header of {length:,} bytes", _AGAIN)
    # Not more than there is: memory for what a header claims would be taken first.
    data = stream.read(min(length, size))
    if len(data) < length:
        missing = length - len(data)
        raise IncompleteError(f"{where} is truncated: at least {missing:,} bytes of its header are missing", _AGAIN)
    return data


def _check_metadata(metadata: object, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the header of {where} has a __metadata__ that does not map text to text")


def _tensor(name: str, entry: Any, file: Path, start: int, where: str) -> TensorInfo:
    what = f"tensor {shown(name)} in {where}"
    if not isinstance(entry, dict) or set(entry) != _ENTRY:
        raise CheckpointError(f"{what}: a header entry has exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{what}: dtype {shown(dtype, 40)} is not known here")
    shape = _sizes(entry["shape"])
    if shape is None or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{what}: shape {shown(entry['shape'], 60)} is not a list of sizes")
    offsets = _sizes(entry["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what}: data_offsets {shown(entry['data_offsets'], 60)} are no byte range")
    # Counted as if nothing were empty: torch refuses such a shape also where a 0 is in it.
    if math.prod(max(length, 1) for length in shape) * DTYPES[dtype].size > MAX_BYTES:
        raise CheckpointError(f"{what} claims a shape that no file can hold: {shown(list(shape), 60)}")
    nbytes = math.prod(shape) * DTYPES[dtype].size
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{what}: shape {shown(list(shape), 60)} of {dtype} does not fill its {offsets[1] - offsets[0]:,} bytes"
        )
    return TensorInfo(name, dtype, shape, file, start + offsets[0], nbytes, row_major(shape))


def _sizes(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    if not all(type(size) is int and 0 <= size <= MAX_BYTES for size in value):
        return None
    return tuple(value)


def _check_layout(tensors: list[TensorInfo], start: int, size: int, where: str) -> None:
    end = start
    for info in tensors:
        if info.offset != end:
            fault = "overlaps the one before it" if info.offset < end else "leaves a gap before it"
            raise CheckpointError(f"tensor {shown(info.name)} in {where} {fault}", _AGAIN)
        end += info.nbytes
    if size < end:
        raise IncompleteError(f"{where} is truncated: {end - size:,} of its {end:,} bytes are missing", _AGAIN)
    if size > end:
        raise CheckpointError(f"{where} has {size - end:,} bytes more than its header describes", _AGAIN)
