"""A folder's files as the readers see them, wherever they lie: on this machine, or on a hub."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.checkpoint.trust import file_size, read_bytes, shown
from orchestrator.errors import CheckpointError

T = TypeVar("T")


class Stream(Protocol):
    """The bytes of a file, from any place of it."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def tell(self) -> int: ...

    def seekable(self) -> bool: ...


@dataclass(frozen=True)
class Opened:
    """A weight file that is being read.

    Attributes:
        size: in bytes.
        file: what it is called; of a file on a hub there is no such file.
        remote: each place that is looked at costs a request: what is not needed to know the tensors is left unread.
    """

    stream: Stream
    size: int
    file: Path
    remote: bool = False

    @property
    def where(self) -> str:
        """Its name in messages."""
        return shown(self.file, 400)


@contextmanager
def open_file(file: Path) -> Iterator[Opened]:
    """A file of this machine. What goes wrong while it is read is said in one line.

    Raises:
        IncompleteError, CheckpointError: it is missing, not a regular file, or cannot be read.
    """
    size = file_size(file)
    try:
        with file.open("rb") as stream:
            yield Opened(stream, size, file)
    except OSError as error:
        raise CheckpointError(f"{shown(file, 400)} cannot be read: {error.strerror or shown(error)}") from error


class Files(Protocol):
    """The files in one folder, by name. `path` is what the folder is called."""

    @property
    def path(self) -> Path: ...

    def names(self) -> Iterable[str]: ...

    def has(self, name: str) -> bool:
        """Whether there is such a file, or a link in its place (to nowhere: whoever reads it says so)."""

    def read(self, name: str, limit: int) -> bytes:
        """The whole of a small file; CheckpointError where it takes more than `limit` bytes."""

    def open(self, name: str) -> AbstractContextManager[Opened]: ...

    def map(self, function: Callable[[str], T], names: Iterable[str]) -> Iterable[T]:
        """The function of each name, in order."""


@dataclass(frozen=True)
class LocalFiles:
    """A folder of this machine."""

    path: Path

    def names(self) -> Iterable[str]:
        return (file.name for file in self.path.iterdir())

    def has(self, name: str) -> bool:
        file = self.path / name
        return file.exists() or file.is_symlink()

    def read(self, name: str, limit: int) -> bytes:
        return read_bytes(self.path / name, limit)

    def open(self, name: str) -> AbstractContextManager[Opened]:
        return open_file(self.path / name)

    def map(self, function: Callable[[str], T], names: Iterable[str]) -> Iterable[T]:
        return map(function, names)
