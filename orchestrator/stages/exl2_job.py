"""exllamav2's own record of a conversion, kept so that a crash at any moment costs minutes and not hours.

The record (job_new.json) says how far the converter is; every three minutes it goes on to the next checkpoint:

    hidden_states_temp   the states behind the modules that are done, whole
    the record           with "invalid" in it, otherwise as before
    hidden_states        replaced by the temporary file
    the record           of the new states, without "invalid"

The record is written in place, so that a crash leaves half of one, or one of other states than those that lie there.
So the last good record is kept, with a hard link to the states of its time: replacing a file leaves that alone.
What is quantized after it (out_tensor) is only written again. From conversion/{convert_exl2,measure,quantize}.py of
0.3.2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.report.console import note

RECORD = "job_new.json"
_STATES, _TOKENS = "hidden_states.safetensors", "cal_data.safetensors"
_KEPT, _NEXT = "last_good", "last_good.next"
_TENSORS = "out_tensor"  # a file for each linear that is quantized

# Flag of the converter -> its key in the record, whose value wins over the flag's when a job goes on.
_SETTINGS = {
    "-i": "in_dir",
    "-cf": "compile_full",
    "-om": "output_measurement",
    "-b": "bits",
    "-hb": "head_bits",
    "-l": "length",
    "-ml": "measurement_length",
    "-c": "cal_dataset",
    "-r": "dataset_rows",
    "-mr": "measurement_rows",
}
_DONE = {"measure_quant": "last_module_idx", "quant": "q_last_module_idx"}  # how many modules are behind a checkpoint
# What the converter reads when it goes on with a step; the others make what they need.
_NEEDS = {
    "initial_embeddings": (_TOKENS,),
    "embeddings": (_TOKENS,),
    "measure_quant": (_TOKENS, _STATES),
    "quant": (_TOKENS, _STATES),
}


class Record:
    """The converter's record in its working folder.

    Args:
        arguments: the converter's, as they will be given.
        modules: names of the linears that it quantizes.
    """

    def __init__(self, where: Path, arguments: Sequence[str], modules: Iterable[str]) -> None:
        self._where = where
        given = dict(pairwise(arguments))
        self._wanted: dict[str, Any] = {key: given[flag] for flag, key in _SETTINGS.items() if flag in given}
        if "-m" in given:  # the record holds all of it
            self._wanted["measurement"] = json.loads(Path(given["-m"]).read_text(encoding="utf-8"))["measurement"]
        self._modules = tuple(modules)
        self._seen = (0, 0)

    def resume(self) -> str:
        """The step that the converter will go on with, everything for it put in place; "": it has to begin anew.

        A note says where it was taken back, or why it begins anew.
        """
        places = [place for place in (self._where, *self._kept) if (place / RECORD).exists()]
        reasons = []
        for place in places:
            try:
                record = self._read(place)
                self._check(place, record)
            except _Unusable as reason:
                reasons.append(str(reason))
                continue
            if place != self._where:
                self._take_back(place)
                note(f"{RECORD} {reasons[0]}: taken back to the last good one ({_step(record)})")
            return str(record["progress"])
        if reasons:
            note(f"an earlier run cannot be continued ({RECORD} {reasons[0]}): begun anew")
        return ""

    def forget(self) -> None:
        """Leaves nothing that could be gone on with, whatever is removed after it."""
        for place in (self._where, *self._kept):
            (place / RECORD).unlink(missing_ok=True)

    def leave_only(self) -> None:
        """Removes all but the record: the result is whole, and what says so goes last."""
        for path in self._where.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != RECORD:
                path.unlink(missing_ok=True)

    def keep(self) -> None:
        """Keeps the record, if it is a good one and not kept yet, with its states. While the converter runs, too."""
        file = self._where / RECORD
        with contextlib.suppress(OSError, _Unusable):
            status = file.stat()
            if (seen := (status.st_mtime_ns, status.st_size)) == self._seen:
                return
            record, text = self._read(self._where), file.read_bytes()
            self._seen = seen  # also where the disk has no hard links: then not again until the next one
            kept, new = self._kept
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            if _STATES in _NEEDS.get(str(record["progress"]), ()):
                os.link(self._where / _STATES, new / _STATES)
            _write(new / RECORD, text)
            if file.read_bytes() == text:  # the states belong to it: they change only while it is invalid
                shutil.rmtree(kept, ignore_errors=True)
                new.rename(kept)
            else:
                self._seen = (0, 0)
                shutil.rmtree(new)

    @property
    def _kept(self) -> tuple[Path, Path]:
        """The kept one; and the next, which is whole as well where a crash came between the two."""
        return self._where / _KEPT, self._where / _NEXT

    def _read(self, place: Path) -> dict[str, Any]:
        try:
            record = json.loads((place / RECORD).read_text(encoding="utf-8"))
            str(record["progress"])
        except (OSError, ValueError, KeyError, TypeError):
            raise _Unusable("is damaged") from None
        if "invalid" in record:
            raise _Unusable("is of a crash between two checkpoints")
        return dict(record)

    def _check(self, place: Path, record: Mapping[str, Any]) -> None:
        for key, wanted in self._wanted.items():
            if not _same(record.get(key), wanted):
                values = "" if key == "measurement" else f" {shown(record.get(key))} instead of {shown(wanted)}"
                raise _Unusable(f"was begun with another {key}{values}")
        for name in _NEEDS.get(str(record["progress"]), ()):
            if not _is_whole((place if name == _STATES else self._where) / name):
                raise _Unusable(f"has no {name} to go with it")
        if record["progress"] == "compile":
            for module in self._modules:
                if not _is_whole(self._where / _TENSORS / f"{module}.safetensors"):
                    raise _Unusable(f"has no {module}.safetensors to go with it")

    def _take_back(self, place: Path) -> None:
        """States first: with them and the old record, a crash in between leaves one that is still unusable."""
        with contextlib.suppress(FileNotFoundError):
            (self._where / _STATES).unlink()
        if (place / _STATES).exists():
            os.link(place / _STATES, self._where / _STATES)
        _write(self._where / RECORD, (place / RECORD).read_bytes())


class _Unusable(Exception):
    """Why a record cannot be gone on with, to be said after its name."""


def _step(record: Mapping[str, Any]) -> str:
    step = str(record["progress"])
    done = record.get(_DONE.get(step, ""))
    return f"{step}, module {done}" if done else step


def _same(there: Any, wanted: Any) -> bool:
    if isinstance(there, int | float) and isinstance(wanted, str):  # of the command line
        with contextlib.suppress(ValueError):
            return float(there) == float(wanted)
    return bool(there == wanted)


def _is_whole(file: Path) -> bool:
    try:
        read_safetensors_header(file)
    except (CheckpointError, OSError):
        return False
    return True


def _write(path: Path, data: bytes) -> None:
    """At once or not at all, and on the disk."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
