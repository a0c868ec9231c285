"""Which tensor of a base model each tensor of an adapter changes, and how. Only headers are looked at."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from orchestrator.checkpoint.adapter import Adapter, modules_of
from orchestrator.checkpoint.adapter_base import check_plain
from orchestrator.checkpoint.adapter_experts import experts_targets, is_experts
from orchestrator.checkpoint.adapter_names import Parts
from orchestrator.checkpoint.adapter_targets import BiasTarget, LoraTarget, ReplaceTarget, RowsTarget, Target
from orchestrator.checkpoint.architectures import layout_of
from orchestrator.checkpoint.base_names import BaseNames
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.lora_config import LoraConfig, names_rows_of
from orchestrator.checkpoint.tensors import PLAIN_FLOATS, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

_PEFT = "Merge it with PEFT (merge_and_unload) and give the merged model."
_INCOMPLETE = "It was saved incompletely: save it again with PEFT."
_MIXED_UP = "Its config and its weights are of different adapters."

_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}
"""model_type -> the linears that transformers stores as (in, out) (its Conv1D)."""


@dataclass
class Matching:
    """One adapter and one base while their tensors are matched.

    Attributes:
        found: base tensor -> what changes it.
        shapes: of the tensors that the adapter replaces, as it replaces them.
    """

    lora: LoraConfig
    base: Checkpoint
    names: BaseNames
    where: str
    found: dict[str, list[Target]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add(self, target: Target) -> None:
        """Notes a target; one tensor can be changed in several ways, but in none of them twice."""
        others = self.found.setdefault(target.tensor, [])
        if any(type(other) is type(target) for other in others):
            raise CheckpointError(f"{self.where}: two adapter tensors want {shown(target.tensor)}", _MIXED_UP)
        others.append(target)

    def tensor(self, name: str) -> TensorInfo:
        """The base's tensor that PEFT knows as `name`; of a tied head that is not stored, the embedding."""
        found = self.names.find(name)
        if found is None:
            raise self.other_model(
                f"the adapter changes {shown(name)}, which {shown(self.base.path, 400)} does not have"
            )
        info = stored(self.base, self.names, found)
        if info.dtype not in PLAIN_FLOATS:
            raise CheckpointError(
                f"{shown(self.base.path, 400)}: {shown(name)} is {info.dtype}: a quantized base cannot be merged into",
                "Give the original 16-bit model as model.path=...",
            )
        return info

    def name(self, name: str) -> str:
        """The result's name of the tensor that PEFT knows as `name`."""
        return self.names.find(name) or name

    def shape(self, name: str) -> tuple[int, ...]:
        """What the changes of PEFT's `name` are added to: the saved tensor that replaces it, or the base's."""
        return self.shapes.get(self.name(name)) or self.tensor(name).shape

    def other_model(self, message: str) -> CheckpointError:
        """The error for an adapter that does not fit the base; it begins with the adapter's folder."""
        message = f"{self.where}: {message}"
        if self.lora.base:
            return CheckpointError(message, f"It was trained on {self.lora.base}. Give that model as model.path=...")
        return CheckpointError(message, "Give the model that it was trained on as model.path=...")


def stored(base: Checkpoint, names: BaseNames, name: str) -> TensorInfo:
    """The tensor that holds what `name` is: the embedding for a tied head that is not stored."""
    return base.tensors.get(name) or base.tensors[names.vocabulary.embedding]


def targets(adapter: Adapter, base: Checkpoint) -> dict[str, tuple[Target, ...]]:
    """For each base tensor that the adapter changes, how. Every tensor of the adapter is used exactly once.

    Only headers are looked at; `check_values` looks at the data.

    Raises:
        CheckpointError: a quantized base, an adapter of another model (it names the first mismatch), or a
            tensor that no supported feature explains (it names the feature).
    """
    where = shown(adapter.path, 400)
    check_plain(base)
    job = Matching(adapter.lora, base, BaseNames(base), where)
    modules = modules_of(adapter)
    for path, info in modules.saved.items():
        _replace_saved(job, path, info)
    for module, parts in modules.lora.items():
        for part in ("base_layer.weight", "base_layer.bias"):
            if part in parts and not is_experts(job, module):
                _replace_base(job, module, part.removeprefix("base_layer."), parts.pop(part))
    for module, parts in modules.lora.items():
        if is_experts(job, module):
            for target in experts_targets(job, module, parts):
                job.add(target)
        else:
            _match(job, module, parts)
            _check_asked(job, module, parts)
    _check_saved(job)
    _check_rows(job)
    left = set(adapter.tensors) - set(consumed(job.found)) - modules.spare
    if left:
        raise CheckpointError(f"{where}: {shown(min(left))} would not be used", _PEFT)
    return {name: tuple(found) for name, found in job.found.items()}


def consumed(found: Mapping[str, Iterable[Target]]) -> list[str]:
    """The names of the adapter's tensors that the targets use up, sorted."""
    return sorted({name for several in found.values() for target in several for name in target.consumed})


