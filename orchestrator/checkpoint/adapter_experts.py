"""LoRA on the experts of a mixture (target_parameters): stacked in one tensor, or stored one by one.

transformers 5 holds a layer's experts as gate_up_proj (experts, gate and up outputs, in) and down_proj (experts,
out, in). PEFT wraps a module once for each such parameter, in this order: the first's tensors are named after
experts.base_layer, the last's after experts. Most checkpoints on disks hold each expert's linears as tensors of
their own; then a part of A and of B belongs to each.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.checkpoint.adapter_names import Parts
from orchestrator.checkpoint.adapter_targets import ExpertsTarget, LoraTarget, Target
from orchestrator.checkpoint.architectures import architecture_name
from orchestrator.checkpoint.tensors import DTYPES, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

if TYPE_CHECKING:
    from orchestrator.checkpoint.adapter_match import Matching

_PEFT = "Merge it with PEFT (merge_and_unload) and give the merged model."

_NESTED = ("gate_up_proj", "down_proj")
"""The parameters of an experts' module in the order in which PEFT wraps them, the innermost first."""

_ONE_BY_ONE = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""Stacked parameter -> the linears of one expert that it holds, one after the other, by each naming in use."""

_INPUTS_FIRST = ("GptOssForCausalLM", "AriaForConditionalGeneration", "AriaTextForCausalLM")
"""Architectures whose stacked experts are (experts, in, out); looked at where the shapes leave it open."""

_WRAPPER = ".base_layer"


def is_experts(job: "Matching", module: str) -> bool:
    """Whether a module with a LoRA is a wrapped module of experts, rather than a linear."""
    if module.endswith(_WRAPPER):
        return True
    asked = any(job.lora.targets_parameter(f"{module}.{name}") for name in _NESTED)
    return asked and job.names.find(f"{module}.weight") is None


def experts_targets(job: "Matching", module: str, parts: Parts) -> list[Target]:
    """What the LoRA of one stacked parameter changes.

    Raises:
        CheckpointError: a parameter that is not known here, or shapes that do not fit the base's.
    """
    parameter = _parameter(job, module)
    for part in ("lora_A", "lora_B"):
        if part not in parts:
            raise CheckpointError(
                f"{job.where}: {shown(module)} has no {part}", "It was saved incompletely: save it again with PEFT."
            )
    if surplus := sorted(set(parts) - {"lora_A", "lora_B"}):
        raise CheckpointError(
            f"{job.where}: no feature that is merged here explains {shown(parts[surplus[0]].name)}", _PEFT
        )
    if job.names.find(parameter):
        return [_stacked(job, parameter, parts["lora_A"], parts["lora_B"])]
    return list(_one_by_one(job, parameter, parts["lora_A"], parts["lora_B"]))


def _parameter(job: "Matching", module: str) -> str:
    """The path of the stacked parameter that a wrapper's name stands for."""
    experts = module
    while experts.endswith(_WRAPPER):
        experts = experts.removesuffix(_WRAPPER)
    depth = module.count(_WRAPPER, len(experts))
    wrapped = [name for name in _NESTED if job.lora.targets_parameter(f"{experts}.{name}")]
    others = [name for name in job.lora.parameters if name.rpartition(".")[2] not in (*_NESTED, "weight")]
    if depth >= len(wrapped) or others:
        what = f": {shown(others[0])}" if others else f" for {shown(module)}"
        raise CheckpointError(f"{job.where}: target_parameters is not understood{what}", _PEFT)
    return f"{experts}.{wrapped[len(wrapped) - 1 - depth]}"


def _check_rank(job: "Matching", parameter: str, experts: int, a: TensorInfo, b: TensorInfo) -> int:
    rank = job.lora.rank_of(parameter)
    if (a.shape[0], b.shape[1]) != (rank * experts, rank * experts):
        raise CheckpointError(
            f"{job.where}: {shown(parameter)} has lora_A of {a.shape[0]} rows and lora_B of {b.shape[1]} columns, "
            f"where rank {rank} and {experts} experts make {rank * experts}",
            "Its config and its weights are of different adapters, or the base has another number of experts.",
        )
    return rank


def _stacked(job: "Matching", parameter: str, a: TensorInfo, b: TensorInfo) -> ExpertsTarget:
    info = job.tensor(parameter)
    if len(info.shape) != 3:
        raise job.other_model(f"{shown(parameter)} has {len(info.shape)} dimensions, not stacked experts' 3")
    experts, trained = info.shape[0], (b.shape[0], a.shape[1])
    _check_rank(job, parameter, experts, a, b)
    if trained not in (info.shape[1:], info.shape[:0:-1]):
        raise job.other_model(
            f"{shown(parameter)}: the adapter was trained on experts of {list(trained)} (out, in), this model has "
            f"{list(info.shape[1:])}"
        )
    transposed = trained != info.shape[1:]
    if info.shape[1] == info.shape[2]:
        transposed = architecture_name(job.base.config) in _INPUTS_FIRST
    scale = job.lora.scale_of(parameter)
    return ExpertsTarget(job.name(parameter), parameter, a, b, scale, transposed, experts)


def _one_by_one(job: "Matching", parameter: str, a: TensorInfo, b: TensorInfo) -> Iterator[LoraTarget]:
    experts, _, name = parameter.rpartition(".")
    linears = next(
        (group for group in _ONE_BY_ONE[name] if job.names.find(f"{experts}.0.{group[0]}.weight")),
        None,
    )
    if linears is None:
        raise job.other_model(
            f"the adapter changes {shown(parameter)}, which {shown(job.base.path, 400)} does not have, "
            "neither stacked nor one expert at a time"
        )
    count = 0
    while job.names.find(f"{experts}.{count}.{linears[0]}.weight"):
        count += 1
    rank = _check_rank(job, parameter, count, a, b)
    scale = job.lora.scale_of(parameter)
    for number in range(count):
        start = 0
        for linear in linears:
            module = f"{experts}.{number}.{linear}"
            info = job.tensor(f"{module}.weight")
            if len(info.shape) != 2 or info.shape[1] != a.shape[1] or start + info.shape[0] > b.shape[0]:
                raise _other_experts(job, module, info, a, b)
            part = _columns(_rows(b, start, info.shape[0]), number, count)
            yield LoraTarget(info.name, module, _rows(a, number * rank, rank), part, scale, transposed=False)
            start += info.shape[0]
        if start != b.shape[0]:
            raise _other_experts(job, module, info, a, b)


def _other_experts(job: "Matching", module: str, info: TensorInfo, a: TensorInfo, b: TensorInfo) -> CheckpointError:
    return job.other_model(
        f"{shown(module)}: the adapter was trained on experts of {[b.shape[0], a.shape[1]]} (out, in; gate and up "
        f"together), this model has {list(info.shape)}"
    )


def _rows(info: TensorInfo, start: int, count: int) -> TensorInfo:
    """`count` rows of a matrix from `start` on, where they lie."""
    return _part(info, start * info.strides[0], (count, info.shape[1]), info.strides)


def _columns(info: TensorInfo, start: int, step: int) -> TensorInfo:
    """Every `step`-th column of a matrix from `start` on, where they lie."""
    columns = len(range(start, info.shape[1], step))
    return _part(info, start * info.strides[1], (info.shape[0], columns), (info.strides[0], step * info.strides[1]))


def _part(info: TensorInfo, skip: int, shape: tuple[int, int], strides: tuple[int, ...]) -> TensorInfo:
    size = DTYPES[info.dtype].size
    nbytes = shape[0] * shape[1] * size
    return replace(info, shape=shape, strides=strides, offset=info.offset + skip * size, nbytes=nbytes)
