"""What config.json's quantization_config says, in one form for every method that is known here. No torch.

The keys are those of GPTQModel and AutoGPTQ, AutoAWQ, compressed-tensors, DeepSeek's and transformers' fp8,
bitsandbytes through transformers, and exllamav2's converter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.checkpoint.trust import as_json, shown
from orchestrator.errors import CheckpointError

_WHERE = "config.json's quantization_config"
_PER_ROW = -1  # a group that is the whole row


@dataclass(frozen=True)
class Quantized:
    """How a checkpoint's linears are stored.

    Attributes:
        format: quant_method.
        method: the same as quant.method names it (bitsandbytes has three).
        bits: per weight; 0: a format that is not known here.
        group: inputs that share a scale; -1: all of them.
        columns: outputs that share a scale with them (blocks of fp8).
        symmetric: without zero points.
        reordered: inputs are in another order, so that their groups are scattered (desc_act).
        uniform: bits and group are those of every linear.
        double: the scales are quantized too.
        layout: of compressed-tensors: its format.
    """

    format: str
    method: str
    bits: float
    group: int = _PER_ROW
    columns: int = 1
    symmetric: bool = True
    reordered: bool = False
    uniform: bool = True
    double: bool = False
    layout: str = ""

    @property
    def label(self) -> str:
        """As a person says it: "gptq, 4 bits, groups of 128"."""
        groups = f", groups of {self.group}" if self.group > 0 else ""
        return f"{self.method}, {self.bits:g} bits{groups}" if self.bits else self.format


def read_quantization(values: Mapping[str, Any]) -> Quantized:
    """What a quantization_config says.

    Raises:
        CheckpointError: a value is missing that its method cannot do without, or makes no sense.
    """
    method = values.get("quant_method")
    if not isinstance(method, str):
        raise CheckpointError(
            f"{_WHERE} has no quant_method" if method is None else f"{_WHERE}: quant_method is {as_json(method)}",
            "Download config.json again.",
        )
    read = _READERS.get(method)
    return read(values) if read else Quantized(shown(method, 40), shown(method, 40), 0)


def _gptq(values: Mapping[str, Any]) -> Quantized:
    group = _group(values, "group_size")
    reordered = _flag(values, "desc_act", False) and group != _PER_ROW
    sym, own_rules = _flag(values, "sym", True), bool(values.get("dynamic"))
    return Quantized("gptq", "gptq", _bits(values, "bits"), group, 1, sym, reordered, not own_rules)


def _awq(values: Mapping[str, Any]) -> Quantized:
    group = _group(values, "q_group_size", "group_size")
    return Quantized(
        "awq", "awq", _bits(values, "w_bit", "bits"), group, symmetric=not _flag(values, "zero_point", True)
    )


def _exl2(values: Mapping[str, Any]) -> Quantized:
    bits = values.get("bits")
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 1 <= bits <= 16:
        raise _odd("bits", bits, "a number of bits per weight")
    return Quantized("exl2", "exl2", float(bits), uniform=False)


def _bitsandbytes(values: Mapping[str, Any]) -> Quantized:
    four, eight = _flag(values, "load_in_4bit", False), _flag(values, "load_in_8bit", False)
    if four == eight:
        raise CheckpointError(f"{_WHERE} says neither load_in_4bit nor load_in_8bit, or both")
    if eight:
        return Quantized("bitsandbytes", "int8", 8)
    kind = values.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise _odd("bnb_4bit_quant_type", kind, "nf4 or fp4")
    return Quantized("bitsandbytes", kind, 4, double=_flag(values, "bnb_4bit_use_double_quant", False))


def _fp8(values: Mapping[str, Any]) -> Quantized:
    found = Quantized("fp8", "fp8", 8)
    block = values.get("weight_block_size")
    if block is None:
        return found
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise _odd("weight_block_size", block, "two sizes")
    return replace(found, columns=block[0], group=block[1])


def _compressed(values: Mapping[str, Any]) -> Quantized:
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _odd("config_groups", groups, "an object")
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    if not all(isinstance(part, dict) for part in weights):
        raise CheckpointError(f"{_WHERE}: a group of config_groups says nothing of its weights")
    first: dict[str, Any] = weights[0] or {}
    return Quantized(
        "compressed-tensors",
        "compressed-tensors",
        _bits(first, "num_bits"),
        _group(first, "group_size"),
        symmetric=_flag(first, "symmetric", True),
        reordered=first.get("actorder") == "group",
        uniform=all(part == first for part in weights),
        layout=shown(values.get("format", ""), 40),
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Quantized]] = {
    "gptq": _gptq,
    "awq": _awq,
    "exl2": _exl2,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}


def _bits(values: Mapping[str, Any], *keys: str) -> float:
    value = next((values[key] for key in keys if values.get(key) is not None), None)
    if type(value) is not int or not 1 <= value <= 16:
        raise _odd(keys[-1], value, "a whole number of bits")
    return float(value)


def _group(values: Mapping[str, Any], *keys: str) -> int:
    """Inputs that share a scale; null is written for whole rows, too."""
    value = next((values[key] for key in keys if values.get(key) is not None), _PER_ROW)
    if type(value) is not int or not (value == _PER_ROW or value > 0):
        raise _odd(keys[-1], value, "a positive whole number, or -1")
    return value


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _odd(key, value, "true or false")
    return value


def _odd(key: str, value: object, wanted: str) -> CheckpointError:
    if value is None:
        return CheckpointError(f"{_WHERE} has no {key}", "Download config.json again.")
    return CheckpointError(f"{_WHERE}: {key} is {as_json(value)}, not {wanted}", "Download config.json again.")
