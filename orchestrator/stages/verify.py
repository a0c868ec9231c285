"""Reading a merged or converted model back: a sample of its tensors against what the sources give, byte for byte.

The files' digests are the store's to check (`Store.verify`): they say that the disk holds what was written. This
says that what was written is right.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.checkpoint.adapter import Adapter
from orchestrator.checkpoint.folder import Checkpoint, open_checkpoint
from orchestrator.checkpoint.reader import read_words
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import StageError
from orchestrator.stages.merge_plan import Output, plan_merge, written_dtype
from orchestrator.stages.nf4 import Nf4
from orchestrator.stages.pieces import Piece, pieces, work

SAMPLE = 64
"""Tensors compared, at least one of every kind (layers apart)."""


def verify_merge(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], dtype: str | None, result: Path, nf4: Nf4 | None = None
) -> list[str]:
    """The names of the tensors compared: the first, the middle and the last piece of each.

    Raises:
        StageError: the result has other tensors, or one with other bytes (named).
        CheckpointError: the result or the sources cannot be read.
    """
    plan = plan_merge(base, adapters, nf4)
    found = open_checkpoint(result).tensors
    wanted = {output.name: (written_dtype(output, dtype), output.source.shape) for output in plan.outputs}
    there = {name: (info.dtype, info.shape) for name, info in found.items()}
    if there != wanted:
        name = min(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
        raise StageError(f"{result}: {shown(name)} is {there.get(name)}, and should be {wanted.get(name)}")
    sample = _sample(plan.outputs)
    for output in sample:
        for piece in _three(output, wanted[output.name][0]):
            _compare(piece, found[output.name], result)
    return [output.name for output in sample]


def _compare(piece: Piece, info: TensorInfo, result: Path) -> None:
    expected = memoryview(work(piece).data).tobytes()
    if read_words(info, piece.start, piece.stop).tobytes() != expected:
        raise StageError(
            f"{result}: {shown(info.name)} is not what its sources give (rows {piece.start} to {piece.stop})",
            f"Remove it (task=artifacts artifacts.action=prune artifacts.name={result.name}) and run it again.",
        )


def _three(output: Output, dtype: str) -> Iterator[Piece]:
    """The first, the middle and the last piece of an output, without making the others."""
    every = list(pieces([(output, dtype)]))
    yield from (every[place] for place in sorted({0, len(every) // 2, len(every) - 1}))


def _sample(outputs: Sequence[Output]) -> list[Output]:
    """One output of every kind first, then others in an order that their names decide."""
    kinds: dict[str, Output] = {}
    for output in outputs:
        kind = ".".join(part for part in output.name.split(".") if not part.isdigit())
        kinds.setdefault(kind, output)
    first = list(kinds.values())
    chosen = {output.name for output in first}
    rest = sorted((o for o in outputs if o.name not in chosen), key=lambda o: hashlib.sha256(o.name.encode()).digest())
    return [*first, *rest[: max(SAMPLE - len(first), 0)]]
