"""The mix of widths that exllamav2's converter chose for a target, and whether the model has it. No torch.

Its optimizer takes of each block (attention or MLP) one of the options that were measured, and leaves it as the
record's "strategy" (conversion/optimize.py of 0.3.2). It starts each block at its first option, stays within the
target where it can, and in the end takes a block's next option as long as any still fits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.exl2_layout import TOLERANCE, Packed
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.trust import shown
from orchestrator.plan.exl2_sizes import pad32
from orchestrator.stages.exl2_job import RECORD
from orchestrator.stages.exl2_measurement import Options, blocks, option_bits, read_options
from orchestrator.stages.exl2_result import Linears, NotWhole

_WORD = 32  # bits: the last group of a linear is filled up to whole ones

Choice = dict[str, dict[str, Any]]  # block -> its option


class OtherMix(NotWhole):
    """All of a model is there, and its widths are not those that were chosen, or not of the target."""


def check_mix(packed: Mapping[str, Packed], work: Path, measurement: Path, source: Checkpoint, bits: float) -> None:
    """Checks that every linear of a model has the bits that the optimizer chose, and that those are of the target.

    Args:
        packed: the quantized linears of the model.
        work: the converter's folder.
        measurement: what it was given.
        bits: per weight, that it was asked for.

    Raises:
        OtherMix: they have others; or the choice is not one that it makes.
        NotWhole: the measurement is none.
    """
    options = read_options(measurement, source)
    chosen = _read(work / RECORD, options)
    weights = sum(pad32(out) * rows for out, rows in Linears.of(source).layers.values())
    _check_target([(options[block], option) for block, option in chosen.items()], bits * weights)
    for block, shapes in blocks(source).items():
        for name, shape in shapes.items():
            try:
                wanted = option_bits(chosen[block][name], shape)
            except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
                raise OtherMix(f"chose widths for {block}.{name} that are none") from None
            _check_linear(packed[f"{block}.{name}"], wanted)


def _read(record: Path, options: Options) -> Choice:
    """The option of each block."""
    try:
        strategy = json.loads(record.read_text(encoding="utf-8"))["strategy"]
        chosen = {block: dict(strategy[block]) for block in options}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OtherMix(f"left no choice of widths in {RECORD} ({shown(repr(error))})") from None
    for block, option in chosen.items():
        if option not in options[block]:
            raise OtherMix(f"chose widths for {block} that were not measured")
    return chosen


def _check_target(chosen: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]], budget: float) -> None:
    """Raises OtherMix unless the mix has the target's bits, or is the nearest that the optimizer comes to.

    Args:
        chosen: of each block its options, and the one of them that was chosen.
        budget: bits of all linears, as asked for. (The converter adds those of as many weights as norms have.)
    """
    total = sum(_total(option) for _, option in chosen)
    if abs(total / budget - 1) <= TOLERANCE:
        return
    if total > budget:
        if any(option != options[0] for options, option in chosen):
            raise OtherMix(f"chose widths of {total:,} bits, and {budget:,.0f} were asked for")
        return
    for options, option in chosen:
        last = len(options) - 1 - options[::-1].index(option)
        following = options[last + 1 : last + 2]
        if following and total - _total(option) + _total(following[0]) <= budget:
            raise OtherMix(
                f"chose widths of {total:,} bits where {budget:,.0f} were asked for, and a wider option fits"
            )


def _total(option: Mapping[str, Any]) -> int:
    return int(option["total_bits"])  # which `read_options` has looked at


def _check_linear(linear: Packed, wanted: int) -> None:
    """Raises OtherMix unless a linear takes so many bits; its last group is filled up to whole words."""
    if not 0 <= 8 * linear.nbytes - wanted < _WORD * linear.columns:
        chosen = wanted / linear.weights
        raise OtherMix(f"wrote {linear.module} with {linear.bits:.3f} bits per weight, and chose {chosen:.3f} for it")
