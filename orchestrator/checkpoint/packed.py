"""The shapes that quantized linears had before they were packed, as far as their headers say them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from orchestrator.checkpoint.roles import SpecTensor
from orchestrator.checkpoint.tensors import DTYPES, TensorInfo

Shape = tuple[int, ...]
_Shapes = Mapping[str, TensorInfo]  # of one module: the last part of a tensor's name -> the tensor


def bits_of(quantization: dict[str, Any]) -> int:
    """Bits per weight that a quantization_config says; 0 where it says none."""
    values = [quantization.get(key) for key in ("bits", "w_bit")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        values.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return next((value for value in values if type(value) is int and 1 <= value <= 8), 0)


def _gptq(module: _Shapes, bits: int) -> Shape | None:
    """v1 and v2 differ in what the zeros mean, not in their shapes."""
    if "qweight" not in module or "scales" not in module:
        return None
    rows, columns = _two(module["qweight"])
    if "g_idx" in module and module["g_idx"].parameters:
        return columns, module["g_idx"].parameters
    return (columns, rows * 32 // bits) if bits else None


def _awq(module: _Shapes, bits: int) -> Shape | None:
    if "qweight" not in module or "scales" not in module:
        return None
    return _two(module["scales"])[1], _two(module["qweight"])[0]


def _exl2(module: _Shapes, bits: int) -> Shape | None:
    """The columns are padded to 32 (see `PADDED`)."""
    if "q_weight" not in module or "q_invperm" not in module:
        return None
    return _two(module["q_weight"])[1], module["q_invperm"].parameters


def _compressed(module: _Shapes, bits: int) -> Shape | None:
    if "weight_packed" in module and bits:
        out, words = _two(module["weight_packed"])
        return out, words * 8 * DTYPES[module["weight_packed"].dtype].size // bits
    return _eight_bit(module, bits)


def _eight_bit(module: _Shapes, bits: int) -> Shape | None:
    """fp8 and int8 keep the shape. bitsandbytes' 4 bit does not, and says the shape in its data only."""
    weight = module.get("weight")
    if weight is None or len(weight.shape) != 2 or weight.dtype == "U8":
        return None
    return weight.shape


def _two(info: TensorInfo) -> tuple[int, int]:
    return (info.shape[0], info.shape[1]) if len(info.shape) == 2 else (0, 0)


_FORMATS: dict[str, Callable[[_Shapes, int], Shape | None]] = {
    "gptq": _gptq,
    "awq": _awq,
    "exl2": _exl2,
    "compressed-tensors": _compressed,
    "fp8": _eight_bit,
    "fbgemm_fp8": _eight_bit,
    "bitsandbytes": _eight_bit,
}
"""quant_method of a quantization_config -> how a packed linear's (out, in) is read off."""

PADDED = ("exl2",)
"""Methods that store more columns than there are: where config.json says fewer, it is right."""


def unpacked_shapes(tensors: Mapping[str, TensorInfo], quantization: dict[str, Any]) -> dict[str, Shape]:
    """Name -> shape as if nothing were packed; linears whose shape the headers do not say are left out."""
    method = quantization.get("quant_method")
    read = _FORMATS.get(method) if isinstance(method, str) else None
    bits = bits_of(quantization)
    modules: dict[str, dict[str, TensorInfo]] = {}
    found: dict[str, Shape] = {}
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = info
        if part not in ("weight", "qweight", "q_weight", "weight_packed"):
            found[name] = info.shape
    for module, parts in modules.items():
        weight = parts.get("weight")
        shape = read(parts, bits) if read else None
        if shape is None and weight is not None and _is_plain(weight):
            shape = weight.shape
        if shape is not None and 0 not in shape:
            found[f"{module}.weight"] = shape
    return found


def _is_plain(weight: TensorInfo) -> bool:
    return DTYPES[weight.dtype].floating


def joined(tensors: Iterable[SpecTensor], linears: Mapping[str, tuple[Shape, str]]) -> Iterator[SpecTensor]:
    """The tensors with the parts of each packed linear as one, in its real shape, where the first of them stood.

    Args:
        linears: name ("....weight") -> its real shape and its role.
    """
    owned: dict[str, list[SpecTensor]] = {}
    for tensor in tensors:
        owned.setdefault(_owner(tensor.name, linears), []).append(tensor)
    for name, parts in owned.items():
        if name not in linears or [part.name for part in parts] == [name]:
            yield from parts
            continue
        shape, role = linears[name]
        largest = max(parts, key=lambda part: part.nbytes)
        size = sum(part.nbytes for part in parts)
        yield replace(largest, name=name, shape=shape, nbytes=size, role=role, parts=tuple(parts))


def _owner(name: str, linears: Mapping[str, object]) -> str:
    """The linear that a tensor is a part of, however deep ("weight.quant_state.x"); else the tensor itself."""
    path = name
    while "." in path and not name.endswith(".bias"):
        path = path.rpartition(".")[0]
        if f"{path}.weight" in linears:
            return f"{path}.weight"
    return name
