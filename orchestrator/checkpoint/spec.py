"""What a model's headers and config say about it: the facts that planning needs. No torch, no data read."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.architectures import (
    Architecture,
    architecture_name,
    architecture_of,
    is_tied,
    layout_of,
    located,
)
from orchestrator.checkpoint.caches import LayerCache, layer_caches
from orchestrator.checkpoint.config_values import ConfigValues
from orchestrator.checkpoint.dimensions import (
    MAX_LAYERS,
    Shape,
    Sizes,
    configured,
    is_latent,
    model_parts,
    shape_of,
)
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.measure import contradictions, measured
from orchestrator.checkpoint.packed import PADDED, joined, unpacked_shapes
from orchestrator.checkpoint.positions import longest_context
from orchestrator.checkpoint.roles import SpecLora as SpecLora  # for those who have the spec
from orchestrator.checkpoint.roles import SpecTensor as SpecTensor
from orchestrator.checkpoint.roles import layer_pattern, spec_tensors
from orchestrator.checkpoint.tensors import PLAIN_FLOATS, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

_WEIGHTS = {"linear", "expert", "embedding", "head"}


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A model's dimensions, from its headers where they say them, else from its config.

    It equals itself only, so that what was summed up over its tensors can be kept by it: there are tens of thousands.

    Attributes:
        heads, kv_heads: of the attention; head_dim: size of one head, in elements (with latent attention: of a query).
        intermediate: of the layers that have one MLP.
        tied: the output head is the embedding (then `tensors` has no head).
        max_context: longest position of the config, in tokens, as RoPE scaling stretches it.
        dtype: the commonest floating type of the weights by size, in safetensors' names.
        parameters: elements of `tensors`; of a packed linear those that it stands for.
        quantization: config.json's quantization_config; None for plain weights.
        notes: contradictions and how they were decided.
        layer_caches: what each layer keeps for every token.
        rotary_bytes: of the rotary frequencies that transformers keeps beside the weights, float32 whatever the dtype.
        scaled_embedding: it also keeps one factor for the embedding, in the dtype.
        loras: what adapters that are not merged add beside `tensors`.
        experts: in each layer that has some; 0: none. experts_per_token: how many of them a token passes through.
    """

    architecture: str
    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    max_context: int
    dtype: str
    parameters: int
    quantization: dict[str, Any] | None
    notes: tuple[str, ...]
    tensors: tuple[SpecTensor, ...]
    layer_caches: tuple[LayerCache, ...] = ()
    rotary_bytes: int = 0
    scaled_embedding: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    loras: tuple[SpecLora, ...] = ()

    @functools.cached_property
    def nbytes(self) -> int:
        """Of all weights as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def mlp_elements(self) -> int:
        """What the widest MLP holds for a token: gate, up and product; of experts also inputs and outputs."""
        routed = self.experts_per_token * (4 * self.expert_intermediate + 3 * self.hidden)
        return max(3 * self.intermediate, routed)

    @functools.cached_property
    def vision_bytes(self) -> int:
        """Of the image encoder and its projection, which are no part of the language model."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.role == "vision")

    def cache_elements(self, context: int) -> int:
        """Elements that all layers keep for a sequence of `context` tokens."""
        return sum(cache.elements * cache.tokens(context) for cache in self.layer_caches)


