"""Adapters that run on top of their base, in the form that exllamav2 0.3.2 reads: one folder for each.

Its reader (lora.py) multiplies B by one scale for the whole adapter and then rounds both factors to half precision.
So all that scales (alpha and rank by module, rank stabilization, the adapter's weight) is folded into B here, in
float32, and rounded once; r and lora_alpha are written as 1, whatever the ranks are: it takes them off the tensors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.artifacts import Artifact, Built, Recipe, Store
from orchestrator.checkpoint.adapter import Adapter, check_values
from orchestrator.checkpoint.adapter import fingerprint as adapter_fingerprint
from orchestrator.checkpoint.adapter_names import PREFIX
from orchestrator.checkpoint.adapter_targets import LoraTarget
from orchestrator.checkpoint.adapter_unmerged import MERGED, lora_size, lora_targets
from orchestrator.checkpoint.fingerprint import differences
from orchestrator.checkpoint.folder import Checkpoint, fingerprint
from orchestrator.checkpoint.reader import read_tensor, read_words
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.trust import shown
from orchestrator.checkpoint.writer import PlannedTensor, Shard, ShardWriter, write_text
from orchestrator.config import Config, folder
from orchestrator.errors import CheckpointError, StageError
from orchestrator.pipeline import Source, tokenizer_folder
from orchestrator.plan.disk import Part
from orchestrator.report.console import note, size
from orchestrator.runfolder import RunFolder

if TYPE_CHECKING:
    import torch

VERSION = "1"
"""Of this stage: part of an artifact's key, to be raised when the same inputs give other bytes."""

STAGE = "adapter"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DTYPE = "F16"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def write_adapters(config: Config, source: Source, run: RunFolder) -> list[tuple[Artifact, bool]]:
    """The stage: a folder for each adapter of `source.unmerged`, in their order, and whether it was made now.

    Raises:
        CheckpointError: an adapter that cannot run on top of its base, or values that half precision cannot hold.
        DoesNotFitError, RequestError, StageError: see the store.
    """
    store = Store(folder(config.paths.artifacts))
    for line in (line for adapter, _ in source.unmerged for line in adapter.notes):
        note(f"note: {line}")
    if (own := tokenizer_folder(source)) != source.base.path:
        note(f"note: the tokenizer is the adapter's: {own}")
    made = []
    for adapter, weight in source.unmerged:
        made.append(_made(store, source, adapter, weight, run))
        if config.convert.verify:
            _verify(store, made[-1][0], source.base, adapter, weight)
    return made


def disk_part(store: Store, source: Source) -> list[Part]:
    """What the stage will write, by headers alone: those adapters together that are not there yet."""
    sizes = [_to_write(store, source, adapter, weight) for adapter, weight in source.unmerged]
    missing = [(needed, adds) for needed, adds in sizes if adds]
    if not missing:
        return []
    what = "for an adapter" if len(missing) == 1 else f"for {len(missing)} adapters"
    return [Part(what, sum(needed for needed, _ in missing), sum(adds for _, adds in missing))]


def _to_write(store: Store, source: Source, adapter: Adapter, weight: float) -> tuple[int, int]:
    """Bytes that an adapter takes once it is done, and those that the disk needs for it."""
    needed = _shard(lora_targets(adapter, source.base)).file_bytes
    recipe = _recipe(source.base, adapter, weight) if source.is_here else None
    return needed, store.to_write(recipe, needed) if recipe else needed


def _recipe(base: Checkpoint, adapter: Adapter, weight: float) -> Recipe:
    inputs = {"base": fingerprint(base), "adapter": adapter_fingerprint(adapter)}
    return Recipe(STAGE, VERSION, {"weight": weight}, inputs, (str(base.path), str(adapter.path)))


def _made(store: Store, source: Source, adapter: Adapter, weight: float, run: RunFolder) -> tuple[Artifact, bool]:
    recipe, started = _recipe(source.base, adapter, weight), time.monotonic()
    if store.find(recipe) is None:
        run.status("converting the adapter")
    artifact, built = store.build(
        recipe,
        make=lambda out: write_adapter(source.base, adapter, weight, out),
        needed=_shard(lora_targets(adapter, source.base)).file_bytes,
        changed=lambda: differences(recipe.inputs, _recipe(source.base, adapter, weight).inputs),
        waiting=lambda: note(f"waiting for another run that builds {recipe.name}"),
    )
    how = f"{size(artifact.size)} in {time.monotonic() - started:.1f} s" if built else "found, nothing to build"
    note(f"{STAGE}: {how} -> {artifact.path}")
    return artifact, built


