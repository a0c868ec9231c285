"""From a configuration to a live engine: the way that every task that answers something goes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import __version__, embedded
from orchestrator.artifacts import kept
from orchestrator.backends.protocol import LoadPlan, Stats
from orchestrator.backends.table import BACKENDS
from orchestrator.checkpoint.adapter import Adapter, open_adapter
from orchestrator.checkpoint.adapter_match import targets
from orchestrator.checkpoint.adapter_unmerged import lora_targets
from orchestrator.checkpoint.bare import open_to_plan
from orchestrator.checkpoint.folder import Checkpoint, open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.config import Config, folder
from orchestrator.engine.handle import EngineProcess
from orchestrator.engine.memory import MemoryWatch
from orchestrator.engine.placement import differs, split
from orchestrator.engine.wire import Ready
from orchestrator.errors import OutOfMemoryError, RequestError
from orchestrator.hardware import Hardware, child_devices, detect
from orchestrator.hardware.lease import leases
from orchestrator.hub.locate import ADAPTER, MODEL, Located, NoPartsError, locate
from orchestrator.pipeline import (
    Model,
    Source,
    check_stages,
    conversion,
    disk_needs,
    is_built,
    planned_spec,
    prepare,
    tokenizer_folder,
    versions,
)
from orchestrator.plan.changes import as_it_loads
from orchestrator.plan.conversion import Conversion, must_have_memory
from orchestrator.plan.disk import Need, must_be_writable, must_have_room
from orchestrator.plan.planner import make_plan, must_fit, runnable
from orchestrator.plan.ranking import why
from orchestrator.plan.types import Candidate, Plan
from orchestrator.report.console import console, note, size
from orchestrator.report.tables import fitting, hardware_line, held_lines, margin_line, model_line, plan_table
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.gpus import leased
from orchestrator.tasks.record import keep, keep_out_of_memory, memory, record_load, with_use
from orchestrator.tokenizer import Tokenizer, check_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

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
    disk: tuple[Need, ...]  # what the chosen candidate writes to the store, and to output.path
    conversion: Conversion | None  # what making its files takes of a GPU and of the host
    elsewhere: bool  # the hardware is another machine's

    def to_json(self) -> dict[str, Any]:
        """What plan.json says: the plan, of which model and which adapters it is, and what it writes to the disk."""
        store, *output = (need.to_json() for need in self.disk)
        needed = {
            "disk_needed": store,
            "output_needed": output[0] if output else None,
            "conversion_needed": self.conversion.to_json() if self.conversion is not None else None,
        }
        return self.source.identity() | self.plan.to_json() | needed


@dataclass(frozen=True)
class Places:
    """Where a request's model lies, and its adapters with their weights."""

    base: Located
    adapters: tuple[tuple[Located, float], ...]

    @property
    def remote(self) -> bool:
        """Whether some of it lies on a hub only."""
        return any(place.remote for place in (self.base, *(adapter for adapter, _ in self.adapters)))

    def here(self) -> Places:
        """All of it on this machine; the adapters first, which are small."""
        adapters = tuple((place.here(), weight) for place, weight in self.adapters)
        return Places(self.base.here(), adapters)


@dataclass(frozen=True)
class Session:
    """A live engine, and what it was made from."""

    planned: Planned
    chosen: Candidate
    model: Model
    engine: EngineProcess
    ready: Ready
    tokenizer: Tokenizer
    watch: MemoryWatch

    def measured(self, stats: Stats) -> dict[str, Any]:
        """What was measured in every session: times in s, sizes in bytes."""
        return {
            "load_s": self.ready.load_s,
            "gpu_peak_bytes": stats.gpu_peak_bytes,
            "host_peak_bytes": stats.host_peak_bytes,
            "prefill_tokens_per_s": stats.prefill_tokens / stats.prefill_s if stats.prefill_s else None,
            "decode_tokens_per_s": stats.decode_tokens / stats.decode_s if stats.decode_s else None,
            "placement": self.ready.placement,
            "split": split({gpu.device: gpu.weights for gpu in self.chosen.gpus}, self.ready.placement),
            "memory": memory(self.planned, self.chosen, self.watch, stats),
        }

    def remember(self, stats: Stats) -> None:
        """Adds this session to the record that margins are learned from; where that fails, it says so and goes on."""
        devices = with_use(memory(self.planned, self.chosen, self.watch, stats), self.planned, self.chosen, self.engine)
        keep(self.planned, self.chosen, devices, self.ready.versions)

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


