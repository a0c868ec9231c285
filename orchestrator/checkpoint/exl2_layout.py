"""EXL2 files by themselves: what their headers and their data must say, their real bits per weight, their numbers.

A quantized linear of `in` rows and `out` columns (padded to 32) is five tensors, as exllamav2 0.3.2 writes them
(conversion/adaptivegptq.py) and reads them (exllamav2_ext/cuda/q_matrix.cu, quant/qdq_*.cuh):

    q_weight     int32 [words, out]      in a group each column is a stream of bits down the rows, low bits first
    q_groups     int16 [2 * groups]      of each group: its bits per weight, its first row of q_weight
    q_scale      int32 [groups, out / 8] eight numbers of 4 bits, the low ones first: 1 less than a scale's root
    q_scale_max  float16 [groups]        what a group's scales are multiplied with, times 256
    q_invperm    int32 [in]              which stored row an input row is: rows are stored by their importance

No torch; numpy only where data are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.reader import read_words
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

PARTS = {"q_weight": "I32", "q_invperm": "I32", "q_scale": "I32", "q_scale_max": "F16", "q_groups": "I16"}
"""Part of a quantized linear -> its dtype."""

WIDTHS = (2, 3, 4, 5, 6, 8)
TOLERANCE = 0.01
"""Share by which real bits per weight may differ from those that are said."""

_AGAIN = "Download the model again, or convert it anew."
_WIDEST, _STEP, _LEAST = 8, 2, 3
"""Bits per weight that the converter gives at most; by which two of its mixes for a block that follow each other
differ at most; and below which a target may be missed in a small model, whose groups are a large part of its rows."""

_BLOCK = re.compile(r"(.+\.\d+\.[^.]+)\.")  # a layer's attention, or its MLP with all its experts
_HEAD = "lm_head"  # the only name that the converter knows for it
_WORD = 32  # bits
_ROOTS = 8  # roots of scales in a word


@dataclass(frozen=True)
class Packed:
    """A quantized linear by its headers.

    Attributes:
        rows: its inputs.
        columns: its outputs, padded to 32.
    """

    module: str
    rows: int
    columns: int
    groups: int
    parts: Mapping[str, TensorInfo]

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())

    @property
    def beside(self) -> int:
        """Bytes that are stored beside the weights' own."""
        return self.nbytes - self.parts["q_weight"].nbytes

    @property
    def bits(self) -> float:
        """Bits per weight with everything that is stored beside the weights, as the converter counts its target."""
        return mean_bits([self])


def mean_bits(linears: Iterable[Packed]) -> float:
    """Bits per weight of several linears together."""
    found = list(linears)
    return 8 * sum(linear.nbytes for linear in found) / max(sum(linear.weights for linear in found), 1)


def stored_bits(tensors: Mapping[str, TensorInfo]) -> tuple[float, float]:
    """(of the layers, of the head): the bits per weight that an EXL2 model really has, from its headers.

    Raises:
        CheckpointError: see `packed_linears`; or one of the two is not there.
    """
    linears = packed_linears(tensors).values()
    head = [linear for linear in linears if _is_head(linear)]
    layers = [linear for linear in linears if not _is_head(linear)]
    plain = tensors.get(f"{_HEAD}.weight")  # which exllamav2 reads, though its converter leaves none so
    if not layers or not (head or plain):
        raise CheckpointError(f"there is no quantized {'head' if layers else 'layer'} among its tensors", _AGAIN)
    if plain is not None and not head:
        return mean_bits(layers), 8 * plain.nbytes / max(plain.parameters, 1)
    return mean_bits(layers), mean_bits(head)


def _is_head(linear: Packed) -> bool:
    return linear.module.rpartition(".")[2] == _HEAD


