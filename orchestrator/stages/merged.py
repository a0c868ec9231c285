"""The model that a merge will write, from headers alone: what a plan is made of before there is such a model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.checkpoint.adapter import Adapter
from orchestrator.checkpoint.carry import edited
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.tensors import DTYPES, TensorInfo, row_major
from orchestrator.checkpoint.tied import same_data, tied_pair
from orchestrator.stages.merge_plan import Output, check_dtype, lay_out, written_dtype
from orchestrator.stages.merge_vocabulary import decide_tokenizer, resized_config

Adapters = Sequence[tuple[Adapter, float]]
"""Each with its weight."""


def merged_checkpoint(base: Checkpoint, adapters: Adapters, dtype: str | None) -> Checkpoint:
    """The base with its adapters merged into it: the tensors and the config that will be written. No torch.

    Its files are the base's and the adapters': none of its own are there yet. Whether an adapter left a tied head as
    its embedding is read off both where they lie here; of an adapter that lies on a hub they count as two.

    Args:
        dtype: convert.dtype; None: every tensor as the base has it.

    Raises:
        CheckpointError, ConfigError: what headers show that cannot be merged, or not be written as `dtype`.
    """
    check_dtype(base, dtype)
    found = lay_out(base, adapters, _stored_head(base), _same_here)
    config, notes = resized_config(base, found.rows)
    told = found.tie.notes if found.tie.config else ()
    return replace(
        base,
        config=edited(base.config, found.tie.config | config),
        tensors={output.name: _written(output, dtype) for output in found.outputs},
        notes=(*base.notes, *told, *notes),
    )


def merged_tokenizer(base: Checkpoint, adapters: Adapters) -> Path:
    """The folder whose tokenizer the merged model gets: the base's, or that of an adapter that came with its own."""
    found = lay_out(base, adapters, _stored_head(base), _same_here)
    chosen = decide_tokenizer(base, [adapter for adapter, _ in adapters], found.changes, found.rows)
    return chosen.folder or base.path


def _written(output: Output, dtype: str | None) -> TensorInfo:
    shape, kind = output.source.shape, written_dtype(output, dtype)
    nbytes = math.prod(shape) * DTYPES[kind].size
    return replace(output.source, name=output.name, dtype=kind, nbytes=nbytes, strides=row_major(shape))


def _stored_head(base: Checkpoint) -> str | None:
    """A tied head that is stored as well: taken to be the embedding, or the merge will refuse it."""
    pair = tied_pair(base)
    return pair[0].name if pair else None


def _same_here(one: TensorInfo, other: TensorInfo) -> bool:
    return one.file.is_file() and other.file.is_file() and same_data(one, other)
