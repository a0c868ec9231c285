"""A model's sizes as the shapes of its tensors say them; config.json is asked only for what no shape says."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace

from orchestrator.checkpoint.architectures import Architecture
from orchestrator.checkpoint.config_values import ConfigValues
from orchestrator.checkpoint.dimensions import KEYS, Shape, Sizes, is_latent, with_experts
from orchestrator.checkpoint.parts import Part
from orchestrator.errors import CheckpointError


def measured(
    parts: Iterable[tuple[str, Part]], shapes: Mapping[str, Shape], row: Architecture, config: ConfigValues, where: str
) -> Sizes:
    """The sizes that the weights themselves have; config.json's only for what no shape says.

    Raises:
        CheckpointError: shapes that contradict each other, or sizes that do not divide.
    """
    found = _read_off(parts, shapes, where)
    hidden, vocab = found["hidden"], found["vocab"]
    sizes = Sizes(hidden, 0, 0, 0, found.get("intermediate", 0), vocab)
    if not sizes.intermediate:
        sizes = replace(sizes, intermediate=found.get("gate_up", 0) // 2 or config.maybe("intermediate_size") or 0)
    if row.sparse:
        said = with_experts(row, config, sizes)
        inner = found.get("expert_intermediate", said.expert_intermediate)
        sizes = replace(
            said,
            experts=found.get("experts", 0),
            experts_per_token=said.experts_per_token if "experts" in found else 0,
            expert_intermediate=inner if "experts" in found else 0,
            shared_intermediate=found.get("shared_intermediate", 0),
        )
    return _latent_heads(found, sizes, config, where) if is_latent(row) else _heads(found, sizes, row, config, where)


def _read_off(parts: Iterable[tuple[str, Part]], shapes: Mapping[str, Shape], where: str) -> dict[str, int]:
    """Every dimension's size, as the first tensor that has it says."""
    found: dict[str, int] = {}
    agreed: set[tuple[Shape, tuple[str, ...]]] = set()
    for name, part in parts:
        shape = shapes.get(name)
        if shape is None or (shape, part.shape) in agreed:
            continue
        if len(shape) != len(part.shape) or 0 in shape:
            wanted = {1: "one dimension", 2: "two dimensions", 3: "three dimensions"}[len(part.shape)]
            raise CheckpointError(f"{where}: {name} has shape {list(shape)}, not {wanted}")
        for dimension, size in zip(part.shape, shape, strict=True):
            found.setdefault(dimension, size)
        wanted_shape = tuple(found[dimension] for dimension in part.shape)
        if shape != wanted_shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(shape)} where the other weights say {list(wanted_shape)}",
                "The files are of different models: download the model again.",
            )
        agreed.add((shape, part.shape))
    return found


def _heads(found: dict[str, int], sizes: Sizes, row: Architecture, config: ConfigValues, where: str) -> Sizes:
    queries = found["queries"]
    keys = found["keys"] if "keys" in found else (found["fused"] - queries) // 2
    head_dim = found.get("head_dim") or _head_dim(row, config, queries)
    if (
        queries % head_dim
        or keys % head_dim
        or keys < 1
        or found.get("fused", queries + 2 * keys) != queries + 2 * keys
    ):
        raise CheckpointError(
            f"{where}: heads of {head_dim} do not divide the {queries} rows of the queries and the {keys} of the keys",
            "Correct head_dim or num_attention_heads in config.json.",
        )
    return replace(sizes, heads=queries // head_dim, kv_heads=keys // head_dim, head_dim=head_dim)


def _head_dim(row: Architecture, config: ConfigValues, queries: int) -> int:
    said = config.maybe("head_dim") or config.maybe("kv_channels") or row.head_dim
    if said and queries % said == 0:
        return said
    heads = config.need("num_attention_heads")
    if queries % heads:
        raise CheckpointError(
            f"{config.where}: {heads} heads do not divide the {queries} rows of the queries",
            "Correct num_attention_heads, or give head_dim.",
        )
    return queries // heads


def _latent_heads(found: dict[str, int], sizes: Sizes, config: ConfigValues, where: str) -> Sizes:
    """The rows are heads x (nope + rope), heads x (nope + value) and heads x value: with rope, all follow."""
    rope = found["latent"] - found["key_rank"]
    nope_rows = found["latent_keys"] - found["latent_values"]
    rope_rows = found["latent_queries"] - nope_rows
    heads = rope_rows // rope if rope > 0 else 0
    if heads < 1 or nope_rows < 1 or rope_rows % rope or nope_rows % heads or found["latent_values"] % heads:
        raise CheckpointError(
            f"{where}: the shapes of q, kv_a_proj_with_mqa, kv_b_proj and o_proj are of no number of heads",
            "The files are of different models: download the model again.",
        )
    nope = nope_rows // heads
    return replace(
        sizes,
        heads=heads,
        kv_heads=heads,
        head_dim=nope + rope,
        query_rank=found.get("query_rank", 0),
        key_rank=found["key_rank"],
        rope_dim=rope,
        nope_dim=nope,
        value_dim=found["latent_values"] // heads,
    )


def contradictions(sizes: Sizes, row: Architecture, config: ConfigValues) -> Iterator[str]:
    """Where config.json says otherwise than the weights: one sentence each."""
    for field in fields(Sizes):
        keys = KEYS.get(field.name, ())
        # Of latent attention transformers writes the rotary part as head_dim, others the whole: both are right.
        if field.name == "head_dim" and is_latent(row):
            continue
        said, there = config.said(*keys), getattr(sizes, field.name)
        if field.name == "intermediate" and row.halved and said:
            said //= 2
        if said is not None and there and said != there and not (field.name == "kv_heads" and is_latent(row)):
            key = next(key for key in keys if config.said(key) is not None)
            yield f"config.json says {key} {said}, the weights say {there}: {there} it is"
