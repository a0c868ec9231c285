"""Made-up models written straight to files, as fast as the disk takes them: one block of random words, repeated.

`write_plain` is float16 safetensors. `write_exl2` is what exllamav2 0.3.2 loads as EXL2, as its converter packs it
(conversion/adaptivegptq.py, `pack`): every linear of the layers in one width, the head in the converter's own mix,
groups of 128 rows, permutations that change nothing, scales for which dequantized weights have a spread of about 0.02.
`write_gptq` is GPTQ's first layout, as AutoGPTQ packs it: symmetric, groups of 128 in order, the head in float16.

What is uncertain of it: a real conversion gives layers widths of their own (only their sum is known), and groups of 32
rows to some of them, so that scales and group counts differ by a percent or so; true permutations are no identity,
which costs the same memory. It is for memory, placement and speed; what such a model answers is noise.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from made_up import Shape

from orchestrator import embedded
from orchestrator.plan.exl2_sizes import HEAD, pad32

BLOCK = 4_194_301  # elements: a prime, so that no two rows of a matrix are alike
GROUP = 128  # rows with one scale
HEAD_BITS = 6  # the usual, whose groups are as large
SPREAD = 0.02  # of weights
SIZES = {"F16": 2, "I16": 2, "I32": 4}
Words = np.ndarray[Any, Any]
Bytes = Callable[[int], Iterator[bytes | memoryview]]  # so many of them
Tensor = tuple[str, tuple[int, ...], Bytes]  # safetensors' dtype, shape, content


def write_plain(folder: Path, shape: Shape, context: int) -> Path:
    """A float16 checkpoint with a tokenizer of as many tokens; what is there already is left as it is."""
    half = _repeated(_random(np.float16))
    tensors = {name: ("F16", size, half if len(size) > 1 else _ONES) for name, size in shape.tensors()}
    return _write(folder, "model.safetensors", tensors, _config(shape, context), shape.vocab)


def write_config(folder: Path, shape: Shape, context: int) -> Path:
    """A folder with nothing but the float16 model's config.json: enough for a plan."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape, context), indent=1))
    return folder


def write_exl2(folder: Path, shape: Shape, context: int, bits: int, *, hollow: bool = False) -> Path:
    """The same model in EXL2: `bits` (2, 3, 4, 5, 6 or 8) for the linears of the layers.

    Args:
        hollow: the file has its header and its length, and takes no room: it is for plans, not for loading.
    """
    signed = {"quant_method": "exl2", "version": "0.3.2", "bits": float(bits), "head_bits": HEAD_BITS}
    config = _config(shape, context) | {"quantization_config": signed}
    return _write(folder, "output.safetensors", _exl2_tensors(shape, bits), config, shape.vocab, hollow)


def write_gptq(folder: Path, shape: Shape, context: int, bits: int, *, hollow: bool = False) -> Path:
    """The same model in GPTQ: `bits` (4 or 8) for the linears of the layers. `hollow`: as of `write_exl2`."""
    signed = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": True}
    config = _config(shape, context) | {"quantization_config": signed | {"checkpoint_format": "gptq"}}
    return _write(folder, "model.safetensors", _gptq_tensors(shape, bits), config, shape.vocab, hollow)


def gptq_bytes(shape: Shape, bits: int) -> int:
    """Bytes of all tensors of such a model; nothing is written."""
    return sum(map(_bytes, _gptq_tensors(shape, bits).values()))


