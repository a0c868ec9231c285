"""The header of any weight file, by its suffix. Nothing here needs torch, and no data are read."""

from collections.abc import Callable
from pathlib import Path

from orchestrator.checkpoint.bin_header import bin_header
from orchestrator.checkpoint.files import Files, LocalFiles, Opened
from orchestrator.checkpoint.safetensors_header import safetensors_header
from orchestrator.checkpoint.tensors import Header
from orchestrator.checkpoint.trust import IncompleteError, shown
from orchestrator.errors import CheckpointError

READERS: dict[str, Callable[[Opened], Header]] = {
    ".safetensors": safetensors_header,
    ".bin": bin_header,
}

_LFS = b"version https://git-lfs"


def read_header(file: Path) -> Header:
    """The header of a weight file of this machine; see `header_of`."""
    return header_of(LocalFiles(file.parent), file.name)


def header_of(files: Files, name: str) -> Header:
    """The tensors of a weight file, and the digest of its header.

    Raises:
        IncompleteError: missing, truncated, or a Git LFS pointer in its place.
        CheckpointError: unreadable, malicious or contradictory (see the readers).
    """
    file = files.path / name
    reader = READERS.get(file.suffix)
    if reader is None:
        raise CheckpointError(f"{shown(file, 400)} is neither .safetensors nor .bin")
    with files.open(name) as opened:
        if opened.size < 1024 and opened.stream.read(len(_LFS)) == _LFS:
            raise IncompleteError(f"{opened.where} is a Git LFS pointer, not the weights", "Type: git lfs pull")
        opened.stream.seek(0)
        return reader(opened)
