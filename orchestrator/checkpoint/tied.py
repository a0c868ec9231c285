"""The output head and the embedding of a model whose config says that they are one."""

import numpy as np

from orchestrator.checkpoint.architectures import Architecture, is_tied, layout_of
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.reader import read_words, row_ranges
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

_STEP = 2**24
"""Bytes compared at a time."""


def tied_pair(base: Checkpoint) -> tuple[TensorInfo, TensorInfo] | None:
    """(head, embedding), where the config ties them and both are stored."""
    row = layout_of(base.config) or Architecture()
    head, embedding = base.tensors.get(row.head), base.tensors.get(row.embedding)
    if not is_tied(base.config) or head is None or embedding is None:
        return None
    return head, embedding


def superfluous_head(base: Checkpoint) -> str | None:
    """The name of a tied head that is stored beside the same embedding; None where there is none.

    Raises:
        CheckpointError: the two differ: engines disagree about which of them they use.
    """
    pair = tied_pair(base)
    if pair is None:
        return None
    head, embedding = pair
    if not head.shares_all(embedding) and not _same_data(head, embedding):
        raise CheckpointError(
            f"{shown(base.path, 400)}: config.json ties {head.name} to {embedding.name}, but their values differ",
            "If the stored head is right, set tie_word_embeddings to false in config.json; else remove it.",
        )
    return head.name


def _same_data(one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    ranges = row_ranges(one, _STEP)
    return all(np.array_equal(read_words(one, *rows), read_words(other, *rows)) for rows in ranges)
