"""Memory of transformers and bitsandbytes: exact bytes of weights, bounds for the rest.

Weights are what the loaded modules hold, tensor by tensor (checked against real loads in tests/engines). The KV
cache is transformers' DynamicCache, which grows with the tokens there are: the figure is for a full context of
every sequence in flight. Scratch is what one prefill holds, from its shapes.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from orchestrator.checkpoint.spec import ModelSpec, SpecTensor
from orchestrator.engine.in_flight import Held
from orchestrator.hardware import MIB, Hardware
from orchestrator.plan.offload import BANDWIDTH, Offload, Piece, Spread, allowed, disk_room, spread
from orchestrator.plan.types import Ask, Candidate, DeviceBytes

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # safetensors' names
# Resident memory of the process before any weight: interpreter, torch, transformers, the engine. Linux x86-64:
# 410 MiB with the CPU build of torch 2.13, more with a CUDA build, which loads larger libraries.
HOST_RUNTIME = {"cpu": 600 * MIB, "cuda": 3000 * MIB}
# Context and kernels of one process on one GPU, beside torch's allocator: 760 to 785 MiB on an H200 with CUDA 13.0,
# 850 with the kernels of int8 (benchmarks/results/tests_gpu_huggingface.json). Other cards were not measured.
CUDA_RUNTIME = {"int8": 860 * MIB, "": 780 * MIB}
GAPS = 1.1  # of scratch: 7 to 16% were seen between what the allocator held and what tensors took, with its one segment
# cuBLAS and cuBLASLt each get 32 MiB from torch's allocator on compute capability 9.0, less on older cards.
CUBLAS_WORKSPACE = 64 * MIB
QUANT_BLOCK = 64  # bitsandbytes' 4-bit blocks: one float32 absmax each
FLOAT32 = "e_score_correction_bias"  # transformers keeps it so whatever the dtype
NESTED_BLOCK = 256  # double quantization: one float32 for so many absmax bytes
# Parts of a stored linear that are no tensors once loaded: a JSON text (see `packed_bytes`), and an int8 layout's name.
_STATE, _LAYOUT = "quant_state.", "weight_format"
_NESTED = "nested_absmax"
_OFFSET = 4  # bytes: of nested absmax, a float32 that the JSON text has


@dataclass(frozen=True)
class Unit:
    """A part of the model that stays on one device: an embedding, a layer, the head."""

    modules: tuple[str, ...]
    weights: int
    kv_per_token: int


def linear_bytes(shape: tuple[int, ...], method: str, dtype: str, double: bool) -> int:
    """Bytes of one quantized linear weight of shape (out, in), with everything stored beside it."""
    count = math.prod(shape)
    if method == "int8":
        return count + 4 * shape[0]  # one float32 scale per row
    if method in ("nf4", "fp4"):
        blocks = math.ceil(count / QUANT_BLOCK)
        codebook = 16 * 4
        if not double:
            return math.ceil(count / 2) + 4 * blocks + codebook
        nested = 4 * math.ceil(blocks / NESTED_BLOCK) + 256 * 4 + 4
        return math.ceil(count / 2) + blocks + nested + codebook
    return count * DTYPE_BYTES[dtype]


def packed_bytes(tensor: SpecTensor) -> int:
    """Bytes of a linear that is stored quantized, once loaded: as stored, its quant_state's text as what it says."""
    held = (part for part in tensor.parts if _STATE not in part.name and not part.name.endswith(_LAYOUT))
    nested = any(part.name.endswith(_NESTED) for part in tensor.parts)
    return sum(part.nbytes for part in held) + nested * _OFFSET


def tensor_bytes(tensor: SpecTensor, method: str, dtype: str, double: bool) -> int:
    """Bytes of one tensor once loaded: linears of the layers quantized, everything else in the dtype.

    Experts are no linears: transformers 5 holds them as one parameter, which bitsandbytes leaves as it is.
    """
    if tensor.parts:
        return packed_bytes(tensor)
    if tensor.name.endswith(FLOAT32):
        return math.prod(tensor.shape) * 4
    if tensor.role == "linear":
        return linear_bytes(tensor.shape, method, dtype, double)
    return math.prod(tensor.shape) * DTYPE_BYTES[dtype]


