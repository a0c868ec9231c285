"""exllamav2's measurement: whose it is, whether it is of a model, what widths it allows. No torch.

It says of each block (attention or MLP) what error some mixes of widths give, and holds for every target. It costs
many times a quantization, and a fine-tune's differs little from its base's: so one of the base serves it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.artifacts import Recipe, Store
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.plan.exl2_sizes import pad32
from orchestrator.stages.exl2_result import Linears, NotWhole

Options = dict[str, list[dict[str, Any]]]  # block -> its options

FILE = "measurement.json"


def read_options(file: Path, source: Checkpoint) -> Options:
    """The options of every block of a model.

    Raises:
        NotWhole: the file is none, or lacks a block.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotWhole("wrote no measurement") from None
    except OSError as error:
        raise NotWhole(f"has no measurement that can be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise NotWhole("has no measurement that can be read: it is not JSON") from None
    measured = value.get("measurement") if isinstance(value, dict) else None
    if not isinstance(measured, dict) or not isinstance(value.get("last_module_idx"), int):
        raise NotWhole("has no measurement that can be read: no object with measurement and last_module_idx")
    options = {name: found for name, found in measured.items() if isinstance(found, list) and found}
    wanted = blocks(source)
    missing = sorted(set(wanted) - set(options))
    if missing:
        raise NotWhole(f"measured nothing of {len(missing)} of {len(wanted)} blocks, the first is {missing[0]}")
    if strange := next((block for block in wanted if not all(map(_is_option, options[block]))), None):
        raise NotWhole(f"says of an option of {strange} not how many bits it takes")
    return {block: options[block] for block in wanted}


def _is_option(value: Any) -> bool:
    bits = value.get("total_bits") if isinstance(value, dict) else None
    return isinstance(bits, int | float) and not isinstance(bits, bool) and math.isfinite(bits) and bits > 0


def judge_measurement(file: Path, source: Checkpoint) -> dict[str, Any]:
    """Checks that a measurement covers every layer of the model that it was made of.

    Returns:
        JSON-able: how many modules were measured, with how many options in all.

    Raises:
        NotWhole: it does not.
    """
    options = read_options(file, source)
    return {"modules": len(options), "options": sum(map(len, options.values()))}


def check_fits(file: Path, source: Checkpoint) -> None:
    """Checks that a measurement of another model (the base of this one, say) can be used for this one.

    Its blocks must have the same names, and every option as many bits as linears of this model's shapes take.

    Raises:
        NotWhole: it cannot.
    """
    shapes = blocks(source)
    for block, options in read_options(file, source).items():
        try:
            wanted = sum(option_bits(options[0][name], shape) for name, shape in shapes[block].items())
            said = int(options[0]["total_bits"])
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
            raise NotWhole(f"says something else of {block} than a measurement of such a model does") from None
        biases = sum(16 * pad32(out) for out, _ in shapes[block].values())  # counted where a linear has one
        if not 0 <= said - wanted <= biases:
            raise NotWhole(f"was made of a {block} with other shapes")


def blocks(source: Checkpoint) -> dict[str, dict[str, tuple[int, int]]]:
    """Block (attention or MLP of a layer) -> its linears -> (out, in)."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for module, shape in Linears.of(source).layers.items():
        block, _, name = module.rpartition(".")
        found.setdefault(block, {})[name] = shape
    return found


def option_bits(option: dict[str, Any], shape: tuple[int, int]) -> int:
    """Bits that a linear takes with an option's widths, as the converter counts them (qparams.py, total_bits)."""
    out, rows = pad32(shape[0]), shape[1]
    left, groups, weights = rows, 0, 0
    for bits, share in zip(option["bits"], option["bits_prop"], strict=True):
        if not 0 < share <= 1:
            raise ValueError(share)
        size = int(option["group_size"][str(bits)])
        count = math.ceil(min(rows * share, left) / size)
        used = min(count * size, left)
        weights += used * out * bits
        left -= used
        groups += count
    return weights + groups * (out * int(option["scale_bits"]) + 16 + 32) + 32 * rows


def base_measurements(store: Store, own: Recipe, model: Any) -> Iterator[Recipe]:
    """The measurements in the store of what a merged model was merged onto, with the same calibration.

    Args:
        own: the recipe of the model's own measurement.
        model: the name of the merged model's artifact, as the recipes' inputs have it; something else is none of ours.
    """
    finished = [(artifact, artifact.manifest) for artifact in store.finished()]
    merged = (said for artifact, said in finished if artifact.name == model and said["stage"] == "merge")
    base = next((said["inputs"].get("base") for said in merged), None)
    if base is None:
        return
    # A base in another format was converted first: then that artifact was measured.
    copies = [a.name for a, said in finished if (said["stage"], said["inputs"]) == ("convert", {"base": base})]
    wanted = [own.inputs | {"model": same} for same in (base, *copies)]
    for artifact, said in finished:
        if said["stage"] == own.stage and said["inputs"] in wanted:
            recipe = Recipe(own.stage, own.version, own.options, said["inputs"])
            if recipe.name == artifact.name:  # the same version and options, too
                yield recipe