def _gptq_tensors(shape: Shape, bits: int) -> dict[str, Tensor]:
    words, half = _repeated(_random(np.uint32)), _repeated(_random(np.float16))
    zero = sum((2 ** (bits - 1) - 1) << at for at in range(0, 32, bits))  # a word of the codes of 0, less 1
    scale = SPREAD * math.sqrt(12) / 2**bits  # of codes that are all as likely
    tensors: dict[str, Tensor] = {}
    for name, size in shape.tensors():
        module = name.removesuffix("weight")
        if ".layers." not in name or len(size) == 1:
            tensors[name] = ("F16", size, half if len(size) > 1 else _ONES)
            continue
        out, into = size
        groups = into // GROUP
        order = np.arange(into, dtype=np.int32) // GROUP
        tensors |= {
            f"{module}qweight": ("I32", (into * bits // 32, out), words),
            f"{module}qzeros": ("I32", (groups, out * bits // 32), _constant(np.uint32(zero))),
            f"{module}scales": ("F16", (groups, out), _constant(np.float16(scale))),
            f"{module}g_idx": ("I32", (into,), _of(order)),
        }
    return tensors


def exl2_bytes(shape: Shape, bits: int) -> int:
    """Bytes of all tensors of such a model; nothing is written."""
    return sum(map(_bytes, _exl2_tensors(shape, bits).values()))


def _exl2_tensors(shape: Shape, bits: int) -> dict[str, Tensor]:
    words = _repeated(_random(np.uint32))
    linears = {
        f"model.layers.{layer}.{module}": (size, ((bits, size[1]),))
        for layer in range(shape.layers)
        for module, size in shape.linears().items()
    }
    linears["lm_head"] = ((shape.vocab, shape.hidden), _head_parts(shape.hidden))
    half = _repeated(_random(np.float16))
    tensors: dict[str, Tensor] = {}
    for module, (size, parts) in linears.items():
        tensors |= {f"{module}.{part}": tensor for part, tensor in _linear(size, parts, words).items()}
    for name, size in shape.tensors():
        if name.removesuffix(".weight") not in linears:
            tensors[name] = ("F16", size, half if len(size) > 1 else _ONES)
    return tensors


def _head_parts(rows: int) -> tuple[tuple[int, int], ...]:
    """(bits, rows) of the head, as the converter shares them out: the wider ones first."""
    found, left = [], rows
    for bits, share in HEAD[HEAD_BITS][1]:
        used = min(math.ceil(min(rows * share, left) / GROUP) * GROUP, left)
        found.append((bits, used))
        left -= used
    return tuple(found)


def _linear(size: tuple[int, int], parts: tuple[tuple[int, int], ...], words: Bytes) -> dict[str, Tensor]:
    """The five tensors of a quantized linear of shape (out, in)."""
    out, rows = pad32(size[0]), size[1]
    groups: list[tuple[int, int]] = []  # (bits, first row of packed words)
    packed = 0
    for bits, count in parts:
        for start in range(0, count, GROUP):
            groups.append((bits, packed))
            packed += min(GROUP, count - start) * bits // 32
    # A weight is (q - half of the range) * (s + 1)^2 * largest / 256, for q of `bits` bits and s of 4.
    mean_square = sum((s + 1) ** 2 for s in range(16)) / 16 / 256
    largest = [SPREAD * math.sqrt(12) / 2**bits / mean_square for bits, _ in groups]
    return {
        "q_weight": ("I32", (packed, out), words),
        "q_invperm": ("I32", (rows,), _of(np.arange(rows, dtype=np.int32))),
        "q_scale": ("I32", (len(groups), out // 8), words),
        "q_scale_max": ("F16", (len(groups),), _of(np.array(largest, dtype=np.float16))),
        "q_groups": ("I16", (2 * len(groups),), _of(np.array(groups, dtype=np.uint16).reshape(-1))),
    }


def _config(shape: Shape, context: int) -> dict[str, Any]:
    more = {"head_dim": shape.hidden // shape.heads, "hidden_act": "silu", "max_position_embeddings": context}
    # No end token: answers have to run to their length.
    return shape.config() | more | {"bos_token_id": 1, "eos_token_id": None}


def _random(kind: type) -> Words:
    random = np.random.default_rng(0)
    if kind is np.float16:
        return (random.standard_normal(BLOCK, np.float32) * np.float32(SPREAD)).astype(np.float16)
    return random.integers(0, 2**32, BLOCK, dtype=np.uint32)


def _repeated(block: Words) -> Bytes:
    """Bytes of a block over and over, each tensor from where the last one ended."""
    data, at = memoryview(block).cast("B"), 0

    def read(count: int) -> Iterator[memoryview]:
        nonlocal at
        while count:
            piece = data[at : at + count]
            at = (at + len(piece)) % len(data)
            count -= len(piece)
            yield piece

    return read


def _constant(value: np.generic) -> Bytes:
    return lambda count: iter([value.tobytes() * (count // value.nbytes)])


_ONES = _constant(np.float16(1))


def _of(values: Words) -> Bytes:
    return lambda count: iter([values.tobytes()])


def _write(
    folder: Path, file: str, tensors: dict[str, Tensor], config: dict[str, Any], vocab: int, hollow: bool = False
) -> Path:
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # Words of four bytes first: all tensors then begin where they can be read at once.
    ordered = sorted(tensors.items(), key=lambda item: item[1][0] != "I32")
    with (folder / file).open("wb") as out:
        out.write(_header(ordered))
        if hollow:
            out.truncate(out.tell() + sum(_bytes(tensor) for _, tensor in ordered))
        for _, tensor in () if hollow else ordered:
            _fill(out, tensor)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, vocab, int(config["max_position_embeddings"]))
    (folder / "done").touch()
    return folder


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor[1]) * SIZES[tensor[0]]


def _header(tensors: list[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        entries[name] = {
            "dtype": tensor[0],
            "shape": list(tensor[1]),
            "data_offsets": [end, end := end + _bytes(tensor)],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _fill(out: BinaryIO, tensor: Tensor) -> None:
    for piece in tensor[2](_bytes(tensor)):
        out.write(piece)


def write_tokenizer(folder: Path, vocab: int, context: int) -> None:
    """The embedded tokenizer, made as large as the model's vocabulary by words that no text has."""
    tokenizer = json.loads((embedded.BASE / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f"<{number}>": number for number in range(max(words.values()) + 1, vocab)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((embedded.BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": context}))
