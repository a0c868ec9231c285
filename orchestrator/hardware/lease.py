"""Leases of GPU memory: what every run here has asked for, so that runs at the same time share the GPUs.

A lease is a file that its run keeps locked, so that the system releases it with the process, however that ends. Runs
of one user see each other's; what other users' runs take is seen when they have taken it, as all memory is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import DoesNotFitError
from orchestrator.hardware.types import GIB, Gpu

PLACE = "ORCHESTRATOR_LEASES"  # names the folder of the leases, where the usual one cannot serve
POLL_S = 0.25  # between two looks at the leases, while waiting for one to end
LOOK_AGAIN_S = 5.0  # then the GPUs are looked at again: what has no lease comes and goes too
SETTLE_S = 20.0  # how long after the end of a run that was killed its engine may still hold memory
MOST_BYTES = 1 << 16  # of a lease's file
_LEASE, _PART = ".lease", ".part"


@dataclass(frozen=True)
class Share:
    """A lease's part of one GPU, in bytes.

    Attributes:
        asked: the most that the run takes.
        others: what was held when it began by nobody that NVML names and by no run with a lease. Where NVML does not
            name our processes (in most containers), what is held beyond that is the leases'.
    """

    asked: int
    others: int


@dataclass(frozen=True)
class Lease:
    """What a running run holds or is about to: `gpus` by their keys; `since`: seconds since the epoch."""

    pid: int
    what: str
    since: float
    gpus: dict[str, Share]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "gpus": {name: vars(share) for name, share in self.gpus.items()}}

    @classmethod
    def of(cls, value: Any) -> Lease:
        """The lease of a JSON value.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: `to_json` did not write it.
        """
        shares = {str(name): Share(_count(s["asked"]), _count(s["others"])) for name, s in value["gpus"].items()}
        return cls(_count(value["pid"]), str(value["what"]), _time(value["since"]), shares)


@dataclass(frozen=True)
class Wanted:
    """What a run would take of each GPU, in bytes, and whether there is room for it now."""

    gpus: dict[Gpu, int]
    room: bool


@contextmanager
def lease(what: str, choose: Callable[[], Wanted], say: Callable[[str], None]) -> Iterator[None]:
    """Holds a lease while it is open; before that, waits for other runs as long as there is no room.

    Where the folder cannot be used the run goes on without one, and says so: a run that is alone needs none.

    Args:
        what: the run, for those who wait for it.
        choose: looks at the GPUs and says what it wants; no other run takes a lease meanwhile.
        say: gets what a person should know: for whom it waits.

    Raises:
        DoesNotFitError: of `choose`; after a wait, only when the memory of a run that was killed must be free.
    """
    try:
        mine = _acquired(what, choose, say)
    except OSError as error:
        say(f"note: other runs cannot see what this one takes of the GPUs: {place()}: {error.strerror} (see {PLACE})")
        choose()
        yield
        return
    try:
        yield
    finally:
        mine.release()


def leases() -> tuple[list[Lease], tuple[str, ...]]:
    """The leases of running runs, the oldest first, and notes. What killed runs have left is removed."""
    folder, found, notes = place(), [], []
    try:
        files = [folder / name for name in sorted(os.listdir(folder)) if name.endswith(_LEASE)]
        if files:
            _check(folder)
    except FileNotFoundError:
        return [], ()
    except OSError as error:
        return [], (f"leases of GPU memory cannot be read: {folder}: {error.strerror}",)
    for file in files:
        try:
            found.append(_read(file))
        except FileNotFoundError:  # it has ended meanwhile
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            notes.append(f"{file} is not a lease and does not count ({type(error).__name__})")
    return sorted((one for one in found if one is not None), key=lambda one: one.since), tuple(notes)


def place() -> Path:
    """The folder of the leases, one for all of a user's runs on a machine.

    Not in XDG_RUNTIME_DIR, which is emptied when the user logs out and runs go on; nor in TMPDIR, which some schedulers
    set to another folder for each job.
    """
    return Path(os.environ.get(PLACE) or f"/tmp/orchestrator-leases-{os.geteuid()}")


@dataclass(frozen=True)
class _File:
    """Our own lease, locked by `handle`."""

    path: Path
    handle: int

    @classmethod
    def write(cls, folder: Path, text: str) -> _File:
        # Made under another name: without its lock it would be taken for a killed run's.
        handle, part = tempfile.mkstemp(_PART, f"{os.getpid()}-", folder)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, text.encode())
            path = Path(part).with_suffix(_LEASE)
            os.rename(part, path)
        except BaseException:
            os.close(handle)
            raise
        return cls(path, handle)

    def release(self) -> None:
        with suppress(OSError):
            self.path.unlink()
        os.close(self.handle)


def _acquired(what: str, choose: Callable[[], Wanted], say: Callable[[str], None]) -> _File:
    said, patience = "", 0.0
    while True:
        with _turn() as folder:
            held, _ = leases()
            try:
                wanted = choose()
                if wanted.room:
                    shares = {gpu.key: Share(size, max(0, gpu.unnamed)) for gpu, size in wanted.gpus.items()}
                    mine = Lease(os.getpid(), what, time.time(), shares)
                    return _File.write(folder, json.dumps(mine.to_json()))
                text, patience = _waiting(wanted, held), time.monotonic() + SETTLE_S
            except DoesNotFitError:
                if time.monotonic() > patience:
                    raise
                text = said
        if text != said:
            say(text)
            said = text
        _until_other(held)


def _waiting(wanted: Wanted, held: list[Lease]) -> str:
    sizes = " and ".join(f"{size / GIB:.2f} GiB on GPU {gpu.index}" for gpu, size in wanted.gpus.items())
    keys = {gpu.key for gpu in wanted.gpus}
    holders = " and ".join(f"{one.what} (pid {one.pid})" for one in held if keys & set(one.gpus))
    return f"waiting for {sizes}, held by {holders}" if holders else f"waiting for {sizes}"


def _until_other(held: list[Lease]) -> None:
    """Waits for a lease to end, or to begin, though not for long."""
    end = time.monotonic() + (LOOK_AGAIN_S if held else 0)
    time.sleep(POLL_S)
    while time.monotonic() < end and leases()[0] == held:
        time.sleep(POLL_S)


@contextmanager
def _turn() -> Iterator[Path]:
    """The folder; no other run is in its turn while this is open.

    Raises:
        OSError: it cannot be used.
    """
    folder = place()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check(folder)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in folder.glob(f"*{_PART}"):  # of a run that was killed in its turn
            left.unlink()
        yield folder
    finally:
        os.close(handle)


def _check(folder: Path) -> None:
    """Raises OSError for a folder that others can write to: anybody can make one in /tmp before us."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "others can write to it")


def _read(file: Path) -> Lease | None:
    """The lease in a file; None, and the file removed, where its run has ended without a word."""
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would keep us waiting
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: several may look at a time
        file.unlink()
        return None
    except BlockingIOError:
        return Lease.of(json.loads(os.read(handle, MOST_BYTES)))
    finally:
        os.close(handle)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _time(value: Any) -> float:
    if type(value) is not float or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a time")
    return value
