"""Merging LoRA adapters into a base, tensor by tensor: neither model is ever loaded.

W += weight * s * B@A in float32, one cast, one write. Peak memory depends on the largest tensors' rows, not on
the number of layers. A finished shard is kept with a record beside it (`<shard>.done`), so that a run that was
killed goes on with the next shard. Without adapters this is the plain conversion to safetensors.
"""

import errno
import functools
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.checkpoint.adapter import Adapter
from orchestrator.checkpoint.adapter import fingerprint as adapter_fingerprint
from orchestrator.checkpoint.carry import carry_over
from orchestrator.checkpoint.digest import digest
from orchestrator.checkpoint.folder import Checkpoint, fingerprint
from orchestrator.checkpoint.spec import main_dtype
from orchestrator.checkpoint.tensors import DTYPES
from orchestrator.checkpoint.trust import shown
from orchestrator.checkpoint.writer import Shard, ShardWriter, plan_shards, write_index, write_text
from orchestrator.errors import CheckpointError, StageError
from orchestrator.stages.merge_plan import MergePlan, Output, check_dtype, plan_merge, written_dtype
from orchestrator.stages.nf4 import Nf4, check_available
from orchestrator.stages.pieces import Tally, in_order, keep_memory_flat, pieces, thread_count, work

VERSION = "2"
"""Of this stage: part of an artifact's key, to be raised when the same inputs give other bytes."""

REPORT_NAME = "merge-report.json"

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, name of the tensor that is done)."""

_SPACE = (errno.ENOSPC, errno.EDQUOT)
_GIB = 2**30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """Everything that a shard's writing needs to know."""

    base: Checkpoint
    plan: MergePlan
    outputs: dict[str, Output]  # the plan's, by name
    out: Path
    recipe: str
    computes: bool  # whether anything is more than copied


def merge(
    base: Checkpoint,
    adapters: list[tuple[Adapter, float]],
    out: Path,
    *,
    dtype: str | None,
    shard_size: int,
    progress: Progress,
    nf4: Nf4 | None = None,
) -> dict[str, Any]:
    """Writes `base` with the adapters merged into it to the folder `out`, as safetensors.

    Args:
        adapters: each with the factor that its change is multiplied by; none: plain conversion.
        out: the stage's own folder; one that a killed call left behind is gone on with.
        dtype: "float32", "float16", "bfloat16", or None: every tensor as the base has it.
        shard_size: bytes of data in one file.
        nf4: adapters are added to the base as a training on NF4 saw it; None: as it is.

    Returns:
        JSON-able: what merge-report.json says (base, adapters, dtype, tensors, bytes, shards with digests, dropped,
        notes, carried, and per module the relative Frobenius norm of the change, the share of elements changed and
        the adapter tensors used), and `kept`: the shards that an earlier call had finished.

    Raises:
        CheckpointError: inputs that cannot be merged (see `adapter_match.targets`), NaN or infinite weights, an
            overflow of the written dtype, or a merge that changes nothing.
        ConfigError: a dtype that is not on the list.
        StageError: the disk is full (finished shards stay), or the folder holds another model.
    """
    if nf4 is not None:
        check_available()
    plan = plan_merge(base, adapters, nf4)
    check_dtype(base, dtype)
    shards = plan_shards(_layout(plan, dtype), shard_size)
    outputs = {output.name: output for output in plan.outputs}
    computes = bool(adapters) or dtype is not None
    job = _Job(base, plan, outputs, out, _recipe(base, adapters, dtype, shard_size, nf4), computes)
    try:
        _prepare(job, shards)
        records = _write_all(job, shards, progress)
        modules = [module for record in records for module in record["modules"]]
        written = dtype or DTYPES[main_dtype(base.tensors.values()) or "F32"].torch
        if adapters and not any(module["changed"] for module in modules):
            _discard(job, shards)
            raise _no_change(adapters, written)
        report = {
            "version": VERSION,
            "base": str(base.path),
            "adapters": [_described(adapter, weight) for adapter, weight in adapters],
            "onto": {"base": "original"} if nf4 is None else {"base": "nf4", "double": nf4.double},
            "dtype": written,
            "tensors": sum(len(shard.tensors) for shard in shards),
            "bytes": sum(shard.file_bytes for shard in shards),
            "shards": [{key: record[key] for key in ("name", "bytes", "xxh3_128")} for record in records],
            "dropped": list(plan.dropped),
            "notes": list(plan.notes),
            "carried": _carry(job, shards, written),
            "modules": modules,
        }
        write_text(out / REPORT_NAME, json.dumps(report, indent=1) + "\n")
        _forget(job, shards)
    except OSError as error:
        raise _disk_error(error, out, shards) from error
    return report | {"kept": [record["name"] for record in records if record["kept"]]}


