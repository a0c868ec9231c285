"""Which GPUs a CUDA process sees, and in which order: CUDA_VISIBLE_DEVICES as CUDA itself reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

NAME = "CUDA_VISIBLE_DEVICES"
_NUMBER = re.compile(r"\+?[0-9]{1,9}")  # CUDA reads a number as far as it goes: "1st" is 1


@dataclass(frozen=True)
class Card:
    """A GPU as it can be named.

    Attributes:
        instances: the UUIDs of its MIG instances; None where MIG is off.
        old_names: of the same instances, as drivers before 470 knew them: MIG-GPU-<uuid>/<GPU instance>/<compute one>.
    """

    uuid: str
    instances: tuple[str, ...] | None = None
    old_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """A visible device: a card's position in PCI order and, where the card is split, the instance on it."""

    card: int
    instance: int | None = None


def visible(cards: Sequence[Card], value: str | None) -> tuple[list[Place], tuple[str, ...]]:
    """The devices that CUDA numbers 0, 1, ..., and what is to be said about it.

    Args:
        cards: in PCI order.
        value: of CUDA_VISIBLE_DEVICES; None: not set.
    """
    if value is None:
        split = [i for i, card in enumerate(cards) if card.instances == ()]
        notes = tuple(f"GPU {i} is left out: MIG is on, and it has no instance" for i in split)
        places = [place for place in (_whole(cards, i) for i in range(len(cards))) if place is not None]
    else:
        places, notes = _listed(cards, value)
    split_places = [place for place in places if place.instance is not None]
    if split_places and len(places) > 1:
        # NVIDIA's MIG guide: a process gets one instance, and no whole GPU beside one.
        return split_places[:1], (*notes, "CUDA gives a process one MIG instance only: the first is planned for")
    return places, notes


def pinned(cards: Sequence[Card], place: Place, value: str | None) -> str:
    """What CUDA_VISIBLE_DEVICES has to be for a child process to get a MIG instance; "" where it is as it is here.

    A number names a card, and only its first instance; of several entries CUDA takes one; and a driver that has UUIDs
    need not know the names of old. The UUID says which it is. (Where it is clear, nothing is changed: vLLM up to 0.26
    reads numbers only.)
    """
    instances = cards[place.card].instances
    if place.instance is None or instances is None:
        return ""
    uuid = instances[place.instance]
    clear = place == Place(0, 0) if value is None else "," not in value and ("/" not in value or value.strip() == uuid)
    return "" if clear else uuid


def _listed(cards: Sequence[Card], value: str) -> tuple[list[Place], tuple[str, ...]]:
    if not value.strip():
        return [], (f"{NAME} is empty and hides every GPU",)
    entries = [entry.strip() for entry in value.split(",")]
    # The first entry says what all are: numbers, UUIDs of GPUs, or of MIG instances. Another kind ends the list.
    kind = next((prefix for prefix in ("GPU-", "MIG-") if entries[0].startswith(prefix)), "")
    keys = list(takewhile(lambda key: key is not None, (_key(entry, kind) for entry in entries)))
    places = list(takewhile(lambda place: place is not None, (_find(cards, key, kind) for key in keys)))
    found = [place for place in places if place is not None]
    if len(set(keys)) < len(keys) or len(set(found)) < len(found):
        return [], (f"{NAME}={value} names a GPU twice, which hides every GPU",)
    if len(found) < len(entries):
        wrong = entries[len(found)] or "empty name"
        return found, (f"{NAME}={value}: there is no {wrong}, which hides it and all that follow",)
    return found, ()


def _key(entry: str, kind: str) -> str | int | None:
    """A number, or the beginning of a UUID; None for what is not of this kind."""
    if kind:
        return entry if entry.startswith(kind) else None
    number = _NUMBER.match(entry)
    return int(number[0]) if number else None


def _find(cards: Sequence[Card], key: str | int | None, kind: str) -> Place | None:
    """The place of a number or of a UUID, whose beginning is enough where it is the beginning of one only."""
    if not isinstance(key, str):
        return None if key is None else _whole(cards, key)
    found: list[Place | None]
    if kind == "MIG-":
        named = [(Place(i, j), uuid) for i, card in enumerate(cards) for j, uuid in enumerate(card.instances or ())]
        named += [(Place(i, j), name) for i, card in enumerate(cards) for j, name in enumerate(card.old_names)]
        whole = {place for place, name in named if name == key}  # .../1/1 is the beginning of .../1/10, too
        found = list(whole or {place for place, name in named if name.startswith(key) and "/" not in key})
    else:
        found = [_whole(cards, i) for i, card in enumerate(cards) if card.uuid.startswith(key)]
    return found[0] if len(found) == 1 else None


def _whole(cards: Sequence[Card], index: int) -> Place | None:
    """The card, or the first instance of one that is split; None where there is none."""
    if index >= len(cards):
        return None
    instances = cards[index].instances
    if instances is None:
        return Place(index)
    return Place(index, 0) if instances else None
