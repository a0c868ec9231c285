"""What either layout of a `.bin` comes to, and what is said and refused alike of both."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.errors import CheckpointError


@dataclass(frozen=True)
class Contents:
    """A `.bin`, read as far as its pickles.

    Attributes:
        value: what was saved, with `PickledTensor`s for its tensors.
        regions: offset in the file and size, in bytes, of each storage by its key.
        digest: SHA-256 of the pickles' bytes.
    """

    value: object
    regions: dict[str, tuple[int, int]]
    digest: str


def refuse_overlaps(regions: Iterable[tuple[int, int]], where: str) -> None:
    """Raises CheckpointError where two runs of bytes (offset, size) share one: a small file could claim terabytes."""
    end = 0
    for start, size in sorted(region for region in regions if region[1]):
        if start < end:
            raise CheckpointError(f"{where} has storages that overlap at byte {start:,}: refused", "Download it again.")
        end = start + size


def resave(where: str, loaded: str) -> str:
    """The command that puts what the Python expression `loaded` makes of the file `f` in the file's place."""
    name = shlex.quote(where)
    code = f"import sys, torch; f = sys.argv[1]; torch.save({loaded}, f + '.new')"
    return f'python -c "{code}" {name} && mv {name}.new {name}'