def _check_asked(job: Matching, module: str, parts: Parts) -> None:
    """Refuses a LoRA on a module for which the config asks for none: PEFT would leave it out."""
    lora, vocabulary = job.lora, job.names.vocabulary
    if lora.modules is None or not any(part.startswith("lora_") for part in parts) or lora.modules.take(module):
        return
    ties = lora.weight_tying and job.name(f"{module}.weight") in (vocabulary.embedding, vocabulary.head)
    if ties or lora.targets_parameter(f"{module}.weight"):
        return
    raise CheckpointError(
        f"{job.where}: {shown(module)} has a LoRA, and adapter_config.json does not ask for one there "
        "(target_modules, exclude_modules, layers_to_transform)",
        _MIXED_UP,
    )


def _match(job: Matching, module: str, parts: Parts) -> None:
    """Notes what a module's parts do, whatever they are; a part that is missing or too many is named."""
    if rows := parts.pop("trainable_tokens_delta", None):
        job.add(_rows(job, module, rows))
    if not parts:
        return
    kind = "lora_embedding_" if any(part.startswith("lora_embedding_") for part in parts) else "lora_"
    wanted = {f"{kind}A", f"{kind}B"}
    wanted |= {"lora_magnitude_vector"} if job.lora.dora else set()
    wanted |= {"lora_B.bias"} if job.lora.lora_bias and kind == "lora_" else set()
    if missing := sorted(wanted - set(parts)):
        raise CheckpointError(
            f"{job.where}: {shown(module)} has no {missing[0]}",
            _INCOMPLETE,
        )
    if surplus := sorted(set(parts) - wanted):
        raise CheckpointError(
            f"{job.where}: {shown(parts[surplus[0]].name)} is there, but adapter_config.json does not ask for it",
            _MIXED_UP,
        )
    job.add(_lora(job, module, parts, kind))
    if bias := parts.get("lora_B.bias"):
        job.add(_bias(job, module, bias))


def _lora(job: Matching, module: str, parts: Parts, kind: str) -> LoraTarget:
    a, b, name = parts[f"{kind}A"], parts[f"{kind}B"], f"{module}.weight"
    _refuse_attention(job, module)
    path = name if job.lora.targets_parameter(name) else module
    shape = job.shape(name)
    if len(shape) != 2:
        raise CheckpointError(
            f"{job.where}: {shown(name)} has {len(shape)} dimensions, not a Linear's 2",
            "LoRA on convolutions is not merged here: merge it with PEFT (merge_and_unload).",
        )
    _check_rank(job, path, (a, b), job.lora.rank_of(path))
    transposed = kind == "lora_embedding_" or _stores_inputs_first(job, module, shape, (a, b))
    outputs, inputs = reversed(shape) if transposed else shape
    for what, trained, there in (("inputs", a.shape[1], inputs), ("outputs", b.shape[0], outputs)):
        if trained != there:
            raise job.other_model(
                f"{shown(module)}: the adapter was trained on {trained} {what}, this model has {there}"
            )
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != (outputs,):
        raise job.other_model(
            f"{shown(magnitude.name)} has shape {shown(list(magnitude.shape), 60)}, this model needs [{outputs}]"
        )
    return LoraTarget(job.name(name), module, a, b, job.lora.scale_of(path), transposed, magnitude)


def _refuse_attention(job: Matching, module: str) -> None:
    if job.names.find(f"{module}.weight") is None and job.names.find(f"{module}.in_proj_weight"):
        raise CheckpointError(f"{job.where}: LoRA on {shown(module)}, a MultiheadAttention, is not merged here", _PEFT)


def _check_rank(job: Matching, module: str, lora: tuple[TensorInfo, TensorInfo], rank: int) -> None:
    a, b = lora
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{job.where}: {shown(module)} has lora_A of rank {a.shape[0]} and lora_B of rank {b.shape[1]}, "
            f"adapter_config.json says {rank}",
            _MIXED_UP,
        )


def _stores_inputs_first(
    job: Matching, module: str, shape: tuple[int, ...], lora: tuple[TensorInfo, TensorInfo]
) -> bool:
    """Whether a linear lies on the disk as (in, out).

    fan_in_fan_out tells only of the module that PEFT wrapped last, so the architecture and the shapes go first.
    """
    if row := layout_of(job.base.config):
        return row.transposed
    if listed := _CONV1D.get(str(job.base.config.get("model_type"))):
        return module.rpartition(".")[2] in listed
    trained = (lora[1].shape[0], lora[0].shape[1])
    if shape[0] != shape[1] and trained in (shape, shape[::-1]):
        return trained != shape
    return job.lora.fan_in_fan_out


