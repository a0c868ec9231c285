"""What to change where something does not fit, cheapest first, each with its number.

Every kind of change is tried alone, with nothing else given up (but the sequences in flight, which cost only speed);
where none is enough, all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from orchestrator.backends.table import BACKENDS, METHODS, backends_with_key
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.config import ENGINE_KEYS, Config, changed, get
from orchestrator.errors import OrchestratorError
from orchestrator.hardware import GIB, Hardware
from orchestrator.plan import offload
from orchestrator.plan.asks import asks_of
from orchestrator.plan.estimate import estimate
from orchestrator.plan.ranking import goal_of, rank
from orchestrator.plan.types import Candidate, Change

CACHE_BITS = (8, 6, 4)
WIDTHS = tuple(quarters / 4 for quarters in range(32, 8, -1))  # 8 to 2.25 bits
LEAST_BITS = 4.0  # down to which every plan looks by itself, where no engine and no width was asked for
MOST_CARDS = 16
LEAST_CONTEXT = 512
AS_IT_LOADS = "bitsandbytes"  # quantizes when it loads

Try = tuple[Config, Hardware]
Tries = Callable[[Config, Hardware], Iterator[Try]]
Unmade = Callable[[Config, Candidate], str]  # why the files of a candidate cannot be made here; "": they can, or are


def made(config: Config, candidate: Candidate) -> str:
    """Of no candidate anything has to be made."""
    return ""


def changes(config: Config, spec: ModelSpec, hardware: Hardware, unmade: Unmade = made) -> tuple[Change, ...]:
    """The first of each kind that fits, and whose files can be made, cheapest kind first; () where nothing helps."""

    def each(*kinds: _Kind) -> list[Change]:
        tried = (_first(kind, config, spec, hardware, unmade) for kind in kinds)
        return [change for change in tried if change is not None]

    found = each(*KINDS)
    if not any(change.slow for change in found):
        found += each(TO_BOTH)
    if not any(change.settings and not change.slow for change in found):
        found = each(TOGETHER) + found
    # Cards are no help where the settings beside them do it alone.
    alone = [set(change.settings) for change in found if not change.cards]
    return tuple(c for c in found if not (c.cards and any(settings <= set(c.settings) for settings in alone)))


def as_it_loads(config: Config, spec: ModelSpec, hardware: Hardware) -> str:
    """What to type so that it is quantized when it loads, in the nearest width that fits; "": nothing does."""
    if config.backend.engine_args:  # which are another engine's
        return ""
    try:
        found = _first(_Kind("", _as_it_loads), config, spec, hardware, made)
    except OrchestratorError:  # an architecture that it does not know, an adapter on top
        return ""
    return " ".join(found.settings) if found is not None else ""


def smallest(config: Config, spec: ModelSpec, hardware: Hardware) -> Candidate:
    """What needs the least of all that could be asked for, for who wants to know what is missing."""
    tried = [
        estimate(other, spec, machine, ask)
        for other, machine in _everything(config, hardware)
        for ask in asks_of(other, spec, machine)
    ]
    over = [c for c in tried if any(d.left < 0 for d in c.devices)]  # what is refused as it is has no sizes
    return min(over or tried, key=lambda c: sum(d.total for d in c.devices))


@dataclass(frozen=True)
class _Kind:
    """One kind of change.

    Attributes:
        costs: what is given up, for the person.
        tries: what to try, the cheapest first.
        counts: whether a candidate is such a change (given what was asked for).
        longest: the context is the longest that fits, up to the one that was asked for.
    """

    costs: str
    tries: Tries
    counts: Callable[[Candidate, Config], bool] = lambda found, asked: not found.offloads
    longest: bool = False


def _first(kind: _Kind, config: Config, spec: ModelSpec, hardware: Hardware, unmade: Unmade) -> Change | None:
    for other, machine in kind.tries(config, hardware):
        goal = config.model.max_context if kind.longest else None
        found = _best(other, machine, spec, partial(_counts, kind, config, other, unmade), goal)
        if found is not None and found.fits and found.max_context >= _least_context(config, spec):
            settings = tuple(_typed(config, other, found))
            cards = len(machine.gpus) - len(hardware.gpus)
            more = f"{cards} more such card{'s' * (cards > 1)} ({len(machine.gpus)} in all)" if cards else ""
            return Change(settings, more, _costs(kind, found), found)
    return None


def _counts(kind: _Kind, asked: Config, other: Config, unmade: Unmade, found: Candidate) -> bool:
    return kind.counts(found, asked) and not (found.fits and unmade(other, found))


def _least_context(config: Config, spec: ModelSpec) -> int:
    """Tokens that a change has to leave, to be worth naming."""
    return min(LEAST_CONTEXT, config.model.max_context or LEAST_CONTEXT, spec.max_context)


def _best(
    config: Config, hardware: Hardware, spec: ModelSpec, counts: Callable[[Candidate], bool], longest: int | None
) -> Candidate | None:
    goal = longest or goal_of(config, spec)
    asks = (replace(ask, goal=longest) if longest else ask for ask in asks_of(config, spec, hardware))
    candidates = (estimate(config, spec, hardware, ask) for ask in asks)
    return min((c for c in candidates if counts(c) and not c.needs), key=lambda c: rank(c, goal), default=None)


def _costs(kind: _Kind, found: Candidate) -> str:
    if not found.offloads:
        return kind.costs
    where = []
    if found.gpus and found.host.weights:
        where.append(f"{found.host.weights / GIB:.2f} GiB in host memory")
    if found.disk:
        where.append(f"{found.disk.weights / GIB:.2f} GiB on disk")
    return f"{', '.join(where)}: at most {found.most_tokens_per_s:.2g} tokens/s"


def _typed(config: Config, other: Config, found: Candidate) -> Iterator[str]:
    """The settings that lead from one configuration to the candidate that was found with another."""
    if found.backend != config.backend.name and (found.offloads or other.backend.name != config.backend.name):
        yield f"backend={found.backend}"  # offloading, another one may come first with just so much host memory
    asked = (config.quant.bits, config.quant.method)
    if (other.quant.bits, other.quant.method) != asked or (found.offloads and config.quant.bits != found.bits):
        if found.bits != config.quant.bits:
            yield f"quant.bits={found.bits:g}"
        if config.quant.method not in ("auto", found.method):
            yield "quant.method=auto"
    if other.model.dtype != config.model.dtype:
        yield f"model.dtype={other.model.dtype}"
    if other.model.max_context != config.model.max_context:
        yield f"model.max_context={found.max_context}"
    if other.hardware.reserve_gib != config.hardware.reserve_gib:
        yield f"hardware.reserve_gib={other.hardware.reserve_gib:g}"
    if other.hardware.margin_gib != config.hardware.margin_gib:
        yield f"hardware.margin_gib={other.hardware.margin_gib:g}"
    if other.run.in_flight != config.run.in_flight:
        yield f"run.in_flight={found.max_in_flight}"
    for key in ENGINE_KEYS:
        value = get(other, key)
        if value == get(config, key):
            continue
        if key == "offload.cpu_gib" and value is not None:
            if not found.host.weights:
                continue
            value = f"{math.ceil(found.host.weights / GIB * 100) / 100:g}"
        if key == "offload.folder" and value is not None:
            if not found.disk:
                continue
            value = "/path"
        if value is None:
            value = "auto" if key == "parallel.gpu_split" and found.backend == config.backend.name else "null"
        yield f"{key}={value}"


# The kinds. Each takes what was asked for, and yields what to try instead.


def _fewer_in_flight(config: Config, hardware: Hardware) -> Iterator[Try]:
    fewer = (config.run.in_flight or 1) // 2
    while fewer:
        yield changed(config, {"run.in_flight": fewer}), hardware
        fewer //= 2


def _another_degree(config: Config, hardware: Hardware) -> Iterator[Try]:
    """Over more GPUs than was asked for, or fewer."""
    asked = config.parallel.tensor
    if asked is not None:
        more, fewer = range(asked + 1, len(hardware.gpus) + 1), range(min(asked - 1, len(hardware.gpus)), 1, -1)
        for ranks in (*more, *fewer):
            yield changed(config, {"parallel.tensor": ranks}), hardware


def _stages(config: Config, hardware: Hardware) -> Iterator[Try]:
    """One group of layers on each GPU, where a layer cannot be cut."""
    if config.parallel.pipeline is None and config.parallel.tensor is None:
        for stages in range(2, len(hardware.gpus) + 1):
            yield changed(config, {"parallel.pipeline": stages}), hardware


def _own_split(config: Config, hardware: Hardware) -> Iterator[Try]:
    """Without a split or a degree that was given by hand."""
    by_hand = {key: None for key in ("parallel.gpu_split", "parallel.tensor", "parallel.pipeline") if get(config, key)}
    if by_hand:
        yield changed(config, by_hand), hardware


def _no_margin(config: Config, hardware: Hardware) -> Iterator[Try]:
    if config.hardware.margin_gib != 0:
        yield changed(config, {"hardware.margin_gib": 0.0}), hardware


def _no_reserve(config: Config, hardware: Hardware) -> Iterator[Try]:
    kept = round(config.hardware.reserve_gib * GIB)
    if not kept or not all(gpu.free for gpu in hardware.gpus):  # of one that has nothing left, who knows what it had?
        return
    gpus = tuple(replace(gpu, free=gpu.free + kept) for gpu in hardware.gpus)
    host = hardware.host_available + (0 if gpus else kept)
    yield changed(config, {"hardware.reserve_gib": 0.0}), replace(hardware, gpus=gpus, host_available=host)


def _smaller_cache(config: Config, hardware: Hardware) -> Iterator[Try]:
    smaller = [{"cache.bits": bits} for bits in CACHE_BITS if bits < (config.cache.bits or 16)]
    yield from ((other, hardware) for other in _and_one_in_flight(config, smaller))


def _shorter_context(config: Config, hardware: Hardware) -> Iterator[Try]:
    if config.model.max_context is not None:
        yield from ((other, hardware) for other in _and_one_in_flight(config, [{"model.max_context": None}]))


def _another_method(config: Config, hardware: Hardware) -> Iterator[Try]:
    """The width that was asked for, by whatever has it."""
    if config.quant.method != "auto" and config.quant.bits is not None:
        free = [{"quant.method": "auto", "quant.group_size": None}]
        yield from ((other, hardware) for other in _and_one_in_flight(config, free))


def _fewer_bits(config: Config, hardware: Hardware) -> Iterator[Try]:
    method = {"quant.method": "auto", "model.dtype": "auto"} if _fixed(config) else {}
    widths = [{"quant.bits": bits, **method} for bits in _widths_below(config)]
    yield from ((other, hardware) for other in _and_one_in_flight(config, widths))


def _another_engine(config: Config, hardware: Hardware) -> Iterator[Try]:
    """The same width if another engine has it, else the next one below."""
    if config.backend.name == "auto":
        return
    free = dict.fromkeys(ENGINE_KEYS) | {"backend.name": "auto", "quant.method": "auto", "model.dtype": "auto"}
    for bits in dict.fromkeys((config.quant.bits, *_widths_below(config))):
        for ranks in dict.fromkeys((config.parallel.tensor, None)):
            yield _one_in_flight(config, {**free, "quant.bits": bits, "parallel.tensor": ranks}), hardware


def _as_it_loads(config: Config, hardware: Hardware) -> Iterator[Try]:
    free = dict.fromkeys(ENGINE_KEYS) | {"backend.name": AS_IT_LOADS, "quant.method": "auto", "model.dtype": "auto"}
    asked = config.quant.bits
    has = {width for widths in BACKENDS[AS_IT_LOADS].methods.values() for width in widths}
    for bits in [None] if asked is None else sorted(has, key=lambda width: abs(width - asked)):
        yield changed(config, {**free, "quant.bits": bits}), hardware


def _to_host(config: Config, hardware: Hardware) -> Iterator[Try]:
    if hardware.gpus:
        for other in _offloading(config):
            yield changed(other, {"offload.cpu_gib": hardware.host_available / GIB}), hardware


def _to_disk(config: Config, hardware: Hardware) -> Iterator[Try]:
    for other in _offloading(config):
        yield changed(other, {"offload.folder": offload.ANY_FOLDER}), hardware


def _to_both(config: Config, hardware: Hardware) -> Iterator[Try]:
    if hardware.gpus:
        for other in _offloading(config):
            both = {"offload.cpu_gib": hardware.host_available / GIB, "offload.folder": offload.ANY_FOLDER}
            yield changed(other, both), hardware


def _offloading(config: Config) -> Iterator[Config]:
    """What was asked for, on an engine that offloads; then any width of any such engine."""
    nowhere = dict.fromkeys(offload.KEYS)
    if config.backend.name in ("auto", *backends_with_key(offload.KEYS[0])):
        yield changed(config, nowhere)
    free = dict.fromkeys(ENGINE_KEYS) | {"backend.name": "auto"}
    yield changed(config, free)
    yield changed(config, free | {"quant.bits": None, "quant.method": "auto", "model.dtype": "auto"})


def _more_cards(config: Config, hardware: Hardware) -> Iterator[Try]:
    if not hardware.gpus:
        return
    own = changed(config, {"parallel.gpu_split": None, "parallel.tensor": None})
    last = hardware.gpus[-1]
    for count in range(len(hardware.gpus) + 1, MOST_CARDS + 1):
        more = (replace(last, index=last.index + i + 1) for i in range(count - len(hardware.gpus)))
        larger = replace(hardware, gpus=(*hardware.gpus, *more))
        if config.parallel.tensor is not None:
            yield changed(config, {"parallel.gpu_split": None, "parallel.tensor": count}), larger
        yield own, larger


def _everything(config: Config, hardware: Hardware) -> Iterator[Try]:
    free: dict[str, Any] = dict.fromkeys(ENGINE_KEYS)
    free |= {"backend.name": "auto", "quant.method": "auto", "model.dtype": "auto", "model.max_context": None}
    yield _one_in_flight(config, {**free, "quant.bits": None}), hardware
    for bits in WIDTHS:
        yield _one_in_flight(config, {**free, "quant.bits": bits}), hardware
    yield _one_in_flight(config, {**free, "quant.bits": WIDTHS[-1], "cache.bits": CACHE_BITS[-1]}), hardware


def _and_one_in_flight(config: Config, tried: list[dict[str, Any]]) -> Iterator[Config]:
    """Each with the sequences in flight that were asked for; then each with one."""
    yield from (changed(config, change) for change in tried)
    if (config.run.in_flight or 1) > 1:
        yield from (_one_in_flight(config, change) for change in tried)


def _one_in_flight(config: Config, more: dict[str, Any]) -> Config:
    fewer = {"run.in_flight": 1} if (config.run.in_flight or 1) > 1 else {}
    return changed(config, {**fewer, **more})


def _fixed(config: Config) -> bool:
    """Whether the method, or a dtype of what is not quantized, allows one width only."""
    method = METHODS.get(config.quant.method)
    return config.model.dtype != "auto" or (method is not None and method.low is None)


def _widths_below(config: Config) -> Iterator[float]:
    if config.quant.bits is not None:
        asked = config.quant.bits
    elif config.model.dtype != "auto" or config.quant.method == "none":
        asked = 16.0
    elif config.quant.method != "auto":
        asked = max(width for b in BACKENDS.values() for width in b.methods.get(config.quant.method, ()))
    else:
        asked = 32.0 if config.backend.name != "auto" else LEAST_BITS
    return (bits for bits in (16.0, *WIDTHS) if bits < asked)


def _is_shorter(found: Candidate, asked: Config) -> bool:
    return not found.offloads and found.max_context < (asked.model.max_context or 0)


KINDS = (
    _Kind("fewer answers at a time", _fewer_in_flight),
    _Kind("the room that was kept for others", _no_reserve),
    _Kind("the degree that was typed", _another_degree),
    _Kind("the split that was typed", _own_split),
    _Kind("speed: a stage computes at a time", _stages),
    _Kind("the room for what a plan does not foresee", _no_margin),
    _Kind("a little precision of the cache", _smaller_cache),
    _Kind("the length of a conversation", _shorter_context, _is_shorter, longest=True),
    _Kind("the method that was asked for", _another_method, lambda found, asked: found.method != asked.quant.method),
    _Kind("precision", _fewer_bits),
    _Kind("the engine that was asked for", _another_engine, lambda found, asked: found.backend != asked.backend.name),
    _Kind("speed", _to_host, lambda found, asked: found.offloads),
    _Kind("speed", _to_disk, lambda found, asked: found.offloads),
    _Kind("what a card costs", _more_cards),
)
TO_BOTH = _Kind("speed", _to_both, lambda found, asked: found.offloads)  # where neither alone is enough
TOGETHER = _Kind("all of it together", _everything)
