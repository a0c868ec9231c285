"""What each engine can do, as data: the plan, the config checks and the interpreters read it. No engine is imported.

A new engine is a row here, an adapter module and a memory model; nothing else names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """One way to store weights. `loss` orders methods by how far they are from 16 bit (0 is nothing lost).

    `low` and `high` bound the bits per weight of a method that takes any width; others have those of their backend.
    """

    name: str
    loss: float
    label: str
    low: float | None = None
    high: float | None = None


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("none", 0.0, "unquantized"),
        Method("int8", 1.0, "int8"),
        Method("nf4", 4.0, "NF4"),
        Method("fp4", 5.0, "FP4"),
    )
}


@dataclass(frozen=True)
class Backend:
    """One engine.

    Attributes:
        adapter: "module:Class" of its adapter, imported in the engine's own process only.
        memory: "module:function" of its memory model (torch-free).
        methods: method -> the bits per weight it comes in, the automatic choice first.
        devices: where it runs, best first.
        keys: the engine-specific keys of the configuration that it understands.
        packages: what has to be importable in its interpreter.
        extra: the extra of our own package that installs them; empty where only task=engine does.
        speed: method -> expected decode speed relative to the others (only the order matters).
        cpu_speed: the same on a CPU, where it differs.
        cache_bits: widths of the KV cache, for engines that have the key `cache.bits`.
        stages: "module:function" of the stages that turn merged safetensors into what it loads (see pipeline).
    """

    name: str
    adapter: str
    memory: str
    methods: dict[str, tuple[float, ...]]
    devices: tuple[str, ...]
    packages: tuple[str, ...]
    extra: str
    speed: dict[str, float]
    keys: frozenset[str] = field(default_factory=frozenset)
    cpu_speed: dict[str, float] | None = None
    cache_bits: tuple[int, ...] = ()
    stages: tuple[str, ...] = ()


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            name="bitsandbytes",
            adapter="orchestrator.backends.huggingface:HuggingFaceEngine",
            memory="orchestrator.plan.huggingface:estimate",
            methods={"nf4": (4.0,), "int8": (8.0,), "fp4": (4.0,)},
            devices=("cuda", "cpu"),
            packages=("torch", "transformers", "accelerate", "bitsandbytes"),
            extra="bitsandbytes",
            speed={"nf4": 1.0, "fp4": 1.0, "int8": 0.5},
            keys=frozenset({"quant.double"}),
        ),
        Backend(
            name="transformers",
            adapter="orchestrator.backends.huggingface:HuggingFaceEngine",
            memory="orchestrator.plan.huggingface:estimate",
            methods={"none": (16.0, 32.0)},
            devices=("cuda", "cpu"),
            packages=("torch", "transformers", "accelerate"),
            extra="transformers",
            speed={"none": 1.2},
        ),
        Backend(
            name="vllm",
            adapter="orchestrator.backends.vllm:VllmEngine",
            memory="orchestrator.plan.vllm:estimate",
            methods={"none": (16.0, 32.0)},
            devices=("cuda", "cpu"),
            packages=("vllm",),
            extra="",  # its pins collide with ours: it lives in an interpreter of its own
            speed={"none": 4.0},
            # Faster there too, but it takes half a minute to start: on a CPU it is for who asks for it.
            cpu_speed={"none": 0.1},
            keys=frozenset({"parallel.tensor", "parallel.pipeline", "cache.bits"}),
            cache_bits=(16, 8),
        ),
    )
}


def backends_with_key(key: str) -> list[str]:
    """Names of the backends that understand an engine-specific key of the configuration."""
    return [backend.name for backend in BACKENDS.values() if key in backend.keys]
