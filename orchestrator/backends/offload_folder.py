"""A folder of one run's own below offload.folder, gone when the run is; what killed runs left goes with the next one.

A run holds a lock on the file beside its folder. The operating system drops it with the process, so that a folder
whose lock can be had belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from pathlib import Path

from orchestrator.errors import DoesNotFitError, EngineError

PREFIX = "orchestrator-offload-"


class OffloadFolder:
    """`path` is empty and this run's own until `close`, or until the process ends."""

    def __init__(self, root: str, need: int) -> None:
        """Makes the folder and removes leftovers.

        Args:
            root: offload.folder.
            need: bytes of weights that the plan has on disk; so much has to be free, used or not.

        Raises:
            EngineError: the folder cannot be made or written.
            DoesNotFitError: the disk has too little.
        """
        self.path = Path(root) / f"{PREFIX}{uuid.uuid4().hex}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for lock in self.path.parent.glob(f"{PREFIX}*.lock"):
                _remove_leftover(lock)
            self._lock: int | None = _take(_lock_of(self.path))
            self.path.mkdir()
        except OSError as error:
            raise EngineError(
                f"offload.folder={root} cannot be written: {error.strerror}", "Name another folder"
            ) from error
        free = shutil.disk_usage(self.path).free
        if free < need:
            self.close()
            raise DoesNotFitError(
                f"offload.folder={root} has {free / 2**30:.2f} GiB free, and {need / 2**30:.2f} GiB are planned there",
                "Free some, or name a folder on another disk",
            )

    def close(self) -> None:
        """Removes the folder and its lock. Idempotent."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            _lock_of(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _take(lock: Path) -> int:
    """The lock, held through the file's handle. Another run that cleans up may remove the file before it is locked."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_still(lock, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_still(lock: Path, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(lock), os.fstat(handle))
    return False


def _remove_leftover(lock: Path) -> None:
    """Removes the folder of a run that is no more; one in use, or another user's, is left alone."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except OSError:
        return
    with contextlib.closing(os.fdopen(handle)), contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink(missing_ok=True)
