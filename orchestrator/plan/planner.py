"""The plan: every engine and width that was asked about, what fits, and the best of it. No torch, no GPU needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from orchestrator.backends.known_models import counted, tried
from orchestrator.backends.table import BACKENDS
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.config import Config, changed
from orchestrator.engine.interpreters import require
from orchestrator.errors import ConfigError, DoesNotFitError, EngineUnavailableError
from orchestrator.hardware import BF16, Hardware
from orchestrator.plan import offload
from orchestrator.plan.asks import asks_of, known, none_loads, none_unmerged, nothing_matches
from orchestrator.plan.changes import Unmade, changes, made, smallest
from orchestrator.plan.conversion import ELSEWHERE
from orchestrator.plan.estimate import estimate, largest_context
from orchestrator.plan.packed import check_asked, check_weights, quantized_of
from orchestrator.plan.ranking import goal_of, rank
from orchestrator.plan.types import Candidate, Plan

SAID = 3  # changes that an error names; the plan has them all


def make_plan(config: Config, spec: ModelSpec, hardware: Hardware, unmade: Unmade = made) -> Plan:
    """The best candidate first, by the design's order.

    Fits; needs no offload; then the least loss of precision that keeps the context; then speed; installed before not
    installed. Offload comes before precision because it costs a factor of ten or more in speed, where 4 bits cost a
    little quality: who wants the precision asks for the width, and then nothing stands before the offload. Only what
    has not even half of the context stands behind one with offload that keeps it.

    Args:
        unmade: says of a candidate why its files cannot be made here; no such one is suggested instead.

    Raises:
        ConfigError: no engine has the method, the bits and the keys that were asked for together.
        EngineUnavailableError: the engine that was asked for does not run on such hardware.
        DoesNotFitError: never here: a plan that does not fit is an answer too (see `must_fit`).
    """
    _check_context(config, spec)
    offload.check_offload(config, bool(hardware.gpus))
    stored = quantized_of(spec)
    if stored is not None:
        check_weights(spec, stored)
        check_asked(config, stored)
    asks = list(asks_of(config, spec, hardware))
    if not asks and stored is not None:
        raise none_loads(config, spec, hardware, stored)
    if not asks and (refusal := none_unmerged(config, spec, hardware)) is not None:
        raise refusal
    if not asks:
        if not any(spec.architecture in counted(name) for name in BACKENDS):
            raise ConfigError(f"what an engine needs for a {spec.architecture} is not known here; {known(spec)}")
        raise ConfigError(nothing_matches(config))
    candidates = [
        replace(estimate(config, spec, hardware, ask), largest_context=largest_context(config, spec, hardware, ask))
        for ask in asks
    ]
    candidates.sort(key=lambda c: rank(c, goal_of(config, spec)))
    notes = (
        *spec.notes,
        *_untried(candidates, spec),
        *hardware.notes,
        *_dtype_notes(config, candidates[0], hardware),
        *_old_card_notes(candidates, hardware),
        *_split_notes(config, spec, hardware, candidates[0]),
        *_in_flight_notes(config, spec, hardware, candidates[0]),
    )
    if candidates[0].fits:
        return Plan(candidates[0], tuple(candidates), notes, hardware)
    lacking = next((why for candidate in candidates if (why := unmade(config, candidate))), "")
    ways = changes(config, spec, hardware, unmade)
    return Plan(candidates[0], tuple(candidates), notes, hardware, ways, lacking)


def _untried(candidates: list[Candidate], spec: ModelSpec) -> Iterator[str]:
    names = [name for name in dict.fromkeys(c.backend for c in candidates) if spec.architecture not in tried(name)]
    if names:
        yield f"{' and '.join(names)} with a {spec.architecture}: planned by the engine's rules, and never tried here"


def must_fit(plan: Plan, config: Config, spec: ModelSpec, hardware: Hardware) -> None:
    """Refuses a plan that does not fit.

    Raises:
        DoesNotFitError: with what is missing where, and what would fit.
    """
    if plan.chosen.fits:
        return
    problem = f"{plan.chosen.label} does not fit: {'; '.join(plan.chosen.reasons)}"
    unmade = f" Nothing that has to be converted first would: {plan.unmade}; {ELSEWHERE}." if plan.unmade else ""
    if plan.changes:
        fast, slow = ([change.said for change in plan.changes if change.slow is offloads] for offloads in (False, True))
        ways = "; or ".join(fast[:SAID]) + ("; or, slower, " if fast and slow else "") + "; or, slower, ".join(slow)
        raise DoesNotFitError(problem, f"What would fit: {ways}.{unmade}")
    if unmade:
        raise DoesNotFitError(problem, unmade.strip())
    least = smallest(config, spec, hardware)
    why = "; ".join(least.reasons)
    raise DoesNotFitError(problem, f"Nothing that this version has would fit, {least.label} neither: {why}.")


def runnable(plan: Plan, config: Config, hardware: Hardware) -> tuple[Candidate, str]:
    """The candidate that a real run takes, and its interpreter.

    With backend=auto an installed engine that fits comes before a better one that is not installed.

    Raises:
        ConfigError: what was asked for needs a checkpoint that this version does not make.
        EngineUnavailableError: the engine that was asked for, or every one, is not installed.
    """
    fitting = [c for c in plan.candidates if c.fits]
    if config.backend.name == "auto":
        fitting = [c for c in fitting if not c.needs] or fitting
        fitting = [c for c in fitting if c.installed] or fitting
    chosen = fitting[0]
    if chosen.needs:
        raise not_made(chosen)
    if hardware.device not in BACKENDS[chosen.backend].devices:
        raise EngineUnavailableError(f"backend={chosen.backend} needs a CUDA GPU, and there is none here")
    return chosen, require(BACKENDS[chosen.backend], config, hardware.device)


def not_made(chosen: Candidate) -> ConfigError:
    """A candidate that runs only from a checkpoint that nothing here makes."""
    return ConfigError(
        f"{chosen.label} needs {chosen.needs}, and this version makes none",
        "Make one with GPTQModel (pip install gptqmodel) and give its folder as model.path, or ask for another "
        "method (quant.method, quant.bits, backend).",
    )


def _check_context(config: Config, spec: ModelSpec) -> None:
    asked = config.model.max_context
    if asked is not None and asked > spec.max_context:
        raise ConfigError(
            f"model.max_context={asked} is more than the {spec.max_context} tokens that this model was made for",
            f"Set model.max_context={spec.max_context} or less.",
        )


def _old_card_notes(candidates: list[Candidate], hardware: Hardware) -> Iterator[str]:
    """No refusal: an interpreter of the user's own may have a PyTorch that was built for such a card."""
    for least in sorted({BACKENDS[c.backend].capability for c in candidates}):
        old = next((gpu for gpu in hardware.gpus if gpu.capability < least), None)
        if old is not None:
            of = [name for name in dict.fromkeys(c.backend for c in candidates) if BACKENDS[name].capability == least]
            yield (
                f"GPU {old.index} ({old.name}) has compute capability {old.capability_text}, for which the PyTorch "
                f"pinned for {' and '.join(of)} has no kernels: its least is {'.'.join(map(str, least))}"
            )


