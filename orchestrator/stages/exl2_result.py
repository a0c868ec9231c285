"""Whether exllamav2's converter has made what it was asked for: by the files, whatever it said. No torch."""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.artifacts import Artifact
from orchestrator.checkpoint.architectures import architecture_of, is_tied
from orchestrator.checkpoint.carry import written_config
from orchestrator.checkpoint.exl2_layout import TOLERANCE, Packed, check_data, check_exl2, mean_bits, packed_linears
from orchestrator.checkpoint.folder import Checkpoint, carried_files
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.plan.exl2_sizes import head_file_bytes, pad32


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


def judge_model(
    folder: Path,
    source: Checkpoint,
    bits: float,
    head_bits: int,
    check_bits: Callable[[Mapping[str, Packed]], None] | None = None,
) -> dict[str, Any]:
    """Checks an EXL2 model against the one that it was made from: every tensor, its shape, groups and scales, the real
    bits per weight, config.json, the tokenizer and what else travels with it, byte for byte.

    Args:
        check_bits: looks at the linears' bits, and raises NotWhole if they are not right; None: their mean is `bits`.

    Returns:
        JSON-able: the bits per weight that the layers and the head really have, bytes, exllamav2's version.

    Raises:
        NotWhole: something is missing or wrong.
    """
    tensors = _tensors(folder)
    linears, head = Linears.of(source), _head_name(source)
    packed = _packed(tensors)
    for module, shape in (*linears.layers.items(), (head, linears.head)):
        _check_linear(packed, module, shape)
    for name in (*linears.plain, *linears.biases):
        if name not in tensors:
            raise NotWhole(f"wrote no {name}")
    version = _check_config(folder, source, bits, head_bits)
    for file in carried_files(source.path):
        if not (folder / file.name).is_file():
            raise NotWhole(f"left {file.name} out")
        if not filecmp.cmp(file, folder / file.name, shallow=False):
            raise NotWhole(f"wrote a {file.name} that is not the model's")
    real, real_head = mean_bits(packed[module] for module in linears.layers), packed[head].bits
    if check_bits is not None:
        check_bits(packed)
    elif not math.isclose(real, bits, rel_tol=TOLERANCE):
        raise NotWhole(f"wrote layers of {real:.3f} bits per weight, not {bits:g}")
    exact = 8 * head_file_bytes(packed[head].rows, packed[head].columns, head_bits) / packed[head].weights
    if not math.isclose(real_head, exact, rel_tol=5 * TOLERANCE):  # its rounding may make a group more of one width
        raise NotWhole(f"wrote a head of {real_head:.3f} bits per weight, not {exact:.3f}")
    return {
        "bits": bits,
        "measured_bits": round(real, 4),
        "head_bits": head_bits,
        "measured_head_bits": round(real_head, 4),
        "bytes": sum(info.nbytes for info in tensors.values()),
        "tensors": len(tensors),
        "exllamav2": version,
    }


def verify_artifact(artifact: Artifact) -> list[str]:
    """What is wrong with the EXL2 files of an artifact, beside their digests: against their own headers, config.json
    and the bits that they had when they were made."""
    report = artifact.manifest.get("report")
    bits = report.get("measured_bits") if isinstance(report, dict) else None
    try:
        check_exl2(artifact.path, bits)
    except CheckpointError as error:
        return [error.message]
    return []


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


def _packed(tensors: dict[str, TensorInfo]) -> dict[str, Packed]:
    """The quantized linears, their headers and data checked."""
    try:
        found = packed_linears(tensors)
        for linear in found.values():
            check_data(linear)
    except CheckpointError as error:
        raise NotWhole(f"wrote a damaged model: {error.message}") from error
    return found


def _check_linear(packed: dict[str, Packed], module: str, shape: tuple[int, int]) -> None:
    linear = packed.get(module)
    if linear is None:
        raise NotWhole(f"wrote no {module}.q_weight")
    if (linear.columns, linear.rows) != (pad32(shape[0]), shape[1]):
        raise NotWhole(f"wrote {module} with shape {[linear.columns, linear.rows]}, not {list(shape)}")


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
    for key in ("rope_theta", "rope_scaling"):  # the only form that exllamav2 reads
        wanted = written_config(source.config, "").get(key)
        if config.get(key) != wanted:
            raise NotWhole(f"wrote {key} {shown(config.get(key))} to config.json, not {shown(wanted)}")
    return shown(signed.get("version", ""), 40)
