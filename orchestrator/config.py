"""The typed configuration: every key, its default, and the checks that need nothing but the configuration.

Hydra composes it from conf/ and the command line; `from_hydra` turns the result into these dataclasses.
Values that depend on a model or a machine are checked by the plan.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.backends.table import (
    BACKENDS,
    METHODS,
    backends_that_plan,
    backends_with_adapters,
    backends_with_key,
)
from orchestrator.errors import ConfigError

MEMORY_GIB = (0.1, 4096.0)  # that a GPU, or a host, can be capped to
LESS = "set less, or leave it out"  # where so much is kept free that nothing is left
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass
class BackendConfig:
    name: str = "auto"
    library: str | None = None
    python: str | None = None  # interpreter for the engine's process; unset: chosen by what is installed
    engine_args: dict[str, Any] = field(default_factory=dict)  # the engine's own, none of them what the plan decides


@dataclass
class AdapterConfig:
    path: str = "???"  # a folder, or a hub id
    revision: str | None = None  # of a hub id; unset: main
    name: str | None = None
    weight: float = 1.0


@dataclass
class ModelConfig:
    path: str | None = None  # a folder, or a hub id (org/name); unset: the embedded model with its adapter and prompts
    revision: str | None = None  # of a hub id: a branch, tag or commit; unset: main
    adapter: str | None = None  # short for adapters=[{path: ...}]
    adapters: list[AdapterConfig] = field(default_factory=list)
    merge: bool = True  # false: adapters run on top of the base, where the engine can; the base alone is quantized
    max_context: int | None = None  # tokens of one sequence; unset: what fits, up to 4096 or the model's
    dtype: str = "auto"  # of what is not quantized, and of the arithmetic
    chat_template: str | None = None  # a Jinja file; unset: the model's
    trust_remote_code: bool = False


@dataclass
class MergeConfig:
    base: str = "original"  # what adapters are added to; nf4: what a QLoRA training saw of it
    double: bool = False  # with nf4: the training quantized its scales too (bnb_4bit_use_double_quant)


@dataclass
class CalibrationConfig:
    file: str | None = None
    rows: int | None = None
    length: int | None = None


@dataclass
class QuantConfig:
    method: str = "auto"
    bits: float | None = None  # bits per weight
    group_size: int | None = None  # of GPTQ: inputs that share a scale; -1 (all), 32, 64, 128; unset: 128
    head_bits: int | None = None
    double: bool | None = None  # bitsandbytes: quantize the quantization constants too
    measurement: str | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)


@dataclass
class CacheConfig:
    bits: int | None = None


@dataclass
class ParallelConfig:
    tensor: int | None = None
    pipeline: int | None = None
    gpu_split: Any = None  # "auto", or a list of GiB
    executor: str | None = None
    nodes: int | None = None


@dataclass
class OffloadConfig:
    folder: str | None = None  # weights that nothing else has room for stay on disk; unset: none do
    cpu_gib: float | None = None  # beside a GPU: so much of the weights may lie in host memory; unset: none


@dataclass
class HardwareConfig:
    profile: str = "auto"
    cards: int | None = None  # a profile's number of cards
    gpus: list[int] | None = None  # indexes of the machine's GPUs to use
    memory_gib: Any = None  # cap on each GPU, or on the host where there is none: one number, or a list of one per GPU
    reserve_gib: float = 0.0  # of each GPU, or of the host where there is none, to leave free
    margin_gib: float | None = None  # of each device, kept free for what a plan does not foresee; unset: as measured
    capability: float | None = None  # compute capability (8.6) of a profile's cards; of the machine's own at most


@dataclass
class PromptsConfig:
    file: str | None = None  # .txt: a prompt a line; .jsonl: {"prompt"} or {"messages"}; "-": standard input
    text: Any = None  # one prompt, or a list


@dataclass
class GenerationConfig:
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    stop_tokens: list[int] = field(default_factory=list)  # ids, beside the model's own end tokens


@dataclass
class ConvertConfig:
    shard_size: str | None = None  # of one file; unset: 5GB, and safetensors are not written anew for it
    dtype: str = "auto"  # of the merged checkpoint; auto: as the source has it
    verify: bool = False  # read the result back and compare a sample with the sources


@dataclass
class OutputConfig:
    path: str | None = None


@dataclass
class PathsConfig:
    artifacts: str = "~/.cache/orchestrator/artifacts"
    engines: str = "~/.cache/orchestrator/engines"
    runs: str = "runs"


@dataclass
class RunConfig:
    resume: str | None = None  # a run folder to continue
    in_flight: int | None = None  # prompts answered at a time; unset: 4, or fewer where that keeps the context


@dataclass
class ArtifactsConfig:
    action: str = "list"
    name: str | None = None  # one artifact; unset: all
    unused_days: float = 30.0  # prune removes what no run has used, or built on, for so long
    dry_run: bool = False


@dataclass
class EngineConfig:
    name: str | None = None


@dataclass
class ServerConfig:
    host: str = "127.0.0.1"  # this machine only
    port: int = 8000  # 0: any that is free
    api_key: str | None = None  # that clients have to send; unset: none


@dataclass
class TaskConfig:
    name: str = "run"


@dataclass
class Config:
    backend: BackendConfig = field(default_factory=BackendConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    task: TaskConfig = field(default_factory=TaskConfig)


# Keys that only some engines understand: set for one that lacks them, they are refused, never ignored.
ENGINE_KEYS = (
    "quant.group_size",
    "quant.head_bits",
    "quant.double",
    "quant.measurement",
    "quant.calibration.file",
    "quant.calibration.rows",
    "quant.calibration.length",
    "cache.bits",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.gpu_split",
    "parallel.executor",
    "parallel.nodes",
    "offload.folder",
    "offload.cpu_gib",
    "backend.library",
)


def keys(node: Any = None, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, dotted."""
    node = Config() if node is None else node
    for item in fields(node):
        value, name = getattr(node, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from keys(value, f"{name}.")
        else:
            yield name


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def changed(config: Config, values: dict[str, Any]) -> Config:
    """A copy with other values for some dotted keys; what is not changed is shared. Nothing is checked."""
    other = copy.copy(config)
    for key, value in values.items():
        place: Any = other
        *sections, name = key.split(".")
        for section in sections:
            setattr(place, section, copy.copy(getattr(place, section)))
            place = getattr(place, section)
        setattr(place, name, value)
    return other


def did_you_mean(word: str, known: list[str]) -> str:
    """A sentence naming the known words nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.85) or difflib.get_close_matches(word, known, 2, 0.6)
    if not near:  # the right last part in the wrong place: "bits" for "quant.bits"
        last = [name.rsplit(".", 1)[-1] for name in known]
        close = difflib.get_close_matches(word.rsplit(".", 1)[-1], last, 1, 0.75)
        near = [name for name in known if name.rsplit(".", 1)[-1] in close]
    return f"Did you mean {' or '.join(near)}?" if near else ""


def from_hydra(tree: DictConfig) -> Config:
    """The composed tree as typed dataclasses, checked.

    Raises:
        ConfigError: for every problem found, all in one message.
    """
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    if config.model.adapter:
        config.model.adapters.insert(0, AdapterConfig(path=config.model.adapter))
    problems = [problem for check in CHECKS for problem in check(config)]
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _check_choices(config: Config) -> Iterator[str]:
    choices: dict[str, tuple[str, ...]] = {
        "model.dtype": DTYPES,
        "convert.dtype": DTYPES,
        "quant.method": ("auto", *METHODS),
        "artifacts.action": ("list", "verify", "prune"),
        "merge.base": ("original", "nf4"),
    }
    for key, allowed in choices.items():
        value = get(config, key)
        if value not in allowed:
            yield f"{key}={value} is not one of {', '.join(allowed)}"


def _check_numbers(config: Config) -> Iterator[str]:
    ranges: dict[str, tuple[float, float, str]] = {
        "quant.bits": (2, 32, "2 to 32 bits"),
        "model.max_context": (16, 2**24, "16 to 16777216 tokens"),
        "generation.max_tokens": (1, 2**20, "1 to 1048576 tokens"),
        "generation.temperature": (0, 10, "0 (greedy) to 10"),
        "generation.top_p": (1e-6, 1, "above 0, up to 1"),
        "generation.seed": (0, 2**63 - 1, f"0 to {2**63 - 1}"),
        "hardware.reserve_gib": (0, 4096, "0 to 4096 GiB"),
        "hardware.margin_gib": (0, 4096, "0 to 4096 GiB"),
        "hardware.capability": (3, 20, "3 to 20, such as 7.5 (T4) or 8.6 (RTX 3090)"),
        "hardware.cards": (1, 1024, "1 to 1024"),
        "offload.cpu_gib": (0, 4096, "0 to 4096 GiB"),
        "run.in_flight": (1, 1024, "1 to 1024 prompts"),
        "parallel.tensor": (1, 1024, "1 to 1024 ranks"),
        "parallel.pipeline": (1, 1024, "1 to 1024 stages"),
        "artifacts.unused_days": (0, 36500, "0 to 36500 days"),
        "server.port": (0, 65535, "1 to 65535, or 0 for any that is free"),
    }
    for key, (low, high, meaning) in ranges.items():
        value = get(config, key)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            yield f"{key}={value} is out of range: {meaning}"
    try:
        parse_size(config.convert.shard_size or DEFAULT_SHARD)
    except ValueError as error:
        yield f"convert.shard_size={config.convert.shard_size}: {error}"


def _check_engine_keys(config: Config) -> Iterator[str]:
    name = config.backend.name
    if name != "auto" and name not in BACKENDS:
        yield f"backend.name={name} is not one of auto, {', '.join(BACKENDS)}. {did_you_mean(name, list(BACKENDS))}"
        return
    for key in ENGINE_KEYS:
        if get(config, key) is None or (name != "auto" and key in BACKENDS[name].keys):
            continue
        able = backends_with_key(key)
        if name != "auto":
            yield f"{key} is not a setting of backend={name} ({_who(able)})"
        elif not able:
            yield f"{key} is set, and no backend of this version takes it"
    asked = BACKENDS.values() if name == "auto" else (BACKENDS[name],)
    widths = sorted({bits for backend in asked for bits in backend.cache_bits}, reverse=True)
    if widths and config.cache.bits not in (None, *widths):
        known = f"{', '.join(map(str, widths[:-1]))} or {widths[-1]}"
        where = "any backend: there are" if name == "auto" else f"backend={name}, which has"
        yield f"cache.bits={config.cache.bits} is not a width of {where} {known}"
    if name != "auto" and config.quant.method not in ("auto", *BACKENDS[name].known_methods):
        able = [b.name for b in BACKENDS.values() if config.quant.method in b.known_methods]
        methods = ", ".join(BACKENDS[name].known_methods)
        yield f"quant.method={config.quant.method} is not run by backend={name}, which has {methods} ({_who(able)})"


def _who(able: list[str]) -> str:
    return f"backend={' or '.join(able)} has it" if able else "no backend of this version has it"


def _check_engine_args(config: Config) -> Iterator[str]:
    """Of what goes to the engine as it is: it would win against the plan. With backend=auto any engine may get it."""
    for name in config.backend.engine_args:
        planning = [b for b in backends_that_plan(name) if config.backend.name in ("auto", b)]
        if planning:
            key = BACKENDS[planning[0]].planned_args[name]
            yield (
                f"backend.engine_args.{name} would undo what is planned for backend={' or '.join(planning)}: "
                f"{f'type {key} instead' if key else 'leave it out'}"
            )


def _check_hardware(config: Config) -> Iterator[str]:
    hardware = config.hardware
    if hardware.profile not in ("auto", "cpu") and hardware.cards is None:
        yield f"hardware.profile={hardware.profile} is not auto or cpu; a named profile is chosen by hardware=4x24gb"
    if hardware.cards is not None and hardware.profile in ("auto", "cpu"):
        yield "hardware.cards belongs to a named profile: hardware=4x24gb (hardware.gpus=[0,1] chooses GPUs)"
    if hardware.gpus is not None and len(set(hardware.gpus)) < len(hardware.gpus):
        yield f"hardware.gpus={hardware.gpus} names a GPU twice"
    if hardware.gpus == []:
        yield "hardware.gpus=[] names no GPU; hardware=cpu runs without one"
    if hardware.profile == "cpu" and (hardware.gpus or hardware.capability is not None):
        key = "hardware.gpus" if hardware.gpus else "hardware.capability"
        yield f"{key} is set, and hardware=cpu runs without a GPU: leave one of them out"
    if _is_number(hardware.capability) and round(hardware.capability or 0, 1) != hardware.capability:
        yield f"hardware.capability={hardware.capability:g} has one digit after the point, such as 8.6"


def _check_memory(config: Config) -> Iterator[str]:
    value, (kept, said) = config.hardware.memory_gib, kept_free(config.hardware)
    if value is None:
        return
    sizes = value if isinstance(value, list) else [value]
    if not sizes or not all(_is_number(size) and MEMORY_GIB[0] <= size <= MEMORY_GIB[1] for size in sizes):
        low, high = MEMORY_GIB
        yield (
            f"hardware.memory_gib={value} is not {low:g} to {high:g} GiB, without a unit: one number, or one for each "
            "GPU ('hardware.memory_gib=[24,16]')"
        )
    elif kept >= min(sizes):
        yield f"{said} nothing of hardware.memory_gib={min(sizes):g}: {LESS}"


def kept_free(hardware: HardwareConfig) -> tuple[float, str]:
    """GiB that a request keeps free of each device, and which keys do: "hardware.margin_gib=8 leaves"."""
    kept = {"hardware.reserve_gib": hardware.reserve_gib, "hardware.margin_gib": hardware.margin_gib or 0.0}
    said = [f"{key}={gib:g}" for key, gib in kept.items() if gib]
    return sum(kept.values()), f"{' and '.join(said)} {'leaves' if len(said) == 1 else 'leave'}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_model(config: Config) -> Iterator[str]:
    if config.model.adapter and len(config.model.adapters) > 1:
        yield "model.adapter and model.adapters are both set: give all of them as model.adapters"
    for adapter in config.model.adapters:
        if not math.isfinite(adapter.weight) or adapter.weight == 0:
            yield f"the weight {adapter.weight:g} of the adapter {adapter.path} is not a number other than 0"
    if config.merge.double and config.merge.base != "nf4":
        yield "merge.double belongs to merge.base=nf4"
    if config.merge.base == "nf4" and config.model.path is not None and not config.model.adapters:
        yield "merge.base=nf4 is for an adapter that was trained on a 4-bit base, and no model.adapter is set"
    if config.model.revision is not None and config.model.path is None:
        yield "model.revision is set and model.path is not: the embedded model has no revisions"
    for revision in (config.model.revision, *(adapter.revision for adapter in config.model.adapters)):
        if revision is not None and not _is_revision(revision):
            yield f"model.revision={revision!r} is not the name of a branch, tag or commit"


def _check_unmerged(config: Config) -> Iterator[str]:
    """Of model.merge=false: who runs it, and what goes with it."""
    if config.model.merge:
        return
    name, merged = config.backend.name, "leave model.merge out to have it merged into an unquantized model.path"
    if name in BACKENDS and not BACKENDS[name].unmerged:
        able = " or ".join(backends_with_adapters())
        yield (
            f"model.merge=false (an adapter on top of its base) is not run by backend={name}: type backend={able}, or "
            f"{merged}"
        )
    if config.model.path is not None and not config.model.adapters:
        yield "model.merge=false runs an adapter on top of model.path, and there is none: type model.adapter=PATH"
    if config.merge.base != "original":
        yield f"merge.base={config.merge.base} is for an adapter that is merged, and model.merge=false merges none"
    if config.task.name == "convert":
        yield (
            "task=convert writes one model, and model.merge=false keeps base and adapter apart: leave out both "
            f"model.adapter and model.merge to convert the base, or {merged}"
        )


def _is_revision(text: str) -> bool:
    """Whether git would take it: it becomes a part of addresses and of file names."""
    return text.isprintable() and " " not in text and all(part not in ("", ".", "..") for part in text.split("/"))


def _check_prompts(config: Config) -> Iterator[str]:
    text = config.prompts.text
    if text is not None and config.prompts.file is not None:
        yield "prompts.text and prompts.file are both set: give one"
    if isinstance(text, list) and not all(isinstance(item, str | int | float) for item in text):
        yield "prompts.text is a text or a list of texts"
    if isinstance(text, dict):
        yield "prompts.text is a text or a list of texts; quote it for the shell: 'prompts.text=What is {}?'"


def _check_stop(config: Config) -> Iterator[str]:
    if "" in config.generation.stop:
        yield "generation.stop has an empty text, which is in every answer: leave it out"


def _check_offload(config: Config) -> Iterator[str]:
    if config.offload.folder is not None and not config.offload.folder.strip():
        yield "offload.folder is empty: name a folder, or leave it unset"


def _check_server(config: Config) -> Iterator[str]:
    if not config.server.host:
        yield "server.host is empty: 127.0.0.1 is this machine only, 0.0.0.0 every address that it has"
    key = config.server.api_key
    if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
        yield "server.api_key is empty, or has characters that an HTTP header cannot carry"


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    _check_choices,
    _check_numbers,
    _check_engine_keys,
    _check_engine_args,
    _check_hardware,
    _check_memory,
    _check_model,
    _check_unmerged,
    _check_prompts,
    _check_stop,
    _check_offload,
    _check_server,
)

DEFAULT_SHARD = "5GB"
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "500MB", "5GB", "2GiB" or a plain number.

    Raises:
        ValueError: it is none of these, or not at least 1 MB (a shard smaller than that helps nobody).
    """
    cleaned = text.strip().upper()
    unit = next((u for u in sorted(SIZE_UNITS, key=len, reverse=True) if cleaned.endswith(u)), "")
    try:
        size = float(cleaned.removesuffix(unit)) * SIZE_UNITS.get(unit, 1)
    except ValueError:
        raise ValueError("a size is a number and a unit: 500MB, 5GB, 2GiB") from None
    if not (math.isfinite(size) and size >= 10**6):
        raise ValueError("a shard is at least 1MB")
    return int(size)


def folder(path: str) -> Path:
    """A path of the configuration: ~ expanded, absolute."""
    return Path(os.path.expanduser(path)).absolute()