def model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The facts about a model of a supported architecture.

    Where config.json contradicts the headers, the headers win and a note says so.

    Raises:
        CheckpointError: an unsupported architecture (the message lists the supported ones), a tensor that is
            missing (it names the first), shapes that contradict each other, a config value that is no size.
    """
    where = shown(checkpoint.path, 400)
    if layout_of(checkpoint.config) is None:
        raise _unknown(checkpoint, where)
    row = located(architecture_of(checkpoint.config, where), checkpoint.tensors)
    config = ConfigValues(checkpoint.config, shown(checkpoint.path / "config.json", 400), row.defaults)
    quantization = _quantization(checkpoint.config, config.where)
    notes = list(checkpoint.notes)
    tied = is_tied(checkpoint.config)
    layers = _layers(checkpoint, row, config, notes)
    left_out: list[str] = []
    tensors = tuple(spec_tensors(checkpoint, row, layers, tied, quantization is not None, left_out))
    if quantization is None:
        _check_dtypes(tensors, where)  # before the shapes: those of packed weights contradict each other
    sizes = _sizes(checkpoint, row, config, (layers, tied), quantization, notes)
    notes += left_out
    if quantization is not None:
        tensors = _joined(checkpoint, row, config, layers, tied, sizes, tensors, notes)
    longest = longest_context(row, config, notes)
    return ModelSpec(
        architecture=architecture_name(checkpoint.config),
        model_type=shown(checkpoint.config.get("model_type", "")),
        layers=layers,
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate=sizes.intermediate,
        vocab=sizes.vocab,
        tied=tied,
        max_context=longest,
        dtype=main_dtype(checkpoint.tensors.values()),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        quantization=quantization,
        notes=tuple(notes),
        tensors=tensors,
        layer_caches=layer_caches(row, config, sizes, layers),
        rotary_bytes=_rotary_bytes(row, config, sizes, layers),
        scaled_embedding=row.scaled_embedding,
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
        expert_intermediate=sizes.expert_intermediate or (sizes.intermediate if sizes.experts else 0),
    )


def _check_dtypes(tensors: Iterable[SpecTensor], where: str) -> None:
    """Weights that are not quantized are floats of 16 bits or more; masks and other buffers may be anything.

    Raises:
        CheckpointError: the first that is not.
    """
    for tensor in tensors:
        if tensor.role in _WEIGHTS and tensor.dtype not in PLAIN_FLOATS:
            raise CheckpointError(
                f"{where}: {shown(tensor.name)} is {tensor.dtype}, which no plain weight is, and config.json has no "
                "quantization_config",
                "FP8 or packed weights whose config.json lost it? Download it again, or set model.path to the "
                "unquantized model.",
            )


def main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """The commonest plain floating type by bytes; "" where there is none."""
    size: Counter[str] = Counter()
    for info in tensors:
        if info.dtype in PLAIN_FLOATS:
            size[info.dtype] += info.nbytes
    return size.most_common(1)[0][0] if size else ""


def _unknown(checkpoint: Checkpoint, where: str) -> CheckpointError:
    """An architecture that is not in the table, with what can be said of it all the same."""
    try:
        architecture_of(checkpoint.config, where)
    except CheckpointError as error:
        size = checkpoint.nbytes / 2**30
        known = f"its {len(checkpoint.tensors)} tensors take {size:.2f} GiB as they are stored"
        return CheckpointError(
            f"{error.message}; {known}, what is a layer and what a cache needs is not known "
            "(task=convert merges and converts it all the same)",
            error.hint,
        )
    raise AssertionError("the architecture is known")


def _quantization(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    value = config.get("quantization_config")
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{where}: quantization_config is no object")
    return value


def _layers(checkpoint: Checkpoint, row: Architecture, config: ConfigValues, notes: list[str]) -> int:
    matches = map(layer_pattern(row).fullmatch, checkpoint.tensors)
    stored = max((int(match[1]) + 1 for match in matches if match), default=0)
    said = config.maybe("num_hidden_layers") or stored
    if max(stored, said) > MAX_LAYERS:
        raise CheckpointError(f"{shown(checkpoint.path, 400)} claims {max(stored, said):,} layers: refused")
    if stored == 0:
        first = row.layer.format(0) + row.every[0].name
        raise CheckpointError(f"{shown(checkpoint.path, 400)} holds no layers: {first} is missing")
    drafts = (config.maybe(row.draft_layers, 0) or 0) if row.draft_layers else 0
    if said < stored <= said + drafts:
        notes.append(
            f"the last {stored - said} of {stored} layers predict tokens ahead: neither engines nor the plan take them"
        )
        return said
    if stored > said:
        notes.append(f"config.json says {said} layers, the weights have {stored}: {stored} it is")
    return max(stored, said)


def _stored_experts(checkpoint: Checkpoint, row: Architecture, layers: int) -> int:
    """Experts of a layer, by the rows of the first router that there is."""
    routers = {part.name for part in (*row.sparse, *row.stacked) if part.shape == ("experts", "hidden")}
    names = (row.layer.format(layer) + router for layer in range(layers) for router in routers)
    shapes = (checkpoint.tensors[name].shape for name in names if name in checkpoint.tensors)
    return next((shape[0] for shape in shapes if shape), 0)


def _sizes(
    checkpoint: Checkpoint,
    row: Architecture,
    config: ConfigValues,
    whole: tuple[int, bool],
    quantization: dict[str, Any] | None,
    notes: list[str],
) -> Sizes:
    """Those of the headers; of packed weights those of config.json where the headers do not say them."""
    layers, tied = whole
    where = shown(checkpoint.path, 400)
    experts = _stored_experts(checkpoint, row, layers)
    if quantization is None:
        parts = list(model_parts(row, config, layers, experts, tied, checkpoint.tensors))
        for name, _ in parts:
            if name not in checkpoint.tensors:
                raise _missing(checkpoint, name, layers)
        shapes: Mapping[str, Shape] = {name: checkpoint.tensors[name].shape for name, _ in parts}
        sizes = measured(parts, shapes, row, config, where)
        notes.extend(contradictions(sizes, row, config))
        return sizes
    shapes = unpacked_shapes(checkpoint.tensors, quantization)
    names = dict.fromkeys((*checkpoint.tensors, *shapes))
    parts = list(model_parts(row, config, layers, experts, True, names))  # a packed head may be padded
    if all(name in shapes for name, _ in parts):
        try:
            sizes = measured(parts, shapes, row, config, where)
            against = list(contradictions(sizes, row, config))
        except CheckpointError:  # packed otherwise than this method packs: then config.json is all there is
            against = []
            padded = True
        else:
            padded = bool(against) and quantization.get("quant_method") in PADDED
        if not padded:
            return _noted(
                sizes, notes, "the weights are quantized: dimensions are read off their packed shapes", against
            )
    return _noted(configured(row, config), notes, "the weights are quantized: dimensions are config.json's", [])


def _joined(
    checkpoint: Checkpoint,
    row: Architecture,
    config: ConfigValues,
    layers: int,
    tied: bool,
    sizes: Sizes,
    tensors: tuple[SpecTensor, ...],
    notes: list[str],
) -> tuple[SpecTensor, ...]:
    """The tensors of a quantized model, each packed linear as one; biases that the architecture has not are left out.

    Raises:
        CheckpointError: a tensor of the architecture of which nothing is stored, packed or not.
    """
    module = row.head.removesuffix("weight")
    packed_head = any(name.startswith(module) and name != row.head for name in checkpoint.tensors)
    parts = dict(model_parts(row, config, layers, sizes.experts, tied and not packed_head, checkpoint.tensors))
    roles = {"linear", "expert", "head"}
    linears = {name: (shape_of(part, sizes), part.role) for name, part in parts.items() if part.role in roles}
    found = tuple(joined(tensors, linears))
    there = {tensor.name for tensor in found}
    for name in parts:
        if name not in there:
            raise _missing(checkpoint, name, layers)
    kept = tuple(t for t in found if t.name in parts or not t.name.endswith(".bias") or t.layer is None)
    if len(kept) < len(found):
        notes.append(
            f"{len(found) - len(kept)} biases that a {architecture_name(checkpoint.config)} has not are left out"
        )
    return kept


def _noted(sizes: Sizes, notes: list[str], note: str, more: list[str]) -> Sizes:
    notes += [note, *more]
    return sizes


def _missing(checkpoint: Checkpoint, name: str, layers: int) -> CheckpointError:
    packed = f"{name.removesuffix('.weight')}.q_weight"
    if packed in checkpoint.tensors and "quantization_config" not in checkpoint.config:
        return CheckpointError(
            f"{shown(checkpoint.path, 400)}: {packed} is of an EXL2 model, and config.json has no quantization_config",
            'Add "quantization_config": {"quant_method": "exl2", "bits": 4.0} to config.json, with its own bits.',
        )
    what = architecture_name(checkpoint.config)
    return CheckpointError(
        f"{shown(checkpoint.path, 400)}: {name} is missing, which a {what} of {layers} layers needs",
        "Download it again, or correct num_hidden_layers or tie_word_embeddings in config.json.",
    )


def _rotary_bytes(row: Architecture, config: ConfigValues, sizes: Sizes, layers: int) -> int:
    """Each set of rotary frequencies, twice, for every second element that is rotated."""
    rotated = sizes.rope_dim if is_latent(row) else sizes.head_dim
    rope = config.raw("rope_parameters")  # where transformers 5 writes it
    nested = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    factor = config.raw("partial_rotary_factor") if nested is None else nested
    if isinstance(factor, float) and 0 < factor < 1:
        rotated = int(rotated * factor)
    kinds = {cache.kind for cache in layer_caches(row, config, sizes, layers)}
    sets = min(row.rotary_sets, max(len(kinds), 1))
    return 4 * sets * 2 * (rotated // 2)
