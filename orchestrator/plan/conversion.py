"""What an engine's own conversion takes of a GPU and of the host, held against what is there before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.errors import DoesNotFitError
from orchestrator.report.console import size

ELSEWHERE = "convert it on a larger machine (task=convert output.path=FOLDER) and give that folder as model.path"

# The sizes are bounds: with a fifth less it is tried, with a word on it.
_TRIED = 0.8


@dataclass(frozen=True)
class Conversion:
    """A conversion that has to be made; it runs on one GPU. All sizes are bytes.

    Attributes:
        what: "to EXL2".
        gpu: what it takes of that GPU, at most.
        gpu_free: the most that one GPU has for it, under its cap and once the runs with leases have ended; None: there
            is none, which is refused for itself; or one that was begun goes on, which is not.
        host: what it takes of host memory, at most.
        host_free: None where nobody knows (a profile says nothing of a host), or one that was begun goes on.
        instead: what to type so that an engine quantizes as it loads, where that fits; "": nothing.
    """

    what: str
    gpu: int
    gpu_free: int | None
    host: int
    host_free: int | None
    instead: str = ""

    @property
    def lacks_gpu(self) -> bool:
        """Whether no GPU has enough for it, by far."""
        return _is_short(self.gpu, self.gpu_free)

    @property
    def lacks(self) -> str:
        """What there is too little of: "takes 23.37 GiB of one GPU, and none has more than 15.56 GiB free"; or ""."""
        lacking = []
        if self.lacks_gpu and self.gpu_free is not None:
            lacking.append(f"{size(self.gpu)} of one GPU, and none has more than {size(self.gpu_free)} free")
        if self.host_free is not None and _is_short(self.host, self.host_free):
            lacking.append(f"{size(self.host)} of host memory, of which {size(self.host_free)} are free")
        return f"takes {'; and '.join(lacking)}" if lacking else ""

    def __str__(self) -> str:
        """As in "to EXL2: at most 23.37 GiB of one GPU (23.56 GiB free) and 28.50 GiB of host memory"."""
        gpu, host = (_free(*pair) for pair in ((self.gpu, self.gpu_free), (self.host, self.host_free)))
        return f"{self.what}: at most {size(self.gpu)} of one GPU{gpu} and {size(self.host)} of host memory{host}"

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": {"bytes": self.gpu, "free": self.gpu_free},
            "host": {"bytes": self.host, "free": self.host_free},
        }


def must_have_memory(conversion: Conversion | None) -> None:
    """Refuses a conversion that takes more than there is.

    Raises:
        DoesNotFitError: with the numbers, and what to do.
    """
    if conversion is not None and conversion.lacks:
        more = "Allow it a larger GPU (hardware.gpus, hardware.memory_gib)" if conversion.lacks_gpu else "Free some"
        instead = f"; or type {conversion.instead}, which quantizes when it loads" if conversion.instead else ""
        raise DoesNotFitError(
            f"the conversion {conversion.what} {conversion.lacks}", f"{more}; or {ELSEWHERE}{instead}."
        )


def _is_short(needed: int, free: int | None) -> bool:
    return free is not None and _TRIED * needed > free


def _free(needed: int, free: int | None) -> str:
    if free is None:
        return ""
    may = "is" if _is_short(needed, free) else "may be"
    return f" ({size(free)} free{f', which {may} too little' if needed > free else ''})"
