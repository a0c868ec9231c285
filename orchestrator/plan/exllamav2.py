"""Memory of ExLlamaV2: weights by their bits, cache and scratch by its own rules, its ways to spread over GPUs.

Layers get widths of their own when a model is quantized, only their sum is known before: so the plan says how many
bytes the GPUs hold together, and checks that every one has room for its share of an even distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.backends.exl2_setup import (
    CONTEXT_BYTES,
    FLASH_CAPABILITY,
    PAGE,
    RESERVE_FILLING,
    RESERVE_FIRST,
    RESERVE_OTHERS,
    round_up,
)
from orchestrator.backends.exl2_texts import check_texts
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.errors import ConfigError
from orchestrator.hardware import GIB, MIB, Gpu, Hardware
from orchestrator.plan.exl2_sizes import (
    HEAD,
    Piece,
    adapter_scratch,
    cache_bytes,
    embedding_bytes,
    fixed_scratch,
    pad32,
    pieces,
    split_constants,
)
from orchestrator.plan.exl2_tensor import pinned_bytes, ranks_of, refusals
from orchestrator.plan.types import Ask, Candidate, DeviceBytes

HOST_RUNTIME = 3000 * MIB  # the engine's process before any weight: CUDA libraries, torch, the extension
CACHE_BITS = (16, 8, 6, 4)
_QUERY = 8  # tokens per sequence that the generator keeps logits for, in host memory


@dataclass
class _Share:
    """What one GPU gets."""

    gpu: Gpu
    reserve: int
    weights: int = 0
    adapters: int = 0
    cache: int = 0
    scratch: int = 0

    @property
    def used(self) -> int:
        return self.weights + self.adapters + self.cache + self.scratch

    def take(self, part: Piece, cache: int) -> None:
        """Adds a module, with the cache of a layer if it has one."""
        self.weights += part.weights
        self.adapters += part.adapters
        self.cache += cache if part.cached else 0


def estimate(spec: ModelSpec, hardware: Hardware, ask: Ask) -> Candidate:
    """Where everything goes, and whether it fits, with the largest context up to the one asked for.

    Raises:
        ConfigError: a setting of the engine's that it cannot have.
    """
    settings = _Settings.read(ask, hardware)
    if _one_at_a_time(hardware, ask):
        ask = replace(ask, max_in_flight=1)
    wanted = ask.max_context if ask.max_context is not None else min(ask.goal, spec.max_context)
    best = _place(spec, hardware, ask, settings, wanted)
    if best.fits or ask.max_context is not None or not _place(spec, hardware, ask, settings, 1).fits:
        return best
    low, high = 0, wanted  # the largest context that fits lies between; low always fits, or is 0
    while high - low > PAGE:
        middle = (low + high) // 2 // PAGE * PAGE or PAGE
        tried = _place(spec, hardware, ask, settings, middle)
        if tried.fits:
            low, best = middle, tried
        else:
            high = middle
    return best


def _one_at_a_time(hardware: Hardware, ask: Ask) -> str:
    """Without flash-attn there is no paged cache, and no room but for one sequence: why; "" where there is."""
    if any(gpu.capability < FLASH_CAPABILITY for gpu in hardware.gpus):
        return "one answer at a time: flash-attn, for several, needs compute capability 8.0"
    return f"one answer at a time: {ask.lacks}" if ask.lacks else ""


@dataclass(frozen=True)
class _Settings:
    """The engine's own settings, checked."""

    head_bits: int
    cache_bits: int
    split: tuple[float, ...]  # GiB; empty: automatic
    ranks: int  # over which each layer is cut; 1: layers stay whole

    @classmethod
    def read(cls, ask: Ask, hardware: Hardware) -> _Settings:
        head_bits = ask.settings.get("quant.head_bits", 6)
        if head_bits not in HEAD:
            raise ConfigError(f"quant.head_bits={head_bits} is not one of {', '.join(map(str, HEAD))}")
        cache_bits = ask.settings.get("cache.bits", 16)
        if cache_bits not in CACHE_BITS:
            raise ConfigError(f"cache.bits={cache_bits} is not one of {', '.join(map(str, CACHE_BITS))}")
        _check_calibration(ask.settings)
        split, ranks = _split(ask.settings.get("parallel.gpu_split", "auto"), hardware), _ranks(ask.settings)
        if split and ranks > 1:
            raise ConfigError(
                f"parallel.gpu_split={list(split)} gives each GPU whole layers, and parallel.tensor={ranks} a part of "
                "every layer",
                "Leave out one of them.",
            )
        return cls(head_bits, cache_bits, split, ranks)


