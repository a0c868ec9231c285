"""Downloads files of a hub repo into the hub library's own cache, where an interrupted download continues.

The library fetches the small files and lays out the cache. Its own download of a large file begins
anew in each process (its partial files have names of one process), so large files come through here: appended to
blobs/<sha256>.incomplete by ranges, checked against that SHA-256, renamed; the library finds the blob and links it.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from orchestrator import __version__
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import DoesNotFitError, OrchestratorError
from orchestrator.hub.commit import Commit, RemoteFile
from orchestrator.hub.errors import explained
from orchestrator.hub.locate import Located, storage
from orchestrator.hub.together import together
from orchestrator.report.console import note, progress, size

log = logging.getLogger(__name__)

AT_ONCE = 4  # files: one connection rarely fills a line
LARGEST = constants.MAX_HTTP_DOWNLOAD_SIZE  # of one file without the library's own protocol


class Stopped(Exception):
    """Another file failed, or the user has had enough: a worker ends."""


def download(commit: Commit, files: list[RemoteFile]) -> Located:
    """The snapshot of a commit with all of these files.

    Raises:
        RequestError, DoesNotFitError, OrchestratorError: see `orchestrator.hub.locate`.
    """
    disable_progress_bars()
    hub_logging.set_verbosity_error()  # its warnings ("trying to resume") would run through the progress
    with explained(commit.hub, commit.revision):
        _download(commit, [file for file in files if not (commit.snapshot / file.name).exists()])
        _remember(commit)
    return Located(commit.snapshot, commit.hub, commit.commit)


def _link(commit: Commit, name: str) -> Path:
    """The library's part: it links a blob that is there, and downloads one that is not."""
    return Path(hf_hub_download(commit.hub, name, revision=commit.commit))


def _remember(commit: Commit) -> None:
    """refs/<revision>, as the library writes it, for when there is no network; last, so that it names a whole one."""
    if commit.revision == commit.commit:
        return
    ref = storage(commit.hub) / "refs" / commit.revision
    try:
        if not ref.is_file() or ref.read_text(encoding="ascii") != commit.commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit.commit, encoding="ascii")
    except (OSError, ValueError) as error:  # a cache that is shared read-only serves all the same
        log.info("%s is not written: %s", ref, error)


def _download(commit: Commit, missing: list[RemoteFile]) -> None:
    """Downloads files, several at a time, the small ones first: where the weights are there, all is.

    Raises:
        DoesNotFitError: the cache's disk is too small.
    """
    if not missing:
        return
    there = {file.name: _there(commit, file) for file in missing}
    total = sum(file.size - there[file.name] for file in missing)
    _check_disk(commit, total)
    if total:
        kept = f" ({size(sum(there.values()))} of them is there already)" if any(there.values()) else ""
        note(f"downloading {commit.hub}, commit {commit.commit[:12]}: {size(total)} in {len(missing)} files{kept}")
    moved = dict.fromkeys(there, 0)
    stop = threading.Event()

    def work(file: RemoteFile) -> None:
        def at(position: int) -> None:
            if stop.is_set():
                raise Stopped
            moved[file.name] = max(0, position - there[file.name])

        if file.sha256 is not None and file.size <= LARGEST:
            _resumed(commit, file, at)
        _link(commit, file.name)
        moved[file.name] = file.size - there[file.name]

    with progress("downloading") as show:
        try:
            for file in sorted(missing, key=lambda file: file.sha256 is not None):
                if file.sha256 is None:
                    work(file)
            large = [file for file in missing if file.sha256 is not None]
            for file in together(work, large, AT_ONCE):
                if (done := sum(moved.values())) < total:
                    show(done, total, file.name)
        finally:
            stop.set()
        if total:
            show(total, total, commit.hub)


def _there(commit: Commit, file: RemoteFile) -> int:
    """How many bytes of a file the cache has: all (another commit's file is the same), or a part, or none."""
    if file.sha256 is None:
        return 0
    blob = commit.blob(file)
    if blob.exists():
        return file.size
    part = _part(blob)
    return min(part.stat().st_size, file.size) if part.exists() else 0


def _part(blob: Path) -> Path:
    """The name that the library's older versions gave to a file that they went on with: theirs are continued too."""
    return blob.with_name(f"{blob.name}.incomplete")


def _check_disk(commit: Commit, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    if needed > free:
        raise DoesNotFitError(
            f"{commit.hub} takes {size(needed)} more in {cache}, where {size(free)} are free",
            "Free some of it, or set HF_HOME to a folder on a larger disk.",
        )


def _resumed(commit: Commit, file: RemoteFile, at: Callable[[int], None]) -> None:
    """Makes sure that a large file's blob is there: goes on where its partial file ends, and checks its digest.

    Raises:
        OrchestratorError: what came is not what the hub has.
    """
    blob = commit.blob(file)
    with _locked(commit, file, at):
        if blob.exists():
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = _part(blob)
        with part.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
            http_get(
                hf_hub_url(commit.hub, file.name, revision=commit.commit),
                _Watched(out, at),
                resume_size=out.tell(),
                headers=build_hf_headers(library_name="orchestrator", library_version=__version__),
                expected_size=file.size,
            )
        with part.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        if digest != file.sha256:
            part.unlink()
            raise OrchestratorError(
                f"{commit.hub}: {shown(file.name)} came with another SHA-256 than the hub says: it is removed",
                "Type the same line again: only this file is downloaded anew.",
            )
        part.replace(blob)


class _Watched:
    """A file that tells after each write how far it is; `at` may raise."""

    def __init__(self, file: BinaryIO, at: Callable[[int], None]) -> None:
        self._file = file
        self._at = at

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._at(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _locked(commit: Commit, file: RemoteFile, at: Callable[[int], None]) -> Iterator[None]:
    """The lock that the library takes for this blob: whoever comes second waits, and finds it."""
    place = storage(commit.hub)
    path = place.parent / ".locks" / place.name / f"{file.sha256}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0.2, mode=0o664)
    waited = False
    while True:
        try:
            lock.acquire()
            break
        except Timeout:
            if not waited:
                note(f"waiting for another process that downloads {commit.hub}: {file.name}")
            waited = True
            at(_there(commit, file))
        except NotImplementedError:  # a file system without locks: the digest finds what two writers make of a file
            yield
            return
    try:
        yield
    finally:
        lock.release()
