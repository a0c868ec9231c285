"""What a merge will write: for every tensor of the result, where its values come from and what is added."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.adapter import Adapter, check_values
from orchestrator.checkpoint.adapter_match import targets
from orchestrator.checkpoint.adapter_targets import LoraTarget, ReplaceTarget, RowsTarget, Target
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.tied import vocabulary_of
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.stages.merge_vocabulary import Changes, decide_tie, decide_tokenizer, resized
from orchestrator.stages.nf4 import Nf4


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    Attributes:
        name: as the result names it.
        source: the tensor that it starts from: the base's, or an adapter's that takes its place.
        changes: what is done to that, each with its adapter's weight (1 where it is no sum).
        replaced: the base's tensor, where `source` is an adapter's of the same shape.
        used: the adapters' tensors that go into it.
        dtype: the base's, where `source` is an adapter's of another shape; else "".
        nf4: how the source goes through NF4 first; None where it does not.
    """

    name: str
    source: TensorInfo
    changes: tuple[tuple[float, Target], ...] = ()
    replaced: TensorInfo | None = None
    used: tuple[str, ...] = ()
    dtype: str = ""
    nf4: Nf4 | None = None

    @property
    def touched(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.used)


@dataclass(frozen=True)
class MergePlan:
    """What is written.

    Attributes:
        outputs: the result's tensors in the base's order; a head that the base did not store comes last.
        config: keys of config.json that change, as `carry.edited` takes them.
        dropped: the base's tensors that are left out.
        notes: for the user.
        tokenizer: a folder whose tokenizer takes the place of the base's.
    """

    outputs: tuple[Output, ...]
    config: dict[str, Any]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    tokenizer: Path | None = None


def plan_merge(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], nf4: Nf4 | None = None) -> MergePlan:
    """What merging `adapters`, each with its weight, into `base` will write. Adapters' values are looked at.

    Args:
        nf4: the base's linears go through it first.

    Raises:
        CheckpointError: inputs that cannot be merged (see `adapter_match.targets`), or tensors of theirs that are
            not finite.
    """
    changes = _changes(base, adapters)
    tie = decide_tie(base, changes)
    sources = {name: info for name, info in base.tensors.items() if name not in tie.dropped} | tie.added
    shared = {vocabulary_of(base).embedding: tie.same}
    outputs = tuple(
        _output(name, info, tie.changes.get(name, []), shared.get(name, ())) for name, info in sources.items()
    )
    rows = resized(base, {output.name: output.source for output in outputs})
    chosen = decide_tokenizer(base, [adapter for adapter, _ in adapters], changes, rows)
    notes = (*base.notes, *(note for adapter, _ in adapters for note in adapter.notes), *tie.notes, *chosen.notes)
    if nf4 is not None:
        outputs = tuple(_through(output, nf4) for output in outputs)
    return MergePlan(outputs, tie.config | chosen.config, tie.dropped, notes, chosen.folder)


def _through(output: Output, nf4: Nf4) -> Output:
    if output.replaced is not None or output.dtype or not nf4.takes(output.source):
        return output
    if any(isinstance(target, LoraTarget) and target.transposed for _, target in output.changes):
        raise CheckpointError(
            f"{shown(output.name)} is stored as (in, out), which merge.base=nf4 is not for", "Set merge.base=original."
        )
    return replace(output, nf4=nf4)


def grown(base: Checkpoint, adapters: Iterable[Adapter]) -> int:
    """Elements that adapters add to a base at most: rows of a vocabulary, a head that was tied. From headers."""
    names = vocabulary_of(base)
    hidden_head = names.head if names.tied and names.head not in base.tensors else ""
    added = 0
    for adapter in adapters:
        found = targets(adapter, base)
        saved = {name: t for name, several in found.items() for t in several if isinstance(t, ReplaceTarget)}
        for name, target in saved.items():
            there = base.tensors.get(name) or base.tensors[names.embedding]
            added += target.value.parameters - there.parameters
        if hidden_head and (hidden_head in found or _of_one(found.get(names.embedding, ()))):
            added += base.tensors[names.embedding].parameters
    return added


def _of_one(several: Sequence[Target]) -> bool:
    """Whether changes of an embedding may be its own, so that a head that was tied to it is written as well."""
    return any(isinstance(target, ReplaceTarget | LoraTarget) for target in several)


def _output(name: str, info: TensorInfo, changes: list[tuple[float, Target]], shared: tuple[str, ...]) -> Output:
    used = tuple(sorted({*shared, *(name for _, target in changes for name in target.consumed)}))
    added = tuple((weight, target) for weight, target in changes if not isinstance(target, ReplaceTarget))
    for _, target in changes:
        if isinstance(target, ReplaceTarget):
            same = target.value.shape == info.shape
            return Output(name, target.value, added, info if same else None, used, "" if same else info.dtype)
    return Output(name, info, added, None, used)


def _changes(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> Changes:
    changes: Changes = {}
    for adapter, weight in adapters:
        found = targets(adapter, base)
        check_values(adapter)
        where = shown(adapter.path, 400)
        for name, several in found.items():
            for target in several:
                _check_weight(target, weight, where)
            _check_together(name, several, [target for _, target in changes.get(name, [])], where)
        for name, several in found.items():
            changes.setdefault(name, []).extend((weight, target) for target in several)
    return changes


def _no_sum(target: Target) -> str:
    """What a target does to a tensor that no weight can scale and nothing can be added up with; "" for a sum."""
    if isinstance(target, ReplaceTarget):
        return "replaces"
    if isinstance(target, RowsTarget):
        return "replaces rows of"
    if isinstance(target, LoraTarget) and target.magnitude is not None:
        return "scales (DoRA)"
    return ""


def _check_weight(target: Target, weight: float, where: str) -> None:
    if not math.isfinite(weight):
        raise CheckpointError(f"{where}: the adapter's weight is {weight}, not a finite number")
    if (what := _no_sum(target)) and weight != 1:
        raise CheckpointError(
            f"{where}: the adapter {what} {shown(target.tensor)}, which a weight of {weight} cannot scale",
            "Give it the weight 1.",
        )


def _check_together(name: str, mine: Sequence[Target], others: Sequence[Target], where: str) -> None:
    """Refuses where several adapters together have no meaning."""
    what = next((found for target in (*mine, *others) if (found := _no_sum(target))), "")
    if what and others:
        raise CheckpointError(
            f"{where}: one adapter {what} {shown(name)}, and another changes it too", "Merge one adapter only."
        )
