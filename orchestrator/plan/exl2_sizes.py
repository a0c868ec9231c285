"""How many bytes an EXL2 model takes: in the file, and on a GPU once exllamav2 0.3.2 has loaded it. No torch."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from orchestrator.backends.exl2_setup import MAX_INPUT, round_up
from orchestrator.checkpoint.spec import ModelSpec, SpecTensor

# The head's quantization: head_bits -> (rows of a group, ((bits, share of the rows), ...)), as its qparams.py has it.
HEAD: dict[int, tuple[int, tuple[tuple[int, Fraction], ...]]] = {
    2: (32, ((4, Fraction(3, 10)), (2, Fraction(7, 10)))),
    3: (32, ((4, Fraction(15, 100)), (3, Fraction(85, 100)))),
    4: (32, ((6, Fraction(15, 100)), (4, Fraction(85, 100)))),
    5: (128, ((6, Fraction(15, 100)), (5, Fraction(85, 100)))),
    6: (128, ((8, Fraction(15, 100)), (6, Fraction(85, 100)))),
    8: (128, ((8, Fraction(1)),)),
}
_MAX_DQ = 512 * 2**20  # elements that are dequantized at once
_HALF = 2  # bytes
# PyTorch takes it for cuBLAS from its own allocator: 32 MiB on compute capability 9.0 (the peak there was 30 MiB over a
# plan without it), 8 MiB on older cards.
CUBLAS_WORKSPACE = 32 * 2**20
_PERMUTED = "down_proj"  # its permutation is folded into gate and up while loading


@dataclass(frozen=True)
class Piece:
    """A module in the order of loading: an attention block, an MLP block, a norm, the head.

    Attributes:
        weights: bytes on its GPU.
        footprint: bytes that the manual split counts for it (those of the file).
        adapters: bytes beside the weights, of adapters that are not merged; no split of its own counts them.
        scratch: bytes of scratch that the manual split wants beside it, without the fixed part of attention.
        cached: whether it has a share of the KV cache.
    """

    weights: int
    footprint: int
    scratch: int
    cached: bool
    adapters: int = 0


def pad32(columns: int) -> int:
    """Output columns of a quantized linear are padded to 32."""
    return -(-columns // 32) * 32


def head_file_bytes(rows: int, columns: int, head_bits: int) -> int:
    """Bytes of the quantized head (rows is the hidden size), exactly."""
    group, parts = HEAD[head_bits]
    left, groups, weights = rows, 0, 0
    for bits, share in parts:
        count = math.ceil(min(rows * share, Fraction(left)) / group)
        used = min(count * group, left)
        weights += used * columns * bits
        left -= used
        groups += count
    # Scales of 4 bits per column, and per group 16 bits of largest scale and 32 of its place; the permutation.
    return (weights + groups * (columns * 4 + 16 + 32) + rows * 32) // 8


def linear_loaded_bytes(shape: tuple[int, ...], bits: float, name: str) -> int:
    """Bytes of a quantized linear of shape (out, in) on the GPU, on average: the file's share and a group map."""
    out, rows = pad32(shape[0]), shape[1]
    group_map = 4 * rows
    # Two 16-bit permutations take what the file's 32-bit one did, except where both are dropped.
    return int(out * rows * bits / 8) + group_map - (4 * rows if f".{_PERMUTED}." in name else 0)


def other_bytes(spec: ModelSpec, tensor: SpecTensor) -> int:
    """Norms and biases, in half precision; norms of heads are repeated for each head."""
    count = math.prod(tensor.shape)
    if tensor.name.endswith("q_norm.weight"):
        count *= spec.heads if tensor.shape == (spec.head_dim,) else 1
    if tensor.name.endswith("k_norm.weight"):
        count *= spec.kv_heads if tensor.shape == (spec.head_dim,) else 1
    return _HALF * count


def _packed_bytes(tensor: SpecTensor) -> tuple[int, int]:
    """(on the GPU, in the file) of a linear that is stored quantized, by its headers (ext.py's make_q_matrix).

    EXL2 as for `linear_loaded_bytes`. GPTQ gets two 16-bit permutations beside the g_idx that it has.
    """
    stored, rows = sum(part.nbytes for part in tensor.parts), tensor.shape[1]
    if tensor.part("q_weight"):
        return stored + 4 * rows - (4 * rows if f".{_PERMUTED}." in tensor.name else 0), stored
    return stored + (4 * rows if tensor.part("g_idx") else 0), stored


def linear_bytes(tensor: SpecTensor, bits: float, quantized: bool) -> tuple[int, int]:
    """(on the GPU, in the file)."""
    if tensor.parts:
        return _packed_bytes(tensor)
    out, rows = pad32(tensor.shape[0]), tensor.shape[1]
    if not quantized:
        return _HALF * out * rows, _HALF * out * rows
    return linear_loaded_bytes(tensor.shape, bits, tensor.name), int(out * rows * bits / 8) + 4 * rows


def embedding_bytes(spec: ModelSpec) -> int:
    """Of the embedding, which stays in host memory, in half precision."""
    return _HALF * spec.vocab * spec.hidden


def pieces(spec: ModelSpec, bits: float, head_bits: int, quantized: bool, context: int) -> list[Piece]:
    """The model's modules on the GPUs, in the order of loading.

    All layers are taken to have the same width, but for those of a model that is quantized already.
    """
    size, last = _block_bytes(spec, bits, quantized)
    loras = _adapter_bytes(spec)
    scratch = {"attention": _attention_scratch(spec, context), "mlp": _mlp_scratch(spec, context)}
    blocks = [
        Piece(*size[layer, block], scratch[block], block == "attention", loras.get((layer, block), 0))
        for layer in range(spec.layers)
        for block in ("attention", "mlp")
        if (layer, block) in size
    ]
    loaded, stored = head_bytes(spec, head_bits, quantized)
    head = Piece(loaded, stored, dequantized(spec.hidden, pad32(spec.vocab)), False)
    return [*blocks, Piece(last, last, 0, False), head]