def fits(planned: Planned) -> None:
    """Raises DoesNotFitError unless the plan fits."""
    must_fit(planned.plan, planned.config, planned.spec, planned.hardware)


def has_room(planned: Planned) -> None:
    """Raises DoesNotFitError unless the disk has room for what has to be written, ConfigError if it cannot be."""
    must_be_writable(planned.disk)
    must_have_room(planned.disk)


def can_be_made(planned: Planned) -> None:
    """Raises what the engine's own conversion would, as far as headers show it, before it, or anything, is begun.

    Raises:
        ConfigError: settings or a file of the user's that do not go with this model.
        DoesNotFitError: it takes more memory than there is.
    """
    check_stages(planned.config, planned.source, planned.plan.chosen, here=False)
    must_have_memory(planned.conversion)


def can_convert(planned: Planned) -> None:
    """Raises unless the chosen candidate's files can be made, and written."""
    can_be_made(planned)
    has_room(planned)


def can_run(planned: Planned) -> None:
    """Raises DoesNotFitError unless the plan fits, and what it makes and writes does too."""
    fits(planned)
    can_convert(planned)


def look(
    config: Config,
    *,
    planning: bool,
    download: bool = True,
    bare: bool = False,
    check: Callable[[Planned], None] = can_run,
) -> Planned:
    """Reads the headers and the machine, and plans. Neither torch nor a GPU is needed.

    Args:
        planning: for the machine that was asked about, which need not be this one.
        download: of hub ids, what the cache does not have; False: their headers will do.
        bare: a folder's config.json without weights will do.
        check: looks at the plan of what is not here yet, and raises if it is not worth the download.

    Raises:
        RequestError, EngineUnavailableError: as the checkpoint, the configuration and the machine say.
        DoesNotFitError: what would have to be downloaded does not fit.
    """
    places = find_places(config, latest=download)
    if download and places.remote:
        places = _brought(config, places, planning, check)
    return _planned(config, places, planning, bare=bare)


def bring(config: Config, check: Callable[[Source], None]) -> tuple[Config, Source]:
    """The model and its adapters, on this machine; nothing is planned.

    Args:
        check: looks at the headers of what is not here yet, and raises if it is not worth the download.

    Raises:
        CheckpointError, RequestError, OrchestratorError: as for `look`.
    """
    places = find_places(config, latest=True)
    if places.remote:
        try:
            check(open_source(config, places)[1])
        except NoPartsError as error:
            note(f"{error.message}: it is looked at when it is here")
        places = places.here()
    return open_source(config, places)


def _brought(config: Config, places: Places, planning: bool, check: Callable[[Planned], None]) -> Places:
    """What is not here is planned by its headers, and downloaded if the plan is good."""
    try:
        check(_planned(config, places, planning))
    except NoPartsError as error:
        note(f"{error.message}: it is looked at when it is here")
    return places.here()


