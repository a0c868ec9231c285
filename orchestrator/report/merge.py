"""What a merge did, as a table."""

from __future__ import annotations

import statistics
from typing import Any

from orchestrator.report.console import console
from orchestrator.report.tables import fitting, table


def show_merge(report: dict[str, Any]) -> None:
    """The change by kind of module (layers together), and what was checked. Nothing for a plain conversion."""
    out = console()
    for text in report["notes"]:
        out.print(f"note: {text}", markup=False, soft_wrap=True)
    if not report["adapters"]:
        return
    kinds: dict[str, list[dict[str, Any]]] = {}
    for module in report["modules"]:
        kinds.setdefault(_kind(module["tensor"]), []).append(module)
    rounded = report["onto"]["base"] == "nf4"
    onto = f"NF4{' (double)' * report['onto']['double']}" if rounded else "the original"
    columns = ("module", "tensors", "median", "most", "changed", *(("NF4",) if rounded else ()))
    made = table(f"Merged onto {onto}: |change| / |weights|", *columns, folded=("module",))
    for kind, modules in kinds.items():
        changes = [m["relative_change"] for m in modules if m["relative_change"] is not None]
        spread = (statistics.median(changes), max(changes)) if changes else ()
        shares = statistics.fmean(m["changed"] for m in modules)
        cells = [_ratio(change) for change in spread] or ["new"] * 2
        lost = [m["nf4_rounding"] for m in modules if "nf4_rounding" in m]
        last = [_ratio(statistics.median(lost)) if lost else "-"] if rounded else []
        made.add_row(kind, str(len(modules)), *cells, f"{shares:.1%}", *last)
    out.print(fitting(out.width, made))
    if rounded:
        text = (
            "NF4: how far its rounding takes the weights from those that merge.base=original would give; "
            "take that if the adapter was not trained on 4 bit"
        )
        out.print(text, markup=False, soft_wrap=True)
    count = sum(adapter["tensors"] for adapter in report["adapters"])
    text = f"{count} adapter tensors, each used once; {report['tensors']} tensors written, all finite"
    out.print(text, markup=False, soft_wrap=True)


def _ratio(value: float) -> str:
    """In at most seven characters: 9.77%, x281.8, x1e+06."""
    if value < 9.995:
        return f"{value:.2%}"
    return f"x{value:.1f}" if value < 99999.5 else f"x{value:.0e}"


def _kind(tensor: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    parts = tensor.removesuffix(".weight").split(".")
    last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last_number + 1 :])
