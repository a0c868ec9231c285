"""A LoRA adapter's folder, and which tensor of a base model each of its tensors belongs to. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.architectures import Architecture, is_tied, layout_of
from orchestrator.checkpoint.bits import all_finite, all_zero
from orchestrator.checkpoint.fingerprint import fingerprint_files
from orchestrator.checkpoint.folder import Checkpoint, check_folder
from orchestrator.checkpoint.lora_config import LoraConfig, parse_lora_config
from orchestrator.checkpoint.reader import read_words
from orchestrator.checkpoint.tensors import PLAIN_FLOATS, TensorInfo
from orchestrator.checkpoint.trust import read_object, shown
from orchestrator.checkpoint.weights import ADAPTER_FORMATS, read_weights
from orchestrator.errors import CheckpointError

PREFIX = "base_model.model."
"""What PEFT puts before a module's path."""

_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"

_REFUSED_TENSORS = {
    ".lora_embedding_": "LoRA on an embedding",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "biases in lora_B (lora_bias)",
    ".token_adapter.": "trained token rows",
    ".base_layer.": "a saved base layer (a targeted embedding or head, or experts)",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter's files: config as it is, the facts a merge uses, tensors in file order."""

    path: Path
    config: dict[str, Any]
    lora: LoraConfig
    tensors: dict[str, TensorInfo]
    format: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    digests: dict[str, str]


@dataclass(frozen=True)
class LoraTarget:
    """W += scale * B@A on the base's `tensor`; the product is transposed where the base stores (in, out)."""

    tensor: str
    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapter's tensors that this uses up."""
        return (self.a.name, self.b.name)


@dataclass(frozen=True)
class ReplaceTarget:
    """The base's `tensor` becomes `value` (modules_to_save, or a saved embedding)."""

    tensor: str
    module: str
    value: TensorInfo

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapter's tensors that this uses up."""
        return (self.value.name,)


Target = LoraTarget | ReplaceTarget


def open_adapter(path: Path) -> Adapter:
    """An adapter's folder, checked: adapter_config.json and adapter_model.safetensors or .bin.

    Raises:
        CheckpointError: no such folder, no adapter in it, damaged or malicious files, or a feature that is
            not merged here (named).
    """
    check_folder(path)
    where = shown(path, 400)
    file = path / "adapter_config.json"
    if not file.exists():
        model = (path / "config.json").exists()
        hint = f"It is a model: give it as model.path={where}" if model else "Give a folder that PEFT has saved."
        raise CheckpointError(f"{where} has no adapter_config.json", hint)
    config = read_object(file)
    lora = parse_lora_config(config, shown(file, 400))
    weights = read_weights(path, ADAPTER_FORMATS)
    if weights is None:
        raise CheckpointError(f"{where} has neither adapter_model.safetensors nor adapter_model.bin")
    if not weights.tensors:
        raise CheckpointError(f"{where}: the adapter would change nothing: it holds no tensors")
    return Adapter(path, config, lora, weights.tensors, weights.format, weights.files, weights.notes, weights.digests)


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """What identifies an adapter, JSON-able: names, sizes, times, header digests. No data are read."""
    found = fingerprint_files((adapter.path / "adapter_config.json",), adapter.files, adapter.digests)
    return {"format": adapter.format, **found}


def targets(adapter: Adapter, base: Checkpoint) -> dict[str, Target]:
    """For each base tensor that the adapter changes, how. Every tensor of the adapter is used exactly once.

    Only headers are looked at; `check_values` looks at the data.

    Raises:
        CheckpointError: a quantized base, an adapter of another model (it names the first mismatch), or a
            tensor that no supported feature explains (it names the feature).
    """
    where = shown(adapter.path, 400)
    if base.config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{shown(base.path, 400)} is quantized: an adapter cannot be merged into it",
            "Give the original 16-bit model as model.path=...",
        )
    found: dict[str, Target] = {}
    for module, parts in _modules(adapter, where).items():
        target = _target(adapter, base, module, parts, where)
        if target.tensor in found:
            raise CheckpointError(f"{where}: two adapter tensors want {shown(target.tensor)}")
        found[target.tensor] = target
    _check_saved(adapter, base, found.values(), where)
    return found


def check_values(adapter: Adapter) -> None:
    """Reads the adapter's data (small) once.

    Raises:
        CheckpointError: a value that is NaN or infinite (it names the tensor), or every lora_B is zero and
            nothing is replaced: the adapter would change nothing.
    """
    where = shown(adapter.path, 400)
    idle = True
    for info in adapter.tensors.values():
        data = read_words(info, 0, info.shape[0] if info.shape else 1)
        if not all_finite(data, info.dtype):
            raise CheckpointError(
                f"{where}: {shown(info.name)} holds NaN or infinite values",
                "The training diverged: use an earlier checkpoint of it.",
            )
        changes = not info.name.endswith(_LORA_A)
        idle = idle and not (changes and not all_zero(data, info.dtype))
    if idle:
        raise CheckpointError(
            f"{where}: the adapter would change nothing: every lora_B is zero", "Was it saved before training?"
        )


