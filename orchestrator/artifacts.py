"""The artifact store: built once, under a lock, in a partial folder; finished only when its manifest is there.

    <root>/<stage>-<key>/            a finished artifact, with manifest.json
    <root>/<stage>-<key>.partial/    one that is being built, or whose builder was killed
    <root>/.locks/<stage>-<key>.lock    held by the one process that builds it
    <root>/.locks/<stage>-<key>.use     shared by those that load it

The key is a digest of the recipe: the stage, its own version, its options and the inputs' fingerprints. So a
partial folder always belongs to unchanged inputs, and the next run continues it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from orchestrator import __version__
from orchestrator.checkpoint.digest import digest
from orchestrator.checkpoint.fingerprint import differences
from orchestrator.errors import DoesNotFitError, RequestError, StageError
from orchestrator.runfolder import write_json

MANIFEST = "manifest.json"
RECIPE_NAME = "recipe.json"  # of what is being built, in its partial folder
GIB = 2**30
_NAME = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{20}")
log = logging.getLogger(__name__)
_keeping: list[contextlib.ExitStack] = []


@dataclass(frozen=True)
class Recipe:
    """What an artifact is made of and how. All values are JSON."""

    stage: str
    version: str  # the stage's own: raised when its result changes
    options: dict[str, Any]
    inputs: dict[str, Any]  # name -> fingerprint
    sources: tuple[str, ...] = ()  # where they lie, for a person: no part of the key
    settings: dict[str, Any] = field(default_factory=dict)  # key as it is typed -> value: neither

    @property
    def name(self) -> str:
        """<stage>-<key>"""
        text = json.dumps([self.stage, self.version, self.options, self.inputs], sort_keys=True)
        return f"{self.stage}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


@dataclass(frozen=True)
class Entry:
    """A file as it was built. Somebody's output.path may be the same file (a hard link), and be edited there."""

    size: int
    xxh3_128: str
    mtime_ns: int


@dataclass(frozen=True)
class Artifact:
    """A finished artifact."""

    path: Path
    manifest: dict[str, Any]
    files: dict[str, Entry]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(entry.size for entry in self.files.values())


@dataclass(frozen=True)
class Built:
    """What a stage returns: its report, and the digests that it computed while it wrote (file -> hex)."""

    report: dict[str, Any]
    digests: dict[str, str]


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """While it is open, prune leaves alone what `Store.build` gives out."""
    with contextlib.ExitStack() as marks:
        _keeping.append(marks)
        try:
            yield
        finally:
            _keeping.remove(marks)