def _ranks(settings: dict[str, Any]) -> int:
    return int(settings.get("parallel.tensor") or 1)


def _check_calibration(settings: dict[str, Any]) -> None:
    file, rows = settings.get("quant.calibration.file"), settings.get("quant.calibration.rows")
    length, measurement = settings.get("quant.calibration.length"), settings.get("quant.measurement")
    for key, path in (("quant.calibration.file", file), ("quant.measurement", measurement)):
        if path is not None and not Path(path).expanduser().is_file():
            raise ConfigError(f"{key}={path} is not a file")
    if file is not None:
        check_texts(Path(file).expanduser())
    if rows is not None and file is None:
        raise ConfigError("quant.calibration.rows counts rows of quant.calibration.file, and none is set")
    if rows is not None and rows < 1:
        raise ConfigError(f"quant.calibration.rows={rows}: at least 1 is needed")
    if length is not None and (length < 128 or length % 128):
        raise ConfigError(f"quant.calibration.length={length} is not a multiple of 128 tokens")


def _split(value: Any, hardware: Hardware) -> tuple[float, ...]:
    """parallel.gpu_split as GiB per GPU; empty for "auto"."""
    if value == "auto":
        return ()
    if not isinstance(value, list | tuple) or not value or not all(_is_size(x) for x in value):
        raise ConfigError(
            f"parallel.gpu_split={value} is neither auto nor a list of GiB", "Type: 'parallel.gpu_split=[18,18]'"
        )
    if min(value) < 0 or not any(value):
        what = "a GPU cannot take less than 0 GiB" if any(value) else "no GPU gets any"
        raise ConfigError(
            f"parallel.gpu_split={list(value)}: {what}",
            "Give each GPU its GiB, 0 for one that is to get none.",
        )
    if len(value) > len(hardware.gpus):
        there = "there is 1" if len(hardware.gpus) == 1 else f"there are {len(hardware.gpus)}"
        raise ConfigError(
            f"parallel.gpu_split={list(value)} is for {len(value)} GPUs, and {there}",
            f"Give {len(hardware.gpus)} numbers of GiB or fewer, one for each GPU.",
        )
    return tuple(float(x) for x in value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _place(spec: ModelSpec, hardware: Hardware, ask: Ask, settings: _Settings, context: int) -> Candidate:
    place = _layers_cut if settings.ranks > 1 else _layers_whole
    return place(spec, hardware, ask, settings, context)


def _layers_cut(spec: ModelSpec, hardware: Hardware, ask: Ask, settings: _Settings, context: int) -> Candidate:
    """A part of every layer on each GPU: its engine's tensor parallel."""
    if reasons := tuple(refusals(spec, ask, settings.ranks, hardware.gpus)):
        whole = _layers_whole(spec, hardware, ask, settings, context)  # the sizes that there are
        return replace(whole, fits=False, reasons=(*reasons, *whole.reasons))
    cards = hardware.gpus[: settings.ranks]
    tokens = round_up(context) * ask.max_in_flight
    per_layer, layer = cache_bytes(spec, settings.cache_bits)
    cache = (spec.layers * math.ceil(per_layer * tokens), layer * tokens)
    ranks = ranks_of(spec, ask.bits, settings.head_bits, settings.ranks, context, cache)
    gpus = tuple(
        DeviceBytes(f"cuda:{gpu.index}", rank.weights, rank.cache, rank.beside, CONTEXT_BYTES, gpu.free)
        for gpu, rank in zip(cards, ranks, strict=True)
    )
    embedding = embedding_bytes(spec)
    scratch = _logits(spec, ask) + pinned_bytes(spec, context)
    host = DeviceBytes("cpu", embedding, 0, scratch, HOST_RUNTIME, hardware.host_available)
    return Candidate.of(
        ask,
        context,
        gpus,
        host,
        device_map={"": "+".join(gpu.device for gpu in gpus), "model.embed_tokens": "cpu"},
        weights={"cpu": embedding} | {gpu.device: gpu.weights for gpu in gpus},
        tensor_parallel=settings.ranks,
        cache_bits=settings.cache_bits,
    )


def _logits(spec: ModelSpec, ask: Ask) -> int:
    """Those of a step, in host memory, bytes."""
    return 4 * _QUERY * ask.max_in_flight * pad32(spec.vocab)


def _layers_whole(spec: ModelSpec, hardware: Hardware, ask: Ask, settings: _Settings, context: int) -> Candidate:
    """Whole layers on each GPU: split automatically or by hand."""
    quantized = ask.method != "none"
    parts = pieces(spec, ask.bits, settings.head_bits, quantized, context)
    tokens = round_up(context) * ask.max_in_flight
    per_layer, per_gpu = cache_bytes(spec, settings.cache_bits)
    kv = math.ceil(per_layer * tokens)
    fixed = fixed_scratch(spec, context, quantized) + adapter_scratch(spec, context, quantized) + per_gpu * tokens
    reasons: list[str] = []
    if settings.split:
        given = [(gpu, size) for gpu, size in zip(hardware.gpus, settings.split, strict=False) if size]
        shares, split = [_Share(gpu, 0) for gpu, _ in given], tuple(size for _, size in given)
        missing = _by_hand(shares, parts, split, split_constants(spec, context), kv, fixed)
        reasons += (f"parallel.gpu_split={[float(f'{s:g}') for s in settings.split]} {text}" for text in missing)
    else:
        shares, split = _automatic(hardware.gpus, parts, kv, fixed), ()
    gpus = tuple(
        DeviceBytes(f"cuda:{s.gpu.index}", s.weights + s.adapters, s.cache, s.scratch, CONTEXT_BYTES, s.gpu.free)
        for s in shares
    )
    embedding = embedding_bytes(spec)
    adapters = {gpu.device: s.adapters for gpu, s in zip(gpus, shares, strict=True) if s.adapters}
    scratch = _logits(spec, ask) + sum(adapters.values())  # through which they go
    host = DeviceBytes("cpu", embedding, 0, scratch, HOST_RUNTIME, hardware.host_available)
    group = "+".join(gpu.device for gpu in gpus)
    return Candidate.of(
        ask,
        context,
        gpus,
        host,
        tuple(reasons),
        device_map={"": group, "model.embed_tokens": "cpu"},
        weights={"cpu": embedding, group: sum(gpu.weights for gpu in gpus)},
        gpu_split=split,
        cache_bits=settings.cache_bits,
        adapter_bytes=adapters,
        notes=tuple(filter(None, [_one_at_a_time(hardware, ask)])),
    )


def _automatic(gpus: Sequence[Gpu], parts: Sequence[Piece], kv: int, fixed: int) -> list[_Share]:
    """The GPUs that get something. One that has no room for a layer is left to others: there it would only cost."""
    reserves = [RESERVE_FIRST, *[RESERVE_OTHERS] * len(gpus)]
    shares = [_Share(gpu, r) for gpu, r in zip(gpus, reserves, strict=False)]
    _fill(shares, parts, kv, fixed)
    shares = shares[: max((i + 1 for i, s in enumerate(shares) if s.used), default=1)]
    if len(shares) == 1 or all(share.used for share in shares):
        return shares
    idle = [share.gpu for share in shares if not share.used]
    return _automatic([gpu for gpu in gpus if gpu not in idle], parts, kv, fixed)


def _fill(shares: list[_Share], parts: Sequence[Piece], kv: int, fixed: int) -> None:
    """Fills the GPUs in order, as load_autosplit does; what is over stays on the last one, which then does not fit."""
    at = 0
    for part in parts:
        need = part.weights + part.adapters + (kv if part.cached else 0)
        while True:
            share = shares[at]
            first = 0 if share.scratch else fixed + share.reserve + RESERVE_FILLING
            room = share.gpu.free - CONTEXT_BYTES
            if at == len(shares) - 1 or share.used + first + need <= room:
                break
            at += 1
        share.scratch += first
        share.take(part, kv)


def _by_hand(
    shares: list[_Share],
    parts: Sequence[Piece],
    split: Sequence[float],
    constants: tuple[int, int],
    kv: int,
    fixed: int,
) -> list[str]:
    """Fills the GPUs as `load(gpu_split)` does, which leaves the cache out of account; returns why it cannot."""
    once, attention = constants
    left = [size * GIB - once for size in split]
    scratch, reserved = [0] * len(split), [0] * len(split)
    at = 0
    for number, part in enumerate(parts):
        while True:
            wants, fixed_attention = max(part.scratch, scratch[at]), attention if part.cached else reserved[at]
            if part.footprint + wants + fixed_attention <= left[at]:
                break
            if at == len(split) - 1:
                weights, rest = (sum(p.footprint for p in some) for some in (parts, parts[number:]))
                missing = math.ceil((rest + wants + fixed_attention - left[at]) / GIB * 100) / 100
                return [
                    f"has no room for the weights ({weights / GIB:.2f} GiB) and the scratch of each GPU: "
                    f"{missing:.2f} GiB are missing"
                ]
            at += 1
        scratch[at], reserved[at] = wants, fixed_attention
        left[at] -= part.footprint
        shares[at].scratch = fixed
        shares[at].take(part, kv)
    return []
