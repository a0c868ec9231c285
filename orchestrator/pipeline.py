"""Which stages a request needs, and running those whose artifact is not there yet."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.artifacts import Artifact, Built, Recipe, Store
from orchestrator.backends.table import BACKENDS
from orchestrator.checkpoint.adapter import Adapter
from orchestrator.checkpoint.adapter import fingerprint as adapter_fingerprint
from orchestrator.checkpoint.adapter_base import unpacked
from orchestrator.checkpoint.adapter_unmerged import lora_size, lora_targets
from orchestrator.checkpoint.architectures import layout_of
from orchestrator.checkpoint.carry import written_config
from orchestrator.checkpoint.exl2_layout import check_exl2
from orchestrator.checkpoint.fingerprint import differences
from orchestrator.checkpoint.folder import Checkpoint, fingerprint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.config import DEFAULT_SHARD, Config, folder, parse_size
from orchestrator.errors import StageError
from orchestrator.hub.locate import Located
from orchestrator.plan.conversion import Conversion, must_have_memory
from orchestrator.plan.disk import Need, Part, output_need, store_need
from orchestrator.plan.exl2_headers import check_planned
from orchestrator.plan.types import Candidate
from orchestrator.report.console import note, progress, size
from orchestrator.report.merge import show_merge
from orchestrator.runfolder import RunFolder

if TYPE_CHECKING:
    from orchestrator.stages.nf4 import Nf4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A folder that an engine can load, and the artifacts that it came from."""

    path: Path
    artifacts: tuple[Artifact, ...] = ()
    built: tuple[str, ...] = ()  # names of those that were built now
    adapters: tuple[Path, ...] = ()  # folders of those that run on top of it

    def with_adapters(self, made: Sequence[tuple[Artifact, bool]]) -> Model:
        """The model with adapters on top of it, each with whether it was made now."""
        return Model(
            self.path,
            (*self.artifacts, *(artifact for artifact, _ in made)),
            (*self.built, *(artifact.name for artifact, now in made if now)),
            tuple(artifact.path for artifact, _ in made),
        )