def _split_notes(config: Config, spec: ModelSpec, hardware: Hardware, chosen: Candidate) -> Iterator[str]:
    """A split by hand says how much of the layers a GPU gets; their cache comes on top, and may find little room."""
    if not chosen.gpu_split or not chosen.fits or chosen.max_context >= goal_of(config, spec):
        return
    by_itself = changed(config, {"parallel.gpu_split": None})
    most = _same(by_itself, spec, hardware, chosen)
    if most > chosen.max_context:
        said = ",".join(f"{share:g}" for share in config.parallel.gpu_split)
        yield (
            f"parallel.gpu_split=[{said}] leaves a context of {chosen.max_context}: a share is of layers, and their "
            f"cache comes on top of it. Give the first GPUs less, or type parallel.gpu_split=auto, which has {most}."
        )


def _in_flight_notes(config: Config, spec: ModelSpec, hardware: Hardware, chosen: Candidate) -> Iterator[str]:
    """So many at a time were asked for, and no context: it is cut before they are, and nobody chose that."""
    in_flight, asked = config.run.in_flight or 1, config.model.max_context
    alone = min(goal_of(config, spec), chosen.largest_context or 0)
    if in_flight == 1 or asked is not None or not chosen.fits or chosen.max_context >= alone:
        return
    fewer, longest = in_flight, chosen.max_context
    while longest < alone and fewer > 1:
        fewer //= 2
        longest = _same(changed(config, {"run.in_flight": fewer}), spec, hardware, chosen)
    yield (
        f"run.in_flight={in_flight} leaves {chosen.label} a context of {chosen.max_context} each, where one alone has "
        f"{alone}. Type run.in_flight={fewer}, which has {longest}, or, if {chosen.max_context} will do, "
        f"model.max_context={chosen.max_context}."
    )


def _same(config: Config, spec: ModelSpec, hardware: Hardware, chosen: Candidate) -> int:
    """The context of the same engine, method and width under another configuration; 0: it does not fit."""
    like = (chosen.backend, chosen.method, chosen.bits)
    asks = [ask for ask in asks_of(config, spec, hardware) if (ask.backend, ask.method, ask.bits) == like]
    found = (estimate(config, spec, hardware, ask) for ask in asks)
    return max((c.max_context for c in found if c.fits), default=0)


def _dtype_notes(config: Config, chosen: Candidate, hardware: Hardware) -> Iterator[str]:
    """Where the card decides the dtype, or has none of what was asked for."""
    without = [gpu for gpu in hardware.gpus if gpu.capability < BF16]
    if not without or BACKENDS[chosen.backend].dtypes:
        return  # an engine of one dtype has it on every card
    gpu = without[0]
    card = f"GPU {gpu.index} ({gpu.name}, compute capability {gpu.capability_text}) has no bf16"
    if config.model.dtype == "auto" and chosen.dtype == "float16":
        yield f"{card}: float16"
    elif chosen.dtype == "bfloat16":
        yield f"{card}: model.dtype=bfloat16 is slow there, or refused by the engine; model.dtype=float16 is not"
