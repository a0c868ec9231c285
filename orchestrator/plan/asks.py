"""What a configuration asks the plan to look at: every engine, method and width that it leaves open."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.backends.known_models import LOADED, counted, unmerged
from orchestrator.backends.table import BACKENDS, METHODS, Backend, backends_with_adapters, backends_with_key
from orchestrator.checkpoint.adapter_unmerged import MERGED
from orchestrator.checkpoint.quantized import Quantized
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.config import ENGINE_KEYS, Config, get
from orchestrator.errors import ConfigError, EngineUnavailableError, OrchestratorError
from orchestrator.hardware import BF16, GIB, Hardware
from orchestrator.plan.packed import not_loaded, quantized_of
from orchestrator.plan.ranking import GOAL_CONTEXT, IN_FLIGHT
from orchestrator.plan.types import Ask


def asks_of(config: Config, spec: ModelSpec, hardware: Hardware) -> Iterator[Ask]:
    set_keys = {key for key in ENGINE_KEYS if get(config, key) is not None}
    stored = quantized_of(spec)
    for backend in BACKENDS.values():
        if config.backend.name not in ("auto", backend.name) or not set_keys <= backend.keys:
            continue
        if not (config.model.merge or backend.unmerged):
            continue
        automatic = hardware.device in backend.automatic or bool(set_keys) or stored is not None
        if config.backend.name == "auto" and not automatic:
            continue
        if backend.cache_bits and config.cache.bits not in (None, *backend.cache_bits):
            continue  # of another engine that was not named
        if (refusal := _refusal(backend, spec, hardware, stored)) is not None:
            if config.backend.name == backend.name:
                raise refusal
            continue
        for method, bits in _widths(config, backend, hardware) if stored is None else [(stored.method, stored.bits)]:
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
                double_quant=bool(config.quant.double) and method in ("nf4", "fp4")
                if stored is None
                else stored.double,
                max_context=config.model.max_context,
                goal=GOAL_CONTEXT,
                max_in_flight=config.run.in_flight or IN_FLIGHT[0],
                settings={key: get(config, key) for key in set_keys},
                engine_args=dict(config.backend.engine_args),
            )


def none_loads(config: Config, spec: ModelSpec, hardware: Hardware, stored: Quantized) -> OrchestratorError:
    """Why nothing that was asked for runs a checkpoint that is quantized already."""
    what = f"the model is quantized already ({stored.label})"
    loaders = [b for b in BACKENDS.values() if config.backend.name in ("auto", b.name) and stored.format in b.loads]
    if not loaders:
        return ConfigError(f"{what}, and no engine here loads that as it is; {known(spec)}", _UNQUANTIZED)
    refusals = [r for backend in loaders if (r := _refusal(backend, spec, hardware, stored)) is not None]
    if absent := next((error for error in refusals if isinstance(error, EngineUnavailableError)), None):
        return EngineUnavailableError(f"{what}, and {absent.message}", absent.hint)
    if reasons := [why for backend in loaders if (why := not_loaded(backend, stored))]:
        return ConfigError(f"{what}, and {'; '.join(reasons)}; {known(spec)}", _UNQUANTIZED)
    if refusals:
        return refusals[0]
    return ConfigError(f"{what}, and {nothing_matches(config)}", "Leave out what is not the checkpoint's own.")


def none_unmerged(config: Config, spec: ModelSpec, hardware: Hardware) -> OrchestratorError | None:
    """Why no engine runs these adapters on top of their base; None where that is not what stands in the way."""
    able = [BACKENDS[name] for name in backends_with_adapters() if config.backend.name in ("auto", name)]
    refusals = (_refusal(backend, spec, hardware, None) for backend in able)
    found = None if config.model.merge else next((refusal for refusal in refusals if refusal is not None), None)
    if isinstance(found, EngineUnavailableError):
        hint = f"Leave model.merge out to have the adapter merged. {found.hint}"
        return EngineUnavailableError(f"model.merge=false: {found.message}", hint)
    return found


_UNQUANTIZED = "Set model.path to the unquantized model."


def _refusal(
    backend: Backend, spec: ModelSpec, hardware: Hardware, stored: Quantized | None
) -> OrchestratorError | None:
    """Why an engine can run nothing of this model on this hardware; None where it can."""
    if stored is not None and (why := not_loaded(backend, stored)):
        what = f"the model is quantized already ({stored.label})"
        return ConfigError(f"{what}, and {why}; {known(spec)}", _UNQUANTIZED)
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
            f"what backend={backend.name} needs for a {spec.architecture} is not known here; {known(spec)}",
            f"It is known of {', '.join(sorted(counted(backend.name)))}.",
        )
    if spec.loras and spec.architecture not in unmerged(backend.name):
        return ConfigError(
            f"backend={backend.name} runs no adapter on top of a {spec.architecture} (model.merge=false)",
            MERGED,
        )
    return None


def known(spec: ModelSpec) -> str:
    """What can be said of a model that cannot be planned."""
    cache = spec.cache_elements(1)
    eyes = f" ({spec.vision_bytes / GIB:.2f} of them the image encoder)" if spec.vision_bytes else ""
    return f"its weights take {spec.nbytes / GIB:.2f} GiB{eyes} as they are, its cache {cache:,} elements a token"


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
    elif method in backend.half and asked == "float32":
        return None
    elif asked != "auto":
        return asked
    if not hardware.gpus:
        return "bfloat16" if method == "none" or method in backend.half else "float32"
    return "bfloat16" if all(gpu.capability >= BF16 for gpu in hardware.gpus) else "float16"


def _in(backend: Backend, config: Config) -> str:
    """The dtypes of an engine that has not every one, where one was asked for."""
    if config.model.dtype == "auto" or not backend.dtypes:
        return ""
    return f", all in {' or '.join(backend.dtypes)}: leave model.dtype out"


def _offer(backend: Backend, method: str, widths: tuple[float, ...]) -> str:
    """As it is typed where the bare name would be read as "nothing", or where it is not taken by itself."""
    typed = method == "none" or method in backend.on_request
    return f"{f'quant={method}' if typed else method} at {METHODS[method].widths(widths)} bits"


def _loads(backend: Backend) -> str:
    """What it does not make, and runs where a checkpoint is in it already."""
    others = [name for name in backend.loads if name in METHODS and name not in backend.methods]
    return f", and {' and '.join(others)} where the checkpoint is in it already" if others else ""


def nothing_matches(config: Config) -> str:
    asked = [f"backend={config.backend.name}"] if config.backend.name != "auto" else []
    asked += [f"quant.method={config.quant.method}"] if config.quant.method != "auto" else []
    asked += [f"quant.bits={config.quant.bits:.10g}"] if config.quant.bits is not None else []
    asked += [f"model.dtype={config.model.dtype}"] if config.model.dtype != "auto" else []
    asked += ["model.merge=false"] if not config.model.merge else []
    needed = {key: backends_with_key(key) for key in ENGINE_KEYS if get(config, key) is not None}
    asked += [f"{key}={get(config, key)}" for key in needed]
    have = [f"{key} is a setting of {' and '.join(able)}" for key, able in needed.items()]
    have += [
        f"{b.name} has {', '.join(_offer(b, m, ws) for m, ws in b.methods.items())}{_loads(b)}{_in(b, config)}"
        for b in BACKENDS.values()
        if config.backend.name in ("auto", b.name)
        and (config.model.merge or b.unmerged)
        and all(b.name in able for able in needed.values())
    ]
    return f"no engine runs {' with '.join(asked)}: {'; '.join(have)}"