def _planned(config: Config, places: Places, planning: bool, *, bare: bool = False) -> Planned:
    asked = config
    config, source = open_source(asked, places, bare=bare)
    spec = planned_spec(config, source)
    if not (planning or places.remote):
        check_tokenizer(tokenizer_folder(source))
    hardware = detect(config.hardware, planning=planning, artifacts=folder(config.paths.artifacts))
    unmade = partial(_unmade, source, planning)
    plan = make_plan(config, spec, hardware, unmade)
    if hardware.gpus and not (planning or plan.chosen.fits) and leases()[0]:
        # Other runs are in the way: it is planned for when they have ended, and waits for that.
        hardware = detect(config.hardware, planning=False, artifacts=folder(config.paths.artifacts), idle=True)
        plan = make_plan(config, spec, hardware, unmade)
    if config.backend.name == "auto":
        plan = _without_unmade(config, source, plan, planning)
    if config is not asked:
        plan = replace(plan, notes=(*plan.notes, EMBEDDED_NOTE))
    elsewhere = planning and config.hardware.cards is not None
    disk = disk_needs(config, source, plan.chosen)
    converting = _converting(config, source, spec, hardware, plan.chosen, planning=planning)
    return Planned(config, source, spec, hardware, plan, disk, converting, elsewhere)


def _converting(
    config: Config, source: Source, spec: ModelSpec, hardware: Hardware, chosen: Candidate, *, planning: bool
) -> Conversion | None:
    """What its conversion takes; where that is more than there is, with what to type instead."""
    found = conversion(config, source, chosen, planning=planning)
    if found is None or not (found.lacks and chosen.fits):
        return found
    return replace(found, instead=as_it_loads(config, spec, hardware))


def _unmade(source: Source, planning: bool, config: Config, candidate: Candidate) -> str:
    """Why the files of a candidate cannot be made here: their conversion takes far more memory than there is."""
    found = conversion(config, source, candidate, planning=planning)
    return f"the conversion {found.what} {found.lacks}" if found is not None and found.lacks else ""


def _without_unmade(config: Config, source: Source, plan: Plan, planning: bool) -> Plan:
    """The plan with what cannot be converted as what does not fit, where something else does.

    An engine that was asked for is not exchanged for another: that is refused with the numbers of its conversion.
    """
    converting = conversion(config, source, plan.chosen, planning=planning)
    if not plan.chosen.fits or converting is None or not converting.lacks:
        return plan
    made = []
    for candidate in plan.candidates:
        found = conversion(config, source, candidate, planning=planning) if candidate.fits else None
        why = (f"its conversion {found.what} {found.lacks}",) if found is not None and found.lacks else ()
        made.append(replace(candidate, fits=candidate.fits and not why, reasons=(*candidate.reasons, *why)))
    made.sort(key=lambda candidate: not candidate.fits)
    notes = (*plan.notes, f"{plan.chosen.label} is not taken: its conversion {converting.what} {converting.lacks}")
    return replace(plan, chosen=made[0], candidates=tuple(made), notes=notes) if made[0].fits else plan


def find_places(config: Config, *, latest: bool) -> Places:
    """Where the model and its adapters lie. Without model.path: the embedded ones.

    Args:
        download, bare: as for `look`.

    Raises:
        RequestError: an adapter without a model.
        OrchestratorError: of a hub id, see `orchestrator.hub.locate`.
    """
    model = config.model
    if model.path is None:
        if model.adapters:
            raise RequestError("model.adapter is set and model.path is not", "Set model.path to the adapter's base.")
        return Places(Located(embedded.BASE), ((Located(embedded.ADAPTER), 1.0),))
    adapters = tuple((locate(a.path, a.revision, ADAPTER, latest=latest), a.weight) for a in model.adapters)
    return Places(locate(model.path, model.revision, MODEL, latest=latest), adapters)