def _modules(adapter: Adapter, where: str) -> dict[str, dict[str, TensorInfo]]:
    """The adapter's tensors by what they belong to: {module: {"A":, "B":}} or {module.kind: {kind:}}."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in adapter.tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{where}: {shown(name)} does not start with {PREFIX}: not one of PEFT's")
        path = name.removeprefix(PREFIX)
        for mark, feature in _REFUSED_TENSORS.items():
            if mark in path:
                raise CheckpointError(
                    f"{where}: the adapter uses {feature}, which is not merged here: {shown(name)}",
                    "Merge it with PEFT (merge_and_unload) and give the merged model.",
                )
        _check_stored(info, where)
        for suffix, part in ((_LORA_A, "A"), (_LORA_B, "B")):
            if path.endswith(suffix):
                modules.setdefault(path.removesuffix(suffix), {})[part] = info
                break
        else:
            modules[path] = {"value": info}
    return modules


def _check_stored(info: TensorInfo, where: str) -> None:
    if info.dtype not in PLAIN_FLOATS:
        raise CheckpointError(f"{where}: {shown(info.name)} is {info.dtype}, not a floating-point tensor")
    if info.parameters == 0 or (".lora_" in info.name and len(info.shape) != 2):
        raise CheckpointError(
            f"{where}: {shown(info.name)} has shape {shown(list(info.shape), 60)}: it was saved without "
            "gathering its parts (ZeRO-3)",
            "Save it again with stage3_gather_16bit_weights_on_model_save, or from zero_to_fp32.",
        )


def _target(adapter: Adapter, base: Checkpoint, module: str, parts: dict[str, TensorInfo], where: str) -> Target:
    if "value" in parts:
        return _replacement(adapter, base, module, parts["value"], where)
    for part, name in (("A", "lora_A"), ("B", "lora_B")):
        if part not in parts:
            raise CheckpointError(f"{where}: {shown(module)} has no {name}")
    a, b = parts["A"], parts["B"]
    weight = _base_tensor(adapter, base, f"{module}.weight", where)
    _refuse_tied(base, weight, where)
    row = layout_of(base.config)
    transposed = row.transposed if row else adapter.lora.fan_in_fan_out
    _check_shapes(adapter, module, weight, (a, b), transposed, where)
    return LoraTarget(weight.name, module, a, b, adapter.lora.scale_of(module), transposed)


def _base_tensor(adapter: Adapter, base: Checkpoint, name: str, where: str) -> TensorInfo:
    if name not in base.tensors:
        raise _other_model(
            adapter, f"{where}: the adapter changes {shown(name)}, which {shown(base.path, 400)} does not have"
        )
    info = base.tensors[name]
    if info.dtype not in PLAIN_FLOATS:
        raise CheckpointError(
            f"{shown(base.path, 400)}: {shown(name)} is {info.dtype}: a quantized base cannot be merged into",
            "Give the original 16-bit model as model.path=...",
        )
    return info


def _other_model(adapter: Adapter, message: str) -> CheckpointError:
    trained = f"It was trained on {adapter.lora.base}. " if adapter.lora.base else ""
    return CheckpointError(message, f"{trained}Give that model as model.path=...")


def _check_shapes(
    adapter: Adapter,
    module: str,
    weight: TensorInfo,
    lora: tuple[TensorInfo, TensorInfo],
    transposed: bool,
    where: str,
) -> None:
    a, b = lora
    rank = adapter.lora.rank_of(module)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{where}: {shown(module)} has lora_A of rank {a.shape[0]} and lora_B of rank {b.shape[1]}, "
            f"adapter_config.json says {rank}",
            "Its config and its weights are of different adapters.",
        )
    if len(weight.shape) != 2:
        raise CheckpointError(f"{where}: {shown(weight.name)} has {len(weight.shape)} dimensions, not a Linear's 2")
    outputs, inputs = reversed(weight.shape) if transposed else weight.shape
    for what, trained, there in (("inputs", a.shape[1], inputs), ("outputs", b.shape[0], outputs)):
        if trained != there:
            raise _other_model(
                adapter,
                f"{shown(module)}: the adapter was trained on {trained} {what}, this model has {there}",
            )


def _replacement(adapter: Adapter, base: Checkpoint, path: str, value: TensorInfo, where: str) -> Target:
    module, _, _kind = path.rpartition(".")
    row = layout_of(base.config) or Architecture()
    # PEFT also saves embeddings that it was not told to save (save_embedding_layers).
    if not adapter.lora.saves(module) and path not in (row.embedding, row.head):
        raise CheckpointError(
            f"{where}: no feature that is merged here explains {shown(value.name)}",
            "Merge it with PEFT (merge_and_unload) and give the merged model.",
        )
    info = _base_tensor(adapter, base, path, where)
    _refuse_tied(base, info, where)
    if value.shape != info.shape:
        raise _other_model(
            adapter,
            f"{shown(path)}: the adapter saved shape {shown(list(value.shape), 60)}, this model has {list(info.shape)}",
        )
    return ReplaceTarget(info.name, module, value)


def _check_saved(adapter: Adapter, base: Checkpoint, found: Iterable[Target], where: str) -> None:
    there = {target.module for target in found if isinstance(target, ReplaceTarget)}
    for name in base.tensors:
        module = name.rpartition(".")[0]
        if adapter.lora.saves(module) and module not in there:
            raise CheckpointError(
                f"{where}: modules_to_save names {shown(module)}, the adapter holds no weights of it",
                "It was saved incompletely: save it again with PEFT.",
            )


def _refuse_tied(base: Checkpoint, info: TensorInfo, where: str) -> None:
    row = layout_of(base.config) or Architecture()
    if is_tied(base.config) and info.name in (row.embedding, row.head):
        raise CheckpointError(
            f"{where}: the adapter changes {shown(info.name)}, which this model shares between its embedding "
            "and its head: not merged here",
            "Merge it with PEFT (merge_and_unload) and give the merged model.",
        )


def consumed(found: Iterable[Target]) -> list[str]:
    """The names of the adapter's tensors that the targets use up, sorted."""
    return sorted(name for target in found for name in target.consumed)
