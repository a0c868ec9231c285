"""ExLlamaV2's tensor parallel: the outputs of every linear cut over the GPUs, the cache by its heads. No torch.

Sizes as exllamav2 0.3.2 cuts and allocates them (tensor_p.py, and tp_split of attn.py, mlp.py and linear.py), over GPUs
that get the same share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.backends.exl2_setup import FLASH_CAPABILITY, SCORE_CHUNK, SCORE_ROWS, round_up
from orchestrator.backends.known_models import CUT_BY_EXLLAMAV2
from orchestrator.checkpoint.spec import ModelSpec, SpecTensor
from orchestrator.hardware import Gpu
from orchestrator.plan.exl2_sizes import (
    CUBLAS_WORKSPACE,
    dequantized,
    head_bytes,
    input_tokens,
    linear_bytes,
    other_bytes,
    pad32,
    pieces,
)
from orchestrator.plan.types import Ask

_HALF = 2  # bytes
_MLP_UNIT, _OUTPUT_UNIT = 128, 32  # columns that are not cut
_LEAST_MLP, _LEAST_OUTPUT, _LEAST_WORDS = 2, 8, 16  # units: a GPU that would get fewer gets none
_SOFTMAX = 5  # float32 copies of the logits that a score has at a time
_PERMUTED = "down_proj"  # loaded without a permutation


@dataclass(frozen=True)
class Rank:
    """What one GPU gets, bytes.

    Attributes:
        loading: what the first GPU holds beside its weights for a moment: each module is loaded there and then cut.
    """

    weights: int
    cache: int
    scratch: int
    loading: int

    @property
    def beside(self) -> int:
        """Scratch, and what loading takes where that is more than the cache that comes after it."""
        return max(self.scratch, self.loading - self.cache)


def refusals(spec: ModelSpec, ask: Ask, ranks: int, gpus: Sequence[Gpu]) -> Iterator[str]:
    """Why exllamav2 would not run this model so, or would answer wrongly without a word."""
    name = f"parallel.tensor={ranks}"
    if ranks > len(gpus):
        yield f"{name} is for {ranks} GPUs, and there {'is' if len(gpus) == 1 else 'are'} {len(gpus)}"
    if old := next((gpu for gpu in gpus[:ranks] if gpu.capability < FLASH_CAPABILITY), None):
        yield (
            f"{name}: exllamav2 cuts layers with flash-attn only, which needs compute capability 8.0, and GPU "
            f"{old.index} has {old.capability_text}"
        )
    elif ask.lacks:
        yield f"{name}: exllamav2 cuts layers with flash-attn only; {ask.lacks}"
    if spec.architecture not in CUT_BY_EXLLAMAV2:
        yield f"{name}: exllamav2 cuts the layers of {', '.join(sorted(CUT_BY_EXLLAMAV2))}, not of {spec.architecture}"
    if ask.method != "exl2":
        yield f"{name}: exllamav2 cuts linears that are quantized to EXL2 only"
    if spec.loras:
        how = "leave out model.merge" if spec.quantization is None else "give the original 16-bit model as model.path"
        yield f"{name}: exllamav2 leaves adapters out where it cuts layers; {how} to have them merged"
    if spec.quantization is not None and not any(t.role == "head" and t.parts for t in spec.tensors):
        yield f"{name}: the output head of this checkpoint is not quantized, and exllamav2 cuts no other"
    if spec.heads * spec.head_dim != spec.hidden:
        yield f"{name}: {spec.heads} heads of {spec.head_dim} are not the {spec.hidden} of the hidden size"
    if ranks > spec.kv_heads:
        yield f"{name} is more than the {spec.kv_heads} key-value heads"
    if spec.intermediate % _MLP_UNIT:
        yield f"{name}: the {spec.intermediate} rows of the MLP are no multiple of {_MLP_UNIT}"
    narrow = [
        ("MLP", spec.intermediate // _MLP_UNIT, _LEAST_MLP),
        ("hidden size", spec.hidden // _OUTPUT_UNIT, _LEAST_OUTPUT),
        ("vocabulary", pad32(spec.vocab) // _OUTPUT_UNIT, _LEAST_WORDS),
    ]
    for what, units, least in narrow:
        if units // ranks < least:
            yield f"{name}: the {what} is too narrow to be cut into {ranks}"


def heads_of(spec: ModelSpec, ranks: int) -> list[int]:
    """Key-value heads of each GPU; the first ones get one more where they cannot have the same."""
    each, more = divmod(spec.kv_heads, ranks)
    return [each + (rank < more) for rank in range(ranks)]


def shares(units: int, heads: Sequence[int]) -> list[int]:
    """Units of each GPU: the same, and what is over first to those with fewer heads, which are counted as emptier."""
    each, more = divmod(units, len(heads))
    order = sorted(range(len(heads)), key=lambda rank: heads[rank])
    return [each + (order.index(rank) < more) for rank in range(len(heads))]


@functools.lru_cache(maxsize=64)  # a plan asks for each context that it tries
def weights_of_ranks(spec: ModelSpec, bits: float, head_bits: int, ranks: int) -> tuple[int, ...]:
    """Bytes of weights on each GPU; norms and each linear's permutations are on all of them."""
    heads = heads_of(spec, ranks)
    total = [0] * ranks
    for tensor in spec.tensors:
        if tensor.role == "linear" or (tensor.parts and tensor.role != "head"):
            whole = linear_bytes(tensor, bits, spec.quantization is None)[0]
            columns = _columns(spec, tensor.name, heads)
        elif tensor.role == "other":
            whole, columns = other_bytes(spec, tensor), []
        else:
            continue
        _add(total, whole, _kept_whole(tensor) if columns else whole, columns)
    head = head_bytes(spec, head_bits, True)[0]
    _add(total, head, 8 * spec.hidden, _words(spec, heads))
    return tuple(total)


