"""Whether exllamav2's converter has made what it was asked for: by the files, whatever it said. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.architectures import architecture_of, is_tied
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.plan.exl2_sizes import pad32

_PARTS = ("q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups")
_DTYPES = {"q_weight": "I32", "q_invperm": "I32", "q_scale": "I32", "q_scale_max": "F16", "q_groups": "I16"}


class NotWhole(Exception):
    """What is wrong with a result, to be said after "and"."""


@dataclass(frozen=True)
class Linears:
    """The linears of a model that are quantized: module -> (out, in)."""

    layers: dict[str, tuple[int, int]]
    head: tuple[int, int]
    plain: tuple[str, ...]  # tensors that are copied
    biases: tuple[str, ...]

    @classmethod
    def of(cls, source: Checkpoint) -> Linears:
        """Those of the model that is converted."""
        row = architecture_of(source.config, str(source.path))
        count = 1 + max(
            int(name[len(prefix) :].split(".", 1)[0])
            for name in source.tensors
            for prefix in (row.layer.split("{}")[0],)
            if name.startswith(prefix)
        )
        modules = [f"{row.layer.format(layer)}{linear}" for layer in range(count) for linear in row.linears]
        norms = [f"{row.layer.format(layer)}{norm}.weight" for layer in range(count) for norm in row.norms]
        layers = {module: _shape(source.tensors[f"{module}.weight"]) for module in modules}
        tied = is_tied(source.config) or row.head not in source.tensors
        head = _shape(source.tensors[row.embedding if tied else row.head])
        biases = tuple(f"{module}.bias" for module in modules if f"{module}.bias" in source.tensors)
        return cls(layers, head, (row.embedding, row.final_norm, *norms), biases)


def _shape(info: TensorInfo) -> tuple[int, int]:
    return info.shape[0], info.shape[1]


def judge_measurement(file: Path, source: Checkpoint) -> dict[str, Any]:
    """Checks that a measurement covers every layer of the model.

    Returns:
        JSON-able: how many modules were measured, with how many options in all.

    Raises:
        NotWhole: it does not.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        measured, _ = value["measurement"], int(value["last_module_idx"])
        options = {name: len(found) for name, found in measured.items() if isinstance(found, list) and found}
    except FileNotFoundError:
        raise NotWhole("wrote no measurement") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotWhole(f"wrote a measurement that cannot be read ({error!r})") from None
    blocks = {".".join(module.split(".")[:-1]) for module in Linears.of(source).layers}
    missing = sorted(blocks - set(options))
    if missing:
        raise NotWhole(f"measured nothing of {len(missing)} of {len(blocks)} blocks, the first is {missing[0]}")
    return {"modules": len(blocks), "options": sum(options[block] for block in blocks)}


def judge_model(folder: Path, source: Checkpoint, bits: float, head_bits: int) -> dict[str, Any]:
    """Checks an EXL2 model against the one that it was made from: every tensor, its shape, config.json, the tokenizer.

    Returns:
        JSON-able: the bits per weight that the layers and the head really have, bytes, exllamav2's version.

    Raises:
        NotWhole: something is missing or wrong.
    """
    tensors = _tensors(folder)
    linears = Linears.of(source)
    for module, shape in (*linears.layers.items(), (_head_name(source), linears.head)):
        _check_linear(tensors, module, shape)
    for name in (*linears.plain, *linears.biases):
        if name not in tensors:
            raise NotWhole(f"wrote no {name}")
    version = _check_config(folder, source, bits, head_bits)
    if not any(folder.glob("tokenizer*")) and any(source.path.glob("tokenizer*")):
        raise NotWhole("left the tokenizer out")
    head = _head_name(source)
    return {
        "bits": bits,
        "measured_bits": _bits(tensors, linears.layers),
        "head_bits": head_bits,
        "measured_head_bits": _bits(tensors, {head: linears.head}),
        "bytes": sum(info.nbytes for info in tensors.values()),
        "tensors": len(tensors),
        "exllamav2": version,
    }


def _head_name(source: Checkpoint) -> str:
    return architecture_of(source.config, str(source.path)).head.removesuffix(".weight")


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    files = sorted(folder.glob("output*.safetensors"))
    if not files:
        raise NotWhole("wrote no model")
    if any("_temp_" in file.name for file in files):
        raise NotWhole("did not finish writing the model")
    found: dict[str, TensorInfo] = {}
    try:
        for file in files:
            found |= {info.name: info for info in read_safetensors_header(file).tensors}
    except CheckpointError as error:
        raise NotWhole(f"wrote a damaged file: {error.message}") from error
    return found


def _check_linear(tensors: dict[str, TensorInfo], module: str, shape: tuple[int, int]) -> None:
    for part in _PARTS:
        info = tensors.get(f"{module}.{part}")
        if info is None:
            raise NotWhole(f"wrote no {module}.{part}")
        if info.dtype != _DTYPES[part]:
            raise NotWhole(f"wrote {module}.{part} as {info.dtype}, not {_DTYPES[part]}")
    out, rows = pad32(shape[0]), shape[1]
    groups = tensors[f"{module}.q_scale_max"].shape
    wanted = {
        "q_weight": (tensors[f"{module}.q_weight"].shape[0], out),
        "q_invperm": (rows,),
        "q_scale": (*groups, out // 8),
        "q_groups": tuple(2 * size for size in groups),
    }
    for part, size in wanted.items():
        have = tensors[f"{module}.{part}"].shape
        if have != size:
            raise NotWhole(f"wrote {module}.{part} with shape {list(have)}, not {list(size)}")


def _check_config(folder: Path, source: Checkpoint, bits: float, head_bits: int) -> str:
    """exllamav2's version, from the signature that its converter leaves in config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        signed = config["quantization_config"]
        said = (signed["quant_method"], float(signed["bits"]), int(signed["head_bits"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotWhole(f"signed no config.json ({error!r})") from None
    if said != ("exl2", bits, head_bits):
        raise NotWhole(f"signed {said[0]} with {said[1]:g} bits and {said[2]} for the head in config.json")
    if config.get("rope_theta") != source.config.get("rope_theta", config.get("rope_theta")):
        raise NotWhole(f"wrote another rope_theta than {source.config['rope_theta']} to config.json")
    return shown(signed.get("version", ""), 40)


def _bits(tensors: dict[str, TensorInfo], linears: dict[str, tuple[int, int]]) -> float:
    stored = sum(tensors[f"{module}.{part}"].nbytes for module in linears for part in _PARTS)
    return round(8 * stored / sum(pad32(out) * rows for out, rows in linears.values()), 4)
