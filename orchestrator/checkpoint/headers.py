"""The header of any weight file, by its suffix. Nothing here needs torch, and no data are read."""

from collections.abc import Callable
from pathlib import Path

from orchestrator.checkpoint.bin_header import read_bin_header
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.tensors import Header
from orchestrator.checkpoint.trust import IncompleteError, file_size, shown
from orchestrator.errors import CheckpointError

READERS: dict[str, Callable[[Path], Header]] = {
    ".safetensors": read_safetensors_header,
    ".bin": read_bin_header,
}

_LFS = b"version https://git-lfs"


def read_header(file: Path) -> Header:
    """The tensors of a weight file, and the digest of its header.

    Raises:
        IncompleteError: missing, truncated, or a Git LFS pointer in its place.
        CheckpointError: unreadable, malicious or contradictory (see the readers).
    """
    reader = READERS.get(file.suffix)
    if reader is None:
        raise CheckpointError(f"{shown(file, 400)} is neither .safetensors nor .bin")
    if file_size(file) < 1024 and _starts_with(file, _LFS):
        raise IncompleteError(f"{shown(file, 400)} is a Git LFS pointer, not the weights", "Type: git lfs pull")
    return reader(file)


def _starts_with(file: Path, magic: bytes) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(magic)) == magic
    except OSError as error:
        raise CheckpointError(f"{shown(file, 400)} cannot be read: {error.strerror}") from error
