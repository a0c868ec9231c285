"""From a configuration to a live engine: the way that every task that answers something goes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import __version__, embedded
from orchestrator.artifacts import kept
from orchestrator.backends.protocol import LoadPlan, Stats
from orchestrator.backends.table import BACKENDS
from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.adapter_match import targets
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.config import Config, folder
from orchestrator.engine.handle import EngineProcess
from orchestrator.engine.wire import Ready
from orchestrator.errors import RequestError
from orchestrator.hardware import Hardware, detect
from orchestrator.hub.locate import ADAPTER, MODEL, Located, locate
from orchestrator.pipeline import Model, Source, is_built, prepare, versions
from orchestrator.plan.planner import make_plan, must_fit, runnable, why
from orchestrator.plan.types import Candidate, Plan
from orchestrator.report.console import console, note
from orchestrator.report.tables import hardware_line, model_line, plan_table
from orchestrator.runfolder import RunFolder
from orchestrator.tokenizer import Tokenizer, check_tokenizer

# GPUs are numbered as NVML does; nothing is fetched; the tokenizer's threads would outnumber the cores.
ENGINE_ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


EMBEDDED_NOTE = (
    f"the embedded model runs at {embedded.BITS:g} bits unless backend=, quant= or quant.bits= says otherwise"
)


@dataclass(frozen=True)
class Planned:
    """A request that has been looked at: nothing is loaded, nothing is written."""

    config: Config
    source: Source
    spec: ModelSpec
    hardware: Hardware
    plan: Plan


@dataclass(frozen=True)
class Session:
    """A live engine, and what it was made from."""

    planned: Planned
    chosen: Candidate
    model: Model
    engine: EngineProcess
    ready: Ready
    tokenizer: Tokenizer

    def measured(self, stats: Stats) -> dict[str, Any]:
        """What was measured in every session: times in s, sizes in bytes."""
        return {
            "load_s": self.ready.load_s,
            "gpu_peak_bytes": stats.gpu_peak_bytes,
            "host_peak_bytes": stats.host_peak_bytes,
            "prefill_tokens_per_s": stats.prefill_tokens / stats.prefill_s if stats.prefill_s else None,
            "decode_tokens_per_s": stats.decode_tokens / stats.decode_s if stats.decode_s else None,
            "placement": self.ready.placement,
        }

    def result(self) -> dict[str, Any]:
        """What result.json says of every session: the plan, the artifacts, the placement, the versions."""
        return {
            "plan": self.planned.plan.to_json() | self.chosen.to_json(),
            **self.planned.source.identity(),
            "artifacts": [{"name": a.name, "built": a.name in self.model.built} for a in self.model.artifacts],
            "stages_run": list(self.model.built),
            "versions": {
                "orchestrator": __version__,
                "python": platform.python_version(),
                **versions("hydra-core", "transformers", "safetensors"),
                "engine": self.ready.versions,
            },
        }


def look(config: Config, *, planning: bool, download: bool = True) -> Planned:
    """Reads the headers and the machine, and plans. Neither torch nor a GPU is needed.

    Args:
        planning: for the machine that was asked about, which need not be this one.
        download: of hub ids, what the cache does not have; False: that is refused.

    Raises:
        RequestError, EngineUnavailableError: as the checkpoint, the configuration and the machine say.
    """
    asked = config
    config, source = find_source(asked, download=download)
    spec = model_spec(source.base)
    if not planning:
        check_tokenizer(source.base.path)
    hardware = detect(config.hardware, planning=planning)
    plan = make_plan(config, spec, hardware)
    if config is not asked:
        plan = replace(plan, notes=(*plan.notes, EMBEDDED_NOTE))
    return Planned(config, source, spec, hardware, plan)


def find_source(config: Config, *, download: bool = True) -> tuple[Config, Source]:
    """The model and its adapters. Without model.path: the embedded ones, with the embedded defaults.

    Raises:
        CheckpointError: a folder that does not hold what it should, or an adapter of another model.
        RequestError: an adapter without a model.
        OrchestratorError: of a hub id, see `orchestrator.hub.locate`.
    """
    model = config.model
    is_embedded = model.path is None
    if is_embedded and model.adapters:
        raise RequestError("model.adapter is set and model.path is not", "Set model.path to the adapter's base.")
    if model.path is None:
        place = Located(embedded.BASE)
        places = [(Located(embedded.ADAPTER), 1.0)]
        config = embedded_defaults(config)
    else:  # the adapters first: they are small, and what is wrong with them is known before 140 GB have come
        places = [(locate(a.path, a.revision, ADAPTER, download=download), a.weight) for a in model.adapters]
        place = locate(model.path, model.revision, MODEL, download=download)
    base = open_checkpoint(place.path)
    found = tuple((open_adapter(adapter.path), weight) for adapter, weight in places)
    for adapter, _ in found:
        targets(adapter, base)  # an adapter of another model is refused before anything long
    name = "the embedded model" if is_embedded else place.name
    return config, Source(base, found, name, is_embedded, place.commit, tuple(adapter for adapter, _ in places))


def embedded_defaults(config: Config) -> Config:
    """4 bits, where neither an engine nor a method nor a width was asked for: this is what the project is for."""
    quant, backend = config.quant, config.backend
    if (quant.bits, quant.method, backend.name, config.model.dtype) == (None, "auto", "auto", "auto"):
        return replace(config, quant=replace(quant, bits=embedded.BITS))
    return config


def show_plan(planned: Planned, chosen: Candidate) -> None:
    """The plan for the person: the model, the machine, the table, the reason."""
    out = console()
    for line in planned.plan.notes:
        note(f"note: {line}")
    note(model_line(planned.source.label, planned.spec, len(planned.source.adapters)))
    note(hardware_line(planned.hardware))
    out.print(plan_table(chosen))
    if chosen.fits:
        note(f"chosen: {chosen.label}: {why(chosen, planned.plan, planned.config)}")
    for line in chosen.notes:
        note(f"note: {line}")


def load_plan(planned: Planned, chosen: Candidate, model: Path) -> LoadPlan:
    """The part of the plan that the engine gets."""
    return LoadPlan(
        model=str(model),
        backend=chosen.backend,
        method=chosen.method,
        bits=chosen.bits,
        dtype=chosen.dtype,
        max_context=chosen.max_context,
        max_in_flight=chosen.max_in_flight,
        device_map=chosen.device_map,
        weights=chosen.weights,
        memory={gpu.device: gpu.capacity for gpu in chosen.gpus},
        kv_cache={device.device: device.kv_cache for device in chosen.devices if device.kv_cache},
        cache_bits=chosen.cache_bits,
        double_quant=chosen.double_quant,
        tensor_parallel=chosen.tensor_parallel,
        pipeline_parallel=chosen.pipeline_parallel,
        gpu_split=chosen.gpu_split,
        offload_folder=str(folder(chosen.offload_folder)) if chosen.offload_folder else "",
        trust_remote_code=planned.config.model.trust_remote_code,
        engine_args=dict(planned.config.backend.engine_args),
    )


@contextmanager
def open_session(
    planned: Planned, run: RunFolder, check: Callable[[Tokenizer, Candidate], None] = lambda tokenizer, chosen: None
) -> Iterator[Session]:
    """Plans, prepares the model and starts the engine; ends it, with all its processes, on the way out.

    Args:
        check: looks at the request with the tokenizer at hand, and raises if it cannot be served: before anything
            long where something has to be built, else while the engine loads.

    Raises:
        OrchestratorError: of every kind; see the exit codes.
    """
    config = planned.config
    run.write("plan.json", planned.plan.to_json())
    must_fit(planned.plan, config, planned.spec, planned.hardware)
    chosen, python = runnable(planned.plan, config, planned.hardware)
    run.write("plan.json", planned.plan.to_json() | chosen.to_json())
    show_plan(planned, chosen)
    tokenizer = None if is_built(config, planned.source, chosen) else _tokenizer(planned, chosen, check)
    with ExitStack() as loading:
        loading.enter_context(kept())
        model = prepare(config, planned.source, chosen, run)
        run.status("loading")
        note(f"loading in a process of its own ({chosen.label}) ...")
        plan = load_plan(planned, chosen, model.path)
        env = {name: os.environ.get(name, value) for name, value in ENGINE_ENVIRONMENT.items()}
        adapter = BACKENDS[chosen.backend].adapter
        with EngineProcess.start(python, adapter, plan, run.path / "engine.log", env=env) as engine:
            tokenizer = tokenizer or _tokenizer(planned, chosen, check)
            ready = engine.wait_ready()
            loading.close()
            note(f"loaded in {ready.load_s:.1f} s; placement as planned, smoke pass finite, warmed up")
            yield Session(planned, chosen, model, engine, ready, tokenizer)


def _tokenizer(planned: Planned, chosen: Candidate, check: Callable[[Tokenizer, Candidate], None]) -> Tokenizer:
    """The base's tokenizer, which every stage carries over byte for byte; the request, checked with it."""
    model = planned.config.model
    tokenizer = Tokenizer(planned.source.base.path, model.chat_template, model.trust_remote_code)
    if not tokenizer.has_template:
        note("note: the model has no chat template: prompts go in as plain text (model.chat_template=FILE sets one)")
    check(tokenizer, chosen)
    return tokenizer
