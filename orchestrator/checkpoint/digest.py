"""A file's digest: what finds damage."""

import os
from pathlib import Path

import xxhash

CHUNK = 8 * 2**20


def digest(path: Path, *, from_disk: bool = False) -> str:
    """XXH3-128 of a file's bytes, in hex: it finds damage as fast as a disk reads. Against forgery it is no help.

    Args:
        from_disk: what the operating system has of it in memory is dropped first, so that the disk is read.
    """
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()