class Store:
    """The artifacts under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, recipe: Recipe) -> Artifact | None:
        """The finished artifact of a recipe with all its files as they were built, or None.

        Sizes and times are looked at; the digest only of a file whose time is another one.
        """
        found = self._read(self.root / recipe.name)
        if found is None:
            return None
        for name, entry in found.files.items():
            if what := _harm(found.path / name, entry):
                log.warning("%s: it is built again", what)
                return None
        return found

    def build(
        self,
        recipe: Recipe,
        make: Callable[[Path], Built],
        needed: int,
        changed: Callable[[], list[str]],
        waiting: Callable[[], None],
    ) -> tuple[Artifact, bool]:
        """The artifact of a recipe, and whether it was built now.

        Args:
            make: builds into the partial folder that it is given, continuing what is there.
            needed: bytes that the result takes.
            changed: the inputs (files) that are not what the recipe says any more. Asked after the build.
            waiting: called once if another run holds the lock.

        Raises:
            RequestError: the store cannot be written.
            DoesNotFitError: the disk has less room than is needed.
            StageError: the inputs changed during the build, or the disk filled up.
        """
        if _keeping:
            self._mark(recipe.name, _keeping[-1])
        if (found := self.find(recipe)) is not None:
            self._used(found)
            return found, False
        with self._lock(recipe.name, waiting):
            if (found := self.find(recipe)) is not None:
                return found, False
            partial = self.root / f"{recipe.name}.partial"
            self._check_room(partial, needed)
            started = time.time()
            try:
                partial.mkdir(exist_ok=True)
                write_json(partial / RECIPE_NAME, {**vars(recipe), "sources": list(recipe.sources)})
                built = make(partial)
                if names := changed():
                    shutil.rmtree(partial)
                    raise StageError(f"files changed while they were read: {', '.join(names)}", "Run it again.")
                return self._finish(partial, recipe, built, started), True
            except OSError as error:
                raise _stage_error(error, partial) from error
            finally:
                _remove_unused(partial)

    def with_report(self, artifact: Artifact, report: dict[str, Any]) -> Artifact:
        """An artifact with another report, which its manifest gets too where it can be written. Its files stay."""
        changed = replace(artifact, manifest={**artifact.manifest, "report": report})
        try:
            with self._lock(artifact.name, waiting=lambda: None):
                write_json(artifact.path / MANIFEST, changed.manifest)
        except (OSError, RequestError) as error:  # a store of somebody else's, read-only
            log.info("%s keeps its report: %s", artifact.path, error)
        return changed

    def to_write(self, recipe: Recipe, needed: int) -> int:
        """Bytes more that the disk needs to build an artifact of `needed` bytes; 0 where it is there."""
        if self.find(recipe) is not None:
            return 0
        return max(0, needed - bytes_below(self.root / f"{recipe.name}.partial"))

    def finished(self) -> list[Artifact]:
        """The finished artifacts, the last used first."""
        found = (self._read(path) for path in self._folders() if not path.name.endswith(".partial"))
        return sorted((a for a in found if a is not None), key=lambda a: -last_used(a))

    def damaged(self) -> list[Path]:
        """Folders that are named as artifacts and have no manifest that can be read; no running process holds them."""
        named = (path for path in self._folders() if _NAME.fullmatch(path.name))
        return [path for path in named if self._read(path) is None and not self.held(path.name)]

    def is_begun(self, recipe: Recipe) -> bool:
        """Whether a build of it was interrupted, or is at work."""
        return (self.root / f"{recipe.name}.partial").is_dir()

    def partials(self) -> list[Path]:
        """Folders of unfinished builds that no running process holds."""
        return [p for p in self._folders() if p.name.endswith(".partial") and not self.held(p.name)]

    def verify(self, artifact: Artifact) -> list[str]:
        """What is wrong with an artifact's files: missing, of another size, of another digest. Reads all of them."""
        problems = []
        for name, entry in artifact.files.items():
            path = artifact.path / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != entry.size:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {entry.size}")
            elif digest(path, from_disk=True) != entry.xxh3_128:
                problems.append(f"{name} has another digest than when it was built")
        return problems

    def outdated(self, recipe: Recipe) -> tuple[Path, list[str]] | None:
        """An unfinished build of the same sources that cannot be continued, and what changed since it began."""
        for partial, begun in self.unfinished():
            names = differences(begun.inputs, recipe.inputs)
            if recipe.sources and (begun.stage, begun.sources) == (recipe.stage, recipe.sources) and names:
                return partial, names
        return None

    def unfinished(self) -> Iterator[tuple[Path, Recipe]]:
        """Unfinished builds that no running process holds, with their recipes; not those whose recipe is damaged."""
        for partial in self.partials():
            if (recipe := _begun(partial)) is not None:
                yield partial, recipe

    def remove(self, path: Path, *, only_ask: bool = False) -> bool:
        """Removes an artifact or a partial folder: the manifest first, so that a half-removed one is none.

        Args:
            only_ask: leave it there.

        Returns:
            False, with nothing removed, if a running process builds or loads it.
        """
        with contextlib.ExitStack() as locks:
            try:
                locks.enter_context(self._lock_file(path.name).acquire(timeout=0))
                self._mark(path.name, locks, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (Timeout, BlockingIOError):
                return False
            if not only_ask:
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)
            return True

    def _folders(self) -> Iterator[Path]:
        if self.root.is_dir():
            yield from sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))

    def _read(self, path: Path) -> Artifact | None:
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files = {name: _entry(entry) for name, entry in manifest["files"].items()}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s has a manifest that cannot be read (%s): not used", path, error)
            return None
        return Artifact(path, manifest, files)

    def _used(self, artifact: Artifact) -> None:
        try:
            os.utime(artifact.path / MANIFEST)
        except OSError:  # a store of somebody else's, read-only: its age is theirs to keep
            log.info("%s is read-only", artifact.path)

    def _lock_file(self, name: str) -> FileLock:
        return FileLock(self.root / ".locks" / f"{name.removesuffix('.partial')}.lock")

    def held(self, name: str) -> bool:
        """Whether a running process builds it."""
        try:
            with self._lock_file(name).acquire(timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # a store that is read-only: nobody builds there
            return False

    def _mark(self, name: str, marks: contextlib.ExitStack, how: int = fcntl.LOCK_SH) -> None:
        """Marks an artifact as used until `marks` is closed, where the store has, or can be given, a file for it.

        Raises:
            BlockingIOError: with LOCK_NB, it is in use.
        """
        try:
            file = self.root / ".locks" / f"{name.removesuffix('.partial')}.use"
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDONLY | os.O_CREAT, 0o666)
            marks.callback(os.close, handle)
            fcntl.flock(handle, how)
        except BlockingIOError:
            raise
        except OSError as error:
            log.info("%s is not marked as used: %s", name, error)

    def _lock(self, name: str, waiting: Callable[[], None]) -> AcquireReturnProxy[FileLock]:
        """The lock of one artifact, taken; the operating system releases it if we die."""
        lock = self._lock_file(name)
        try:
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            try:
                return lock.acquire(timeout=0)
            except Timeout:
                waiting()
                return lock.acquire()
        except OSError as error:
            raise RequestError(
                f"paths.artifacts={self.root} cannot be written ({error.strerror})",
                "Set paths.artifacts=FOLDER to one that can.",
            ) from None

    def _check_room(self, partial: Path, needed: int) -> None:
        needed -= bytes_below(partial)
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise DoesNotFitError(
                f"the disk of {self.root} has {free / GIB:.2f} GiB free and the result takes {needed / GIB:.2f} GiB",
                "Free some (task=artifacts artifacts.action=prune), or set paths.artifacts=FOLDER on another disk.",
            )

    def _finish(self, partial: Path, recipe: Recipe, built: Built, started: float) -> Artifact:
        files = {
            path.name: Entry(path.stat().st_size, built.digests.get(path.name) or digest(path), path.stat().st_mtime_ns)
            for path in sorted(partial.iterdir())
            if path.is_file() and path.name not in (MANIFEST, RECIPE_NAME)
        }
        manifest = {
            "stage": recipe.stage,
            "stage_version": recipe.version,
            "options": recipe.options,
            "inputs": recipe.inputs,
            "orchestrator": __version__,
            "created": started,
            "seconds": round(time.time() - started, 3),
            "files": {name: vars(entry) for name, entry in files.items()},
            "report": built.report,
        }
        (partial / RECIPE_NAME).unlink(missing_ok=True)
        write_json(partial / MANIFEST, manifest)
        final = partial.with_suffix("")
        if final.exists():  # without a readable manifest, or it would have been found
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self.root)
        # What a stage worked with is kept until here: killed while digests are taken, it has not to work again.
        for path in final.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        return Artifact(final, manifest, files)


