"""What identifies the files of a checkpoint without reading their data."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError


def describe(file: Path) -> dict[str, Any]:
    """Name, size in bytes and time of change in nanoseconds of a file (of what a link leads to)."""
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    return {"name": file.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def fingerprint_files(plain: Iterable[Path], weights: Iterable[Path], digests: Mapping[str, str]) -> dict[str, Any]:
    """JSON-able: every file by `describe`, and for weight files the SHA-256 of the header."""
    return {
        "files": [describe(file) for file in sorted(plain)],
        "weights": [{**describe(file), "header_sha256": digests[file.name]} for file in sorted(weights)],
    }
