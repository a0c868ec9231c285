"""What of an adapter an engine can run on top of its base: plain LoRA on the layers' linears. Only headers are read."""

import re
from collections.abc import Callable

from orchestrator.checkpoint.adapter import Adapter
from orchestrator.checkpoint.adapter_base import unpacked
from orchestrator.checkpoint.adapter_match import targets
from orchestrator.checkpoint.adapter_targets import (
    BiasTarget,
    ExpertsTarget,
    LoraTarget,
    ReplaceTarget,
    RowsTarget,
    Target,
)
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.roles import SpecLora
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

MERGED = "Set model.merge=true with the unquantized model as model.path, which merges it."
"""The way out of everything that is refused here."""

_LINEAR = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight")
"""The tensors that a LoRA may change, and their layer's number."""

_REFUSED: dict[type[Target], Callable[[str], str]] = {
    ReplaceTarget: lambda name: f"it replaces {name} (a trained embedding, head, bias or other module)",
    RowsTarget: lambda name: f"it replaces rows of {name} (trained tokens)",
    BiasTarget: lambda name: f"it changes {name} (lora_bias)",
    ExpertsTarget: lambda name: f"it changes {name}, which holds experts",
}
"""Targets that are no LoRA of a linear -> what is said of them."""


def lora_targets(adapter: Adapter, base: Checkpoint) -> tuple[LoraTarget, ...]:
    """What an adapter that runs on top of its base changes, in the order of its files.

    Args:
        base: not quantized yet, or EXL2.

    Raises:
        CheckpointError: an adapter of another model, or whatever is not plain LoRA on the linears of attention and
            MLP (named); a base quantized otherwise; see `adapter_match.targets` too.
    """
    found = [target for several in targets(adapter, unpacked(base)).values() for target in several]
    for target in found:
        if reason := _refusal(target):
            raise CheckpointError(
                f"{shown(adapter.path, 400)}: the adapter cannot run on top of its base (model.merge=false): {reason}",
                MERGED,
            )
    return tuple(target for target in found if isinstance(target, LoraTarget))


def lora_size(target: LoraTarget) -> SpecLora:
    """The factors of one of `lora_targets` as an engine holds them."""
    match = _LINEAR.fullmatch(target.tensor)
    assert match is not None
    inputs, outputs = target.a.shape[1], target.b.shape[0]
    if target.transposed:  # W += (B A)^T = A^T B^T: the factors change places
        inputs, outputs = outputs, inputs
    return SpecLora(target.tensor.removesuffix(".weight"), int(match[1]), target.a.shape[0], inputs, outputs)


def _refusal(target: Target) -> str:
    """Why an engine cannot run it without merging; "" where it can."""
    name = shown(target.tensor)
    if not isinstance(target, LoraTarget):
        return _REFUSED[type(target)](name)
    if target.magnitude is not None:
        return f"it scales {name} (DoRA)"
    if _LINEAR.fullmatch(target.tensor) is None:
        return f"it changes {name}, which is no linear of attention or MLP"
    return ""
