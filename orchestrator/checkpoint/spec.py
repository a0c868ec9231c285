"""What a model's headers and config say about it: the facts that planning needs. No torch, no data read."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.architectures import Architecture, architecture_name, architecture_of, is_tied
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.tensors import DTYPES, PLAIN_FLOATS, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

_MAX_CONFIG = 2**40
_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class SpecTensor:
    """One tensor as planning sees it; `role` is "embedding", "linear", "head" or "other"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    role: str
    layer: int | None


@dataclass(frozen=True)
class ModelSpec:
    """A model's dimensions, from its headers where they say them, else from its config.

    Attributes:
        heads, kv_heads: of the attention; head_dim: size of one head, in elements.
        tied: the output head is the embedding (then `tensors` has no head).
        max_context: longest position of the config, in tokens.
        dtype: the commonest floating type of the weights by size, in safetensors' names.
        parameters: elements of `tensors`, as stored (packed ones count as what they are packed into).
        quantization: config.json's quantization_config; None for plain weights.
        notes: contradictions and how they were decided.
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


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


class _Config:
    """config.json's numbers, checked one by one as they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.values = checkpoint.config
        self.where = shown(checkpoint.path / "config.json", 400)

    def maybe(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 < value < _MAX_CONFIG:
            raise CheckpointError(f"{self.where}: {key} is {shown(value, 40)}, not a positive whole number")
        return value

    def need(self, key: str) -> int:
        value = self.maybe(key)
        if value is None:
            raise CheckpointError(f"{self.where} has no {key}")
        return value


def model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The facts about a model of a supported architecture.

    Where config.json contradicts the headers, the headers win and a note says so.

    Raises:
        CheckpointError: an unsupported architecture (the message lists the supported ones), a tensor that is
            missing (it names the first), shapes that contradict each other, a config value that is no size.
    """
    config = _Config(checkpoint)
    row = architecture_of(checkpoint.config, shown(checkpoint.path, 400))
    quantization = _quantization(checkpoint.config, config.where)
    notes = list(checkpoint.notes)
    tied = is_tied(checkpoint.config)
    layers = _layers(checkpoint, row, config, notes)
    if quantization is None:
        _check_complete(checkpoint, row, layers, tied)
        sizes = _measured(checkpoint, row, config, notes)
        _check_shapes(checkpoint, row, layers, sizes, tied)
    else:
        sizes = _configured(row, config)
        notes.append("the weights are quantized: dimensions are config.json's")
    tensors = tuple(_spec_tensors(checkpoint, row, tied, quantization is not None, notes))
    return ModelSpec(
        architecture=architecture_name(checkpoint.config),
        model_type=shown(checkpoint.config.get("model_type", "")),
        layers=layers,
        **vars(sizes),
        tied=tied,
        max_context=config.maybe("max_position_embeddings") or row.max_context,
        dtype=main_dtype(checkpoint.tensors.values()),
        parameters=sum(checkpoint.tensors[tensor.name].parameters for tensor in tensors),
        quantization=quantization,
        notes=tuple(notes),
        tensors=tensors,
    )


def main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """The commonest plain floating type by bytes; "" where there is none."""
    size: Counter[str] = Counter()
    for info in tensors:
        if info.dtype in PLAIN_FLOATS:
            size[info.dtype] += info.nbytes
    return size.most_common(1)[0][0] if size else ""


def _quantization(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    value = config.get("quantization_config")
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{where}: quantization_config is no object")
    return value


def _layer_pattern(row: Architecture) -> re.Pattern[str]:
    before, after = row.layer.split("{}")
    return re.compile(rf"{re.escape(before)}(\d{{1,9}}){re.escape(after)}(.+)")


def _layers(checkpoint: Checkpoint, row: Architecture, config: _Config, notes: list[str]) -> int:
    matches = (_layer_pattern(row).fullmatch(name) for name in checkpoint.tensors)
    stored = max((int(match[1]) + 1 for match in matches if match), default=0)
    said = config.maybe("num_hidden_layers") or stored
    if max(stored, said) > _MAX_LAYERS:
        raise CheckpointError(f"{shown(checkpoint.path, 400)} claims {max(stored, said):,} layers: refused")
    if stored == 0:
        first = row.layer.format(0) + row.linears[0] + ".weight"
        raise CheckpointError(f"{shown(checkpoint.path, 400)} holds no layers: {first} is missing")
    if stored > said:
        notes.append(f"config.json says {said} layers, the weights have {stored}: {stored} it is")
    return max(stored, said)


def _wanted(row: Architecture, layers: int, tied: bool) -> Iterable[str]:
    yield row.embedding
    for layer in range(layers):
        prefix = row.layer.format(layer)
        yield from (f"{prefix}{module}.weight" for module in (*row.norms, *row.linears))
        yield from (f"{prefix}{module}.bias" for module in row.biases)
    yield row.final_norm
    if not tied:
        yield row.head


def _check_complete(checkpoint: Checkpoint, row: Architecture, layers: int, tied: bool) -> None:
    for name in _wanted(row, layers, tied):
        if name not in checkpoint.tensors:
            what = architecture_name(checkpoint.config)
            raise CheckpointError(
                f"{shown(checkpoint.path, 400)}: {name} is missing, which a {what} of {layers} layers needs",
                "Download it again, or correct num_hidden_layers or tie_word_embeddings in config.json.",
            )


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{shown(checkpoint.path, 400)}: {name} has shape {list(shape)}, not two dimensions")
    return shape[0], shape[1]


def _measured(checkpoint: Checkpoint, row: Architecture, config: _Config, notes: list[str]) -> _Sizes:
    layer = row.layer.format(0)
    vocab, hidden = _matrix(checkpoint, row.embedding)
    queries, _ = _matrix(checkpoint, f"{layer}self_attn.q_proj.weight")
    keys, _ = _matrix(checkpoint, f"{layer}self_attn.k_proj.weight")
    intermediate, _ = _matrix(checkpoint, f"{layer}mlp.gate_proj.weight")
    head_dim = _head_dim(checkpoint, row, config, queries)
    if queries % head_dim or keys % head_dim:
        raise CheckpointError(
            f"{shown(checkpoint.path, 400)}: heads of {head_dim} do not divide q_proj's {queries} and "
            f"k_proj's {keys} rows",
            "Correct head_dim or num_attention_heads in config.json.",
        )
    sizes = _Sizes(hidden, queries // head_dim, keys // head_dim, head_dim, intermediate, vocab)
    _note_contradictions(sizes, config, notes)
    return sizes


def _head_dim(checkpoint: Checkpoint, row: Architecture, config: _Config, queries: int) -> int:
    norm = checkpoint.tensors.get(f"{row.layer.format(0)}self_attn.q_norm.weight")
    if norm is not None and norm.parameters:
        return norm.shape[-1]
    said = config.maybe("head_dim") or row.head_dim
    if said and queries % said == 0:
        return said
    heads = config.need("num_attention_heads")
    if queries % heads:
        raise CheckpointError(
            f"{config.where}: {heads} heads do not divide the {queries} rows of q_proj",
            "Correct num_attention_heads, or give head_dim.",
        )
    return queries // heads


_CONFIG_KEYS = {
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate",
    "vocab_size": "vocab",
}


def _note_contradictions(sizes: _Sizes, config: _Config, notes: list[str]) -> None:
    for key, field in _CONFIG_KEYS.items():
        said, measured = config.maybe(key), getattr(sizes, field)
        if said is not None and said != measured:
            notes.append(f"config.json says {key} {said}, the weights say {measured}: {measured} it is")


def _check_shapes(checkpoint: Checkpoint, row: Architecture, layers: int, sizes: _Sizes, tied: bool) -> None:
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    wanted = {
        "self_attn.q_proj": (queries, sizes.hidden),
        "self_attn.k_proj": (keys, sizes.hidden),
        "self_attn.v_proj": (keys, sizes.hidden),
        "self_attn.o_proj": (sizes.hidden, queries),
        "mlp.gate_proj": (sizes.intermediate, sizes.hidden),
        "mlp.up_proj": (sizes.intermediate, sizes.hidden),
        "mlp.down_proj": (sizes.hidden, sizes.intermediate),
    }
    shapes = {
        f"{row.layer.format(layer)}{module}.weight": shape
        for layer in range(layers)
        for module, shape in wanted.items()
    }
    if not tied:
        shapes[row.head] = (sizes.vocab, sizes.hidden)
    for name, shape in shapes.items():
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"{shown(checkpoint.path, 400)}: {name} has shape {list(found)} where the other weights "
                f"say {list(shape)}",
                "The files are of different models: download the model again.",
            )


def _configured(row: Architecture, config: _Config) -> _Sizes:
    hidden, heads = config.need("hidden_size"), config.need("num_attention_heads")
    return _Sizes(
        hidden,
        heads,
        config.maybe("num_key_value_heads") or heads,
        config.maybe("head_dim") or row.head_dim or max(hidden // heads, 1),
        config.need("intermediate_size"),
        config.need("vocab_size"),
    )


def _spec_tensors(
    checkpoint: Checkpoint, row: Architecture, tied: bool, packed: bool, notes: list[str]
) -> Iterable[SpecTensor]:
    pattern = _layer_pattern(row)
    head, embedding = checkpoint.tensors.get(row.head), checkpoint.tensors.get(row.embedding)
    skipped = tied and head is not None and embedding is not None
    if skipped and head is not None and embedding is not None and not head.shares_all(embedding):
        notes.append(f"config.json ties {row.head} to {row.embedding}: the stored {row.head} is not counted")
    for info in checkpoint.tensors.values():
        if skipped and info.name == row.head:
            continue
        match = pattern.fullmatch(info.name)
        layer = int(match[1]) if match else None
        yield SpecTensor(info.name, info.shape, info.dtype, info.nbytes, _role(info, row, layer, packed), layer)


def _role(info: TensorInfo, row: Architecture, layer: int | None, packed: bool) -> str:
    if layer is None:
        return {row.embedding: "embedding", row.head: "head"}.get(info.name, "other")
    matrix = len(info.shape) == 2 and info.name.endswith(".weight") and "norm" not in info.name
    plain = DTYPES[info.dtype].floating
    return "linear" if matrix and (plain or not packed) else "other"
