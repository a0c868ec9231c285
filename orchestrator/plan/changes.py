"""What to change where something does not fit, each with its number."""

from __future__ import annotations

import math
from dataclasses import replace

from orchestrator.backends.table import BACKENDS
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.config import Config
from orchestrator.hardware import GIB, Hardware
from orchestrator.plan import offload
from orchestrator.plan.asks import asks_of
from orchestrator.plan.estimate import estimate
from orchestrator.plan.ranking import goal_of, rank
from orchestrator.plan.types import Candidate, Plan


def ways_out(config: Config, spec: ModelSpec, hardware: Hardware, plan: Plan) -> str:
    """What would fit, cheapest change first, each with its number; what offload would do comes last."""
    short = replace(plan.chosen, max_context=0)
    tries: list[tuple[str, Config]] = []
    if (config.run.in_flight or 1) > 1:
        tries.append(("run.in_flight=1", _changed(config, in_flight=1)))
    if config.model.max_context is not None:
        tries.append(("a shorter model.max_context", _changed(config, context=True)))
    tries.append(("another width", _changed(config, in_flight=1, context=True, width=True)))
    ways = []
    for name, other in tries:
        asks = asks_of(other, spec, hardware)
        found = min((estimate(other, spec, hardware, ask) for ask in asks), key=lambda c: rank(c, 0))
        if found.fits:
            settings = f"backend={found.backend} quant.bits={found.bits:g} model.max_context={found.max_context}"
            how = name if name.startswith("run.") else f"{settings} run.in_flight={found.max_in_flight}"
            ways.append(f"{how} ({_most(found):.2f} GiB)")
            break
        short = found
    ways += _offload_ways(config, spec, hardware) or _offload_ways(_changed(config, width=True), spec, hardware)
    if ways:
        return f"What would fit: {'; or, slower, '.join(ways)}."
    have = sum(d.capacity for d in short.devices) / GIB
    need = sum(d.total for d in short.devices) / GIB
    return f"Nothing that this version has would fit: {short.label} needs {need:.2f} GiB of {have:.2f} GiB."


def _most(candidate: Candidate) -> float:
    """GiB on the device that holds the most of what is loaded, the disk aside."""
    return max(d.total / GIB for d in (candidate.gpus or (candidate.host,)))


def _offload_ways(config: Config, spec: ModelSpec, hardware: Hardware) -> list[str]:
    """What was asked for, with a part of it in host memory or on disk; in both only where one is not enough."""
    if config.backend.name != "auto" and not BACKENDS[config.backend.name].keys >= set(offload.KEYS):
        config = replace(config, backend=replace(config.backend, name="auto"))
    host, disk = hardware.host_available / GIB, offload.ANY_FOLDER
    ways: list[str] = []
    for cpu, path in ((host, None), (None, disk), (host, disk)) if hardware.gpus else ((None, disk),):
        if cpu is not None and path is not None and ways:
            continue
        other = replace(config, offload=replace(config.offload, cpu_gib=cpu, folder=path))
        candidates = [estimate(other, spec, hardware, ask) for ask in asks_of(other, spec, hardware)]
        fitting = sorted((c for c in candidates if c.fits and c.offloads), key=lambda c: rank(c, goal_of(config, spec)))
        if fitting:
            ways.append(_offload_way(config, fitting[0]))
    return ways


def _offload_way(config: Config, found: Candidate) -> str:
    """The settings that a person types, and what they cost."""
    keys = [] if config.backend.name == found.backend else [f"backend={found.backend}"]
    keys += [] if config.quant.bits == found.bits else [f"quant.bits={found.bits:g}"]
    where = []
    if found.gpus and found.host.weights:
        size = math.ceil(found.host.weights / GIB * 100) / 100
        keys.append(f"offload.cpu_gib={size:g}")
        where.append(f"{size:g} GiB in host memory")
    if found.disk:
        keys.append("offload.folder=/path")
        where.append(f"{found.disk.weights / GIB:.2f} GiB on disk")
    return f"{' '.join(keys)} ({', '.join(where)}, at most {found.most_tokens_per_s:.2g} tokens/s)"


def _changed(config: Config, *, in_flight: int | None = None, context: bool = False, width: bool = False) -> Config:
    """A copy of the configuration with less asked for."""
    run = replace(config.run, in_flight=in_flight) if in_flight else config.run
    model = replace(config.model, max_context=None) if context else config.model
    if not width:
        return replace(config, run=run, model=model)
    quant = replace(config.quant, bits=None, method="auto", double=None)
    backend = replace(config.backend, name="auto")
    offload_ = replace(config.offload, folder=None, cpu_gib=None)
    return replace(config, offload=offload_, run=run, model=replace(model, dtype="auto"), quant=quant, backend=backend)
