"""What the plan asks, and what it answers. All sizes are bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orchestrator.hardware import Hardware


@dataclass(frozen=True)
class DeviceBytes:
    """One device's share of a plan.

    Attributes:
        device: "cuda:0", ..., "cpu" for the host, or "disk".
        runtime: the engine's libraries and the CUDA context, whatever the model.
        capacity: what is free there for this run, less the margin.
        margin: what is kept free beside that, for what the plan does not foresee.
    """

    device: str
    weights: int
    kv_cache: int
    scratch: int
    runtime: int
    capacity: int
    margin: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.scratch + self.runtime

    @property
    def left(self) -> int:
        """What stays free; negative where it does not fit."""
        return self.capacity - self.total

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "weights": self.weights,
            "kv_cache": self.kv_cache,
            "scratch": self.scratch,
            "runtime": self.runtime,
            "total": self.total,
            "capacity": self.capacity,
            "margin": self.margin,
        }


@dataclass(frozen=True)
class Ask:
    """One combination to look at: an engine, a method, a width.

    Attributes:
        max_context: tokens that were asked for; None: as many as fit, up to the goal.
        goal: tokens of context to reach where none were asked for.
        max_in_flight: sequences at a time.
        settings: the engine-specific keys of the configuration that were set ("cache.bits": 8, ...).
        engine_args: backend.engine_args, which the engine gets as they are.
        lacks: what its interpreter on this machine lacks (Backend.lacks); "": nothing that is known of.
    """

    backend: str
    method: str
    bits: float
    dtype: str
    double_quant: bool
    max_context: int | None
    goal: int
    max_in_flight: int
    settings: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)
    lacks: str = ""


@dataclass(frozen=True)
class Candidate:
    """One combination's answer: does it fit, and where everything goes.

    Attributes:
        disk: what is offloaded to `offload_folder`; None: nothing.
        most_tokens_per_s: a bound on the speed of one answer, where weights are offloaded; None: none are.
        notes: what is to be known of an offload before it runs.
        largest_context: tokens that one sequence alone can have, up to what the model was made for; None: nobody asked.
        margin_source: what the margins come from: "never measured on this card", "measured in 5 runs on this card".
        needs: a checkpoint that it runs from and that nothing here makes; "": none.
        adapter_bytes: GPU -> bytes there of adapters that are not merged, which are a part of its weights.
    """

    backend: str
    method: str
    bits: float
    dtype: str
    double_quant: bool
    fits: bool
    reasons: tuple[str, ...]
    max_context: int
    max_in_flight: int
    gpus: tuple[DeviceBytes, ...]
    host: DeviceBytes
    device_map: dict[str, str]
    weights: dict[str, int]  # device -> bytes of weights put there
    installed: bool = True
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpu_split: tuple[float, ...] = ()
    cache_bits: int = 16
    disk: DeviceBytes | None = None
    offload_folder: str = ""
    most_tokens_per_s: float | None = None
    notes: tuple[str, ...] = ()
    largest_context: int | None = None
    margin_source: str = ""
    needs: str = ""
    adapter_bytes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ask: Ask,
        context: int,
        gpus: tuple[DeviceBytes, ...],
        host: DeviceBytes,
        reasons: tuple[str, ...] = (),
        **more: Any,
    ) -> Candidate:
        """The answer to an ask: it fits if there are no `reasons` against it and no device has too little."""
        disk: DeviceBytes | None = more.get("disk")
        over = _over((*gpus, host, *((disk,) if disk else ())))
        return cls(
            backend=ask.backend,
            method=ask.method,
            bits=ask.bits,
            dtype=ask.dtype,
            double_quant=ask.double_quant,
            fits=not reasons and not over and context > 0,
            reasons=(*reasons, *over),
            max_context=context,
            max_in_flight=ask.max_in_flight,
            gpus=gpus,
            host=host,
            **more,
        )

    @property
    def devices(self) -> tuple[DeviceBytes, ...]:
        """Every device that the plan uses."""
        return (*self.gpus, self.host, *((self.disk,) if self.disk else ()))

    @property
    def computing(self) -> tuple[DeviceBytes, ...]:
        """The GPUs; the host where there are none."""
        return self.gpus or (self.host,)

    @property
    def fullest(self) -> DeviceBytes:
        """Of the devices that compute, the one with the least left."""
        return min(self.computing, key=lambda device: device.left)

    @property
    def margin(self) -> int:
        """Bytes that are kept free of each device that computes; the most, where they differ."""
        return max(device.margin for device in self.computing)

    @property
    def limits(self) -> dict[str, int]:
        """GPU -> bytes that the engine may take there.

        The margin too, which is for what it was not expected to take; but not where the plan gives it everything,
        because it makes cache of all that it is told to take.
        """
        return {gpu.device: gpu.capacity + (gpu.margin if gpu.total < gpu.capacity else 0) for gpu in self.gpus}

    @property
    def offloads(self) -> bool:
        """Whether weights move to the device that computes in every step."""
        return self.most_tokens_per_s is not None

    @property
    def label(self) -> str:
        """As a person says it: "bitsandbytes NF4 (4 bits)"."""
        double = ", double quantization" if self.double_quant else ""
        method = "" if self.method == "none" else f" {self.method}"
        return f"{self.backend}{method} ({self.bits:g} bits{double})"

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "reasons": list(self.reasons),
            "backend": self.backend,
            "method": self.method,
            "bits": self.bits,
            "double_quant": self.double_quant,
            "dtype": self.dtype,
            "installed": self.installed,
            "tensor_parallel": self.tensor_parallel,
            "pipeline_parallel": self.pipeline_parallel,
            "gpu_split": list(self.gpu_split),
            "cache_bits": self.cache_bits,
            "max_context": self.max_context,
            "largest_context": self.largest_context,
            "max_in_flight": self.max_in_flight,
            "gpus": [gpu.to_json() for gpu in self.gpus],
            "host": self.host.to_json(),
            "margin": self.margin,
            "margin_source": self.margin_source,
            "disk": self.disk.to_json() if self.disk else None,
            "most_tokens_per_s": self.most_tokens_per_s,
            "offload_notes": list(self.notes),
            "needs": self.needs,
            "adapter_bytes": self.adapter_bytes,
            "device_map": self.device_map,
            "weights": self.weights,
        }


def _over(devices: tuple[DeviceBytes, ...]) -> tuple[str, ...]:
    """A reason for each device with too little; one for all that lack the same."""
    lacking: dict[tuple[int, int], list[str]] = {}
    for device in devices:
        if device.left < 0:
            lacking.setdefault((device.total, device.capacity), []).append(device.device)
    return tuple(
        f"{first} needs {total / 2**30:.2f} GiB and has {capacity / 2**30:.2f} GiB free"
        + (f" ({', '.join(others)} likewise)" if others else "")
        for (total, capacity), (first, *others) in lacking.items()
    )


@dataclass(frozen=True)
class Change:
    """Something to change, with which it would fit.

    Attributes:
        settings: as they are typed ("cache.bits=4", ...).
        cards: what to add to the machine; "": nothing.
        costs: what is given up.
        candidate: what runs then.
    """

    settings: tuple[str, ...]
    cards: str
    costs: str
    candidate: Candidate

    @property
    def slow(self) -> bool:
        """Whether weights are brought in for every token."""
        return self.candidate.offloads

    @property
    def label(self) -> str:
        """What to do, as a person reads it."""
        return ", ".join(part for part in (self.cards, " ".join(self.settings)) if part)

    @property
    def said(self) -> str:
        """With its number: "cache.bits=4 (22.10 GiB on cuda:0, context 4096)"."""
        fullest = self.candidate.fullest
        number = f"{fullest.total / 2**30:.2f} GiB on {fullest.device}, context {self.candidate.max_context}"
        return f"{self.label} ({f'{number}; {self.costs}' if self.slow else number})"

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": list(self.settings),
            "cards": self.cards,
            "costs": self.costs,
            "candidate": self.candidate.to_json(),
        }


@dataclass(frozen=True)
class Plan:
    """The chosen candidate, and all of them, best first.

    Attributes:
        changes: where nothing that was asked for fits: what to change, cheapest first.
        unmade: why nothing is among them that would have to be converted here; "": there is no such reason.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    hardware: Hardware | None = None
    changes: tuple[Change, ...] = ()
    unmade: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            **self.chosen.to_json(),
            "notes": [*self.notes, *self.chosen.notes],
            "hardware": self.hardware.to_json() if self.hardware is not None else None,
            "changes": [change.to_json() for change in self.changes],
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }
