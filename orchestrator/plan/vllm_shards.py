"""What each of vLLM's ranks holds of a tensor, packed or not: shares to the byte, and where a share cannot be cut.

Column-parallel linears are cut by their outputs, row-parallel ones by their inputs; keys and values are repeated where
there are fewer heads than ranks. Embedding, head and norms stay in 16 bits. Packed numbers keep their size when they
are laid out anew for Marlin, but for linears whose sides are no multiples of 64, which it pads a little.
Sources: vllm 0.32's model_executor/layers/quantization/auto_gptq.py, auto_awq.py, fp8.py, compressed_tensors/schemes/,
utils/marlin_utils.py, and kernels/linear/mixed_precision/{marlin,cpu}.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orchestrator.backends.table import BACKENDS, METHODS, Loads
from orchestrator.backends.vllm_rules import VOCAB_PADDING
from orchestrator.checkpoint.quantized import Quantized
from orchestrator.checkpoint.spec import ModelSpec, SpecTensor
from orchestrator.errors import ConfigError
from orchestrator.hardware import Hardware
from orchestrator.plan.packed import SCALES, WEIGHT, quantized_of
from orchestrator.plan.types import Ask

DEFAULT_GROUP = 128  # inputs that share a scale in a GPTQ checkpoint, where quant.group_size does not say
_HALF, _SINGLE = 2, 4  # bytes of a scale: of integers in the dtype, of FP8 and int8 in float32
_KEYS, _VALUES = "self_attn.k_proj", "self_attn.v_proj"
_FUSED = ("self_attn.qkv_proj", "attention.wqkv")
_ROWWISE = ("o_proj", "down_proj", "attention.wo", ".w2")  # the input is sharded, and a bias is not
_CPU_UNIT = 32  # inputs and outputs of a rank: the CPU kernels take multiples
_WORD = 32  # bits: what is packed is cut between words


@dataclass(frozen=True)
class Packing:
    """How a linear's numbers are packed.

    Attributes:
        bits: of one weight.
        group: inputs that share a scale; -1: all of them.
        columns: outputs that share it with them.
        scale: bytes.
        zeros: whether there are zero points, of as many bits as a weight.
    """

    bits: float
    group: int
    columns: int = 1
    scale: int = _HALF
    zeros: bool = False

    def nbytes(self, out: int, into: int, whole: int) -> int:
        """Bytes of a share of `out` outputs and `into` of the `whole` inputs."""
        groups = 1 if self.group < 0 or self.group >= whole else math.ceil(into / self.group)
        zeros = groups * math.ceil(out * self.bits / 8) if self.zeros else 0
        return math.ceil(out * into * self.bits / 8) + groups * math.ceil(out / self.columns) * self.scale + zeros


@dataclass(frozen=True, eq=False)
class Packings:
    """How the tensors of one model are packed, by their names; one that is not there is in the dtype.

    Like a ModelSpec it equals itself only, so that sums over all tensors can be kept by it.
    """

    of: Mapping[str, Packing]


def padded(vocab: int) -> int:
    return math.ceil(vocab / VOCAB_PADDING) * VOCAB_PADDING


def kv_heads(spec: ModelSpec, tp: int) -> int:
    """Key-value heads of each rank; they are repeated where there are fewer than ranks."""
    return max(1, spec.kv_heads // tp)


def group_of(ask: Ask) -> int:
    """quant.group_size.

    Raises:
        ConfigError: it is none that the kernels have.
    """
    group = ask.settings.get("quant.group_size")
    known = BACKENDS[ask.backend].loads["gptq"].groups
    if group is not None and group not in known:
        raise ConfigError(f"quant.group_size={group} is not one of {', '.join(map(str, known))} (-1: whole rows)")
    return DEFAULT_GROUP if group is None else int(group)


def shard(tensor: SpecTensor, spec: ModelSpec, tp: int) -> tuple[int, int]:
    """(outputs, inputs) of each rank's share of a linear."""
    out, into = tensor.shape[-2:]
    module = tensor.name.removesuffix(".weight")
    if tensor.role in ("embedding", "head"):
        return padded(out) // tp, into
    if out == 1:  # the gate of the shared expert: every rank has it
        return out, into
    if module.endswith((_KEYS, _VALUES)):
        return out // spec.kv_heads * kv_heads(spec, tp), into
    if module.endswith(_FUSED):
        return out // (spec.heads + 2 * spec.kv_heads) * (spec.heads // tp + 2 * kv_heads(spec, tp)), into
    return (out, into // tp) if module.endswith(_ROWWISE) else (out // tp, into)


def shard_bytes(tensor: SpecTensor, spec: ModelSpec, tp: int, size: int, packing: Packing | None = None) -> int:
    """Bytes of one tensor on each of its stage's ranks: packed, or `size` bytes an element."""
    if tensor.role in ("linear", "expert", "embedding", "head"):
        out, into = shard(tensor, spec, tp)
        count = math.prod(tensor.shape[:-2])
        return count * (out * into * size if packing is None else packing.nbytes(out, into, tensor.shape[-1]))
    module, _, kind = tensor.name.rpartition(".")
    count = math.prod(tensor.shape)
    if kind != "bias" or module.endswith(_ROWWISE):
        return count * size
    if module.endswith((_KEYS, _VALUES)):
        return count // spec.kv_heads * kv_heads(spec, tp) * size
    if module.endswith(_FUSED):
        heads = spec.heads + 2 * spec.kv_heads
        return count // heads * (spec.heads // tp + 2 * kv_heads(spec, tp)) * size
    return count // tp * size


def packings(spec: ModelSpec, hardware: Hardware, ask: Ask) -> Packings:
    """Tensor name -> how it is packed: as the headers say, or as a GPTQ checkpoint of the model would have it."""
    stored = quantized_of(spec)
    plain = stored is None and ask.method == "none"
    group = DEFAULT_GROUP if plain or stored is not None else group_of(ask)
    return _packings(spec, stored, bool(hardware.gpus), 0 if plain else ask.bits, group)


@functools.lru_cache(maxsize=16)
def _packings(spec: ModelSpec, stored: Quantized | None, on_gpu: bool, bits: float, group: int) -> Packings:
    """`bits`: 0: plain weights."""
    if stored is not None:
        # Marlin drops the zero points of symmetric weights, Machete (compute capability 9.0) keeps them.
        zeros = on_gpu or not stored.symmetric
        return Packings({t.name: _stored(t, stored, zeros) for t in spec.tensors if t.parts})
    if not bits:
        return Packings({})
    packing = Packing(bits, group, zeros=on_gpu)
    linears = (t.name for t in spec.tensors if t.role in ("linear", "expert") and t.shape[-2] > 1)
    return Packings(dict.fromkeys(linears, packing))


def _stored(tensor: SpecTensor, stored: Quantized, keeps_zeros: bool) -> Packing:
    """By the headers where a checkpoint has other widths and groups for some of its linears."""
    weight, scales = tensor.part(*WEIGHT) or tensor, tensor.part(*SCALES)
    out, into = tensor.shape[-2:]
    group = stored.group
    if not stored.uniform:
        each = math.prod(scales.shape) // out if scales is not None else 1
        group = math.ceil(into / each) if each > 1 else -1
    packed_words = weight.dtype == "I32"
    zeros = keeps_zeros and tensor.part("qzeros", "weight_zero_point") is not None
    return Packing(8 * weight.nbytes / (out * into), group, stored.columns, _HALF if packed_words else _SINGLE, zeros)


def misfits(spec: ModelSpec, hardware: Hardware, ask: Ask, packed: Packings, tp: int) -> Iterator[str]:
    """Why vLLM would not run this method on this hardware, or not cut its packed linears into so many shares."""
    if ask.method == "none":
        return
    stored = quantized_of(spec)
    loads = BACKENDS[ask.backend].loads[ask.method if stored is None else stored.format]
    yield from _no_kernel(hardware, ask, loads)
    yield from _uncut(spec, packed, tp, not hardware.gpus)


@functools.lru_cache(maxsize=64)
def _uncut(spec: ModelSpec, packed: Packings, tp: int, on_cpu: bool) -> tuple[str, ...]:
    """Why packed linears cannot be cut into `tp` shares: a reason for each kind of them."""
    reasons: list[str] = []
    said: set[str] = set()
    seen: set[tuple[str, tuple[int, ...], Packing]] = set()
    for tensor in spec.tensors:
        packing = packed.of.get(tensor.name)
        module = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if packing is None or module in said or (module, tensor.shape, packing) in seen:
            continue
        seen.add((module, tensor.shape, packing))
        if why := _cut(tensor, spec, tp, packing, on_cpu):
            said.add(module)
            reasons.append(why)
    return tuple(reasons)


def _no_kernel(hardware: Hardware, ask: Ask, loads: Loads) -> Iterator[str]:
    label = METHODS[ask.method].label
    if not hardware.gpus and ask.bits not in loads.cpu_bits:
        yield f"vLLM has no kernel for {label} at {ask.bits:g} bits on a CPU"
    old = next((gpu for gpu in hardware.gpus if gpu.capability < loads.capability), None)
    if old is not None:
        least = ".".join(map(str, loads.capability))
        yield f"{label} needs compute capability {least}, and GPU {old.index} ({old.name}) has {old.capability_text}"


def _cut(tensor: SpecTensor, spec: ModelSpec, tp: int, packing: Packing, on_cpu: bool) -> str:
    """Why a packed linear cannot be cut into `tp` shares; "" where it can."""
    out, into = shard(tensor, spec, tp)
    whole = tensor.shape[-1]
    name = tensor.name.removesuffix(".weight").rpartition(".")[2]
    has = f"{name} has {into} inputs"
    if into < whole:
        has = f"parallel.tensor={tp} cuts the {whole} inputs of {name} into {into} each"
    if 0 < packing.group < whole and into % packing.group:
        return f"{has}, no multiple of the group of {packing.group}"
    if packing.columns > 1 and tp > 1 and out < tensor.shape[-2] and out % packing.columns:
        return f"parallel.tensor={tp} leaves {out} outputs of {name}, no multiple of {packing.columns}"
    unit = _CPU_UNIT if on_cpu else max(1, int(_WORD // packing.bits))
    if into % unit or out % unit:
        return f"each rank has {out} outputs and {into} inputs of {name}; what is packed is cut by multiples of {unit}"
    return ""
