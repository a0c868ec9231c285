"""The plan: every engine and width that was asked about, what fits, and the best of it. No torch, no GPU needed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace

from orchestrator.backends.known_models import LOADED, counted, tried
from orchestrator.backends.table import BACKENDS, METHODS, Backend
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.checkpoint.trust import shown
from orchestrator.config import ENGINE_KEYS, Config, get
from orchestrator.engine.interpreters import interpreter, require
from orchestrator.errors import ConfigError, DoesNotFitError, EngineUnavailableError, OrchestratorError
from orchestrator.hardware import BF16, Hardware
from orchestrator.plan import offload
from orchestrator.plan.types import Ask, Candidate, Plan

GIB = 2**30
GOAL_CONTEXT = 4096  # tokens that a plan tries to keep where none were asked for
IN_FLIGHT = (4, 2, 1)  # sequences at a time, where they were not asked for: fewer before a shorter context
CONTEXT_STEP = 512  # contexts below the goal count by such steps: a few tokens more are worth no precision


def make_plan(config: Config, spec: ModelSpec, hardware: Hardware) -> Plan:
    """The best candidate first, by the design's order.

    Fits; needs no offload; then the least loss of precision that keeps the context; then speed; installed before not
    installed. Offload comes before precision because it costs a factor of ten or more in speed, where 4 bits cost a
    little quality: who wants the precision asks for the width, and then nothing stands before the offload. Only what
    has not even half of the context stands behind one with offload that keeps it.

    Raises:
        ConfigError: no engine has the method, the bits and the keys that were asked for together.
        EngineUnavailableError: the engine that was asked for does not run on such hardware.
        DoesNotFitError: never here: a plan that does not fit is an answer too (see `must_fit`).
    """
    _check_context(config, spec)
    offload.check_offload(config, bool(hardware.gpus))
    if spec.quantization is not None:
        method = shown(spec.quantization.get("quant_method", "unknown"), 40)
        raise ConfigError(
            f"the model is quantized already ({method}), and no engine of this version runs that; {_known(spec)}",
            "Set model.path to the unquantized model.",
        )
    asks = list(_asks(config, spec, hardware))
    if not asks:
        if not any(spec.architecture in counted(name) for name in BACKENDS):
            raise ConfigError(f"what an engine needs for a {spec.architecture} is not known here; {_known(spec)}")
        raise ConfigError(_nothing_matches(config))
    candidates = [_estimate(config, spec, hardware, ask) for ask in asks]
    candidates.sort(key=lambda c: _rank(c, _goal(config, spec)))
    notes = (
        *spec.notes,
        *_untried(candidates, spec),
        *hardware.notes,
        *_dtype_notes(config, candidates[0], hardware),
    )
    return Plan(candidates[0], tuple(candidates), notes, hardware)


def _untried(candidates: list[Candidate], spec: ModelSpec) -> Iterator[str]:
    names = [name for name in dict.fromkeys(c.backend for c in candidates) if spec.architecture not in tried(name)]
    if names:
        yield f"{' and '.join(names)} with a {spec.architecture}: planned by the engine's rules, and never tried here"


def _known(spec: ModelSpec) -> str:
    """What can be said of a model that cannot be planned."""
    cache = spec.cache_elements(1)
    eyes = f" ({spec.vision_bytes / GIB:.2f} of them the image encoder)" if spec.vision_bytes else ""
    return f"its weights take {spec.nbytes / GIB:.2f} GiB{eyes} as they are, its cache {cache:,} elements a token"


def must_fit(plan: Plan, config: Config, spec: ModelSpec, hardware: Hardware) -> None:
    """Refuses a plan that does not fit.

    Raises:
        DoesNotFitError: with what is missing where, and what would fit.
    """
    if not plan.chosen.fits:
        ways = _ways_out(config, spec, hardware, plan)
        raise DoesNotFitError(f"{plan.chosen.label} does not fit: {'; '.join(plan.chosen.reasons)}", ways)


def runnable(plan: Plan, config: Config, hardware: Hardware) -> tuple[Candidate, str]:
    """The candidate that a real run takes, and its interpreter.

    With backend=auto an installed engine that fits comes before a better one that is not installed.

    Raises:
        EngineUnavailableError: the engine that was asked for, or every one, is not installed.
    """
    fitting = [c for c in plan.candidates if c.fits]
    if config.backend.name == "auto":
        fitting = [c for c in fitting if c.installed] or fitting
    chosen = fitting[0]
    if hardware.device not in BACKENDS[chosen.backend].devices:
        raise EngineUnavailableError(f"backend={chosen.backend} needs a CUDA GPU, and there is none here")
    return chosen, require(BACKENDS[chosen.backend], config, hardware.device)


def why(chosen: Candidate, plan: Plan, config: Config) -> str:
    """The choice in one sentence."""
    others = [c for c in plan.candidates if c is not chosen]
    if not others:
        return "nothing else matches the request"
    if not any(c.fits for c in others):
        return "the only one that fits"
    better = [c for c in others if c.fits and _loss(c) < _loss(chosen)]
    if better and better[0].offloads and not chosen.offloads:
        return f"it needs no offload, unlike {better[0].label}, which would be far slower"
    if better:
        return f"installed, unlike {better[0].label}"
    asked = f" with {config.quant.bits:g} bits" if config.quant.bits is not None else ""
    return f"it fits{asked} and loses the least"


def _check_context(config: Config, spec: ModelSpec) -> None:
    asked = config.model.max_context
    if asked is not None and asked > spec.max_context:
        raise ConfigError(
            f"model.max_context={asked} is more than the {spec.max_context} tokens that this model was made for",
            f"Set model.max_context={spec.max_context} or less.",
        )


def _refusal(backend: Backend, spec: ModelSpec, hardware: Hardware) -> OrchestratorError | None:
    """Why an engine can run nothing of this model on this hardware; None where it can."""
    if hardware.device not in backend.devices:
        return EngineUnavailableError(
            f"backend={backend.name} needs a CUDA GPU, and there is none here",
            "To plan for other hardware, add task=plan hardware=4x24gb (see the hardware group).",
        )
    loaded = LOADED.get(backend.name)
    if loaded is not None and spec.architecture not in loaded:
        return ConfigError(
            f"backend={backend.name} does not know the architecture {spec.architecture}, and would load it as another",
            "Use another backend (backend=auto chooses one).",
        )
    if spec.architecture not in counted(backend.name):
        return ConfigError(
            f"what backend={backend.name} needs for a {spec.architecture} is not known here; {_known(spec)}",
            f"It is known of {', '.join(sorted(counted(backend.name)))}.",
        )
    return None


def _asks(config: Config, spec: ModelSpec, hardware: Hardware) -> Iterator[Ask]:
    set_keys = {key for key in ENGINE_KEYS if get(config, key) is not None}
    for backend in BACKENDS.values():
        if config.backend.name not in ("auto", backend.name) or not set_keys <= backend.keys:
            continue
        if config.backend.name == "auto" and hardware.device not in backend.automatic and not set_keys:
            continue
        if backend.cache_bits and config.cache.bits not in (None, *backend.cache_bits):
            continue  # of another engine that was not named
        if (refusal := _refusal(backend, spec, hardware)) is not None:
            if config.backend.name == backend.name:
                raise refusal
            continue
        for method, bits in _widths(config, backend, hardware):
            if method == "none" and any(key.startswith("quant.") for key in set_keys):
                continue  # they say how to quantize
            if config.quant.double and method not in ("nf4", "fp4"):
                continue
            dtype = _dtype(config, backend, method, bits, hardware)
            if dtype is None:
                continue
            yield Ask(
                backend=backend.name,
                method=method,
                bits=bits,
                dtype=dtype,
                double_quant=bool(config.quant.double) and method in ("nf4", "fp4"),
                max_context=config.model.max_context,
                goal=GOAL_CONTEXT,
                max_in_flight=config.run.in_flight or IN_FLIGHT[0],
                settings={key: get(config, key) for key in set_keys},
            )


def _widths(config: Config, backend: Backend, hardware: Hardware) -> Iterator[tuple[str, float]]:
    """(method, bits) pairs of a backend that the request allows. A method is automatic unless it is named."""
    seen: set[float] = set()
    for method, widths in backend.methods.items():
        if config.quant.method not in ("auto", method):
            continue
        if method in backend.on_request and config.quant.method != method:
            continue
        low, high = METHODS[method].low, METHODS[method].high
        asked = config.quant.bits
        if asked is not None and low is not None and high is not None and low <= asked <= high:
            widths = (asked,)
        for bits in widths:
            if config.quant.bits not in (None, bits):
                continue
            if config.quant.method == "auto" and bits in seen:
                continue  # another method of the same width: only when it is asked for (fp4 beside nf4)
            if bits == 32 and config.quant.bits is None and config.model.dtype == "auto" and hardware.gpus:
                continue  # on a GPU, 32 bit is for who asks for it
            seen.add(bits)
            yield method, bits


def _dtype(config: Config, backend: Backend, method: str, bits: float, hardware: Hardware) -> str | None:
    """The dtype of the arithmetic and of what is not quantized; None where it contradicts the bits or the engine.

    bfloat16 needs compute capability 8.0; CPUs compute in float32, as the kernels there do at their best.
    """
    asked = config.model.dtype
    if backend.dtypes:
        return backend.dtypes[0] if asked == "auto" else asked if asked in backend.dtypes else None
    if method == "none":
        if asked != "auto":
            return asked if bits == (32 if asked == "float32" else 16) else None
        if bits == 32:
            return "float32"
    elif asked != "auto":
        return asked
    if not hardware.gpus:
        return "bfloat16" if method == "none" else "float32"
    return "bfloat16" if all(gpu.capability >= BF16 for gpu in hardware.gpus) else "float16"


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


def _estimate(config: Config, spec: ModelSpec, hardware: Hardware, ask: Ask) -> Candidate:
    """One combination's candidate: with the most sequences in flight that leave room for the context.

    Offload is looked at last, where it is allowed and gives more context than fewer sequences in flight do.
    """
    backend = BACKENDS[ask.backend]
    module, function = backend.memory.split(":")
    estimate = getattr(importlib.import_module(module), function)
    goal = _goal(config, spec)
    settings = {key: value for key, value in ask.settings.items() if key not in offload.KEYS}
    asks = [replace(ask, settings=settings)] + ([ask] if settings != ask.settings else [])
    found: list[Candidate] = []
    for asked in asks:
        for in_flight in (ask.max_in_flight,) if config.run.in_flight else IN_FLIGHT:
            candidate: Candidate = estimate(spec, hardware, replace(asked, max_in_flight=in_flight))
            found.append(candidate)
            if candidate.fits and candidate.max_context >= goal and not candidate.offloads:
                break
        if found[-1].fits and not _is_short(found[-1], goal):
            break
    fitting = [candidate for candidate in found if candidate.fits]
    # Where nothing fits, the last try has the reasons that matter: those against the offload, if one was allowed.
    best = max(fitting, key=lambda c: (not _is_short(c, goal), *_way(c, goal))) if fitting else found[-1]
    return replace(best, installed=interpreter(backend, config, hardware.device) is not None)


def _way(candidate: Candidate, goal: int) -> tuple[bool, int, float, int]:
    """No offload, then more context, then the fastest answer: caches of fewer in flight push out less weights."""
    context = min(candidate.max_context, goal)
    return not candidate.offloads, context, candidate.most_tokens_per_s or 0.0, candidate.max_in_flight


def _goal(config: Config, spec: ModelSpec) -> int:
    """Tokens of context to reach."""
    return config.model.max_context or min(GOAL_CONTEXT, spec.max_context)


def _rank(candidate: Candidate, goal: int) -> tuple[float, ...]:
    speed = BACKENDS[candidate.backend].speed.get(candidate.method, 0.0)
    if not candidate.fits:  # nearest to fitting first
        return (1, sum(device.total for device in candidate.devices))
    offload_and_context = (_is_short(candidate, goal), candidate.offloads, _steps(candidate, goal))
    return (0, *offload_and_context, _loss(candidate), -candidate.bits, -speed, not candidate.installed)


def _steps(candidate: Candidate, goal: int) -> int:
    """How far the context is from the goal."""
    return math.ceil(max(0, goal - candidate.max_context) / CONTEXT_STEP)


def _is_short(candidate: Candidate, goal: int) -> bool:
    """Whether the context is less than half of the goal: then an offload that keeps it is better."""
    return 2 * _steps(candidate, goal) > math.ceil(goal / CONTEXT_STEP)


def _loss(candidate: Candidate) -> float:
    return METHODS[candidate.method].loss_at(candidate.bits)


def _nothing_matches(config: Config) -> str:
    asked = [f"backend={config.backend.name}"] if config.backend.name != "auto" else []
    asked += [f"quant.method={config.quant.method}"] if config.quant.method != "auto" else []
    asked += [f"quant.bits={config.quant.bits:g}"] if config.quant.bits is not None else []
    asked += [f"model.dtype={config.model.dtype}"] if config.model.dtype != "auto" else []
    asked += [f"{key}={get(config, key)}" for key in ENGINE_KEYS if get(config, key) is not None]
    have = [
        f"{b.name} has {', '.join(f'{m} at {METHODS[m].widths(ws)} bits' for m, ws in b.methods.items())}"
        for b in BACKENDS.values()
        if config.backend.name in ("auto", b.name)
    ]
    return f"no engine runs {' with '.join(asked)}: {'; '.join(have)}"


def _ways_out(config: Config, spec: ModelSpec, hardware: Hardware, plan: Plan) -> str:
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
        asks = _asks(other, spec, hardware)
        found = min((_estimate(other, spec, hardware, ask) for ask in asks), key=lambda c: _rank(c, 0))
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
        candidates = [_estimate(other, spec, hardware, ask) for ask in _asks(other, spec, hardware)]
        fitting = sorted((c for c in candidates if c.fits and c.offloads), key=lambda c: _rank(c, _goal(config, spec)))
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