def packed_linears(tensors: Mapping[str, TensorInfo]) -> dict[str, Packed]:
    """Every quantized linear by the name of its module, checked as far as headers go.

    Raises:
        CheckpointError: one lacks a part, or its parts do not fit together (named).
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if part in PARTS:
            modules.setdefault(module, {})[part] = info
    return {module: _packed(module, parts) for module, parts in modules.items()}


def _packed(module: str, parts: dict[str, TensorInfo]) -> Packed:
    for part, dtype in PARTS.items():
        info = parts.get(part)
        if info is None:
            other = next(iter(parts.values()))
            raise CheckpointError(f"{_file(other)}: there is no {shown(module)}.{part}", _AGAIN)
        if info.dtype != dtype:
            raise _wrong(info, f" is {info.dtype}, not {dtype}")
    rows, groups = parts["q_invperm"].parameters, parts["q_scale_max"].parameters
    words, columns = (*parts["q_weight"].shape, 0, 0)[:2]
    wanted = {
        "q_weight": (words, columns),
        "q_invperm": (rows,),
        "q_scale_max": (groups,),
        "q_scale": (groups, columns // _ROOTS),
        "q_groups": (2 * groups,),
    }
    for part, shape in wanted.items():
        if parts[part].shape != shape:
            raise _wrong(parts[part], f" has shape {list(parts[part].shape)}, not {list(shape)}")
    if not rows or not groups or columns % 32 or not WIDTHS[0] * rows <= words * _WORD <= WIDTHS[-1] * (rows + _WORD):
        raise _wrong(parts["q_weight"], f" has shape [{words}, {columns}], which {rows} rows cannot have")
    return Packed(module, rows, columns, groups, parts)


def _wrong(info: TensorInfo, what: str) -> CheckpointError:
    """The error for a tensor, named with its file; `what` is said after its name."""
    return CheckpointError(f"{_file(info)}: {shown(info.name)}{what}", _AGAIN)


def _file(info: TensorInfo) -> str:
    return shown(info.file, 400)


@dataclass(frozen=True)
class Group:
    """Rows of a linear that share their bits and their scales: of the stored rows, and of q_weight's."""

    bits: int
    rows: slice
    words: slice