def write_adapter(base: Checkpoint, adapter: Adapter, weight: float, out: Path) -> Built:
    """Writes one adapter's folder.

    Raises:
        CheckpointError: an adapter that cannot run on top of its base, or values that half precision cannot hold.
    """
    found = lora_targets(adapter, base)
    check_values(adapter)
    changes = False
    with ShardWriter(out, _shard(found)) as writer:
        for name, factor in _factors(adapter, found, weight):
            writer.write(name, factor.numpy())
            changes = changes or (name.endswith(_B) and bool(factor.any()))
        if not changes:
            raise CheckpointError(
                f"{shown(adapter.path, 400)}: the adapter would change nothing: every lora_B is zero in float16",
                "Give it a larger weight.",
            )
        digest = writer.finish()
    write_text(out / CONFIG, json.dumps(_config(found), indent=2) + "\n")
    return Built({"source": str(adapter.path), "weight": weight, "base": str(base.path)}, {WEIGHTS: digest})


def _config(found: Sequence[LoraTarget]) -> dict[str, Any]:
    """adapter_config.json as PEFT's, with nothing left for a reader to scale or to turn."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "target_modules": sorted({lora_size(target).module.rpartition(".")[2] for target in found}),
    }


def _names(target: LoraTarget) -> tuple[str, str]:
    """Of A and of B in the file."""
    module = f"{PREFIX}{lora_size(target).module}"
    return module + _A, module + _B


def _shard(found: Sequence[LoraTarget]) -> Shard:
    tensors = []
    for target in found:
        pair, (a, b) = lora_size(target), _names(target)
        tensors += [PlannedTensor(a, _DTYPE, (pair.rank, pair.inputs))]
        tensors += [PlannedTensor(b, _DTYPE, (pair.outputs, pair.rank))]
    return Shard(WEIGHTS, tuple(tensors))


def _factors(adapter: Adapter, found: Sequence[LoraTarget], weight: float) -> Iterator[tuple[str, torch.Tensor]]:
    """A and B of each linear by their names, all that scales within B; computed in float32, rounded to float16 once."""
    for target in found:
        a, b = read_tensor(target.a).float(), read_tensor(target.b).float()
        if target.transposed:  # (B A)^T = A^T B^T
            a, b = b.T.contiguous(), a.T.contiguous()
        for name, factor in zip(_names(target), (a, b * (target.scale * weight)), strict=True):
            yield name, _half(name, factor, adapter)


def _half(name: str, factor: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """Raises CheckpointError where float16 cannot hold a value."""
    half = factor.half()
    if not bool(half.isfinite().all()):
        raise CheckpointError(
            f"{shown(adapter.path, 400)}: {shown(name)} does not fit into float16, in which exllamav2 runs it: its "
            f"largest value is {float(factor.abs().max()):.4g}",
            MERGED,
        )
    return half


def _verify(store: Store, artifact: Artifact, base: Checkpoint, adapter: Adapter, weight: float) -> None:
    """Reads the result back (convert.verify).

    Raises:
        StageError: it is damaged, or not what its sources give.
    """
    problems = store.verify(artifact)
    found = {info.name: info for info in read_safetensors_header(artifact.path / WEIGHTS).tensors}
    for name, factor in _factors(adapter, lora_targets(adapter, base), weight):
        there = found.get(name)
        if there is None or read_words(there, 0, there.shape[0]).tobytes() != factor.numpy().tobytes():
            problems.append(f"{shown(name)} is not what its sources give")
    if problems:
        raise StageError(
            f"{artifact.path} is damaged: {'; '.join(problems)}",
            f"Remove it with task=artifacts artifacts.action=prune artifacts.name={artifact.name} and run it again.",
        )
    note(f"verified: {len(artifact.files)} files by their digests, {len(found)} tensors against their sources")
