"""Interrupted conversions of a model that a request does not go on with: why, and what to type instead."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from orchestrator.artifacts import Recipe, Store, bytes_below
from orchestrator.report.console import size

_WHAT = {"measurement": "measurement", "exl2": "conversion"}


def left_behind(store: Store, wanted: Recipe, measurement: Recipe | None) -> Iterator[str]:
    """A line for each unfinished build of the same model that is neither of these two and that nobody is at.

    Args:
        wanted: of the EXL2 model.
        measurement: that it is made with; None where the user gave a file.
    """
    for partial, begun in store.unfinished():
        ours = begun.name in (wanted.name, measurement and measurement.name)
        if ours or begun.stage not in _WHAT or begun.inputs.get("model") != wanted.inputs["model"]:
            continue
        what = f"an interrupted {_WHAT[begun.stage]} of this model is not continued"
        name = f"{partial.name} ({size(bytes_below(partial))})"
        remove = f"task=artifacts artifacts.action=prune artifacts.name={partial.name} removes it"
        yield f"{what}: {name} {_why(begun, wanted)}{remove}"


def _why(begun: Recipe, wanted: Recipe) -> str:
    """What differs, and what goes on with it where that can be typed."""
    old = {key: value for key, value in begun.settings.items() if value != wanted.settings.get(key)}
    if not old or begun.version != wanted.version:
        return "was begun with files, or by a version, that are others now; "
    differ = ", ".join(f"{_typed(key, value)} (now {_text(wanted.settings.get(key))})" for key, value in old.items())
    typed = " ".join(shlex.quote(_typed(key, value)) for key, value in old.items())
    return f"was begun with {differ}; the same command with {typed} goes on with it, "


def _typed(key: str, value: Any) -> str:
    return f"{key}={_text(value)}"


def _text(value: Any) -> str:
    return "null" if value is None else repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