def read_groups(linear: Packed) -> list[Group]:
    """The groups of a linear, which fill its rows and q_weight's without a gap.

    Raises:
        CheckpointError: they do not; or the file has become shorter.
    """
    numbers = _read(linear.parts["q_groups"]).tolist()
    starts = [*numbers[1::2], linear.parts["q_weight"].shape[0]]
    found, row = [], 0
    for index, bits in enumerate(numbers[0::2]):
        start, end = starts[index], starts[index + 1]
        last = index == linear.groups - 1
        if bits not in WIDTHS or start >= end or (index == 0 and start):
            raise _wrong(linear.parts["q_groups"], f": group {index} is {bits} bits from row {start}")
        rows = linear.rows - row if last else (end - start) * _WORD // bits
        if rows <= 0 or -(-rows * bits // _WORD) != end - start or (not last and rows * bits % _WORD):
            raise _wrong(
                linear.parts["q_groups"],
                f": group {index} has {end - start} rows of words for {rows} of {bits} bits, of {linear.rows} in all",
            )
        found.append(Group(bits, slice(row, row + rows), slice(start, end)))
        row += rows
    return found


def check_data(linear: Packed) -> None:
    """Checks what headers do not say: the groups, the order of the rows, the scales. q_weight is not read.

    Raises:
        CheckpointError: one of them is wrong (named).
    """
    import numpy as np

    read_groups(linear)
    order = _read(linear.parts["q_invperm"])
    if not np.array_equal(np.sort(order), np.arange(linear.rows, dtype=order.dtype)):
        raise _wrong(linear.parts["q_invperm"], f" is no order of {linear.rows} rows")
    largest = _read(linear.parts["q_scale_max"]).view(np.float16)
    if not np.isfinite(largest).all():
        count = int((~np.isfinite(largest)).sum())
        raise _wrong(linear.parts["q_scale_max"], f": {count} of {linear.groups} are not finite")


def decode(linear: Packed) -> np.ndarray[Any, Any]:
    """The weights as float32 [in, out], each rounded to float16 as the engine's kernels do.

    Raises:
        CheckpointError: see `read_groups`.
    """
    import numpy as np

    words, largest = _read(linear.parts["q_weight"]), _read(linear.parts["q_scale_max"]).view(np.float16)
    shifts = np.arange(0, _WORD, _WORD // _ROOTS, dtype=np.uint32)
    roots = (_read(linear.parts["q_scale"])[:, :, None] >> shifts & 15).reshape(linear.groups, -1) + 1
    scales = (roots**2).astype(np.float16) * (largest * np.float16(1 / 256))[:, None]
    stored = np.empty((linear.rows, linear.columns), np.float32)
    for group, scale in zip(read_groups(linear), scales, strict=True):
        codes = _codes(words[group.words], group.bits, group.rows.stop - group.rows.start)
        stored[group.rows] = (codes - 2 ** (group.bits - 1)).astype(np.float16) * scale
    rows: np.ndarray[Any, Any] = stored[_read(linear.parts["q_invperm"])]
    return rows


def _codes(words: np.ndarray[Any, Any], bits: int, rows: int) -> np.ndarray[Any, Any]:
    """int32 [rows, columns] of a group's words."""
    import numpy as np

    stream = np.ascontiguousarray(words.T).astype("<u4", copy=False).view(np.uint8)
    each = np.unpackbits(stream, axis=1, count=rows * bits, bitorder="little").reshape(len(stream), rows, bits)
    codes: np.ndarray[Any, Any] = (each.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(2, dtype=np.int32)
    return codes.T


def _read(info: TensorInfo) -> np.ndarray[Any, Any]:
    return read_words(info, 0, info.shape[0])


@dataclass(frozen=True)
class Summary:
    """What a folder with an EXL2 model holds.

    Attributes:
        bits: per weight of the layers, with everything that is stored beside the weights.
        head_bits: the same of the head.
        linears: the same of each.
    """

    bits: float
    head_bits: float
    linears: dict[str, float]


def check_exl2(folder: Path, bits: float | None = None) -> Summary:
    """An EXL2 model's files: headers, groups, orders and scales, and whether it has the bits that it says.

    Args:
        bits: that its layers are known to have; None: those of config.json, as near as the converter comes to them.

    Raises:
        CheckpointError: what is wrong (named).
    """
    tensors = {info.name: info for info in _all_tensors(folder)}
    layers, head = stored_bits(tensors)
    said, said_head = _signature(folder)
    if bits is not None and not math.isclose(layers, bits, rel_tol=TOLERANCE):
        raise _other_bits(folder, layers, bits)
    linears = check_headers(folder, tensors, said if bits is None else bits, said_head)
    for linear in linears.values():
        check_data(linear)
    return Summary(layers, head, {module: linear.bits for module, linear in linears.items()})


def check_headers(
    folder: Path, tensors: Mapping[str, TensorInfo], bits: float, head_bits: float = 0
) -> dict[str, Packed]:
    """Every quantized linear of a model, checked as far as headers go, with the bits that config.json says.

    Args:
        bits: per weight of the layers, as config.json says it: what the converter was asked for.
        head_bits: the same of the head; 0: it says none.

    Raises:
        CheckpointError: what is wrong (named).
    """
    linears = packed_linears(tensors)
    _check_once(linears, tensors)
    _check_layers(folder, [linear for linear in linears.values() if not _is_head(linear)], bits)
    for head in filter(_is_head, linears.values()):
        if head.bits < head_bits:
            raise CheckpointError(
                f"{shown(folder, 400)}: its head has {head.bits:.3f} bits per weight, not {head_bits:g}", _AGAIN
            )
    return linears


def _check_once(linears: Mapping[str, Packed], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError where a linear is there unquantized too: which of the two is right, nothing says."""
    for module, linear in linears.items():
        plain = tensors.get(f"{module}.weight")
        if plain is not None:
            packed = linear.parts["q_weight"]
            beside = "" if packed.file == plain.file else f" of {shown(packed.file.name)}"
            raise _wrong(plain, f" is the same linear as {shown(packed.name)}{beside}: it is there twice")


def _check_layers(folder: Path, layers: list[Packed], said: float) -> None:
    """Raises CheckpointError unless the layers can be what the converter gives for a target of `said` bits.

    It stays below its target by less than the next mix of a block would add, which is much where there are few
    blocks. Above it are only the least mixes. Some who sign a model by hand leave out what stands beside the weights.
    """
    if not layers:
        raise CheckpointError(
            f"{shown(folder, 400)}: config.json says exl2, and no linear of its layers is quantized so",
            "Download the model again, or take quantization_config out of config.json.",
        )
    weights = max(sum(linear.weights for linear in layers), 1)
    blocks: dict[str, int] = {}
    for linear in layers:
        found = _BLOCK.match(linear.module)
        block = found[1] if found else linear.module
        blocks[block] = blocks.get(block, 0) + linear.weights
    real, beside = mean_bits(layers), 8 * sum(linear.beside for linear in layers) / weights
    low = min(said, _WIDEST) * (1 - TOLERANCE) - _STEP * max(blocks.values(), default=0) / weights
    high = max(said, _LEAST) * (1 + TOLERANCE) + beside
    if not low <= real <= high:
        raise _other_bits(folder, real, said)


def _other_bits(folder: Path, real: float, said: float) -> CheckpointError:
    return CheckpointError(
        f"{shown(folder, 400)}: its layers have {real:.3f} bits per weight, not {said:g}",
        "Download the model again, or correct quantization_config in config.json.",
    )


def _all_tensors(folder: Path) -> Iterator[TensorInfo]:
    for file in sorted(folder.glob("*.safetensors")):
        yield from read_safetensors_header(file).tensors


def _signature(folder: Path) -> tuple[float, float]:
    """(bits, head_bits) of config.json's quantization_config."""
    try:
        signed = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        if signed["quant_method"] != "exl2":
            raise ValueError(f"quant_method is {signed['quant_method']}")
        return float(signed["bits"]), float(signed.get("head_bits") or 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{shown(folder, 400)}/config.json does not say exl2's bits ({shown(error)})") from None