def open_source(config: Config, places: Places, *, bare: bool = False) -> tuple[Config, Source]:
    """The model and its adapters by their headers; the embedded ones with the embedded defaults.

    Raises:
        CheckpointError: a folder or a repo that does not hold what it should, or an adapter of another model.
        OrchestratorError: a hub cannot be reached, or does not answer what was asked.
    """
    is_embedded = config.model.path is None
    adapters = tuple((_adapter(place), weight) for place, weight in places.adapters)
    base = _checkpoint(places.base, bare)
    check = targets if config.model.merge else lora_targets
    for adapter, _ in adapters:
        check(adapter, base)  # an adapter of another model is refused before anything long
    name = "the embedded model" if is_embedded else places.base.name
    merged, on_top = (adapters, ()) if config.model.merge else ((), adapters)
    where = tuple(place for place, _ in places.adapters)
    source = Source(base, merged, on_top, name, is_embedded, places.base.commit, where)
    return embedded_defaults(config) if is_embedded else config, source


def _checkpoint(place: Located, bare: bool) -> Checkpoint:
    if place.remote is None:
        return open_to_plan(place.path) if bare else open_checkpoint(place.path)
    from orchestrator.hub.headers import remote_checkpoint

    return remote_checkpoint(place.remote)


def _adapter(place: Located) -> Adapter:
    if place.remote is None:
        return open_adapter(place.path)
    from orchestrator.hub.headers import remote_adapter

    return remote_adapter(place.remote)


def embedded_defaults(config: Config) -> Config:
    """4 bits, where neither an engine nor a method nor a width was asked for: this is what the project is for."""
    quant, backend = config.quant, config.backend
    if (quant.bits, quant.method, backend.name, config.model.dtype) == (None, "auto", "auto", "auto"):
        return replace(config, quant=replace(quant, bits=embedded.BITS))
    return config


def show_notes(plan: Plan) -> None:
    """What is to be known of a plan, on stderr."""
    for line in plan.notes:
        note(f"note: {line}")


def show_plan(planned: Planned, chosen: Candidate, out: Console) -> None:
    """The plan for the person: the model, the machine, the table, the reason. What is to be known of it: on stderr.

    Args:
        out: on stdout where the plan is what was asked for, else on stderr.
    """
    show_notes(planned.plan)
    source, said = planned.source, partial(out.print, markup=False, soft_wrap=True)
    said(model_line(source.label, planned.spec, len(source.adapters), len(source.unmerged)))
    for line in (hardware_line(planned.hardware), *held_lines(planned.hardware)):
        said(line)
    out.print(fitting(out.width, plan_table(chosen), plan_table(chosen, narrow=True)))
    said(margin_line(chosen))
    if chosen.fits:
        said(f"chosen: {chosen.label}: {why(chosen, planned.plan, planned.config)}")
    for line in chosen.notes:
        said(line)
    for need in planned.disk:
        if need.bytes:
            said(f"on disk: {need}{' (this machine)' if planned.elsewhere else ''}")
    if planned.conversion is not None:
        said(f"converting {planned.conversion}")


def load_plan(planned: Planned, chosen: Candidate, model: Path, adapters: Sequence[Path] = ()) -> LoadPlan:
    """The part of the plan that the engine gets.

    Args:
        adapters: folders of those that run on top of the model.
    """
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
        memory=chosen.limits,
        margin={gpu.device: chosen.limits[gpu.device] - gpu.capacity for gpu in chosen.gpus},
        kv_cache={device.device: device.kv_cache for device in chosen.devices if device.kv_cache},
        cache_bits=chosen.cache_bits,
        double_quant=chosen.double_quant,
        tensor_parallel=chosen.tensor_parallel,
        pipeline_parallel=chosen.pipeline_parallel,
        gpu_split=chosen.gpu_split,
        offload_folder=str(folder(chosen.offload_folder)) if chosen.offload_folder else "",
        trust_remote_code=planned.config.model.trust_remote_code,
        engine_args=dict(planned.config.backend.engine_args),
        adapters=tuple(map(str, adapters)),
        adapter_bytes=chosen.adapter_bytes,
        tokenizer=_own_tokenizer(planned.source) if adapters else "",
    )


def _own_tokenizer(source: Source) -> str:
    """The folder of an adapter that is not merged and whose tokenizer takes the place of the base's; "" for none."""
    found = tokenizer_folder(source)
    return "" if found == source.base.path else str(found)


