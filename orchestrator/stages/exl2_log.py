"""What exllamav2's converter prints when a model's numbers leave float16's range, and what to say then.

It runs the model in float16 for its reference. Weights that were trained in bfloat16 may give hidden states beyond
65504, mostly in the last layers: measuring looks for them (conversion/measure.py of 0.3.2) and ends with one of three
numbered errors; quantizing does not look, and goes on with errors that are no numbers, or cannot invert a Hessian.
"""

from __future__ import annotations

import re

from orchestrator.errors import StageError

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


def overflow(text: str) -> str:
    """Where the numbers of a model went wrong in a conversion, and how; "" where the log does not say that they did."""
    layer = ""
    for line in text.splitlines():
        if found := _LAYER.match(line):
            layer = found[1]
        for sign, meaning in _SIGNS:
            if sign.search(line):
                return f"{meaning} in {layer}" if layer else meaning
    return ""


def overflow_error(where: str, log: object) -> StageError:
    """The error for what `overflow` found."""
    return StageError(
        f"exllamav2 cannot convert this model: {where}",
        "It computes in float16, and the model's numbers do not fit there (a broken merge looks the same: "
        "convert.verify=true checks it). Type backend=bitsandbytes quant.bits=4, which can compute in bfloat16, or try "
        f"other texts (quant.calibration.file). Its log: {log}",
    )