def bytes_below(folder: Path) -> int:
    """Bytes of the files in a folder and below it, of one with several names once; of links not what they lead to."""
    sizes = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another run removes what it needs no more
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def _entry(said: dict[str, Any]) -> Entry:
    return Entry(int(said["size"]), str(said["xxh3_128"]), int(said["mtime_ns"]))


def _begun(partial: Path) -> Recipe | None:
    """The recipe of an unfinished build; None where it is damaged."""
    try:
        said = json.loads((partial / RECIPE_NAME).read_text(encoding="utf-8"))
        recipe = Recipe(**{**said, "sources": tuple(said["sources"]), "settings": dict(said.get("settings", {}))})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return recipe if partial.name == f"{recipe.name}.partial" else None


def _harm(path: Path, entry: Entry) -> str:
    """What has become of an artifact's file since it was built, or ""."""
    try:
        there = path.stat()
        if there.st_size != entry.size:
            return f"{path} is not as long as when it was built"
        if there.st_mtime_ns == entry.mtime_ns:
            return ""
        if digest(path) != entry.xxh3_128:
            return f"{path} has changed since it was built"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    # A store that was copied: with its time back, the file is not read again by every run.
    with contextlib.suppress(OSError):
        if path.stat().st_mtime_ns == there.st_mtime_ns:
            os.utime(path, ns=(there.st_atime_ns, entry.mtime_ns))
    return ""


def last_used(artifact: Artifact) -> float:
    """When a run last used it: seconds since the epoch."""
    return (artifact.path / MANIFEST).stat().st_mtime


def _stage_error(error: OSError, partial: Path) -> StageError | RequestError:
    if error.errno == errno.ENOSPC:
        return StageError(
            f"the disk of {partial} is full",
            "Free some space and run it again: it continues where it stopped.",
        )
    return RequestError(f"{error.filename or partial}: {error.strerror or error}", "Check paths.artifacts.")


def _remove_unused(partial: Path) -> None:
    """Removes the folder of a build that failed before it wrote anything: there is nothing to go on with."""
    with contextlib.suppress(OSError):
        if {path.name for path in partial.iterdir()} <= {RECIPE_NAME}:
            shutil.rmtree(partial)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