@contextmanager
def start_engine(
    planned: Planned, chosen: Candidate, python: str, model: Path, log: Path, adapters: Sequence[Path] = ()
) -> Iterator[tuple[EngineProcess, MemoryWatch]]:
    """An engine that loads a folder as it was planned, and who watches its memory; both end on the way out.

    Raises:
        EngineUnavailableError: there is no such interpreter.
    """
    plan = load_plan(planned, chosen, model, adapters)
    env = {name: os.environ.get(name, value) for name, value in ENGINE_ENVIRONMENT.items()}
    env |= child_devices(planned.hardware.gpus)
    adapter = BACKENDS[chosen.backend].adapter
    used = [gpu for gpu in planned.hardware.gpus if f"cuda:{gpu.index}" in plan.memory]
    with MemoryWatch(used) as watch, EngineProcess.start(python, adapter, plan, log, env=env) as engine:
        watch.follow(engine.pid)
        yield engine, watch


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
    run.write("plan.json", planned.to_json())
    fits(planned)
    chosen, python = runnable(planned.plan, config, planned.hardware)
    if chosen is not planned.plan.chosen:
        converting = _converting(config, planned.source, planned.spec, planned.hardware, chosen, planning=False)
        planned = replace(planned, disk=disk_needs(config, planned.source, chosen), conversion=converting)
    run.write("plan.json", planned.to_json() | chosen.to_json())
    show_plan(planned, chosen, console())
    has_room(planned)
    must_have_memory(planned.conversion)
    tokenizer = None if is_built(config, planned.source, chosen) else _tokenizer(planned, chosen, check)
    with ExitStack() as holding, ExitStack() as loading:
        loading.enter_context(kept())
        model = prepare(config, planned.source, chosen, run)
        before = chosen
        planned, chosen = holding.enter_context(leased(planned, chosen, run))
        if chosen.devices != before.devices:
            run.write("plan.json", planned.to_json() | chosen.to_json())
        if chosen.max_context < before.max_context:
            tokenizer = None  # what was asked for is checked again
        run.status("loading")
        note(f"loading in a process of its own ({chosen.label}) ...")
        log = run.path / "engine.log"
        with start_engine(planned, chosen, python, model.path, log, model.adapters) as (engine, watch):
            tokenizer = tokenizer or _tokenizer(planned, chosen, check)
            try:
                ready = engine.wait_ready()
                loading.close()
                model = record_load(config, chosen, model, ready)
                note(f"loaded in {ready.load_s:.1f} s; {_placed(chosen, ready)}, smoke pass finite, warmed up")
                yield Session(planned, chosen, model, engine, ready, tokenizer, watch)
            except OutOfMemoryError:
                keep_out_of_memory(planned, chosen, watch)
                raise


def _placed(chosen: Candidate, ready: Ready) -> str:
    """The engine's split beside the plan's: the two opinions on what goes where."""
    found = {gpu.device: (gpu.weights, ready.placement.get(gpu.device, 0)) for gpu in chosen.gpus}
    apart = [
        f"{size(placed)} of weights on {device} where the plan has {size(planned)}"
        for device, (planned, placed) in found.items()
        if differs(planned, placed)
    ]
    return f"split by the engine: {', '.join(apart)}" if apart else "placement as planned"


def _tokenizer(planned: Planned, chosen: Candidate, check: Callable[[Tokenizer, Candidate], None]) -> Tokenizer:
    """The model's tokenizer, which every stage carries over byte for byte; the request, checked with it."""
    model = planned.config.model
    tokenizer = Tokenizer(tokenizer_folder(planned.source), model.chat_template, model.trust_remote_code)
    if not tokenizer.has_template:
        note("note: the model has no chat template: prompts go in as plain text (model.chat_template=FILE sets one)")
    check(tokenizer, chosen)
    return tokenizer
