"""The whole plan for a person: every candidate, a bar for each GPU, what to change, what to type."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.backends.table import METHODS
from orchestrator.config import Config
from orchestrator.overrides import unquoted
from orchestrator.plan.types import Candidate, DeviceBytes, Plan
from orchestrator.report.console import size
from orchestrator.report.tables import gib, table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

BAR = 48  # cells, where there is room for them
LEAST_BAR = 10
PARTS = (  # of a bar: shade, its like in ASCII, colour, name
    ("\u2588", "#", "blue", "weights"),
    ("\u2593", "%", "green", "KV cache"),
    ("\u2592", "+", "yellow", "scratch"),
    ("\u2591", "-", "magenta", "runtime"),
    ("\u00b7", ".", "dim", "free"),
)
CHOOSES = {  # an engine, or a width, is chosen already where one of these was typed
    "backend": ("backend", "backend.name"),
    "quant.bits": ("quant", "quant.bits", "quant.method", "model.dtype"),
}
EXAMPLE = "prompts.text=Hello"


def candidates_table(plan: Plan, *, narrow: bool = False, refused: bool = False) -> Table:
    """Every engine and width that was asked about, best first. It is readable at 80 columns.

    Args:
        narrow: without cache and scratch, for terminals of 60 columns.
        refused: it is no plan.
    """
    more = "What could run it, best first" if plan.chosen.fits else "What could run it with more memory, nearest first"
    made = table(
        "No plan: what was asked for is refused. What was looked at" if refused else more,
        *("engine", "", "fits", "over", "weights", *(() if narrow else ("cache", "scratch")), "left", "context"),
        left=4,
        gap=1 if narrow else 2,
    )
    for c in plan.candidates:
        between = () if narrow else (c.fullest.kv_cache, c.fullest.scratch)
        parts = (c.fullest.weights, *between, c.fullest.left)
        engine = c.backend + ("+" if c.needs else "" if c.installed else "*")
        context = str(c.largest_context) if c.largest_context else "-"
        cells = (engine, method_label(c), _fits(c), spread_label(c), *map(gib, parts), context)
        made.add_row(*cells, style="" if c.fits else "dim")
    return made


def legend(plan: Plan) -> Iterator[str]:
    """What is to be known to read the table of the candidates."""
    runs = plan.candidates
    words = {
        "TP: tensor-parallel": any(c.tensor_parallel > 1 for c in runs),
        "PP: pipeline-parallel": any(c.pipeline_parallel > 1 for c in runs),
        "host, disk: with weights kept there, which is slow": any(c.fits and c.offloads for c in runs),
    }
    said = [text for text, is_there in words.items() if is_there]
    yield "; ".join(("GiB on the fullest device; the largest context, of one answer at a time", *said))
    if needs := ", ".join(dict.fromkeys(method_label(c) for c in plan.candidates if c.needs)):
        yield f"+ from a checkpoint in {needs}, which this version does not make"


def method_label(candidate: Candidate) -> str:
    """The method and its bits, as short as they are clear: "EXL2 4.65", "NF4", "16 bit"."""
    method = METHODS[candidate.method]
    if candidate.method == "none":
        return f"{candidate.bits:g} bit"
    bits = f" {candidate.bits:g}" if method.low is not None or method.per_bit else ""
    return f"{method.label}{bits}{' double' if candidate.double_quant else ''}"


def spread_label(candidate: Candidate) -> str:
    """What it is spread over: "TP 4", "4 GPUs", "cuda:0", "cpu"."""
    ranks = (("TP", candidate.tensor_parallel), ("PP", candidate.pipeline_parallel))
    if any(count > 1 for _, count in ranks):
        return " ".join(f"{name} {count}" for name, count in ranks if count > 1)
    return candidate.fullest.device if len(candidate.computing) == 1 else f"{len(candidate.computing)} GPUs"


def _fits(candidate: Candidate) -> str:
    if not candidate.fits:
        return "no"
    if not candidate.offloads:
        return "yes"
    return "disk" if candidate.disk else "host"


def bars(candidate: Candidate, width: int = 110, *, ascii_only: bool = False) -> Iterator[Text]:
    """A bar for each GPU (or for the host where there is none), and what its shades mean."""
    from rich.text import Text

    devices = candidate.computing
    whole = max(max(device.capacity, device.total) for device in devices)
    numbers = [f"  {_used(device)}" for device in devices]
    bar = max(LEAST_BAR, min(BAR, width - 8 - max(map(len, numbers))))
    for device, number in zip(devices, numbers, strict=True):
        line = Text(f"{device.device:<8}")
        for (shade, plain, colour, _), cells in zip(PARTS, _cells(device, whole, bar), strict=True):
            line.append((plain if ascii_only else shade) * cells, style=colour)
        line.append(number, style="red" if device.left < 0 else "")
        yield line
    shades = Text(" " * 8)
    for i, (shade, plain, colour, name) in enumerate(PARTS):
        shades.append("  " * bool(i) + (plain if ascii_only else shade), style=colour)
        shades.append(f" {name}")
    yield shades


def _used(device: DeviceBytes) -> str:
    """ "23.00 GiB of 23.09 GiB"."""
    return f"{size(device.total)} of {size(device.capacity)}{', too much' if device.left < 0 else ''}"


def _cells(device: DeviceBytes, whole: int, bar: int) -> list[int]:
    """How many cells of a bar each part gets, so that their ends are where they belong."""
    parts = (device.weights, device.kv_cache, device.scratch, device.runtime, max(0, device.left))
    ends = [round(sum(parts[: i + 1]) / whole * bar) for i in range(len(parts))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def changes_table(plan: Plan, *, narrow: bool = False) -> Table:
    """What to change, cheapest first, and what it comes to.

    Args:
        narrow: a setting a line, and what is left without what it takes, for terminals of 60 columns.
    """
    made = table(
        "What to change, cheapest first",
        *("change", "gives up", "then", *(() if narrow else ("GiB",)), "left", "context"),
        left=3,
        folded=("gives up", "then") if narrow else ("gives up",),
        gap=1 if narrow else 2,
    )
    for change in plan.changes:
        found = change.candidate
        then = f"{found.backend} {method_label(found)}"
        total = () if narrow else (gib(found.fullest.total),)
        # To be copied: no setting is cut in two, however narrow the terminal is.
        label = "\n".join((*change.cards.split(" (")[:1], *change.settings)).strip() if narrow else change.label
        made.add_row(label, change.costs, then, *total, gib(found.fullest.left), str(found.max_context))
    return made


def command(typed: list[str], candidate: Candidate, config: Config) -> str:
    """The command that runs a candidate: what was typed, with the engine and the width where they were left open.

    Args:
        typed: the overrides of the command line.
    """
    kept = [unquoted(text) for text in typed if _key(text) not in ("task", "task.name")]
    keys = {_key(text) for text in kept}
    choice = {"backend": candidate.backend, "quant.bits": f"{candidate.bits:g}"}
    added = [f"{key}={value}" for key, value in choice.items() if not keys & set(CHOOSES[key])]
    prompts = config.model.path is None or any(key.startswith("prompts.") for key in keys)
    return shlex.join(["python", "-m", "orchestrator", *kept, *added, *([] if prompts else [EXAMPLE])])


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")
