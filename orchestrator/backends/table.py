"""What each engine can do, as data: the plan, the config checks and the interpreters read it. No engine is imported.

A new engine is a row here, its architectures in known_models.py, an adapter module and a memory model; nothing else
names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """One way to store weights.

    Attributes:
        loss: orders methods by how far they are from 16 bit (0 is nothing lost); at 4 bits, where `per_bit` is set.
        low, high: bounds of the bits per weight of a method that takes any width; others have their backend's.
        per_bit: what each bit above 4 adds to the loss, of a method that takes any width.
    """

    name: str
    loss: float
    label: str
    low: float | None = None
    high: float | None = None
    per_bit: float = 0.0

    def loss_at(self, bits: float) -> float:
        """How far the method is from 16 bit at one width."""
        return self.loss + self.per_bit * (bits - 4)

    def widths(self, usual: tuple[float, ...]) -> str:
        """The widths as a person reads them; `usual` are its backend's."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return " or ".join(f"{bits:g}" for bits in usual)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("none", 0.0, "unquantized"),
        Method("int8", 1.0, "int8"),
        Method("nf4", 4.0, "NF4"),
        Method("fp4", 5.0, "FP4"),
        # A little behind bitsandbytes at the same nominal width: NF4 stores 4.5 bits per weight, 4.0 of EXL2 are 4.0,
        # and its head has 6 where int8's keeps 16.
        Method("exl2", 4.1, "EXL2", low=2.25, high=8.0, per_bit=-0.75),
        # Calibrated, which NF4 is not: a quarter of its divergence at 4 bits, and that of int8 at 8.
        Method("gptq", 3.9, "GPTQ", per_bit=-0.72),
        Method("awq", 3.9, "AWQ"),
        Method("compressed-tensors", 3.9, "compressed-tensors", per_bit=-0.72),
        Method("fp8", 1.05, "FP8"),
    )
}


@dataclass(frozen=True)
class Loads:
    """A format of quantized checkpoints (config.json's quant_method) that an engine loads as it is.

    Attributes:
        bits: the widths that it takes; empty: any.
        cpu_bits: those that it takes on a CPU.
        capability: the least compute capability of its kernels.
        groups: the sizes of groups that it takes; empty: any.
        symmetric: it takes none with zero points.
        in_order: it takes none whose inputs are reordered.
        layouts: of compressed-tensors, those that it takes.
    """

    bits: tuple[float, ...] = ()
    cpu_bits: tuple[float, ...] = ()
    capability: tuple[int, int] = (0, 0)
    groups: tuple[int, ...] = ()
    symmetric: bool = False
    in_order: bool = False
    layouts: tuple[str, ...] = ()


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
        automatic: the devices on which backend=auto takes it into account.
        cache_bits: widths of the KV cache, for engines that have the key `cache.bits`.
        stages: "module:function" of the stages that turn merged safetensors into what it loads (see pipeline); the
            module's `disk_part` says what they write.
        dtypes: what it computes in, the automatic choice first; empty: whatever the device has.
        on_request: methods that run only where quant.method names them.
        loads: quant_method of a checkpoint that is quantized already -> what of it is loaded as it is.
        elsewhere: methods whose checkpoints nothing here makes: their plans say what they need.
        half: methods whose arithmetic has 16 bits on every device.
        unmerged: "module:function" of the stage that writes adapters as it runs them on top of a base
            (model.merge=false; see pipeline), whose module has a `disk_part` too; empty: it runs none.
        grows: of an engine whose memory grows with the tokens it holds, "module:function" of what a plan comes to for
            some of them; empty: all of it is taken when it loads.
        planned_args: those of its own arguments (backend.engine_args) that the plan decides, or that its adapter
            rests on -> the key of ours that says the same; empty: none does.
        lacks: "module:function" of what an interpreter lacks that the engine can do without, but not as well ("" for
            nothing); empty: there is no such thing.
        capability: the least compute capability that the PyTorch of its pins has kernels for; (0, 0): not looked up.
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
    automatic: tuple[str, ...] = ("cuda", "cpu")
    cache_bits: tuple[int, ...] = ()
    stages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    on_request: frozenset[str] = frozenset()
    loads: dict[str, Loads] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()
    half: frozenset[str] = frozenset()
    unmerged: str = ""
    grows: str = ""
    planned_args: Mapping[str, str] = field(default_factory=dict)
    lacks: str = ""
    capability: tuple[int, int] = (0, 0)

    @property
    def known_methods(self) -> tuple[str, ...]:
        """Those that it runs, and those of the checkpoints that it loads as they are."""
        return tuple(dict.fromkeys((*self.methods, *(name for name in self.loads if name in METHODS))))