def _layout(plan: MergePlan, dtype: str | None) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(output.name, written_dtype(output, dtype), output.source.shape) for output in plan.outputs]


def _recipe(
    base: Checkpoint,
    adapters: list[tuple[Adapter, float]],
    dtype: str | None,
    shard_size: int,
    nf4: Nf4 | None,
) -> str:
    inputs = {
        "version": VERSION,
        "base": fingerprint(base),
        "adapters": [[adapter_fingerprint(adapter), weight] for adapter, weight in adapters],
        "dtype": dtype,
        "shard_size": shard_size,
        "nf4": nf4 and vars(nf4),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _prepare(job: _Job, shards: list[Shard]) -> None:
    """Makes the folder, and clears away what earlier calls with other inputs left in it."""
    if job.out.resolve() == job.base.path.resolve():
        raise StageError(f"{job.out} is the base itself", "Give another folder for the result.")
    job.out.mkdir(parents=True, exist_ok=True)
    planned = {shard.name for shard in shards}
    for file in sorted(job.out.glob("*.part")):
        file.unlink()
    for file in sorted(job.out.glob("*.safetensors")):
        record = _record_file(job.out, file.name)
        if file.name not in planned and not record.exists():
            raise StageError(f"{job.out} already holds {file.name}, of another model", "Give an empty folder.")
        if file.name not in planned:
            file.unlink()
            record.unlink()


def _described(adapter: Adapter, weight: float) -> dict[str, Any]:
    tensors = {"tensors": len(adapter.tensors), "rank": adapter.lora.rank, "alpha": adapter.lora.alpha}
    return {"path": str(adapter.path), "weight": weight, **tensors}


def _carry(job: _Job, shards: list[Shard], dtype: str) -> list[str]:
    """Writes the index and the small files; their names."""
    write_index(job.out, shards)
    return carry_over(job.base, job.out, dtype, edits=job.plan.config, tokenizer=job.plan.tokenizer)


def _forget(job: _Job, shards: list[Shard]) -> None:
    """Removes the shards' records: they have served."""
    for shard in shards:
        _record_file(job.out, shard.name).unlink(missing_ok=True)


def _write_all(job: _Job, shards: list[Shard], progress: Progress) -> list[dict[str, Any]]:
    keep_memory_flat()
    total = sum(shard.data_bytes for shard in shards)
    records: list[dict[str, Any]] = []
    done = 0
    with _pool(job) as pool:
        for shard in shards:
            record = _kept(job, shard)
            if record is None:
                record = _write_shard(job, shard, pool, functools.partial(_advance, progress, done, total))
            done += shard.data_bytes
            if record["kept"]:
                progress(done, total, shard.tensors[-1].name)
            records.append(record)
            _log_memory(record, len(records), len(shards))
    return records


def _pool(job: _Job) -> ThreadPoolExecutor:
    if not job.computes:
        return ThreadPoolExecutor(thread_count(), "pieces")
    from orchestrator.stages.merge_tensor import one_thread

    return ThreadPoolExecutor(thread_count(), "pieces", initializer=one_thread)


def _advance(progress: Progress, start: int, total: int, done: int, name: str) -> None:
    progress(start + done, total, name)


def _write_shard(
    job: _Job, shard: Shard, pool: ThreadPoolExecutor, progress: Callable[[int, str], None]
) -> dict[str, Any]:
    outputs = ((job.outputs[tensor.name], tensor.dtype) for tensor in shard.tensors)
    tallies: dict[str, Tally] = {}
    done = 0
    with ShardWriter(job.out, shard) as writer:
        for worked in in_order(pool, work, pieces(outputs), 2 * thread_count() + 1):
            name = worked.piece.output.name
            writer.write(name, worked.data)
            tallies[name] = tallies.get(name, Tally()) + worked.tally
            done += worked.data.nbytes
            progress(done, name)
        record = {
            "name": shard.name,
            "bytes": shard.file_bytes,
            "xxh3_128": writer.finish(),
            "recipe": job.recipe,
            "modules": [
                _module(job.outputs[name], tally) for name, tally in tallies.items() if _told(job.outputs[name])
            ],
        }
    # After the shard: killed between the two, the shard has no record of this recipe and is written again.
    write_text(_record_file(job.out, shard.name), json.dumps(record))
    return {**record, "kept": False}


def _told(output: Output) -> bool:
    return output.touched or output.nf4 is not None


def _module(output: Output, tally: Tally) -> dict[str, Any]:
    """What became of one tensor that an adapter has a part in, or that went through NF4.

    `relative_change` is |change| / |W| (Frobenius) of what the adapters added, before the cast; None where there is
    nothing to compare with (a base of zeros, or of another shape). `nf4_rounding` is |NF4(W) - W| / |W|: how far a
    merge onto the original base and this one lie apart. `changed` is the share of elements whose written value
    differs from the base's.
    """
    told: dict[str, Any] = {
        "tensor": output.name,
        "relative_change": math.sqrt(tally.change / tally.before) if tally.before else None,
        "changed": tally.changed / max(output.source.parameters, 1),
        "used": list(output.used),
    }
    if output.nf4 is not None and tally.before:
        told["nf4_rounding"] = math.sqrt(tally.rounding / tally.before)
    return told


def _kept(job: _Job, shard: Shard) -> dict[str, Any] | None:
    """The record of a shard that an earlier call finished from the same inputs, or None."""
    file = job.out / shard.name
    try:
        record = json.loads(_record_file(job.out, shard.name).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("recipe") != job.recipe:
            return None
        whole = file.stat().st_size == shard.file_bytes and digest(file) == record.get("xxh3_128")
    except (OSError, ValueError):
        return None
    return {**record, "kept": True} if whole else None


def _record_file(out: Path, shard: str) -> Path:
    return out / f"{shard}.done"


def _discard(job: _Job, shards: list[Shard]) -> None:
    """Removes finished shards that nobody will ever use."""
    for shard in shards:
        _record_file(job.out, shard.name).unlink(missing_ok=True)
        (job.out / shard.name).unlink(missing_ok=True)


def _no_change(adapters: list[tuple[Adapter, float]], written: str) -> CheckpointError:
    names = ", ".join(shown(adapter.path) for adapter, _ in adapters)
    finer = "" if written == "float32" else ", or convert.dtype=float32"
    return CheckpointError(
        f"the merge changes nothing: {names} leaves every written weight as it was", f"Give a larger weight{finer}."
    )


def _disk_error(error: OSError, out: Path, shards: list[Shard]) -> StageError:
    if error.errno not in _SPACE:
        return StageError(f"{out} cannot be written: {error.strerror or error}")
    left = (shard.file_bytes for shard in shards if not (out / shard.name).exists())
    free = shutil.disk_usage(out).free
    return StageError(
        f"no space left in {out}: {sum(left) / _GIB:.2f} GiB needed, {free / _GIB:.2f} GiB free",
        "Make room and start it again: finished shards are kept.",
    )


def _log_memory(record: dict[str, Any], number: int, total: int) -> None:
    used, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    how = "kept" if record["kept"] else "written"
    log.info(
        "%s %s (%d of %d), its tensors are on the disk; host memory: %.2f GiB in use by this process, %.2f GiB free",
        record["name"],
        how,
        number,
        total,
        used / _GIB,
        free / _GIB,
    )
