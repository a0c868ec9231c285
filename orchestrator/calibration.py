"""How far each engine's plan was from what it took, run by run, and what the next plan keeps free because of it.

The record is JSON lines beside the artifacts: one line a run, and in it every device that computed, in bytes. It is a
person's file too: lines may be damaged or copied from another machine, so that each number is looked at. No torch.

The rule. From the third run of an engine on a kind of device its margin is the worst miss and a tenth. A miss is what
was measured beyond what the plan comes to for the tokens that were held ("comparable"): where memory grows with them, a
run that left its context empty takes less than planned, and proves nothing of a full one. Lines without that number are
older; of an engine whose memory grows they count only where more was measured than planned. A run that ran out of
memory counts at once: from then on twice of what was kept there is kept at least, and no less than what was measured
beyond its plan.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

from orchestrator.backends.table import BACKENDS
from orchestrator.hardware import GIB, MIB, Hardware

NAME = "calibration.jsonl"
LINES = 1000  # the newest count
TAIL_BYTES = 2 << 20  # enough for so many lines: a run on eight GPUs takes 1.5 KB
LOCK_S = 5.0  # a line takes a millisecond: a lock that is held for longer is not worth a wait
ENOUGH = 3  # runs of an engine on one kind of device, from which its margin is learned
LEAST = 64 * MIB  # of a learned margin
MORE = 1.1  # the next run may miss by a little more than the worst so far
AGAIN = 2  # of the margin with which an engine ran out of memory
WELL, OUT_OF_MEMORY = "well", "out of memory"  # how a run ended; lines that do not say it are older, and ended well
SHARE = 0.02  # of a device, where the engine was not measured
LEAST_UNMEASURED = {"cuda": 300 * MIB, "cpu": 0}  # a host can be small, and its kernel has ways out that a GPU lacks
MOST = 4  # no margin takes more than one such part of a device: a plan that is further off is wrong elsewhere
ASKED = "hardware.margin_gib"  # the source of a margin that was asked for
MOST_BYTES = 1 << 50  # of a number in the record that can be true


@dataclass(frozen=True)
class Margin:
    """Bytes of one device that a plan keeps free, and what they come from: "measured in 5 runs on this card"."""

    bytes: int
    source: str


@dataclass(frozen=True)
class History:
    """What the record says.

    Attributes:
        missed: (engine, kind of device) -> for each run the bytes that it took beyond its plan, negative if fewer.
        full: the same of those that ran out of memory -> the bytes to keep because of it.
        skipped: lines that are no such record.
    """

    missed: Mapping[tuple[str, str], tuple[float, ...]]
    full: Mapping[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)
    skipped: int = 0


def margins(root: Path, hardware: Hardware, engine: str, asked: float | None = None) -> dict[str, Margin]:
    """What to keep free of each GPU and of the host ("cpu").

    Args:
        root: the folder of the artifacts.
        asked: GiB of each device; None: what the record says.
    """
    if asked is not None:
        free = {f"cuda:{gpu.index}": gpu.free for gpu in hardware.gpus} | {"cpu": hardware.host_available}
        return {device: Margin(min(int(asked * GIB), size), ASKED) for device, size in free.items()}
    history = read(root)
    found = {
        f"cuda:{gpu.index}": margin(history, engine, gpu.name, "card", gpu.free, LEAST_UNMEASURED["cuda"])
        for gpu in hardware.gpus
    }
    # Beside a GPU the host is never what is learned about: "cpu" is the kind of a run without one.
    known = History({}) if hardware.gpus else history
    found["cpu"] = margin(known, engine, "cpu", "CPU", hardware.host_available, LEAST_UNMEASURED["cpu"])
    return found


def margin(history: History, engine: str, kind: str, called: str, capacity: int, least: int) -> Margin:
    """The margin of an engine on one device.

    Args:
        kind: as the record has it: the name of a GPU, or "cpu".
        called: what a person calls the device: "card", "CPU".
        capacity: bytes that are free there.
        least: bytes to keep where the engine was not measured.
    """
    # More than the whole device is nothing that was measured on one like it.
    missed = [size for size in history.missed.get((engine, kind), ()) if size < capacity]
    full = [size for size in history.full.get((engine, kind), ()) if size < capacity]
    count = f"measured in {_runs(missed)} on this {called}"
    if len(missed) >= ENOUGH:
        size, source = int(max(LEAST, *missed) * MORE), count
    else:
        size = max(least, int(capacity * SHARE))
        source = f"{count}, {ENOUGH} are needed" if missed else f"never measured on this {called}"
    if full:
        size = max(size, *map(int, full))
        source += f"; out of memory there in {_runs(full)}"
    if history.skipped:
        source += f"; {history.skipped} line{'s' * (history.skipped != 1)} of {NAME} cannot be read"
    return Margin(min(size, capacity // MOST), source)


def _runs(values: Sequence[float]) -> str:
    return f"{len(values)} run{'s' * (len(values) != 1)}"


def lessened(hardware: Hardware, kept: Mapping[str, Margin]) -> Hardware:
    """The machine without what is kept free of it."""
    gpus = tuple(replace(gpu, free=gpu.free - kept[f"cuda:{gpu.index}"].bytes) for gpu in hardware.gpus)
    return replace(hardware, gpus=gpus, host_available=hardware.host_available - kept["cpu"].bytes)


def append(root: Path, line: Mapping[str, Any]) -> None:
    """Adds one run to the record, whole or not at all.

    Raises:
        OSError: it cannot be written, or another process holds its lock for too long.
    """
    locks = root / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    with FileLock(locks / f"{NAME}.lock", timeout=LOCK_S), (root / NAME).open("ab+") as file:
        if file.seek(0, os.SEEK_END) and _last_byte(file.fileno(), file.tell()) != b"\n":
            text = f"\n{text}"  # whoever wrote the last line was killed: only that one is lost
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _last_byte(fd: int, size: int) -> bytes:
    return os.pread(fd, 1, size - 1)


def read(root: Path) -> History:
    """The newest lines of the record; nothing where there is none, or where it cannot be opened."""
    path = root / NAME
    try:
        status = path.stat()
    except OSError:
        return History({})
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for a writer
        return History({})
    return _read(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)  # a plan asks for each of its candidates
def _read(path: Path, changed: int, size: int) -> History:
    start = max(0, size - TAIL_BYTES)
    try:
        with path.open("rb") as file:
            file.seek(start)
            lines = file.read(TAIL_BYTES).splitlines()
    except OSError:
        return History({})
    missed: dict[tuple[str, str], tuple[float, ...]] = {}
    full: dict[tuple[str, str], tuple[float, ...]] = {}
    skipped = 0
    for text in lines[1 if start else 0 :][-LINES:]:
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            ran_out = _ran_out(line)
            found = _by_kind(line, _to_keep if ran_out else _missed)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            skipped += 1
            continue
        kept = full if ran_out else missed
        for key, count in found.items():
            kept[key] = (*kept.get(key, ()), count)
    return History(missed, full, skipped)


def _ran_out(line: Any) -> bool:
    """Raises ValueError for a way to end that is not known here, AttributeError for what is no record."""
    ended = line.get("ended", WELL)
    if ended not in (WELL, OUT_OF_MEMORY):
        raise ValueError("no known end")
    return bool(ended == OUT_OF_MEMORY)


def _by_kind(line: Any, count: Callable[[str, Any], int | None]) -> dict[tuple[str, str], float]:
    """(engine, kind) -> what a line says of its devices of that kind: the worst of them.

    Of devices that the engine itself spreads a model over, the mean: what one holds too much, another lacks.

    Args:
        count: bytes, of the engine's name and a device; None: it says nothing.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no record of a run.
    """
    engine = _name(line["engine"])
    by_kind: dict[str, list[int]] = {}
    for device in line["devices"]:
        if (found := count(engine, device)) is not None:
            by_kind.setdefault(_name(device["kind"]), []).append(found)
    if type(line["together"]) is not bool or not line["devices"]:
        raise TypeError("no record")
    worst = fmean if line["together"] else max
    return {(engine, kind): worst(sizes) for kind, sizes in by_kind.items()}


def _missed(engine: str, device: Any) -> int | None:
    """By how many bytes a device took more than was predicted for what it held; None where that is not known."""
    measured, predicted = _size(device["measured"]), _size(device["predicted"])
    if "comparable" in device:
        return measured - _size(device["comparable"])
    grows = engine in BACKENDS and BACKENDS[engine].grows
    return None if grows and measured <= predicted else measured - predicted


def _to_keep(engine: str, device: Any) -> int:
    """Bytes to keep free of a device where an engine ran out of memory."""
    beyond = 0 if device["measured"] is None else _size(device["measured"]) - _size(device["predicted"])
    return max(AGAIN * _size(device["margin"], least=0), beyond)


def _size(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < MOST_BYTES:
        raise ValueError("no size of memory")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no name")
    return value
