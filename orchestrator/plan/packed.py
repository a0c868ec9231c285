"""Checkpoints that are quantized already: what they are, and which engine loads them as they are.

Such a model has one method and one width, its own: who asks for another is told so, and what an engine does not load is
refused before anything is read but headers.
"""

from __future__ import annotations

import math

from orchestrator.backends.table import BACKENDS, Backend
from orchestrator.checkpoint.quantized import Quantized, read_quantization
from orchestrator.checkpoint.spec import ModelSpec, SpecTensor
from orchestrator.config import ENGINE_KEYS, Config, get
from orchestrator.errors import CheckpointError, ConfigError

WEIGHT = ("qweight", "q_weight", "weight_packed", "weight")  # the part with the numbers themselves
SCALES = ("scales", "weight_scale", "weight_scale_inv")
_OTHER_MODEL = "config.json's quantization_config is of another model, or the files are."
_FOUR_BIT = (("weight",), ("weight.absmax",), ("weight.quant_map",))
_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gptq": (("qweight",), ("qzeros",), ("scales",)),
    "awq": (("qweight",), ("qzeros",), ("scales",)),
    "exl2": (("q_weight",), ("q_invperm",), ("q_scale",), ("q_scale_max",), ("q_groups",)),
    "nf4": _FOUR_BIT,
    "fp4": _FOUR_BIT,
    "int8": (("weight",), ("SCB",)),
    "fp8": (("weight",), ("weight_scale", "weight_scale_inv")),
    "compressed-tensors": (("weight_packed", "weight"), ("weight_scale",)),
}
"""method -> what each packed linear has, each by the names that it may have."""


def quantized_of(spec: ModelSpec) -> Quantized | None:
    """How the model is quantized; None for plain weights.

    Raises:
        CheckpointError: a quantization_config that makes no sense.
    """
    return None if spec.quantization is None else read_quantization(spec.quantization)


def check_weights(spec: ModelSpec, found: Quantized) -> None:
    """Raises CheckpointError where the weights are not what config.json's quantization_config says."""
    if not any(tensor.parts for tensor in spec.tensors):
        raise CheckpointError(
            f"config.json says that the weights are quantized ({found.label}), and none of them is",
            "Remove quantization_config from config.json, or download the model again.",
        )
    for tensor in spec.tensors:
        if tensor.parts and found.method in _PARTS:
            _check_parts(tensor, found)


def _check_parts(tensor: SpecTensor, found: Quantized) -> None:
    """Raises CheckpointError unless a packed linear has its parts, in the sizes that its method and width give."""
    module = tensor.name.removesuffix(".weight")
    for kinds in _PARTS[found.method]:
        if tensor.part(*kinds) is None:
            raise CheckpointError(
                f"{module} has no {' or '.join(kinds)}, which {found.format} weights need", "Download the model again."
            )
    weight, scales = tensor.part(*WEIGHT), tensor.part(*SCALES)
    out, into = tensor.shape[-2:]
    wanted = math.ceil(out * into * found.bits / 8)
    if found.uniform and weight is not None and weight.nbytes != wanted:
        raise CheckpointError(
            f"{weight.name} takes {weight.nbytes:,} bytes, {out} x {into} weights at {found.bits:g} bits {wanted:,}",
            _OTHER_MODEL,
        )
    grouped = found.uniform and found.group > 0 and found.columns == 1 and scales is not None
    if grouped and scales is not None and math.prod(scales.shape) != out * math.ceil(into / found.group):
        raise CheckpointError(
            f"{scales.name} has shape {list(scales.shape)}, which are not the scales of {into} inputs in groups of "
            f"{found.group} for {out} outputs",
            _OTHER_MODEL,
        )


def check_asked(config: Config, found: Quantized) -> None:
    """Raises ConfigError where another method or width was asked for than the checkpoint's own."""
    quant = config.quant
    give = "or give the unquantized model as model.path"
    if quant.method not in ("auto", found.method):
        raise ConfigError(
            f"the model is quantized already ({found.label}): quant.method={quant.method} cannot be made of it",
            f"Leave quant.method out, {give}.",
        )
    if quant.bits not in (None, found.bits):
        raise ConfigError(
            f"the model is quantized already ({found.label}): quant.bits={quant.bits:g} cannot be made of it",
            f"Leave quant.bits out, {give}.",
        )
    for key in ENGINE_KEYS:
        if key.startswith("quant.") and get(config, key) is not None:
            raise ConfigError(
                f"{key} says how to quantize, and the model is quantized already ({found.label})",
                f"Leave {key} out, {give}.",
            )


def not_loaded(backend: Backend, found: Quantized) -> str:
    """Why an engine does not load such a checkpoint; "" where it does."""
    loads = backend.loads.get(found.format)
    if loads is None:
        able = [other.name for other in BACKENDS.values() if found.format in other.loads]
        who = f"backend={' or '.join(able)} does" if able else "no engine here does"
        return f"backend={backend.name} does not load {found.format} checkpoints ({who})"
    listed = " or ".join(f"{bits:g}" for bits in loads.bits)
    sizes = ", ".join(str(size) for size in loads.groups)
    refused = (
        (loads.bits and found.bits not in loads.bits, f"at {found.bits:g} bits, only at {listed}"),
        (loads.symmetric and not found.symmetric, "with zero points (sym=false)"),
        (loads.in_order and found.reordered, "whose inputs are reordered (desc_act=true with groups)"),
        (loads.groups and found.columns == 1 and found.group not in loads.groups, f"in groups other than {sizes}"),
        (loads.layouts and found.layout not in loads.layouts, f"in the format {found.layout or '(none)'}"),
    )
    why = next((text for wrong, text in refused if wrong), "")
    return f"backend={backend.name} loads no {found.format} checkpoints {why}" if why else ""