def _add(total: list[int], whole: int, everywhere: int, columns: list[int]) -> None:
    """Adds a tensor: `everywhere` to each, the rest by columns."""
    every = sum(columns) or 1
    for rank in range(len(total)):
        total[rank] += everywhere + ((whole - everywhere) * columns[rank] // every if columns else 0)


def _kept_whole(tensor: SpecTensor) -> int:
    """A linear's map of groups and its two permutations, by input."""
    return 4 * tensor.shape[1] + (0 if f".{_PERMUTED}." in tensor.name else 4 * tensor.shape[1])


def _columns(spec: ModelSpec, name: str, heads: Sequence[int]) -> list[int]:
    """Outputs of a layer's linear on each GPU; o_proj goes with the heads, whose outputs are the hidden size."""
    if ".k_proj." in name or ".v_proj." in name:
        return [n * spec.head_dim for n in heads]
    if ".q_proj." in name or ".o_proj." in name:
        return [n * spec.head_dim * (spec.heads // spec.kv_heads) for n in heads]
    return _outputs(spec, heads) if f".{_PERMUTED}." in name else _rows(spec, heads)


def _rows(spec: ModelSpec, heads: Sequence[int]) -> list[int]:
    return [_MLP_UNIT * n for n in shares(spec.intermediate // _MLP_UNIT, heads)]


def _outputs(spec: ModelSpec, heads: Sequence[int]) -> list[int]:
    return [_OUTPUT_UNIT * n for n in shares(spec.hidden // _OUTPUT_UNIT, heads)]


def _words(spec: ModelSpec, heads: Sequence[int]) -> list[int]:
    return [_OUTPUT_UNIT * n for n in shares(pad32(spec.vocab) // _OUTPUT_UNIT, heads)]


def ranks_of(
    spec: ModelSpec, bits: float, head_bits: int, ranks: int, context: int, cache: tuple[int, int]
) -> list[Rank]:
    """What each GPU gets.

    Args:
        cache: bytes over all GPUs: of the cache, and of the one layer of it that a quantized one keeps in 16 bits.
    """
    parts = pieces(spec, bits, head_bits, True, context)
    first = max(part.weights for part in parts)
    found = []
    heads = heads_of(spec, ranks)
    for rank, weights in enumerate(weights_of_ranks(spec, bits, head_bits, ranks)):
        kv, layer = (math.ceil(size * heads[rank] / spec.kv_heads) for size in cache)
        held = _held(spec, context, heads, rank)
        # Without a way from GPU to GPU, what the next one gets of it is laid together on the first before it goes.
        loading = held + first + math.ceil(first / ranks) if rank == 0 else 0
        found.append(Rank(weights, kv, held + layer + _step(spec, context, heads, rank), loading))
    return found


def _held(spec: ModelSpec, context: int, heads: Sequence[int], rank: int) -> int:
    """A device's buffers, and the angles (held twice)."""
    tokens = input_tokens(context)
    keys = heads[rank] * spec.head_dim
    queries = keys * (spec.heads // spec.kv_heads)
    rows, outputs, words = (cut(spec, heads)[rank] for cut in (_rows, _outputs, _words))
    attention = dequantized(spec.hidden, queries) + _HALF * tokens * (3 * spec.hidden + 2 * queries + 2 * keys)
    mlp = max(dequantized(spec.hidden, rows), dequantized(spec.intermediate, outputs))
    mlp += _HALF * tokens * (2 * spec.hidden + spec.intermediate + 2 * rows + outputs)
    angles = 2 * 2 * _HALF * round_up(context) * spec.head_dim
    return CUBLAS_WORKSPACE + max(attention, mlp, dequantized(spec.hidden, words)) + angles


def _step(spec: ModelSpec, context: int, heads: Sequence[int], rank: int) -> int:
    """The last norm and the head of a score, and on the first GPU its softmax; an answer takes less."""
    rows = min(SCORE_CHUNK, input_tokens(context))
    softmax = _SOFTMAX * 4 * min(SCORE_ROWS, rows) * pad32(spec.vocab) if rank == 0 else 0
    return _HALF * rows * (2 * spec.hidden + _words(spec, heads)[rank]) + softmax


def pinned_bytes(spec: ModelSpec, context: int) -> int:
    """Host memory through which the GPUs exchange what each has worked out."""
    each = _HALF * input_tokens(context) * max(spec.vocab, spec.intermediate)
    return 2 * (1 << (each - 1).bit_length())  # torch takes powers of two
