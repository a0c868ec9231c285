"""The embedding and the output head of a model, and whether its config says that they are one."""

from dataclasses import dataclass

from orchestrator.checkpoint.architectures import is_tied, layout_of, said_tied
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.reader import read_words, row_ranges
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

_STEP = 2**24
"""Bytes compared at a time."""

_PAIRS = (
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
)
"""(embedding, head) of the architectures that have no row of their own, the first that is stored."""


@dataclass(frozen=True)
class Vocabulary:
    """The names of the embedding and the head ("" where a model's are not known), and whether they are one.

    A tied head need not be stored; `head` is then the name that it would have.
    """

    embedding: str
    head: str
    tied: bool


def vocabulary_of(base: Checkpoint) -> Vocabulary:
    """Where a model's tokens go in and come out, by its architecture or else by the names of its tensors."""
    row = layout_of(base.config)
    pairs = ((row.embedding, row.head),) if row else _PAIRS
    embedding, head = next((pair for pair in pairs if pair[0] in base.tensors), ("", ""))
    # An architecture without a row ties by a default that is not known here: then what is stored tells.
    silent = row is None and said_tied(base.config) is None
    tied = bool(embedding) and (head not in base.tensors if silent else is_tied(base.config))
    return Vocabulary(embedding, head, tied)


def tied_pair(base: Checkpoint) -> tuple[TensorInfo, TensorInfo] | None:
    """(head, embedding), where the config ties them and both are stored."""
    names = vocabulary_of(base)
    if not names.tied or names.head not in base.tensors:
        return None
    return base.tensors[names.head], base.tensors[names.embedding]


def superfluous_head(base: Checkpoint) -> str | None:
    """The name of a tied head that is stored beside the same embedding; None where there is none.

    Raises:
        CheckpointError: the two differ: engines disagree about which of them they use.
    """
    pair = tied_pair(base)
    if pair is None:
        return None
    head, embedding = pair
    if not head.shares_all(embedding) and not same_data(head, embedding):
        raise CheckpointError(
            f"{shown(base.path, 400)}: config.json ties {head.name} to {embedding.name}, but their values differ",
            "If the stored head is right, set tie_word_embeddings to false in config.json; else remove it.",
        )
    return head.name


def same_data(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    ranges = row_ranges(one, _STEP)
    import numpy as np

    return all(np.array_equal(read_words(one, *rows), read_words(other, *rows)) for rows in ranges)
