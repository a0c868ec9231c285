"""A merge's embedding and head: whether they stay one tensor, how many rows they get, whose tokenizer they need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.adapter import Adapter
from orchestrator.checkpoint.adapter_targets import LoraTarget, ReplaceTarget, RowsTarget, Target
from orchestrator.checkpoint.architectures import text_config
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.tied import vocabulary_of
from orchestrator.checkpoint.tokenizer import chat_template, has_tokenizer, token_count
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

Changes = dict[str, list[tuple[float, Target]]]
"""Base tensor -> what each adapter, with its weight, does to it."""

Same = Callable[[TensorInfo, TensorInfo], bool]
"""Whether two tensors of adapters hold the same."""


@dataclass(frozen=True)
class Tie:
    """What becomes of a tied head.

    Attributes:
        changes: the adapters' changes, without those that say the same of the head as of the embedding.
        same: the adapters' tensors of those.
        dropped: tensors that are not written.
        added: a head that the base does not store and the result does: its name, and what it starts from.
        config, notes: see MergePlan.
    """

    changes: Changes
    same: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    added: dict[str, TensorInfo] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokenizer:
    """Whose tokenizer the result gets (None: the base's), and what config.json says of it."""

    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def decide_tie(base: Checkpoint, changes: Changes, stored: str | None, same: Same) -> Tie:
    """Whether a tied head stays tied: it does unless the adapters leave it other than the embedding.

    Trained rows are shared by both. A LoRA on one of them, and a copy that was trained on its own (modules_to_save),
    belonged to that one only in training: then both are written. (PEFT's merge_and_unload adds a LoRA to the tensor
    that both share, which is another model than the one that was trained.)

    Args:
        stored: the name of a tied head that the base stores beside the same embedding; None where it does not.

    Raises:
        CheckpointError: trained rows of both together with another change of the head.
    """
    names = vocabulary_of(base)
    if not names.tied:
        return Tie(changes)
    dropped = (stored,) if stored else ()
    of_embedding, of_head = changes.get(names.embedding, []), changes.get(names.head, [])
    own = any(
        isinstance(target, LoraTarget) or (isinstance(target, ReplaceTarget) and target.own)
        for _, target in of_embedding
    )
    if of_head and _same_changes(of_embedding, of_head, same):
        left = {name: found for name, found in changes.items() if name != names.head}
        note = f"the adapter changes {names.head} as it does {names.embedding}: they stay one"
        return Tie(left, tuple(name for _, target in of_head for name in target.consumed), dropped, notes=(note,))
    if not of_head and not own:
        note = f"{names.head} is tied to {names.embedding} and changes with it"
        return Tie(changes, dropped=dropped, notes=(note,) if of_embedding else ())
    if (of_head or own) and _trains_rows(of_embedding) and not _trains_rows(of_head):
        raise CheckpointError(
            f"{shown(base.path, 400)}: token rows that {names.embedding} shares with {names.head} were trained, and "
            f"{names.head} on its own: what that makes of the head is not defined",
            "Train one of the two only.",
        )
    added = {} if stored else {names.head: base.tensors[names.embedding]}
    note = (
        f"the adapter leaves {names.head} other than {names.embedding}, to which the base ties it: both are "
        "written, with tie_word_embeddings=false"
    )
    return Tie(changes, added=added, config=_everywhere(base, "tie_word_embeddings", False), notes=(note,))


def _trains_rows(changes: Sequence[tuple[float, Target]]) -> bool:
    return any(isinstance(target, RowsTarget) for _, target in changes)


def _same_changes(one: Sequence[tuple[float, Target]], other: Sequence[tuple[float, Target]], same: Same) -> bool:
    return len(one) == len(other) and all(
        first[0] == second[0] and _same(first[1], second[1], same)
        for first, second in zip(_in_order(one), _in_order(other), strict=True)
    )


def _in_order(changes: Sequence[tuple[float, Target]]) -> list[tuple[float, Target]]:
    return sorted(changes, key=lambda change: type(change[1]).__name__)


def _same(one: Target, other: Target, same: Same) -> bool:
    if isinstance(one, ReplaceTarget) and isinstance(other, ReplaceTarget):
        return same(one.value, other.value)
    if isinstance(one, RowsTarget) and isinstance(other, RowsTarget):
        return one.rows == other.rows and same(one.value, other.value)
    if isinstance(one, LoraTarget) and isinstance(other, LoraTarget) and not (one.magnitude or other.magnitude):
        # (B@A)^T = A^T@B^T: a head that shares an embedding's LoRA (ensure_weight_tying) has its factors swapped.
        a, b = (_turned(one.b), _turned(one.a)) if one.transposed != other.transposed else (one.a, one.b)
        return one.scale == other.scale and same(a, other.a) and same(b, other.b)
    return False


def _turned(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=info.shape[::-1], strides=info.strides[::-1])


def _everywhere(base: Checkpoint, key: str, value: object) -> dict[str, Any]:
    """The change of a key that a nested config has outside or inside, or both."""
    inner = text_config(base.config)
    nested = inner is not base.config
    edits: dict[str, Any] = {"text_config": {key: value}} if nested else {}
    if not nested or key in base.config or key == "tie_word_embeddings":
        edits[key] = value
    return edits


def resized(base: Checkpoint, written: Mapping[str, TensorInfo]) -> int | None:
    """The rows of the result's vocabulary, where they are not the base's; else None.

    Raises:
        CheckpointError: an embedding and a head of different numbers of rows.
    """
    names = vocabulary_of(base)
    rows = {name: written[name].shape[0] for name in (names.embedding, names.head) if name in written}
    before = {name: (base.tensors.get(name) or base.tensors[names.embedding]).shape[0] for name in rows}
    if rows == before:
        return None
    if len(set(rows.values())) > 1:
        counts = " and ".join(f"{shown(name)} {count} rows" for name, count in rows.items())
        raise CheckpointError(
            f"the merged model would give {counts}: the adapter resized one of the two",
            "Save the adapter with both (save_embedding_layers=True, or both in modules_to_save).",
        )
    return rows[names.embedding]


def resized_config(base: Checkpoint, rows: int | None) -> tuple[dict[str, Any], list[str]]:
    """The keys of config.json that change where the vocabulary gets other rows, and a note."""
    if rows is None:
        return {}, []
    return _everywhere(base, "vocab_size", rows), [f"the adapter resized the vocabulary to {rows} rows"]


def decide_tokenizer(base: Checkpoint, adapters: Sequence[Adapter], changes: Changes, rows: int | None) -> Tokenizer:
    """The tokenizer that fits the vocabulary: the adapter's where it resized that or trained rows of it.

    Elsewhere too where it has a chat template that the base has not: that is what it was trained with.

    Raises:
        CheckpointError: a tokenizer with more tokens than the embedding has rows.
    """
    names = vocabulary_of(base)
    several = [target for name in (names.embedding, names.head) for _, target in changes.get(name, [])]
    trained = {name for target in several if rows or isinstance(target, RowsTarget) for name in target.consumed}
    owners = [adapter for adapter in adapters if trained & set(adapter.tensors)]
    if not owners:
        return _template_of(base, adapters)
    folders = [adapter.path for adapter in owners if has_tokenizer(adapter.path)]
    folder = folders[0] if folders else base.path
    count, there = token_count(folder), rows or base.tensors[names.embedding].shape[0]
    if count is not None and count > there:
        raise CheckpointError(
            f"{shown(folder, 400)}: its tokenizer has {count} tokens, the merged embedding has {there} rows",
            "Save the adapter with the embedding that it was trained with (save_embedding_layers=True).",
        )
    config, notes = resized_config(base, rows)
    if folders:
        notes.append(f"the tokenizer is the adapter's: {shown(folder, 400)}")
    elif rows:
        notes.append("the adapter has no tokenizer of its own: the base's is kept")
    return Tokenizer(folders[0] if folders else None, config, tuple(notes))


def _template_of(base: Checkpoint, adapters: Sequence[Adapter]) -> Tokenizer:
    """The tokenizer of the first adapter that was trained with another chat template than the base's."""
    known = chat_template(base.path)
    trained = [adapter for adapter in adapters if chat_template(adapter.path) not in (None, known)]
    if not trained:
        return Tokenizer()
    folder, rows = trained[0].path, base.tensors.get(vocabulary_of(base).embedding)
    where, other = shown(folder, 400), "another one" if known else "none"
    if not has_tokenizer(folder):
        hint = "the base's tokenizer is kept (model.chat_template=FILE takes a template)"
        return Tokenizer(notes=(f"{where} has a chat template and no tokenizer, the base has {other}: {hint}",))
    count = token_count(folder)
    if count is not None and rows is not None and count > rows.shape[0]:
        raise CheckpointError(
            f"{where}: its tokenizer has {count} tokens, the embedding has {rows.shape[0]} rows",
            "Save the adapter with the embedding that it was trained with (save_embedding_layers=True).",
        )
    return Tokenizer(folder, notes=(f"tokenizer and chat template are the adapter's ({where}); the base has {other}",))