_CUDA_13 = (7, 5)  # which has no older cards any more, whatever is built with it
MARLIN_GROUPS = (-1, 32, 64, 128)

# Of from_pretrained: what places, quantizes or finds a model otherwise than planned.
_FROM_PRETRAINED = {
    "pretrained_model_name_or_path": "model.path",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "quantization_config": "quant.method",
    "load_in_4bit": "quant.bits",
    "load_in_8bit": "quant.bits",
    "device_map": "hardware.gpus",
    "max_memory": "hardware.memory_gib",
    "offload_folder": "offload.folder",
    "offload_buffers": "",
    "tp_plan": "",
    "tp_size": "",
    "device_mesh": "",
    "distributed_config": "",
    "config": "",
    "state_dict": "",
    "gguf_file": "",
    "use_safetensors": "",
    "local_files_only": "",
    "output_loading_info": "",
}
# Of AsyncEngineArgs. Not among them: what only costs time (enforce_eager, which the plan reads) or says more.
_ASYNC_ENGINE_ARGS = {
    "model": "model.path",
    "model_weights": "model.path",
    "revision": "model.revision",
    "code_revision": "model.revision",
    "tokenizer": "model.path",
    "tokenizer_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "hf_config_path": "model.path",
    "hf_overrides": "",
    "config_format": "",
    "model_class_overrides": "",
    "runner": "",
    "convert": "",
    "skip_tokenizer_init": "",
    "dtype": "model.dtype",
    "quantization": "quant.method",
    "quantization_config": "quant.method",
    "max_model_len": "model.max_context",
    "max_num_seqs": "run.in_flight",
    "max_num_batched_tokens": "",
    "seed": "generation.seed",
    "kv_cache_dtype": "cache.bits",
    "kv_cache_dtype_skip_layers": "",
    "kv_cache_memory_bytes": "hardware.memory_gib",
    "kv_offloading_size": "",
    "kv_transfer_config": "",
    "gpu_memory_utilization": "hardware.memory_gib",
    "num_gpu_blocks_override": "model.max_context",
    "block_size": "",
    "tensor_parallel_size": "parallel.tensor",
    "pipeline_parallel_size": "parallel.pipeline",
    "data_parallel_size": "",
    "data_parallel_size_local": "",
    "prefill_context_parallel_size": "",
    "decode_context_parallel_size": "",
    "enable_expert_parallel": "",
    "distributed_executor_backend": "",
    "device_ids": "hardware.gpus",
    "nnodes": "",
    "cpu_offload_gb": "",
    "cpu_offload_params": "",
    "offload_backend": "",
    "offload_group_size": "",
    "speculative_config": "",
    "spec_method": "",
    "spec_model": "",
    "spec_tokens": "",
    "enable_lora": "model.adapter",
    "load_format": "",
    "max_logprobs": "",
    "worker_cls": "",
    "worker_extension_cls": "",
}
# Of ExLlamaV2Config: the lengths, the sizes of its scratch, and the attention that goes with the cards.
_EXLLAMAV2_CONFIG = {
    "model_dir": "model.path",
    "max_seq_len": "model.max_context",
    "max_batch_size": "run.in_flight",
    "load_in_q4": "quant.bits",
    "max_input_len": "",
    "max_output_len": "",
    "max_attention_size": "",
    "max_dq_size": "",
    "no_flash_attn": "",
    "no_sdpa": "",
}

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            name="bitsandbytes",
            adapter="orchestrator.backends.huggingface:HuggingFaceEngine",
            memory="orchestrator.plan.huggingface:estimate",
            grows="orchestrator.plan.huggingface:at_use",
            methods={"nf4": (4.0,), "int8": (8.0,), "fp4": (4.0,)},
            devices=("cuda", "cpu"),
            packages=("torch", "transformers", "accelerate", "bitsandbytes"),
            extra="bitsandbytes",
            speed={"nf4": 1.0, "fp4": 1.0, "int8": 0.5},
            keys=frozenset({"quant.double", "offload.folder", "offload.cpu_gib"}),
            loads={"bitsandbytes": Loads((4, 8), cpu_bits=(4, 8))},
            planned_args=_FROM_PRETRAINED,
        ),
        Backend(
            name="transformers",
            adapter="orchestrator.backends.huggingface:HuggingFaceEngine",
            memory="orchestrator.plan.huggingface:estimate",
            grows="orchestrator.plan.huggingface:at_use",
            methods={"none": (16.0, 32.0)},
            devices=("cuda", "cpu"),
            packages=("torch", "transformers", "accelerate"),
            extra="transformers",
            speed={"none": 1.2},
            keys=frozenset({"offload.folder", "offload.cpu_gib"}),
            planned_args=_FROM_PRETRAINED,
        ),
        Backend(
            name="vllm",
            adapter="orchestrator.backends.vllm:VllmEngine",
            memory="orchestrator.plan.vllm:estimate",
            methods={"none": (16.0, 32.0), "gptq": (4.0, 8.0)},
            devices=("cuda", "cpu"),
            packages=("vllm",),
            extra="",  # its pins collide with ours: it lives in an interpreter of its own
            speed={"none": 4.0, "gptq": 5.0, "awq": 5.0, "compressed-tensors": 5.0, "fp8": 4.5},
            automatic=("cuda",),  # on a CPU it takes half a minute to start: it is for who asks for it
            keys=frozenset({"quant.group_size", "parallel.tensor", "parallel.pipeline", "cache.bits"}),
            cache_bits=(16, 8),
            # Marlin's, and those of CPUWNA16 on a CPU: vllm 0.32's quantization/{auto_gptq,auto_awq,fp8}.py,
            # compressed_tensors/, kernels/linear/mixed_precision/. FP8 is native from 8.9, weights only from 7.5.
            loads={
                "gptq": Loads((4, 8), (4,), (7, 5), MARLIN_GROUPS, symmetric=True, in_order=True),
                "awq": Loads((4,), (4,), (7, 5), MARLIN_GROUPS),
                "compressed-tensors": Loads(
                    (4, 8),
                    (4,),
                    (7, 5),
                    MARLIN_GROUPS,
                    in_order=True,
                    layouts=("pack-quantized", "int-quantized", "float-quantized"),
                ),
                "fp8": Loads((8,), (), (7, 5)),
            },
            elsewhere=frozenset({"gptq"}),
            half=frozenset({"gptq", "awq", "compressed-tensors", "fp8"}),
            planned_args=_ASYNC_ENGINE_ARGS,
            capability=_CUDA_13,
        ),
        Backend(
            name="exllamav2",
            adapter="orchestrator.backends.exllamav2:ExLlamaV2Engine",
            memory="orchestrator.plan.exllamav2:estimate",
            methods={"exl2": (4.0, 6.0, 8.0), "none": (16.0,)},
            devices=("cuda",),
            # pandas and fastparquet: its converter's tokenize.py imports them whatever the calibration is.
            packages=("torch", "exllamav2", "tokenizers", "safetensors", "pandas", "fastparquet"),
            extra="exllamav2",
            speed={"exl2": 3.0, "gptq": 2.5, "none": 1.1},
            keys=frozenset(
                {
                    "quant.head_bits",
                    "quant.measurement",
                    "quant.calibration.file",
                    "quant.calibration.rows",
                    "quant.calibration.length",
                    "cache.bits",
                    "parallel.gpu_split",
                    "parallel.tensor",
                }
            ),
            cache_bits=(16, 8, 6, 4),
            stages=("orchestrator.stages.exl2:quantize",),
            dtypes=("float16",),
            on_request=frozenset({"none"}),
            loads={"exl2": Loads(), "gptq": Loads((4,))},
            unmerged="orchestrator.stages.exl2_adapters:write_adapters",
            planned_args=_EXLLAMAV2_CONFIG,
            lacks="orchestrator.plan.exl2_attention:lacks",
            capability=_CUDA_13,
        ),
    )
}


def backends_with_key(key: str) -> list[str]:
    """Names of the backends that understand an engine-specific key of the configuration."""
    return [backend.name for backend in BACKENDS.values() if key in backend.keys]


def backends_that_plan(argument: str) -> list[str]:
    """Names of the backends of whose own arguments (backend.engine_args) the plan decides this one."""
    return [backend.name for backend in BACKENDS.values() if argument in backend.planned_args]


def backends_with_adapters() -> list[str]:
    """Names of the backends that run an adapter on top of its base."""
    return [backend.name for backend in BACKENDS.values() if backend.unmerged]
