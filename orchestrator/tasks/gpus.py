"""The GPUs of a plan for one run alone: its lease, and where it goes when others have come meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.config import folder
from orchestrator.errors import DoesNotFitError, EngineUnavailableError
from orchestrator.hardware import Gpu, Hardware, detect
from orchestrator.hardware.lease import Wanted, lease, leases
from orchestrator.plan.asks import asks_of
from orchestrator.plan.estimate import estimate
from orchestrator.plan.types import Ask, Candidate
from orchestrator.report.console import note
from orchestrator.runfolder import RunFolder

if TYPE_CHECKING:
    from orchestrator.tasks.session import Planned


@contextmanager
def leased(planned: Planned, chosen: Candidate, run: RunFolder) -> Iterator[tuple[Planned, Candidate]]:
    """The plan on the GPUs as they are now, which are this run's while it is open; waits for other runs if it must.

    What runs stays what was chosen, as its model has been made: only where it goes can be another place, and the
    context can be shorter where there is less room for good.

    Raises:
        DoesNotFitError: there is less room than when it was planned, and no run that holds it.
        EngineUnavailableError: the GPUs are gone.
    """
    if not chosen.gpus:
        yield planned, chosen
        return
    placing = _Placing(planned, chosen)

    def say(text: str) -> None:
        note(text)
        run.status("waiting")

    with lease(str(run.path), placing.choose, say):
        yield placing.planned, placing.found


class _Placing:
    """One candidate, placed again and again."""

    def __init__(self, planned: Planned, chosen: Candidate) -> None:
        self.planned = planned
        self.found = chosen
        self._chosen = chosen
        self._ask = next(a for a in asks_of(planned.config, planned.spec, planned.hardware) if same(a, chosen))

    def choose(self) -> Wanted:
        """What to lease: what the candidate takes now, or what it waits for."""
        hardware, found = self._place(idle=False)
        if _as_good(found, self._chosen):
            return self._take(hardware, found)
        machine, alone = self._place(idle=True)
        if not alone.fits:
            raise DoesNotFitError(
                f"{found.label} does not fit any more: {'; '.join(found.reasons)}",
                "Somebody has taken memory since it was planned: run it again.",
            )
        # Without leases nobody is there to wait for, and the two differ by the moment only.
        if found.fits and (_as_good(found, alone) or not leases()[0]):
            return self._take(hardware, found)
        return Wanted(_totals(machine, alone), room=False)

    def _take(self, hardware: Hardware, found: Candidate) -> Wanted:
        plan = replace(self.planned.plan, chosen=found, hardware=hardware)
        self.found, self.planned = found, replace(self.planned, hardware=hardware, plan=plan)
        return Wanted(_totals(hardware, found), room=True)

    def _place(self, *, idle: bool) -> tuple[Hardware, Candidate]:
        config = self.planned.config
        hardware = detect(config.hardware, planning=False, artifacts=folder(config.paths.artifacts), idle=idle)
        if not hardware.gpus:
            raise EngineUnavailableError(f"the GPUs that it was planned for are gone: {'; '.join(hardware.notes)}")
        found = estimate(config, self.planned.spec, hardware, self._ask)
        return hardware, replace(found, largest_context=self._chosen.largest_context)


def same(ask: Ask, chosen: Candidate) -> bool:
    """Whether a candidate is the answer to this ask."""
    names = ("backend", "method", "bits", "dtype", "double_quant")
    return all(getattr(ask, name) == getattr(chosen, name) for name in names)


def _as_good(found: Candidate, other: Candidate) -> bool:
    """Whether nothing is lost: a run waits for its context, and rather than be slow."""
    return found.fits and found.max_context >= other.max_context and found.offloads <= other.offloads


def _totals(hardware: Hardware, candidate: Candidate) -> dict[Gpu, int]:
    """What a candidate takes of each GPU."""
    by_device = {f"cuda:{gpu.index}": gpu for gpu in hardware.gpus}
    return {by_device[device.device]: device.total for device in candidate.gpus if device.total}