@dataclass(frozen=True)
class Source:
    """What a request starts from: a base, and adapters with their weights.

    Attributes:
        adapters: those that are merged.
        unmerged: those that run on top of the base.
        name: of the base, for a person: its hub id, its folder.
        commit: of the base, where it is the hub's.
        places: where the adapters lie.
        laid_out: see `loaded`; by the dtype. A plan asks for it again and again.
    """

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...] = ()
    unmerged: tuple[tuple[Adapter, float], ...] = ()
    name: str = ""
    embedded: bool = False
    commit: str | None = None
    places: tuple[Located, ...] = ()
    laid_out: dict[str | None, Checkpoint] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The name, with the commit where it has one."""
        return f"{self.name}@{self.commit[:12]}" if self.commit else self.name

    @property
    def served_name(self) -> str:
        """What an API's clients call it: the hub id as other servers have it, or the folder's last part."""
        if self.embedded:
            return "embedded"
        return self.name if self.commit else self.base.path.name

    @property
    def is_here(self) -> bool:
        """Whether all its files are on this machine; of what is on a hub only, there are no times and sizes yet."""
        adapters = (*self.adapters, *self.unmerged)
        files = (self.base.path / "config.json", *self.base.files, *(f for a, _ in adapters for f in a.files))
        return all(file.is_file() for file in files)

    def identity(self) -> dict[str, Any]:
        """What result.json says of it: the hub id and its commit, or the folder."""
        model = self.name if self.commit else str(self.base.path)
        return {"model": model, "model_revision": self.commit, "adapters": [place.label for place in self.places]}


def merge_recipe(config: Config, source: Source) -> Recipe | None:
    """The recipe of the merge (or of the plain conversion) that a request needs; None where its files will do."""
    from orchestrator.stages.merge import VERSION

    if not _is_written(config, source):
        return None
    options: dict[str, Any] = {
        "dtype": config.convert.dtype,
        "shard_size": parse_size(config.convert.shard_size or DEFAULT_SHARD),
        "weights": [weight for _, weight in source.adapters],
    }
    if config.merge.base == "nf4":
        options["nf4"] = {"double": config.merge.double}
    sources = (str(source.base.path), *(str(adapter.path) for adapter, _ in source.adapters))
    return Recipe("merge" if source.adapters else "convert", VERSION, options, _inputs(source), sources)


def _is_written(config: Config, source: Source) -> bool:
    """Whether a request needs other files than its own: safetensors that are merged, or of another type or size."""
    as_it_is = config.convert.dtype == "auto" and config.convert.shard_size is None
    return bool(source.adapters) or source.base.format == "bin" or not as_it_is


def _inputs(source: Source) -> dict[str, Any]:
    inputs: dict[str, Any] = {"base": fingerprint(source.base)}
    inputs |= {f"adapter{i}": adapter_fingerprint(adapter) for i, (adapter, _) in enumerate(source.adapters)}
    return inputs


def prepare(config: Config, source: Source, chosen: Candidate, run: RunFolder) -> Model:
    """Runs the stages that a request needs and whose artifact is not there yet: the merge, then the engine's own.

    Adapters that are not merged come first: it takes seconds, and what is wrong with one is said before the base is
    quantized. What that becomes does not depend on them. Before anything is written, the engine's own stages look at
    what they will be given: a merge takes an hour, and what they would refuse then is said now.

    Raises:
        CheckpointError, StageError, DoesNotFitError, RequestError, EngineUnavailableError: see the stages, the store.
    """
    backend = BACKENDS[chosen.backend]
    check_stages(config, source, chosen, here=True)
    must_have_memory(conversion(config, source, chosen, planning=False))
    on_top: list[tuple[Artifact, bool]] = []
    if source.unmerged:
        module, function = backend.unmerged.split(":")
        on_top = getattr(importlib.import_module(module), function)(config, source, run)
    model = merged(config, source, run)
    for stage in backend.stages:
        module, function = stage.split(":")
        model = getattr(importlib.import_module(module), function)(config, model, chosen, run)
    return model.with_adapters(on_top)


def is_built(config: Config, source: Source, chosen: Candidate) -> bool:
    """Whether a request needs no stage: then its engine can start at once. (An engine's own stages: not asked.)"""
    recipe = merge_recipe(config, source)
    found = recipe is None or Store(folder(config.paths.artifacts)).find(recipe) is not None
    return found and (source.base.quantized or not BACKENDS[chosen.backend].stages)


def merged(config: Config, source: Source, run: RunFolder) -> Model:
    """The merged (or converted) safetensors of a request; its own files where they will do."""
    recipe = merge_recipe(config, source)
    if recipe is None:
        if config.convert.verify:
            _verify_own(source, run)
        return Model(source.base.path)
    store = Store(folder(config.paths.artifacts))
    if (found := store.find(recipe)) is None:
        run.status("merging" if source.adapters else "converting")
        if outdated := store.outdated(recipe):
            note(f"{outdated[0].name} is not continued: {', '.join(outdated[1])} changed since it was begun")
    started = time.monotonic()
    artifact, built = store.build(
        recipe,
        make=lambda out: _merge(config, source, recipe, out),
        needed=0 if found else loaded(config, source).nbytes,
        changed=lambda: differences(recipe.inputs, _inputs(source)),
        waiting=lambda: note(f"waiting for another run that builds {recipe.name}"),
    )
    if built:
        note(f"{recipe.stage}: {size(artifact.size)} in {time.monotonic() - started:.1f} s -> {artifact.path}")
    else:
        note(f"{recipe.stage}: found, nothing to build -> {artifact.path}")
    if config.convert.verify:
        _verify(config, source, store, artifact, run)
    return Model(artifact.path, (artifact,), (artifact.name,) if built else ())


def check_stages(config: Config, source: Source, chosen: Candidate, *, here: bool) -> None:
    """Refuses by headers alone what the engine's own stages would refuse.

    Args:
        here: they run on this machine, which has to have what they need.

    Raises:
        ConfigError: settings or a file of the user's that do not go with this model.
        EngineUnavailableError: what makes the engine's files is not here; only where there are none in the store yet.
    """
    store = Store(folder(config.paths.artifacts))
    tokenizer = partial(_merged_tokenizer_folder, source)
    for stage in _own_stages(chosen):
        stage.check(config, store, *_given(config, source), chosen, tokenizer, here=here)


def conversion(config: Config, source: Source, chosen: Candidate, *, planning: bool) -> Conversion | None:
    """What the engine's own conversion takes of a GPU and of the host; None where there is nothing to convert.

    Args:
        planning: a profile stands for the machine.
    """
    store = Store(folder(config.paths.artifacts))
    found = (
        stage.conversion(config, store, *_given(config, source), chosen, planning=planning)
        for stage in _own_stages(chosen)
    )
    return next((one for one in found if one is not None), None)


def _own_stages(chosen: Candidate) -> list[Any]:
    """The modules of an engine's own stages."""
    return [importlib.import_module(stage.split(":")[0]) for stage in BACKENDS[chosen.backend].stages]


def _given(config: Config, source: Source) -> tuple[Checkpoint, dict[str, Any] | None]:
    """What an engine's own stages will be given, by headers; their recipes' inputs, None where not all is here yet."""
    model = loaded(config, source)
    if not _is_written(config, source):
        return model, {"model": fingerprint(source.base)} if source.is_here else None
    recipe = merge_recipe(config, source) if source.is_here else None
    return replace(model, config=written_config(model.config, "")), {"model": recipe.name} if recipe else None


def disk_needs(config: Config, source: Source, chosen: Candidate | None) -> tuple[Need, ...]:
    """What a request will write: to the store, and to output.path. What is there already takes nothing.

    Args:
        chosen: None: a merge alone, without an engine's own stages.

    Raises:
        CheckpointError: what cannot be merged.
    """
    store = Store(folder(config.paths.artifacts))
    model, inputs = _given(config, source)
    parts = [Part("for the model", model.nbytes, 0)]
    if is_written := _is_written(config, source):
        recipe = merge_recipe(config, source) if source.is_here else None
        needed = parts[0].size
        adds = store.to_write(recipe, needed) if recipe else needed
        parts = [Part(f"for the {'merged' if source.adapters else 'converted'} model", needed, adds)]
    for stage in _own_stages(chosen) if chosen is not None else ():
        parts += stage.disk_part(config, store, model, inputs, chosen)
    on_top: list[Part] = []
    if source.unmerged and chosen is not None:
        on_top = importlib.import_module(BACKENDS[chosen.backend].unmerged.split(":")[0]).disk_part(store, source)
    needs = (store_need(store.root, [*parts, *on_top]),)
    if config.output.path is None or config.task.name not in ("plan", "convert"):
        return needs
    linked = is_written or len(parts) > 1
    return (*needs, output_need(folder(config.output.path).resolve(), store.root, parts, linked=linked))


def loaded(config: Config, source: Source) -> Checkpoint:
    """What an engine, or its own conversion, will be given: the merged (or converted) model, by headers alone."""
    from orchestrator.stages.merged import merged_checkpoint

    dtype = _dtype(config)
    if not (source.adapters or dtype):
        return source.base
    if dtype not in source.laid_out:
        source.laid_out[dtype] = merged_checkpoint(source.base, source.adapters, dtype)
    return source.laid_out[dtype]


def tokenizer_folder(source: Source) -> Path:
    """Where the tokenizer comes from: the base, or an adapter that came with its own, merged or not."""
    from orchestrator.stages.merged import merged_tokenizer

    adapters = (*source.adapters, *source.unmerged)
    return merged_tokenizer(unpacked(source.base), adapters) if adapters else source.base.path


def _merged_tokenizer_folder(source: Source) -> Path:
    """Where the tokenizer of what an engine's own stages are given comes from: adapters on top of it change nothing."""
    return tokenizer_folder(replace(source, unmerged=()))


def planned_spec(config: Config, source: Source) -> ModelSpec:
    """What the plan is of: the model that will be loaded, and the adapters on top of it. Headers alone are read.

    Raises:
        CheckpointError: an unsupported architecture, or what cannot be merged, or run on top of the base; EXL2 files
            that are damaged as far as headers tell.
    """
    loras = (lora_size(target) for adapter, _ in source.unmerged for target in lora_targets(adapter, source.base))
    model = loaded(config, source)
    spec = model_spec(model)
    if is_exl2(model):
        check_planned(model, spec)
    return replace(spec, loras=tuple(loras))


def is_exl2(model: Checkpoint) -> bool:
    """Whether config.json says that it is an EXL2 model."""
    signed = model.config.get("quantization_config")
    return isinstance(signed, dict) and signed.get("quant_method") == "exl2"


def _verify_own(source: Source, run: RunFolder) -> None:
    """Reads back what is loaded as it is (convert.verify): of EXL2 files it is known what they have to be.

    Raises:
        CheckpointError: what is wrong with them.
    """
    if is_exl2(source.base):
        run.status("verifying")
        if layout_of(source.base.config) is not None:  # else no engine is planned with it
            check_planned(source.base, model_spec(source.base))
        found = check_exl2(source.base.path)
        note(
            f"verified: {len(found.linears)} linears' parts, groups, order and scales; layers of {found.bits:.3f} bits "
            f"per weight, a head of {found.head_bits:.3f}"
        )
    elif not source.unmerged:  # those were verified
        note("convert.verify=true: nothing was converted or merged, so there is nothing to verify")


def _verify(config: Config, source: Source, store: Store, artifact: Artifact, run: RunFolder) -> None:
    """Reads the result back (convert.verify).

    Raises:
        StageError: it is damaged, or not what its sources give.
    """
    from orchestrator.stages.verify import verify_merge

    run.status("verifying")
    if problems := store.verify(artifact):
        raise StageError(
            f"{artifact.path} is damaged: {'; '.join(problems)}",
            f"Remove it with task=artifacts artifacts.action=prune artifacts.name={artifact.name} and run it again.",
        )
    names = verify_merge(source.base, source.adapters, _dtype(config), artifact.path, _nf4(config))
    note(f"verified: {len(artifact.files)} files by their digests, {len(names)} tensors against their sources")


def _nf4(config: Config) -> Nf4 | None:
    from orchestrator.stages.nf4 import Nf4

    return Nf4(config.merge.double) if config.merge.base == "nf4" else None


def _dtype(config: Config) -> str | None:
    return None if config.convert.dtype == "auto" else config.convert.dtype


def _merge(config: Config, source: Source, recipe: Recipe, out: Path) -> Built:
    from orchestrator.stages.merge import merge

    with progress("merging" if source.adapters else "converting") as show:
        report = merge(
            source.base,
            list(source.adapters),
            out,
            dtype=_dtype(config),
            shard_size=recipe.options["shard_size"],
            progress=show,
            nf4=_nf4(config),
        )
    show_merge(report)
    digests = {shard["name"]: shard["xxh3_128"] for shard in report["shards"]}
    summary = {key: value for key, value in report.items() if key not in ("modules", "shards")}
    return Built(summary | {"source": source.label}, digests)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages, those that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
