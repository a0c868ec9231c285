"""Offload: which parts of a model leave the device that computes, for the host's memory or a disk, and at what speed.

As transformers 5 and accelerate 1 do it: a part that is offloaded still computes on the main device. Hooks bring in
the weights of each of its modules before that module's forward pass and drop them afterwards, in every step; its KV
cache stays on the main device. What is offloaded is never quantized. No torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import Config, folder
from orchestrator.errors import ConfigError

GIB = 2**30
KEYS = ("offload.folder", "offload.cpu_gib")
ANY_FOLDER = ""  # one that is not named yet, with room for everything: to find out whether a folder would help
# Bytes per second from where offloaded weights lie to where they compute. Assumed, not measured on this machine, and
# rather fast, so that the speed is a bound: pinned copies over PCIe 3.0 x16 reach 12 of its nominal 15.75 GB/s;
# 1.5 GB/s is a plain NVMe drive read through mmap, with nothing of the file in the system's cache.
BANDWIDTH = {"cpu": 12e9, "disk": 1.5e9}


@dataclass(frozen=True)
class Offload:
    """What the request allows.

    Attributes:
        cpu: bytes of weights that the host may hold beside a GPU.
        folder: where the disk takes what is over; None: no disk.
    """

    cpu: int
    folder: str | None


@dataclass(frozen=True)
class Piece:
    """A part of the model that stays together.

    Attributes:
        here: bytes of its weights on the device that computes.
        away: bytes of its weights where it is offloaded.
        stored: bytes of it in the checkpoint's files.
        cache: bytes of its KV cache.
        moved: bytes that the device that computes keeps free for it where it is offloaded: of its modules, which are
            brought in one after the other, the largest.
    """

    modules: tuple[str, ...]
    here: int
    away: int
    stored: int
    cache: int
    moved: int


@dataclass(frozen=True)
class Spread:
    """Where everything goes. `brought_in`: what the main device keeps free for offloaded weights on their way."""

    device_map: dict[str, str]
    weights: dict[str, int]
    cache: dict[str, int]
    main: str
    brought_in: int
    over: int  # bytes that nothing has room for
    most_tokens_per_s: float  # of one answer: each step moves all offloaded weights


def check_offload(config: Config, has_gpu: bool) -> None:
    """What can be known of the offload keys from the machine alone.

    Raises:
        ConfigError: host memory asked for where nothing else is, or a folder that cannot be one.
    """
    if config.offload.cpu_gib is not None and not has_gpu:
        raise ConfigError(
            f"offload.cpu_gib={config.offload.cpu_gib:g} is host memory beside a GPU, and there is no GPU here",
            "Without a GPU the model lies in host memory: hardware.memory_gib=N caps it, and "
            "offload.folder=/path takes what is over.",
        )
    if config.offload.folder is None:
        return
    path = folder(config.offload.folder)
    there = _nearest(path)
    wrong = (
        "is not a folder" if not there.is_dir() else "" if os.access(there, os.W_OK | os.X_OK) else "is not writable"
    )
    if wrong:
        raise ConfigError(f"offload.folder={config.offload.folder}: {there} {wrong}", "Name a folder on a fast disk.")


def allowed(settings: dict[str, Any], host_free: int) -> Offload | None:
    """What the settings of an ask allow; None: no offload. `host_free`: what a GPU's host has left for weights."""
    cpu, path = settings.get("offload.cpu_gib"), settings.get("offload.folder")
    if cpu is None and path is None:
        return None
    return Offload(max(0, min(int((cpu or 0) * GIB), host_free)), path)


def disk_room(path: str) -> int:
    """Bytes that are free where a folder is or will be."""
    return 2**60 if path == ANY_FOLDER else shutil.disk_usage(_nearest(folder(path))).free


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest parent that exists."""
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def spread(pieces: Sequence[Piece], room: dict[str, int], stores: dict[str, int]) -> Spread | None:
    """Fills the devices that compute in order, then the stores in order; as little as possible is offloaded.

    The main device, where offloaded parts compute and have their cache, is the first by its number. The first piece
    (the embedding, to which inputs go) always stays on a device that computes.

    Args:
        room: device -> bytes there for weights, caches and what is brought in.
        stores: "cpu", "disk" -> bytes there.

    Returns:
        None where not even the first piece and all caches have room.
    """
    main = min(room, key=lambda device: int(device.partition(":")[2] or 0))
    left = sum(room.values()) - sum(piece.here + piece.cache for piece in pieces)
    brought_in = tail_cache = 0
    for count in range(len(pieces) - 1, 0, -1):
        brought_in, tail_cache = max(brought_in, pieces[count].moved), tail_cache + pieces[count].cache
        left += pieces[count].here
        if left < brought_in:
            continue  # not even if all room were in one place
        cache = dict.fromkeys(room, 0) | {main: tail_cache}
        places = _fill(pieces[:count], room | {main: room[main] - brought_in}, cache)
        if places is not None and main in places:  # accelerate knows only the devices that hold something
            return _spread(pieces, places, cache, stores, main, brought_in)
    return None


def _fill(pieces: Sequence[Piece], room: dict[str, int], cache: dict[str, int]) -> list[str] | None:
    """The device of each piece, in order; None where they do not fit. Adds to `cache` the caches that go there."""
    devices = list(room)
    used = dict(cache)
    if any(used[device] > room[device] for device in devices):
        return None
    at, places = 0, []
    for piece in pieces:
        while used[devices[at]] + piece.here + piece.cache > room[devices[at]]:
            at += 1
            if at == len(devices):
                return None
        used[devices[at]] += piece.here + piece.cache
        cache[devices[at]] += piece.cache
        places.append(devices[at])
    return places


def _spread(
    pieces: Sequence[Piece], places: list[str], cache: dict[str, int], stores: dict[str, int], main: str, brought: int
) -> Spread:
    device_map: dict[str, str] = {}
    weights = dict.fromkeys(places, 0)
    for piece, device in zip(pieces, places, strict=False):
        weights[device] += piece.here
        device_map |= dict.fromkeys(piece.modules, device)
    left, at, seconds, over = list(stores.items()), 0, 0.0, 0
    for piece in pieces[len(places) :]:
        while at < len(left) - 1 and weights.get(left[at][0], 0) + piece.away > left[at][1]:
            at += 1
        store, size = left[at]
        weights[store] = weights.get(store, 0) + piece.away
        over = max(over, weights[store] - size)
        # A file is read as it is; only what lies in memory has been converted.
        seconds += (min(piece.away, piece.stored) if store == "disk" else piece.away) / BANDWIDTH[store]
        device_map |= dict.fromkeys(piece.modules, store)
    return Spread(device_map, weights, cache, main, brought, over, 1 / seconds)