def units(spec: ModelSpec, ask: Ask, stored: bool = False) -> tuple[Unit, ...]:
    """The model in the order of its forward pass, as loaded or as `stored`. A tied head stays with the embedding."""
    method = "none" if spec.quantization is not None else ask.method  # what is quantized is; the rest stays as it is
    return _units(spec, method, ask.dtype, ask.double_quant, stored)


@functools.lru_cache(maxsize=64)  # a plan asks for each context that it tries
def _units(spec: ModelSpec, method: str, dtype: str, double: bool, stored: bool) -> tuple[Unit, ...]:
    # Layers with a sliding window count as the others: after a prefill they hold a view of all its keys and values.
    kv = [cache.elements * DTYPE_BYTES[dtype] for cache in spec.layer_caches]
    first: dict[str, int] = {}
    layers: dict[int, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for tensor, count in _kinds(spec):
        size = count * (tensor.nbytes if stored else tensor_bytes(tensor, method, dtype, double))
        if tensor.layer is not None:
            prefix = re.split(rf"(?<=\.{tensor.layer})\.", tensor.name, maxsplit=1)[0]
            layers[tensor.layer] = (prefix, layers.get(tensor.layer, ("", 0))[1] + size)
        else:
            module = tensor.name.rsplit(".", 1)[0]
            part = first if tensor.role == "embedding" else last
            part[module] = part.get(module, 0) + size
    body = next(iter(layers.values()))[0].rsplit(".", 2)[0]
    first_modules = (*first, f"{body}.rotary_emb", *(("lm_head",) if spec.tied else ()))
    buffers = spec.rotary_bytes + spec.scaled_embedding * DTYPE_BYTES[dtype]
    return (
        Unit(first_modules, sum(first.values()) + buffers, 0),
        *(Unit((prefix,), size, kv[layer]) for layer, (prefix, size) in sorted(layers.items())),
        Unit(tuple(last), sum(last.values()), 0),
    )


@functools.lru_cache(maxsize=8)
def _kinds(spec: ModelSpec) -> tuple[tuple[SpecTensor, int], ...]:
    """One tensor of each kind in each layer, and how many there are: of experts there may be tens of thousands."""
    first: dict[Hashable, SpecTensor] = {}
    count: Counter[Hashable] = Counter()
    for tensor in spec.tensors:
        kind: Hashable = tensor.name
        if tensor.layer is not None and not tensor.parts:
            kind = tensor.layer, tensor.role, tensor.shape, tensor.dtype, tensor.nbytes, tensor.name.endswith(FLOAT32)
        first.setdefault(kind, tensor)
        count[kind] += 1
    return tuple((tensor, count[kind]) for kind, tensor in first.items())


def scratch_bytes(spec: ModelSpec, ask: Ask | Candidate, sequences: int, context: int) -> int:
    """What one prefill of so many sequences of `context` tokens holds beside weights and cache.

    That of its layers, and at the end float32 logits of each sequence's last position, twice.
    """
    return _prefill(spec, ask, sequences, context) + 2 * sequences * spec.vocab * 4


def _prefill(spec: ModelSpec, ask: Ask | Candidate, sequences: int, context: int) -> int:
    """What the layers hold.

    Of a token, in elements: in the MLP four hidden states and what `mlp_elements` counts; in attention two hidden
    states, the queries, their answers, keys and values, and those once more for every query; cosines and sines.
    Attention masks, of a byte for each pair of positions, where prompts are unequally long or a window is smaller than
    they are; attention makes them numbers, and pads those. int8 adds a linear's input in bytes and its output in int32;
    4 bit a linear dequantized. A tenth more for the allocator's gaps.

    The figures are those of Llamas on an H200 (benchmarks/results/plan_accuracy.json): without masks, 119,300 bytes a
    token of an 8B in 16 bits, where this says 119,296, and 181,000 in int8, where this says 180,736.
    """
    size = DTYPE_BYTES[ask.dtype]
    tokens = sequences * context
    always = 2 * spec.head_dim  # cosines and sines
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    mask = _masks(spec, sequences, context) * sequences * context**2
    mlp = mask + tokens * (4 * spec.hidden + spec.mlp_elements + always) * size
    attention = mask + tokens * (2 * spec.hidden + 4 * queries + 2 * keys + always) * size
    if ask.method in ("nf4", "fp4"):
        mlp = max(mlp, mlp - tokens * spec.intermediate * size + _largest_linear(spec) * size)  # beside two of its rows
        attention += spec.hidden * queries * size
    if mask:
        attention += sequences * context**2 * 2 * size
    int8 = tokens * (4 * _widest_linear(spec) + spec.hidden) if ask.method == "int8" else 0
    return math.ceil(GAPS * (max(mlp, attention) + int8))


def _masks(spec: ModelSpec, sequences: int, context: int) -> int:
    """How many are kept: one for each kind of attention whose mask is more than that of causality."""
    windows = {cache.window for cache in spec.layer_caches}
    if sequences > 1:  # padded to the longest
        return max(1, len(windows))
    return sum(window is not None and window < context for window in windows)


@functools.lru_cache(maxsize=8)
def _largest_linear(spec: ModelSpec) -> int:
    return max((math.prod(t.shape) for t, _ in _kinds(spec) if t.role == "linear"), default=0)


@functools.lru_cache(maxsize=8)
def _widest_linear(spec: ModelSpec) -> int:
    return max((t.shape[0] for t, _ in _kinds(spec) if t.role == "linear"), default=0)


def at_use(spec: ModelSpec, plan: Candidate, held: Held) -> dict[str, int]:
    """Device -> what a plan comes to for the tokens that requests really held, bytes; never more than the plan.

    Of the cache the share of its tokens, of the scratch that of their prompts, which are taken for equally long.
    """
    prompt = held.prompt_tokens // max(1, held.sequences)
    used = scratch_bytes(spec, plan, held.sequences, prompt)
    if plan.offloads:  # the head comes for every token
        used = max(used, _moved(spec, plan.dtype, plan.disk is not None)[-1])
    unused = max(0, scratch_bytes(spec, plan, plan.max_in_flight, plan.max_context) - used)
    room = plan.max_in_flight * plan.max_context
    return {
        device.device: device.total - unused - device.kv_cache * max(0, room - held.tokens) // room
        for device in plan.computing
    }


def estimate(spec: ModelSpec, hardware: Hardware, ask: Ask) -> Candidate:
    """Where everything goes, and whether it fits, with the largest context up to the one asked for."""
    parts = units(spec, ask)
    wanted = ask.max_context if ask.max_context is not None else min(ask.goal, spec.max_context)
    best = _place(spec, hardware, ask, parts, wanted)
    if best.fits or ask.max_context is not None or not _place(spec, hardware, ask, parts, 1).fits:
        return best
    low, high = 0, wanted  # the largest context that fits lies between; low always fits, or is 0
    while high - low > 64:
        middle = (low + high) // 2
        tried = _place(spec, hardware, ask, parts, middle)
        if tried.fits:
            low, best = middle, tried
        else:
            high = middle
    return best


def _place(spec: ModelSpec, hardware: Hardware, ask: Ask, parts: Sequence[Unit], context: int) -> Candidate:
    place = _on_gpus if hardware.gpus else _on_host
    plain = place(spec, hardware, ask, parts, context)
    offload = allowed(ask.settings, hardware.host_available - HOST_RUNTIME["cuda"])
    if plain.fits or offload is None:
        return plain
    if spec.quantization is not None:
        return replace(plain, reasons=(*plain.reasons, "what is quantized already cannot be offloaded"))
    if ask.method != "none" and not hardware.gpus:
        # As soon as a map names the CPU or the disk beside another device, transformers quantizes nothing there.
        reason = "bitsandbytes offloads from a GPU only; without one, backend=transformers offloads to a folder"
        return replace(plain, reasons=(*plain.reasons, reason))
    return _offloaded(spec, hardware, ask, offload, context) or plain


def _beside_the_model(spec: ModelSpec, hardware: Hardware, ask: Ask, context: int) -> tuple[int, int]:
    """(runtime, scratch) of each device that computes, bytes."""
    scratch = scratch_bytes(spec, ask, ask.max_in_flight, context)
    if not hardware.gpus:
        return HOST_RUNTIME["cpu"], scratch
    return CUDA_RUNTIME.get(ask.method, CUDA_RUNTIME[""]), scratch + CUBLAS_WORKSPACE


def _on_host(spec: ModelSpec, hardware: Hardware, ask: Ask, parts: Sequence[Unit], context: int) -> Candidate:
    weights = sum(part.weights for part in parts)
    kv = sum(part.kv_per_token for part in parts) * context * ask.max_in_flight
    runtime, scratch = _beside_the_model(spec, hardware, ask, context)
    host = DeviceBytes("cpu", weights, kv, scratch, runtime, hardware.host_available)
    reasons = _broken_rows(spec, ask)
    return Candidate.of(ask, context, (), host, reasons, device_map={"": "cpu"}, weights={"cpu": weights})


def _broken_rows(spec: ModelSpec, ask: Ask) -> tuple[str, ...]:
    """bitsandbytes 0.50.2 on a CPU: rows that are no whole number of blocks come back with other values."""
    if ask.method not in ("nf4", "fp4") or (name := _broken_row(spec)) is None:
        return ()
    return (f"bitsandbytes computes wrongly on a CPU where rows are no multiple of {QUANT_BLOCK} long, as in {name}",)


@functools.lru_cache(maxsize=8)
def _broken_row(spec: ModelSpec) -> str | None:
    return next((t.name for t, _ in _kinds(spec) if t.role == "linear" and t.shape[-1] % QUANT_BLOCK), None)


def _on_gpus(spec: ModelSpec, hardware: Hardware, ask: Ask, parts: Sequence[Unit], context: int) -> Candidate:
    """Fills the GPUs in order; what is over stays on the last one, which then does not fit."""
    runtime, scratch = _beside_the_model(spec, hardware, ask, context)
    room = [gpu.free - runtime - scratch for gpu in hardware.gpus]
    weights, cache = [0] * len(room), [0] * len(room)
    device_map: dict[str, str] = {}
    at = 0
    for part in parts:
        kv = part.kv_per_token * context * ask.max_in_flight
        while at < len(room) - 1 and weights[at] + cache[at] + part.weights + kv > room[at]:
            at += 1
        weights[at] += part.weights
        cache[at] += kv
        device_map |= dict.fromkeys(part.modules, f"cuda:{hardware.gpus[at].index}")
    used = [i for i, size in enumerate(weights) if size]
    gpus = tuple(
        DeviceBytes(f"cuda:{gpu.index}", weights[i], cache[i], scratch, runtime, gpu.free)
        for i, gpu in enumerate(hardware.gpus)
        if i in used
    )
    if len(used) == 1:
        device_map = {"": gpus[0].device}
    host = DeviceBytes("cpu", 0, 0, 0, HOST_RUNTIME["cuda"], hardware.host_available)
    placed = {gpu.device: gpu.weights for gpu in gpus}
    return Candidate.of(ask, context, gpus, host, device_map=device_map, weights=placed)


def _offloaded(spec: ModelSpec, hardware: Hardware, ask: Ask, offload: Offload, context: int) -> Candidate | None:
    """With what is over in host memory and on disk; None where that is no way either."""
    runtime, scratch = _beside_the_model(spec, hardware, ask, context)
    free = {f"cuda:{gpu.index}": gpu.free for gpu in hardware.gpus} or {"cpu": hardware.host_available}
    stores = {"cpu": offload.cpu} if hardware.gpus else {}
    if offload.folder is not None:
        stores["disk"] = disk_room(offload.folder)
    room = {device: size - runtime - scratch for device, size in free.items()}
    found = spread(_pieces(spec, ask, context, "disk" in stores), room, stores)
    if found is None:
        return None
    computing = tuple(
        DeviceBytes(
            device,
            found.weights[device],
            found.cache[device],
            scratch + (found.brought_in if device == found.main else 0),
            runtime,
            free[device],
        )
        for device in free
        if device in found.weights
    )
    on_host = found.weights.get("cpu", 0)
    host = DeviceBytes("cpu", on_host, 0, 0, HOST_RUNTIME["cuda"], hardware.host_available)
    on_disk = found.weights.get("disk", 0)
    reasons = _too_little(found, offload) if list(stores)[-1] == "cpu" else ()
    return Candidate.of(
        ask,
        context,
        computing if hardware.gpus else (),
        host if hardware.gpus else computing[0],
        reasons,
        device_map=found.device_map,
        weights=found.weights,
        disk=DeviceBytes("disk", on_disk, 0, 0, 0, stores["disk"]) if on_disk else None,
        offload_folder=offload.folder or "",
        most_tokens_per_s=found.most_tokens_per_s,
        notes=(
            _speed(found, on_host if hardware.gpus else 0, on_disk),
            *((f"what is offloaded is not quantized: it stays in {ask.dtype}",) if ask.method != "none" else ()),
        ),
    )


def _pieces(spec: ModelSpec, ask: Ask, context: int, from_disk: bool) -> list[Piece]:
    """The units as they are where they compute, where they are offloaded (never quantized), and in the files."""
    away, stored = units(spec, replace(ask, method="none")), units(spec, ask, stored=True)
    *layers, head = _moved(spec, ask.dtype, from_disk)
    # The head comes when what the layers hold is free again, but for two hidden states of each token.
    hidden = 2 * ask.max_in_flight * context * spec.hidden * DTYPE_BYTES[ask.dtype]
    moved = (*layers, max(0, head + hidden - _prefill(spec, ask, ask.max_in_flight, context)))
    return [
        Piece(u.modules, u.weights, a.weights, s.weights, u.kv_per_token * context * ask.max_in_flight, m)
        for u, a, s, m in zip(units(spec, ask), away, stored, moved, strict=True)
    ]


@functools.lru_cache(maxsize=8)
def _moved(spec: ModelSpec, dtype: str, from_disk: bool) -> tuple[int, ...]:
    """Bytes of the largest module of each unit, in the dtype: what accelerate's hooks bring in at a time.

    A tensor on disk keeps the dtype of its file, and is converted where it computes: both are there for a moment. All
    experts of a layer are one module in transformers 5.
    """
    sizes: list[Counter[str]] = [Counter() for _ in range(spec.layers + 2)]
    copies = [0] * len(sizes)
    for tensor, count in _kinds(spec):
        before, experts, _ = tensor.name.partition(".experts.")
        module = before if experts else tensor.name.rsplit(".", 1)[0]
        size = math.prod(tensor.shape) * DTYPE_BYTES[dtype]
        unit = tensor.layer + 1 if tensor.layer is not None else 0 if tensor.role == "embedding" else -1
        sizes[unit][module] += size * (count if experts else 1)
        if from_disk and tensor.dtype != STORED[dtype]:
            copies[unit] = max(copies[unit], tensor.nbytes)
    return tuple(max(unit.values(), default=0) + copy for unit, copy in zip(sizes, copies, strict=True))


def _too_little(found: Spread, offload: Offload) -> tuple[str, ...]:
    if found.over <= 0:
        return ()
    have = f"{offload.cpu / 2**30:.2f} GiB of host memory for offloaded weights"
    return (f"{have} are {found.over / 2**30:.2f} GiB too little",)


def _speed(found: Spread, on_host: int, on_disk: int) -> str:
    ways = (("host memory", "cpu", on_host), ("disk", "disk", on_disk))
    moved = [f"{size / 2**30:.2f} GiB from {name} ({BANDWIDTH[key] / 1e9:g} GB/s)" for name, key, size in ways if size]
    return (
        f"offload brings in {' and '.join(moved)} for every token: "
        f"at most about {found.most_tokens_per_s:.2g} tokens/s for each answer"
    )
