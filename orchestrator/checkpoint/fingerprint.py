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


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is not the same in two sets of inputs (name of the input -> its fingerprint), for a message.

    A file that changed, came or went is named as `input/file`; whatever else differs, as the input.
    """
    found = set()
    for name in {*old, *new}:
        before, after = _parts(old.get(name)), _parts(new.get(name))
        changed = {part for part in {*before, *after} if before.get(part) != after.get(part)}
        found |= {f"{name}/{part}" for part in changed if part} or ({name} if changed else set())
    return sorted(found)


def _parts(fingerprint: Any) -> dict[str, Any]:
    """A fingerprint by its files; under the empty name what is no file."""
    if not isinstance(fingerprint, Mapping):
        return {"": fingerprint}
    files = [file for key in ("files", "weights") for file in fingerprint.get(key, [])]
    rest = {key: value for key, value in fingerprint.items() if key not in ("files", "weights")}
    return {"": rest} | {str(file["name"]): file for file in files}
