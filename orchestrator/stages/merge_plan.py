"""What a merge will write: for every tensor of the result, where its values come from and what is added."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.adapter import Adapter, LoraTarget, ReplaceTarget, Target, check_values, consumed, targets
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.tied import superfluous_head
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    Attributes:
        name: as the result names it.
        source: the tensor that it starts from: the base's, or an adapter's that takes its place.
        changes: what is added to that, each with its adapter's weight.
        replaced: the base's tensor, where `source` is an adapter's.
        used: the adapters' tensors that go into it.
    """

    name: str
    source: TensorInfo
    changes: tuple[tuple[float, LoraTarget], ...] = ()
    replaced: TensorInfo | None = None
    used: tuple[str, ...] = ()

    @property
    def touched(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.used)


@dataclass(frozen=True)
class MergePlan:
    """The result's tensors in the base's order; keys of config.json that change; the base's tensors left out; notes."""

    outputs: tuple[Output, ...]
    config: dict[str, Any]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def plan_merge(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> MergePlan:
    """What merging `adapters`, each with its weight, into `base` will write. Adapters' values are looked at.

    Raises:
        CheckpointError: inputs that cannot be merged (see `adapter.targets`), or tensors of theirs that are not finite.
    """
    changes = _changes(base, adapters)
    head = superfluous_head(base)
    dropped = (head,) if head else ()
    outputs = tuple(_output(info, changes.get(name, [])) for name, info in base.tensors.items() if name not in dropped)
    notes = (*base.notes, *(note for adapter, _ in adapters for note in adapter.notes))
    return MergePlan(outputs, {}, dropped, notes)


def _output(info: TensorInfo, changes: list[tuple[float, Target]]) -> Output:
    used = tuple(sorted(name for _, target in changes for name in target.consumed))
    added = tuple((weight, target) for weight, target in changes if isinstance(target, LoraTarget))
    for _, target in changes:
        if isinstance(target, ReplaceTarget):
            return Output(info.name, target.value, added, info, used)
    return Output(info.name, info, added, None, used)


def _changes(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, list[tuple[float, Target]]]:
    changes: dict[str, list[tuple[float, Target]]] = {}
    for adapter, weight in adapters:
        found = targets(adapter, base)
        left = set(adapter.tensors) - set(consumed(found.values()))
        if left:
            raise CheckpointError(f"{shown(adapter.path, 400)}: {shown(min(left))} would not be used")
        check_values(adapter)
        for name, target in found.items():
            _check_together(target, weight, changes.get(name, []), shown(adapter.path, 400))
            changes.setdefault(name, []).append((weight, target))
    return changes


def _check_together(target: Target, weight: float, others: list[tuple[float, Target]], where: str) -> None:
    """Refuses where an adapter's weight, or several adapters together, have no meaning."""
    if not math.isfinite(weight):
        raise CheckpointError(f"{where}: the adapter's weight is {weight}, not a finite number")
    replaces = isinstance(target, ReplaceTarget)
    if replaces and weight != 1:
        raise CheckpointError(
            f"{where}: {shown(target.tensor)} replaces the base's, which a weight of {weight} cannot scale",
            "Give it the weight 1.",
        )
    if others and (replaces or any(isinstance(other, ReplaceTarget) for _, other in others)):
        raise CheckpointError(
            f"{where}: {shown(target.tensor)} is replaced by one adapter and changed by another",
            "Merge one adapter only.",
        )
