"""What an engine's processes hold while they live, sampled from outside: NVML for GPUs, the kernel for the host."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestrator.hardware import Gpu, nvml

PERIOD_S = 0.04  # between two samples: 25 a second
PROC = Path("/proc")
# A file's pages are not held: the kernel drops them when memory is needed, and a checkpoint that is read has many.
HELD = ("RssAnon:", "RssShmem:")


@dataclass(frozen=True)
class Peak:
    """The most bytes that were seen on one device, and whose: "process" (the engine's) or "device" (all that came)."""

    held: int
    by: str


@dataclass
class _Card:
    """One GPU under watch. Bytes."""

    device: str
    handle: Any
    before: int  # that all processes held before the engine came
    ours: int = 0  # the most that the engine's processes held, where they can be told
    grown: int = 0  # the most that all processes held beyond `before`

    def sample(self, library: Any, ours: Callable[[int], bool]) -> None:
        """Looks once; `library`: pynvml.

        Raises:
            NVMLError: it cannot be asked.
        """
        held = nvml.processes(library, self.handle)
        self.ours = max(self.ours, sum(size or 0 for pid, size in held.items() if ours(pid)))
        self.grown = max(self.grown, nvml.memory(library, self.handle)[2] - self.before)

    @property
    def peak(self) -> Peak:
        """Of the engine's processes; of the device where NVML names none of them, as in containers that hide them."""
        return Peak(self.ours, "process") if self.ours else Peak(self.grown, "device")


@dataclass
class MemoryWatch:
    """Watches one engine, which leads a session of processes of its own. A context manager.

    What cannot be asked is left out: a watch never fails a run.
    """

    gpus: Sequence[Gpu]
    period_s: float = PERIOD_S
    _cards: list[_Card] = field(default_factory=list)
    _host: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _library: Any = None  # pynvml, where there are GPUs
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Notes what the GPUs hold before the engine comes."""
        if self.gpus:
            import pynvml

            self._library = pynvml
            with suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                self._open.callback(_closed, pynvml)
                for gpu in self.gpus:
                    handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
                    self._cards.append(_Card(f"cuda:{gpu.index}", handle, nvml.memory(pynvml, handle)[2]))
        return self

    def follow(self, leader: int) -> None:
        """Samples from now on; `leader`: the process whose session the engine's processes are."""
        self._thread = threading.Thread(target=self._run, args=(leader,), name="memory", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._open.close()

    @property
    def peaks(self) -> dict[str, Peak]:
        """Device -> the most so far; without what could not be asked. "cpu": the sum over the processes."""
        found = {card.device: card.peak for card in self._cards if card.peak.held > 0}
        return found | ({"cpu": Peak(self._host, "process")} if self._host else {})

    def _run(self, leader: int) -> None:
        def ours(pid: int) -> bool:
            return _session(pid) == leader

        while True:
            for card in self._cards:
                with suppress(self._library.NVMLError):  # this sample is lost, and the next one may come
                    card.sample(self._library, ours)
            self._host = max(self._host, sum(map(_held, _members(leader))))
            if self._stop.wait(self.period_s):
                return


def _closed(nvml_library: Any) -> None:
    with suppress(nvml_library.NVMLError):
        nvml_library.nvmlShutdown()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended, or is of another container: NVML may tell numbers that mean nothing here
        return None


def _members(leader: int) -> Iterator[int]:
    """The processes of a session."""
    with suppress(OSError):
        yield from (int(name) for name in os.listdir(PROC) if name.isdecimal() and _session(int(name)) == leader)


def _held(pid: int) -> int:
    """Bytes of host memory that a process holds, files' pages aside; 0 where it has ended."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(HELD))