def _bias(job: Matching, module: str, value: TensorInfo) -> BiasTarget:
    name = f"{module}.bias"
    if job.names.find(name) is None:
        raise CheckpointError(
            f"{job.where}: {shown(value.name)} needs a bias to add to, and {shown(job.base.path, 400)} has no "
            f"{shown(name)}",
            "It cannot be merged (nor can PEFT merge it): train it with lora_bias=False.",
        )
    if value.shape != job.shape(name):
        raise job.other_model(
            f"{shown(value.name)} has shape {shown(list(value.shape), 60)}, this model's {shown(name)} "
            f"{list(job.shape(name))}"
        )
    return BiasTarget(job.name(name), module, value, job.lora.scale_of(module))


def _rows(job: Matching, module: str, value: TensorInfo) -> RowsTarget:
    name, lists = f"{module}.weight", job.lora.rows_of(module)
    if len(lists) != 1:
        many = "several lists" if lists else "no list"
        raise CheckpointError(
            f"{job.where}: trainable_token_indices has {many} for {shown(module)}, of which {shown(value.name)} "
            "holds the rows",
            _MIXED_UP,
        )
    rows, shape = lists[0], job.shape(name)
    if value.shape != (len(rows), *shape[1:]):
        raise CheckpointError(
            f"{job.where}: {shown(value.name)} has shape {shown(list(value.shape), 60)}, where "
            f"trainable_token_indices and the model ask for {[len(rows), *shape[1:]]}",
            _MIXED_UP,
        )
    if max(rows) >= shape[0]:
        raise CheckpointError(
            f"{job.where}: {shown(value.name)} is for token {max(rows)}, {shown(name)} has {shape[0]} rows",
            "Give the base that it was trained on, or save it with its resized embedding (save_embedding_layers).",
        )
    return RowsTarget(job.name(name), module, value, rows)


def _replace_base(job: Matching, module: str, kind: str, value: TensorInfo) -> None:
    """What PEFT saves of a module beside its LoRA: an embedding or head that was targeted, a bias that was trained."""
    name = f"{module}.{kind}"
    vocabulary = job.names.vocabulary
    weights = {job.names.find(f"{module}.weight")} & {vocabulary.embedding, vocabulary.head} - {""}
    if not weights and not (kind == "bias" and job.lora.bias != "none"):
        raise _unexplained(job, value)
    job.add(_replacement(job, name, module, value))


def _replace_saved(job: Matching, path: str, value: TensorInfo) -> None:
    module, _, kind = path.rpartition(".")
    vocabulary = job.names.vocabulary
    # PEFT also saves embeddings that it was not told to save (save_embedding_layers).
    known = job.names.find(path) in {vocabulary.embedding, vocabulary.head} - {""}
    if not job.lora.saves(module) and not known and not (kind == "bias" and job.lora.bias != "none"):
        raise _unexplained(job, value)
    job.add(_replacement(job, path, module, value))


def _unexplained(job: Matching, value: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{job.where}: no feature that is merged here explains {shown(value.name)}", _PEFT)


def _replacement(job: Matching, name: str, module: str, value: TensorInfo) -> ReplaceTarget:
    info, tensor = job.tensor(name), job.name(name)
    vocabulary = job.names.vocabulary
    resizable = tensor in (vocabulary.embedding, vocabulary.head) and len(value.shape) == len(info.shape)
    if value.shape[resizable:] != info.shape[resizable:]:
        raise job.other_model(
            f"{shown(name)}: the adapter saved shape {shown(list(value.shape), 60)}, this model has {list(info.shape)}",
        )
    job.shapes[tensor] = value.shape
    return ReplaceTarget(tensor, module, value, job.lora.saves(module))


def _check_saved(job: Matching) -> None:
    vocabulary = job.names.vocabulary
    for name in (*job.base.tensors, *((vocabulary.head,) if vocabulary.tied else ())):
        replaced = any(isinstance(target, ReplaceTarget) for target in job.found.get(name, ()))
        if not replaced and job.lora.saves(name.rpartition(".")[0]):
            raise CheckpointError(
                f"{job.where}: modules_to_save names {shown(name.rpartition('.')[0])}, the adapter holds no weights "
                f"of it: {shown(name)}",
                _INCOMPLETE,
            )


def _check_rows(job: Matching) -> None:
    """Refuses an adapter that lost token rows: without them the model does not know what it was trained on."""
    found = [target for several in job.found.values() for target in several if isinstance(target, RowsTarget)]
    vocabulary = job.names.vocabulary
    shared = (vocabulary.embedding, vocabulary.head) if vocabulary.tied else ()  # PEFT saves the same rows once
    for name, rows in job.lora.token_indices:
        there = any(
            rows == target.rows and (target.tensor in shared or names_rows_of(name, target.module)) for target in found
        )
        if rows and not there:
            count = f"{len(rows)} row{'s' * (len(rows) != 1)}"
            raise CheckpointError(
                f"{job.where}: trainable_token_indices names {count} of {shown(name or 'the embedding')}, the adapter "
                "holds none of them",
                _INCOMPLETE,
            )
