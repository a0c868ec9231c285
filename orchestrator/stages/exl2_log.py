"""What exllamav2's converter prints when a model's numbers leave float16's range, and what to say then.

It runs the model in float16 for its reference. Weights that were trained in bfloat16 may give hidden states beyond
65504, mostly in the last layers: measuring looks for them (conversion/measure.py of 0.3.2) and ends with one of three
numbered errors; quantizing does not look, and goes on with errors that are no numbers, or cannot invert a Hessian.
What is said once is remembered beside the states that it is true of: the run that goes on with them says it no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from orchestrator.checkpoint.writer import write_text
from orchestrator.errors import StageError
from orchestrator.stages.converter import NewLines

_LAYER = re.compile(r"^ -- (?:Sub)?[Ll]ayer: (.+)$")
# What a line of the log means.
_SIGNS = (
    (re.compile(r"## Measurement/inference error \(3\)"), "hidden states beyond float16's range"),
    (re.compile(r"## Measurement/inference error \(2\)"), "hidden states that are no numbers (NaN)"),
    (re.compile(r"## Measurement/inference error \(1\)"), "no width that gives back what the layer computes"),
    (re.compile(r"rfn_error: (?:nan|-?inf)|perplexity \(quant\): (?:nan|inf)"), "results that are no numbers (NaN)"),
    (re.compile(r"ValueError: Hessian is not invertible"), "a Hessian that cannot be inverted"),
    (re.compile(r"OverflowError: math range error"), "a perplexity beyond any number"),
)


_MARKER = "overflow.txt"  # what was seen, and the log that says it, a line each

# (what was seen, the log that says it)
Seen = tuple[str, str]


class OverflowWatch:
    """Looks for signs in a growing log, and leaves the first one in the converter's folder at once.

    Args:
        log: what is in it already is of another run.
        where: the converter's folder.
    """

    def __init__(self, log: Path, where: Path) -> None:
        self._log = log
        self._where = where
        self._lines = NewLines(log, log.stat().st_size if log.exists() else 0)
        self._scan = _Scan()

    def read(self) -> None:
        """Reads what was written since the last call, as far as its lines are whole."""
        found = self._scan.first(self._lines.read().decode(errors="replace").splitlines())
        if found and seen_overflow(self._where) is None:
            write_text(self._where / _MARKER, f"{found}\n{self._log}\n")


def seen_overflow(where: Path) -> Seen | None:
    """What this run or an earlier one saw of the states in a converter's folder."""
    try:
        found, log, *_ = [*(where / _MARKER).read_text(encoding="utf-8").splitlines(), "", ""]
    except FileNotFoundError:
        return None
    return found, log


class _Scan:
    """The signs in lines that come bit by bit."""

    def __init__(self) -> None:
        self._layer = ""

    def first(self, lines: Iterable[str]) -> str:
        """The first sign in these lines, and where; "" where there is none."""
        for line in lines:
            if found := _LAYER.match(line):
                self._layer = found[1]
            for sign, meaning in _SIGNS:
                if sign.search(line):
                    return f"{meaning} in {self._layer}" if self._layer else meaning
        return ""


def overflow_error(where: str, log: object) -> StageError:
    """The error for what was seen; what the converter had made is removed by then."""
    return StageError(
        f"exllamav2 cannot convert this model: {where}",
        "It computes in float16, and the model's numbers do not fit there (a broken merge looks the same: "
        "convert.verify=true checks it). Type backend=bitsandbytes quant.bits=4, which can compute in bfloat16, or try "
        f"other texts (quant.calibration.file). The same command begins anew. Its log: {log}",
    )
