"""A model's sizes as config.json has them, and the tensors and shapes that follow from sizes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from orchestrator.checkpoint.architectures import Architecture
from orchestrator.checkpoint.config_values import ConfigValues
from orchestrator.checkpoint.parts import Part
from orchestrator.errors import CheckpointError

Shape = tuple[int, ...]
MAX_LAYERS = 1_000  # the deepest models that were published have a hundred or two
_MAX_EXPERTS = 2**20  # in all layers: their names are made one by one


@dataclass(frozen=True)
class Sizes:
    """What a model's shapes are made of; 0: it has no such thing.

    Attributes:
        head_dim: of one head's query; with latent attention nope_dim + rope_dim.
        intermediate: rows of one of gate and up.
        shared_intermediate: the same of the experts that every token passes through, together.
        query_rank, key_rank: of latent attention (MLA).
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    query_rank: int = 0
    key_rank: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    value_dim: int = 0


DIMENSIONS: dict[str, Callable[[Sizes], int]] = {
    "one": lambda s: 1,
    "hidden": lambda s: s.hidden,
    "vocab": lambda s: s.vocab,
    "head_dim": lambda s: s.head_dim,
    "queries": lambda s: s.heads * s.head_dim,
    "keys": lambda s: s.kv_heads * s.head_dim,
    "fused": lambda s: (s.heads + 2 * s.kv_heads) * s.head_dim,
    "intermediate": lambda s: s.intermediate,
    "gate_up": lambda s: 2 * s.intermediate,
    "experts": lambda s: s.experts,
    "expert_intermediate": lambda s: s.expert_intermediate,
    "expert_gate_up": lambda s: 2 * s.expert_intermediate,
    "shared_intermediate": lambda s: s.shared_intermediate,
    "query_rank": lambda s: s.query_rank,
    "key_rank": lambda s: s.key_rank,
    "latent": lambda s: s.key_rank + s.rope_dim,
    "latent_queries": lambda s: s.heads * (s.nope_dim + s.rope_dim),
    "latent_keys": lambda s: s.heads * (s.nope_dim + s.value_dim),
    "latent_values": lambda s: s.heads * s.value_dim,
}
"""A dimension's name in the table of architectures -> how large it is."""

KEYS = {
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "kv_channels"),
    "intermediate": ("intermediate_size",),
    "vocab": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_intermediate": ("moe_intermediate_size",),
    "query_rank": ("q_lora_rank",),
    "key_rank": ("kv_lora_rank",),
    "rope_dim": ("qk_rope_head_dim",),
    "nope_dim": ("qk_nope_head_dim",),
    "value_dim": ("v_head_dim",),
}
"""A size -> the keys of config.json that may say it."""


def is_latent(row: Architecture) -> bool:
    """Whether keys and values come out of one latent vector (MLA)."""
    return any("key_rank" in part.shape for part in row.every)


def configured(row: Architecture, config: ConfigValues) -> Sizes:
    """The sizes as config.json has them, completed with the architecture's defaults.

    Raises:
        CheckpointError: a size that is missing or none.
    """
    hidden, heads = config.need("hidden_size"), config.need("num_attention_heads")
    kv_heads = config.maybe("num_key_value_heads") or heads
    head_dim = config.maybe("head_dim") or config.maybe("kv_channels") or row.head_dim
    if not head_dim and hidden % heads and not is_latent(row):
        raise CheckpointError(f"{config.where}: num_attention_heads is {heads}, which does not divide {hidden}")
    if heads % kv_heads and not is_latent(row):
        raise CheckpointError(f"{config.where}: num_key_value_heads is {kv_heads}, which does not divide {heads} heads")
    sizes = Sizes(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        intermediate=config.need("intermediate_size") // (2 if row.halved else 1),
        vocab=config.need("vocab_size"),
    )
    if row.sparse:
        sizes = with_experts(row, config, sizes)
    if is_latent(row):
        rope, nope = config.need("qk_rope_head_dim"), config.need("qk_nope_head_dim")
        sizes = replace(
            sizes,
            kv_heads=heads,
            head_dim=rope + nope,
            query_rank=config.maybe("q_lora_rank") or 0,
            key_rank=config.need("kv_lora_rank"),
            rope_dim=rope,
            nope_dim=nope,
            value_dim=config.need("v_head_dim"),
        )
    return sizes


