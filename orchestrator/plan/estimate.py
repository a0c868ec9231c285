"""One combination's candidate, by the memory model of its engine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace

from orchestrator.backends.table import BACKENDS
from orchestrator.calibration import ASKED, Margin, lessened, margins
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.config import Config, changed, folder
from orchestrator.engine.interpreters import interpreter, lacking
from orchestrator.hardware import GIB, Hardware
from orchestrator.plan import offload
from orchestrator.plan.ranking import IN_FLIGHT, is_short
from orchestrator.plan.types import Ask, Candidate


def estimate(config: Config, spec: ModelSpec, hardware: Hardware, ask: Ask) -> Candidate:
    """One combination's candidate: with the most sequences in flight that leave room for the context.

    Offload is looked at last, where it is allowed and gives more context than fewer sequences in flight do. What the
    engine's margins keep free is not there for its memory model.
    """
    backend = BACKENDS[ask.backend]
    python = interpreter(backend, config, hardware.device)
    if python is not None and hardware.gpus and not hardware.described:
        ask = replace(ask, lacks=lacking(backend, python))
    kept = margins(folder(config.paths.artifacts), hardware, ask.backend, config.hardware.margin_gib)
    room = lessened(hardware, kept)
    module, function = backend.memory.split(":")
    estimate = getattr(importlib.import_module(module), function)
    goal = ask.max_context or min(ask.goal, spec.max_context)
    settings = {key: value for key, value in ask.settings.items() if key not in offload.KEYS}
    asks = [replace(ask, settings=settings)] + ([ask] if settings != ask.settings else [])
    found: list[Candidate] = []
    for asked in asks:
        for in_flight in (ask.max_in_flight,) if config.run.in_flight else IN_FLIGHT:
            candidate: Candidate = estimate(spec, room, replace(asked, max_in_flight=in_flight))
            found.append(candidate)
            if candidate.fits and candidate.max_context >= goal and not candidate.offloads:
                break
        if found[-1].fits and not is_short(found[-1], goal):
            break
    fitting = [candidate for candidate in found if candidate.fits]
    # Where nothing fits, the last try has the reasons that matter: those against the offload, if one was allowed.
    best = max(fitting, key=lambda c: (not is_short(c, goal), *_way(c, goal))) if fitting else found[-1]
    return replace(_with_margins(best, kept), installed=python is not None)


def _with_margins(candidate: Candidate, kept: Mapping[str, Margin]) -> Candidate:
    """The candidate with what is kept free; where nothing but that is missing, it says so."""
    gpus = tuple(replace(gpu, margin=kept[gpu.device].bytes) for gpu in candidate.gpus)
    host = replace(candidate.host, margin=kept["cpu"].bytes)
    largest = max((kept[device.device] for device in gpus or (host,)), key=lambda margin: margin.bytes)
    reasons = candidate.reasons
    over = [d for d in (*gpus, host) if d.total > d.capacity]
    if over and all(d.total <= d.capacity + d.margin for d in over):
        size = max(d.margin for d in over) / GIB
        why = largest.source if largest.source == ASKED else f"{candidate.backend} was {largest.source}"
        reasons += (f"it would without the {size:.2f} GiB kept free ({why})",)
    return replace(candidate, gpus=gpus, host=host, reasons=reasons, margin_source=largest.source)


def _way(candidate: Candidate, goal: int) -> tuple[bool, int, float, int]:
    """No offload, then more context, then the fastest answer: caches of fewer in flight push out less weights."""
    context = min(candidate.max_context, goal)
    return not candidate.offloads, context, candidate.most_tokens_per_s or 0.0, candidate.max_in_flight


def largest_context(config: Config, spec: ModelSpec, hardware: Hardware, ask: Ask) -> int:
    """Tokens that one sequence alone can have, up to what the model was made for; 0: not even a short one fits."""
    alone = replace(ask, max_context=None, goal=spec.max_context, max_in_flight=1)
    found = estimate(changed(config, {"run.in_flight": 1, "model.max_context": None}), spec, hardware, alone)
    return found.max_context if found.fits else 0
