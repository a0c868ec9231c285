"""What a request will write to the disk, held against what is free there before anything starts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, DoesNotFitError
from orchestrator.hardware.host import disk_room
from orchestrator.report.console import size

_WORTH_SAYING = 1.05  # a conversion that takes so much more room than its result
_CALLED = {"paths.artifacts": "the store", "output.path": "the output"}
_ELSEWHERE = {
    "paths.artifacts": "Free some (task=artifacts artifacts.action=prune), or set paths.artifacts=FOLDER elsewhere.",
    "output.path": "Free some, or put both on one disk (paths.artifacts=FOLDER): then it takes the space once.",
}


@dataclass(frozen=True)
class Part:
    """One thing that is written.

    Attributes:
        what: "for the merged model".
        size: bytes of it once it is done.
        adds: bytes more that the disk needs to make it, what is only there meanwhile too; 0 where it is there already.
    """

    what: str
    size: int
    adds: int

    def __str__(self) -> str:
        most = f" (at most {size(self.adds)} while it is made)" if self.adds > self.size * _WORTH_SAYING else ""
        return f"{size(min(self.size, self.adds))} {self.what}{most}"


@dataclass(frozen=True)
class Need:
    """What is written to one folder.

    Attributes:
        key: of the configuration, that says where.
        free: bytes on the folder's file system; None where it cannot be asked.
    """

    key: str
    path: Path
    parts: tuple[Part, ...]
    free: int | None

    @property
    def bytes(self) -> int:
        return sum(part.adds for part in self.parts)

    @property
    def missing(self) -> int:
        """Bytes that the disk lacks."""
        return 0 if self.free is None else max(0, self.bytes - self.free)

    def __str__(self) -> str:
        """As in "on disk: 13.50 GiB for the merged model and 3.90 GiB of EXL2 in ~/store, 210.00 GiB free"."""
        parts = " and ".join(str(part) for part in self.parts if part.adds)
        free = "" if self.free is None else f", {size(self.free)} free"
        return f"{parts} in {self.path}{free}{', which is too little' if self.missing else ''}"

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "free": self.free}


def store_need(store: Path, parts: Sequence[Part]) -> Need:
    """What the artifact store will get."""
    return _need("paths.artifacts", store, parts)


def output_need(output: Path, store: Path, parts: Sequence[Part], *, linked: bool) -> Need:
    """What output.path will get beside what the store has: its last part, unless that is `linked` on one disk."""
    if linked and device(output) == device(store):
        parts = ()
    return _need("output.path", output, [Part("for its copy", part.size, part.size) for part in parts[-1:]])


def must_be_writable(needs: Sequence[Need]) -> None:
    """Refuses a folder that cannot be made or written, where something has to be; leaves nothing there.

    Raises:
        ConfigError: with the reason, and what to do.
    """
    for need in needs:
        if why := _why_not(need):
            raise ConfigError(
                f"{need.key}={need.path} cannot be written ({why})", f"Set {need.key}=FOLDER to one that can."
            )


def not_writable(needs: Sequence[Need]) -> list[str]:
    """What `must_be_writable` would refuse, as a plan says it."""
    found = ((need, _why_not(need)) for need in needs)
    return [
        f"{_CALLED[need.key]} cannot be written: {need.key}={need.path} ({why}); set {need.key}=FOLDER to one that can"
        for need, why in found
        if why
    ]


def _why_not(need: Need) -> str:
    """Why a folder that something has to go to cannot be written; "" where it can. Leaves nothing there."""
    if not need.bytes:
        return ""
    try:
        with tempfile.TemporaryFile(dir=existing(need.path)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def must_have_room(needs: Sequence[Need]) -> None:
    """Refuses what a disk has no room for.

    Raises:
        DoesNotFitError: with the numbers, and what to do.
    """
    for need in needs:
        if need.missing and need.free is not None:
            raise DoesNotFitError(
                f"the disk of {need.key}={need.path} has {size(need.free)} free and the request takes "
                f"{size(need.bytes)}: {' and '.join(str(part) for part in need.parts if part.adds)}",
                _ELSEWHERE[need.key],
            )


def existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def device(path: Path) -> int | None:
    """The file system that a folder is on, or will be on once it is made; None where it cannot be asked."""
    try:
        return existing(path).stat().st_dev
    except OSError:
        return None


def _need(key: str, path: Path, parts: Sequence[Part]) -> Need:
    room = disk_room(path)
    # /proc and its like have no size: who writes there is refused for another reason.
    return Need(key, path, tuple(parts), room.free if room is not None and room.total else None)