@functools.lru_cache(maxsize=64)  # a plan asks for each context that it tries
def _block_bytes(
    spec: ModelSpec, bits: float, quantized: bool
) -> tuple[Mapping[tuple[int, str], tuple[int, int]], int]:
    """(layer, block) -> (on the GPU, in the file); and what is in no layer beside embedding and head."""
    size: dict[tuple[int, str], tuple[int, int]] = {}
    last = 0
    for tensor in spec.tensors:
        if tensor.layer is None:
            last += other_bytes(spec, tensor) if tensor.role == "other" else 0
            continue
        block = _block(tensor.name)
        before = size.get((tensor.layer, block), (0, 0))
        loaded, stored = (
            linear_bytes(tensor, bits, quantized and spec.quantization is None)
            if tensor.role == "linear" or tensor.parts
            else (other_bytes(spec, tensor), other_bytes(spec, tensor))
        )
        size[tensor.layer, block] = before[0] + loaded, before[1] + stored
    return size, last


def _block(name: str) -> str:
    """The block of a layer that a tensor of it belongs to."""
    return "mlp" if ".mlp." in name or "post_attention" in name else "attention"


@functools.lru_cache(maxsize=64)
def _adapter_bytes(spec: ModelSpec) -> Mapping[tuple[int, str], int]:
    """(layer, block) -> bytes of the adapters' factors, which lie beside their linear in half precision."""
    found: Counter[tuple[int, str]] = Counter()
    for lora in spec.loras:
        found[lora.layer, _block(lora.module)] += _HALF * lora.elements
    return found


def adapter_scratch(spec: ModelSpec, context: int, quantized: bool) -> int:
    """What a block takes to run adapters (x A^T for a whole input); a linear that is not quantized also the sum."""
    widest = max((lora.outputs for lora in spec.loras), default=0)
    rank = max((lora.rank for lora in spec.loras), default=0)
    return _HALF * input_tokens(context) * (rank + (0 if quantized else widest))


@functools.lru_cache(maxsize=64)
def head_bytes(spec: ModelSpec, head_bits: int, quantized: bool) -> tuple[int, int]:
    """(on the GPU, in the file) of the output head, which is there even where the embedding is tied to it."""
    columns = pad32(spec.vocab)
    plain = _HALF * spec.hidden * columns
    if spec.quantization is not None:
        packed = next((t for t in spec.tensors if t.role == "head" and t.parts), None)
        return _packed_bytes(packed) if packed else (plain, plain)
    stored = head_file_bytes(spec.hidden, columns, head_bits) if quantized else plain
    return stored + (4 * spec.hidden if quantized else 0), stored


def dequantized(rows: int, columns: int) -> int:
    """Bytes of the buffer that a linear is dequantized into for a matrix product."""
    return 2 * min(rows * columns, _MAX_DQ)


def input_tokens(context: int) -> int:
    """Tokens of one forward pass at most."""
    return min(MAX_INPUT, round_up(context))


def _attention_scratch(spec: ModelSpec, context: int) -> int:
    """As its attn.py counts it for the manual split."""
    tokens, queries, keys = input_tokens(context), spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    state = 2 * tokens * max(queries, spec.hidden)
    repeated = 0 if spec.heads == spec.kv_heads else 4 * round_up(context) * queries
    return state + 2 * tokens * (queries + 2 * keys) + dequantized(spec.hidden, pad32(queries)) + repeated


def _mlp_scratch(spec: ModelSpec, context: int) -> int:
    tokens, widest = input_tokens(context), max(spec.hidden, spec.intermediate)
    return 2 * tokens * spec.hidden + 4 * tokens * widest + dequantized(spec.hidden, pad32(spec.intermediate))


def fixed_scratch(spec: ModelSpec, context: int, quantized: bool) -> int:
    """Of each GPU with a part of the model: the device's scratch, the angles, the activations of one prefill step."""
    tokens, queries = input_tokens(context), spec.heads * spec.head_dim
    attention = 2 * tokens * max(queries, spec.hidden) + dequantized(spec.hidden, pad32(queries))
    head = dequantized(spec.hidden, pad32(spec.vocab))
    angles = 2 * 2 * round_up(context) * spec.head_dim
    activations = 2 * tokens * (4 * spec.hidden + 2 * queries + 2 * spec.kv_heads * spec.head_dim)
    if not quantized:  # every intermediate is a tensor of its own
        return CUBLAS_WORKSPACE + angles + activations + 2 * tokens * 3 * spec.intermediate
    return CUBLAS_WORKSPACE + max(attention, _mlp_scratch(spec, context), head) + angles + activations


def split_constants(spec: ModelSpec, context: int) -> tuple[int, int]:
    """What the manual split takes from each GPU's share: (once, for the largest attention), with flash-attn."""
    tokens, length = input_tokens(context), round_up(context)
    once = 2 * 2 * spec.head_dim * length + 2 * tokens * spec.hidden + 2 * tokens * tokens
    weights = min(2048**2, length**2) // (2048 / 190)
    return once, int(2 * weights * spec.heads * 2)


def cache_bytes(spec: ModelSpec, cache_bits: int) -> tuple[float, int]:
    """(per token and layer, per token and GPU): all but the 16-bit cache keep one layer of it in 16 bits."""
    width = spec.kv_heads * spec.head_dim
    per_layer = {16: 4.0, 8: 2.125, 6: 1.625, 4: 1.125}[cache_bits] * width
    return per_layer, 0 if cache_bits == 16 else 4 * width
