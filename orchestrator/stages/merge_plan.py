"""What a merge will write: for every tensor of the result, where its values come from and what is added."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.adapter import Adapter, check_values
from orchestrator.checkpoint.adapter_match import targets
from orchestrator.checkpoint.adapter_targets import LoraTarget, ReplaceTarget, RowsTarget, Target
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.tensors import DTYPES, PLAIN_FLOATS, TensorInfo
from orchestrator.checkpoint.tied import same_data, superfluous_head, vocabulary_of
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.stages.merge_vocabulary import Changes, Same, Tie, decide_tie, decide_tokenizer, resized
from orchestrator.stages.nf4 import Nf4

WRITTEN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""convert.dtype -> safetensors' name."""

_NEVER_CAST = ("rotary_emb.inv_freq",)


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


@dataclass(frozen=True)
class Layout:
    """The result's tensors, as far as they can be told without looking at values.

    Attributes:
        changes: what the adapters do to the base's tensors.
        rows: of the vocabulary, where they are not the base's; else None.
    """

    changes: Changes
    tie: Tie
    outputs: tuple[Output, ...]
    rows: int | None


def lay_out(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    stored_head: str | None,
    same: Same,
) -> Layout:
    """Which tensors a merge writes, from headers; all that may look at data is `same`.

    Args:
        stored_head: the name of a tied head that the base stores beside its embedding; None where it does not.

    Raises:
        CheckpointError: inputs that cannot be merged.
    """
    changes = _changes(base, adapters)
    tie = decide_tie(base, changes, stored_head, same)
    sources = {name: info for name, info in base.tensors.items() if name not in tie.dropped} | tie.added
    shared = {vocabulary_of(base).embedding: tie.same}
    outputs = tuple(
        _output(name, info, tie.changes.get(name, []), shared.get(name, ())) for name, info in sources.items()
    )
    rows = resized(base, {output.name: output.source for output in outputs})
    return Layout(changes, tie, outputs, rows)


def plan_merge(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], nf4: Nf4 | None = None) -> MergePlan:
    """What merging `adapters`, each with its weight, into `base` will write. Adapters' values are looked at.

    Args:
        nf4: the base's linears go through it first.

    Raises:
        CheckpointError: inputs that cannot be merged (see `adapter_match.targets`), or tensors of theirs that are
            not finite.
    """
    found = lay_out(base, adapters, superfluous_head(base), same_data)
    for adapter, _ in adapters:
        check_values(adapter)
    tie, outputs = found.tie, found.outputs
    chosen = decide_tokenizer(base, [adapter for adapter, _ in adapters], found.changes, found.rows)
    notes = (*base.notes, *(note for adapter, _ in adapters for note in adapter.notes), *tie.notes, *chosen.notes)
    if nf4 is not None:
        outputs = tuple(_through(output, nf4) for output in outputs)
    return MergePlan(outputs, tie.config | chosen.config, tie.dropped, notes, chosen.folder)


def check_dtype(base: Checkpoint, dtype: str | None) -> None:
    """Refuses a convert.dtype (None: as the base has it) that is none, or that packed weights cannot be written as."""
    if dtype is None:
        return
    if dtype not in WRITTEN:
        raise ConfigError(f"convert.dtype={dtype} is not one of {', '.join(WRITTEN)}")
    packed = base.config.get("quantization_config") is not None
    if packed or any(DTYPES[t.dtype].floating and t.dtype not in PLAIN_FLOATS for t in base.tensors.values()):
        raise CheckpointError(
            f"{shown(base.path, 400)} is quantized: its weights cannot be written as {dtype}",
            "Leave convert.dtype out, or give the original 16-bit model.",
        )


def written_dtype(output: Output, dtype: str | None) -> str:
    """The type that an output is written as, where `dtype` was asked for (None: as the base has it)."""
    info = output.replaced or output.source  # an adapter's own tensors are often float32: the base decides
    kept = output.dtype or info.dtype
    if dtype is None or kept not in PLAIN_FLOATS or output.name.endswith(_NEVER_CAST):
        return kept
    return WRITTEN[dtype]


def _through(output: Output, nf4: Nf4) -> Output:
    if output.replaced is not None or output.dtype or not nf4.takes(output.source):
        return output
    if any(isinstance(target, LoraTarget) and target.transposed for _, target in output.changes):
        raise CheckpointError(
            f"{shown(output.name)} is stored as (in, out), which merge.base=nf4 is not for", "Set merge.base=original."
        )
    return replace(output, nf4=nf4)


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
