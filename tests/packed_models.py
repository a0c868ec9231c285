"""Made-up quantized models without torch: real headers of every format, zeros that take no room as weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_models import Llama

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I32": 4, "I8": 1, "U8": 1}
Parts = dict[str, tuple[str, tuple[int, ...]]]  # the name behind the module's -> (dtype, shape)


def gptq(out: int, into: int, bits: int = 4, group: int = 128) -> Parts:
    groups = 1 if group < 0 else math.ceil(into / group)
    return {
        "qweight": ("I32", (into * bits // 32, out)),
        "qzeros": ("I32", (groups, out * bits // 32)),
        "scales": ("F16", (groups, out)),
        "g_idx": ("I32", (into,)),
    }


def awq(out: int, into: int, bits: int = 4, group: int = 128) -> Parts:
    parts = gptq(out, into, bits, group) | {"qweight": ("I32", (into, out * bits // 32))}
    return {name: part for name, part in parts.items() if name != "g_idx"}


def compressed(out: int, into: int, bits: int = 4, group: int = 128) -> Parts:
    groups = 1 if group < 0 else into // group
    return {
        "weight_packed": ("I32", (out, into * bits // 32)),
        "weight_scale": ("F16", (out, groups)),
    }


def fp8(out: int, into: int, bits: int = 8, group: int = 128) -> Parts:
    blocks = (math.ceil(out / group), math.ceil(into / group))
    return {"weight": ("F8_E4M3", (out, into)), "weight_scale_inv": ("F32", blocks)}


def nf4(out: int, into: int, bits: int = 4, group: int = 64) -> Parts:
    return {
        "weight": ("U8", (out * into // 2, 1)),
        "weight.absmax": ("F32", (math.ceil(out * into / group),)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (79,)),
    }


PACK: dict[str, tuple[Callable[..., Parts], dict[str, Any]]] = {
    "gptq": (gptq, {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}),
    "awq": (awq, {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (
        compressed,
        {
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128, "symmetric": True}}},
        },
    ),
    "fp8": (fp8, {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
    "bitsandbytes": (nf4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}
"""quant_method -> the parts of a linear, and the rest of its quantization_config."""


def tensors_of(shape: Llama, method: str, **sizes: int) -> Parts:
    """Tensor name -> (dtype, shape) of a whole model whose layers' linears are packed."""
    pack = PACK[method][0]
    found: Parts = {}
    for name, size in shape.tensors().items():
        if not name.endswith("_proj.weight"):
            found[name] = ("F16", size)
            continue
        module = name.removesuffix("weight")
        found |= {module + part: value for part, value in pack(*size, **sizes).items()}
    return found


def write_packed(
    folder: Path,
    shape: Llama,
    method: str,
    said: dict[str, Any] | None = None,
    leave_out: str = "",
    config: dict[str, Any] | None = None,
    **sizes: int,
) -> Path:
    """A model folder; `said` is put over its quantization_config, `sizes` (bits, group) are those of the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(shape, method, **sizes)
    tensors.pop(leave_out, None)
    entries, end = {}, 0
    for name, (dtype, size) in tensors.items():
        length = math.prod(size) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    quantization = {"quant_method": method} | PACK[method][1] | (said or {})
    stated = {key: value for key, value in quantization.items() if value is not None}
    whole = shape.config() | {"quantization_config": stated} | (config or {})
    (folder / "config.json").write_text(json.dumps(whole))
    return folder