def _expert_count(config: ConfigValues) -> int:
    said = config.said(*KEYS["experts"])
    return said or next((count for key in KEYS["experts"] if (count := config.maybe(key))), 0)


def with_experts(row: Architecture, config: ConfigValues, sizes: Sizes) -> Sizes:
    """The sizes with those of the experts."""
    inner = config.maybe("moe_intermediate_size") or 0
    return replace(
        sizes,
        experts=_expert_count(config),
        experts_per_token=config.maybe("num_experts_per_tok") or 0,
        expert_intermediate=inner,
        shared_intermediate=config.maybe("shared_expert_intermediate_size")
        or inner * (config.maybe("n_shared_experts", 0) or 0),
    )


def is_sparse(row: Architecture, config: ConfigValues, layer: int) -> bool:
    """Whether a layer has experts, by config.json."""
    if not row.sparse or not _expert_count(config):
        return False
    step = config.maybe("decoder_sparse_step") or 1
    first = config.maybe("first_k_dense_replace", 0) or 0
    return layer >= first and (layer + 1) % step == 0 and layer not in config.numbers("mlp_only_layers")


def layer_parts(
    row: Architecture, config: ConfigValues, layer: int, names: Mapping[str, object] | None = None
) -> Iterator[Part]:
    """The tensors of one layer, as the weights have it (`names`, where there are some), else as config.json does."""
    prefix = row.layer.format(layer)
    sparse = is_sparse(row, config, layer)
    stacked = False
    if names is not None and row.sparse:
        stacked = any(prefix + part.name in names for part in row.stacked if part.role == "expert")
        there = stacked or any(prefix + part.name.format(0) in names for part in row.sparse)
        lacks_dense = not any(prefix + part.name in names for part in row.dense)
        sparse = there or (sparse and lacks_dense)
    block = row.dense
    if sparse and stacked:
        # What is not an expert's stands in `sparse`, unless the stacked form renames that too.
        renamed = any(part.role == "other" for part in row.stacked)
        block = row.stacked if renamed else (*(p for p in row.sparse if p.role != "expert"), *row.stacked)
    elif sparse:
        block = row.sparse
    for part in (*row.every, *block):
        wanted = part.when.removeprefix("!")
        if not wanted or config.flag(wanted) != part.when.startswith("!"):
            yield part


def model_parts(
    row: Architecture,
    config: ConfigValues,
    layers: int,
    experts: int,
    tied: bool,
    names: Mapping[str, object] | None = None,
) -> Iterator[tuple[str, Part]]:
    """The language part's tensors by their whole names, in the order of the forward pass.

    Raises:
        CheckpointError: more experts than can be.
    """
    if layers * experts > _MAX_EXPERTS:
        raise CheckpointError(f"{config.where}: {experts:,} experts in each of {layers:,} layers: refused")
    yield row.embedding, Part(row.embedding, ("vocab", "hidden"), "embedding")
    for layer in range(layers):
        prefix = row.layer.format(layer)
        for part in layer_parts(row, config, layer, names):
            for number in range(experts) if "{}" in part.name else (0,):
                yield prefix + part.name.format(number), part
    yield row.final_norm, Part(row.final_norm, ("hidden",))
    if not tied:
        yield row.head, Part(row.head, ("vocab", "hidden"), "head")


def shape_of(part: Part, sizes: Sizes) -> Shape:
    return tuple(DIMENSIONS[name](sizes) for name in part.shape)
