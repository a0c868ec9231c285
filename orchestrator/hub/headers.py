"""A model or an adapter on a hub, opened by its headers alone: the weights stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from orchestrator.checkpoint.adapter import Adapter
from orchestrator.checkpoint.files import Opened
from orchestrator.checkpoint.folder import Checkpoint, checkpoint_of
from orchestrator.checkpoint.lora_config import parse_lora_config
from orchestrator.checkpoint.trust import JSON_LIMIT, parse_object, read_bytes, shown
from orchestrator.checkpoint.weights import ADAPTER_FORMATS, weights_of
from orchestrator.errors import CheckpointError
from orchestrator.hub.commit import Commit, RemoteFile, list_commit, needed
from orchestrator.hub.download import download
from orchestrator.hub.errors import Unreachable, explained
from orchestrator.hub.locate import Kind, Located, cached
from orchestrator.hub.ranges import BLOCK, Ranges
from orchestrator.hub.together import together
from orchestrator.report.console import note, size

T = TypeVar("T")

SHORT = 4096  # bytes
AT_ONCE = 8  # requests: each is an answer's delay and next to no data


class RemoteStream:
    """A file on a hub, read from any place. What has come is kept; a read that goes on behind it asks for the rest.

    Args:
        fetch: gives the bytes from a position up to another one.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._fetch = fetch
        self._blocks: dict[int, bytes] = {}  # by the position of the first byte
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise OSError(22, "Invalid argument")  # as a file does: zipfile goes by it
        self._at = at
        return at

    def read(self, size: int = -1, /) -> bytes:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        data = self._bytes(self._at, stop)
        self._at += len(data)
        return data

    def readline(self, size: int = -1, /) -> bytes:
        line = self._bytes(self._at, min(self._at + (BLOCK if size < 0 else size), self._size))
        line = line[: line.find(b"\n") + 1] or line
        self._at += len(line)
        return line

    def _bytes(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        first = next((at for at, data in self._blocks.items() if at <= start <= at + len(data)), None)
        if first is None:  # near the end all of it: a zip's directory is read backwards
            first = max(self._size - BLOCK, 0) if start >= self._size - BLOCK else start
            self._blocks[first] = self._fetch(first, min(max(stop, first + BLOCK), self._size))
        data = self._blocks[first]
        if (end := first + len(data)) < stop:
            # A long read knows its end. Short ones are a pickle's, one after the other: as much again as there is.
            ahead = len(data) if stop - start <= SHORT else 0
            data += self._fetch(end, min(max(stop, end + ahead), self._size))
            self._blocks[first] = data
        return data[start - first : stop - first]


class RemoteRepo:
    """The files of one commit that a run needs: a plan reads them in parts, and `fetch` brings them here."""

    def __init__(self, commit: Commit, kind: Kind) -> None:
        self.commit = commit
        self.kind = kind
        self.path = Path(f"{commit.hub}@{commit.commit[:12]}")  # a name, in messages: there is no such folder
        self._ranges = Ranges(commit)
        self._small: dict[str, bytes] = {}
        self.files = {file.name: file for file in needed(commit, kind, lambda name: self.read(name, JSON_LIMIT))}

    @property
    def here(self) -> bool:
        """Whether the cache has all of it."""
        return all((self.commit.snapshot / name).exists() for name in self.files)

    @property
    def cost(self) -> str:
        """What a plan has read of how much, for a person."""
        whole = sum(file.size for file in self.files.values())
        return f"{self.path} is planned by its headers: {size(self._ranges.taken)} of {size(whole)} were read"

    def fetch(self) -> Located:
        """Downloads what is not here yet."""
        return download(self.commit, list(self.files.values()))

    # checkpoint.files.Files

    def names(self) -> Iterable[str]:
        return self.files

    def has(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, limit: int) -> bytes:
        file = self.commit.files[name]
        if file.size > limit:
            raise CheckpointError(f"{self.path}: {shown(name)} takes {file.size:,} bytes; at most {limit:,} are read")
        if name not in self._small:
            local = self.commit.snapshot / name
            self._small[name] = read_bytes(local, limit) if local.is_file() else self._part(file, 0, file.size)
        return self._small[name]

    @contextmanager
    def open(self, name: str) -> Iterator[Opened]:
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no {shown(name)}")
        file = self.files[name]
        stream = RemoteStream(file.size, lambda start, stop: self._part(file, start, stop))
        yield Opened(stream, file.size, self.path / name, remote=True)

    def map(self, function: Callable[[str], T], names: Iterable[str]) -> Iterable[T]:
        found: dict[str, T] = {}

        def work(name: str) -> None:
            found[name] = function(name)

        names = list(names)
        for _ in together(work, names, AT_ONCE):
            pass
        return [found[name] for name in names]

    def _part(self, file: RemoteFile, start: int, stop: int) -> bytes:
        return self._ranges.read(file, start, stop) if start < stop else b""


def look_up(hub: str, revision: str, kind: Kind) -> Located:
    """What a revision is now: in the cache, or on the hub.

    A hub that cannot be reached is no error where the cache has it all.

    Raises:
        CheckpointError, RequestError, OrchestratorError: see `orchestrator.hub.locate.locate`.
    """
    try:
        with explained(hub, revision):
            commit = list_commit(hub, revision)
    except Unreachable as error:
        found = cached(hub, revision, kind)
        if found is None:
            raise error.without_cache() from None
        note(f"{error.message}: {hub} is taken from the cache, commit {str(found.commit)[:12]}")
        return found
    repo = RemoteRepo(commit, kind)
    return repo.fetch() if repo.here else Located(repo.path, hub, commit.commit, repo)


def remote_checkpoint(repo: RemoteRepo) -> Checkpoint:
    """The model of a repo, checked as a folder's is; its files' paths are names only.

    Raises:
        CheckpointError: see `orchestrator.checkpoint.folder.open_checkpoint`.
        OrchestratorError: the hub cannot be reached, or does not answer what was asked.
    """
    found = checkpoint_of(repo)
    return replace(found, notes=(*found.notes, repo.cost))


def remote_adapter(repo: RemoteRepo) -> Adapter:
    """The adapter of a repo, checked as a folder's is; its files' paths are names only.

    Raises:
        CheckpointError, OrchestratorError: as for `remote_checkpoint`.
    """
    config = parse_object(repo.read(repo.kind.config, JSON_LIMIT), f"{repo.path}: {repo.kind.config}")
    lora = parse_lora_config(config, f"{repo.path}: {repo.kind.config}")
    weights = weights_of(repo, ADAPTER_FORMATS)
    if weights is None or not weights.tensors:
        raise CheckpointError(f"{repo.path}: the adapter would change nothing: it holds no tensors")
    return Adapter(
        repo.path, config, lora, weights.tensors, weights.format, weights.files, weights.notes, weights.digests
    )
