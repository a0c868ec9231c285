"""Leases of GPU memory: real processes on a machine whose GPUs are not there."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leasing import Machine

from orchestrator import hardware
from orchestrator.config import HardwareConfig
from orchestrator.errors import DoesNotFitError
from orchestrator.hardware import GIB, Gpu, Holder, detect
from orchestrator.hardware import lease as module
from orchestrator.hardware.lease import Lease, Share, Wanted, lease, leases
from orchestrator.hardware.sharing import shared

GPU = Gpu(0, "a card", 24 * GIB, 24 * GIB, (8, 6), "GPU-0")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, 24)
    yield made
    made.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, 24, 24)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.PLACE, str(tmp_path / "leases"))


def test_who_finds_no_room_waits_for_who_has_it_until_it_is_killed(machine: Machine) -> None:
    first = machine.run("first", 16)
    assert first.said() == "GPU 0"
    second = machine.run("second", 16)
    assert second.said() == f"waiting for 16.00 GiB on GPU 0, held by first (pid {first.pid})"
    assert [one.what for one in leases()[0]] == ["first"]
    first.process.send_signal(signal.SIGKILL)
    assert second.said() == "GPU 0"
    assert [one.what for one in leases()[0]] == ["second"]
    second.end()
    assert sorted(path.name for path in machine.leases.iterdir()) == ["lock"]


def test_runs_share_a_gpu_that_has_room_for_both(machine: Machine) -> None:
    runs = [machine.run(name, 10) for name in ("first", "second")]
    assert [run.said() for run in runs] == ["GPU 0", "GPU 0"]
    third = machine.run("third", 10)
    assert third.said().startswith("waiting for 10.00 GiB on GPU 0, held by ")
    runs[1].end()
    assert third.said() == "GPU 0"


def test_three_runs_over_two_gpus(two: Machine) -> None:
    first, second = two.run("first", 16), two.run("second", 16)
    assert sorted((first.said(), second.said())) == ["GPU 0", "GPU 1"]
    third = two.run("third", 16)
    assert third.said().startswith("waiting for 16.00 GiB")
    first.end()
    assert third.said() in ("GPU 0", "GPU 1")


def test_small_runs_are_spread(two: Machine) -> None:
    said = [two.run(name, 6).said() for name in ("first", "second", "third", "fourth")]
    assert said == ["GPU 0", "GPU 1", "GPU 0", "GPU 1"]


def test_a_gpu_that_was_named_is_waited_for(two: Machine) -> None:
    first = two.run("first", 16, 1)
    assert first.said() == "GPU 1"
    second = two.run("second", 16, 1)
    assert second.said() == f"waiting for 16.00 GiB on GPU 1, held by first (pid {first.pid})"
    assert two.run("third", 16).said() == "GPU 0"


def test_memory_that_is_taken_counts_once(machine: Machine) -> None:
    first = machine.run("first", 10)
    assert first.said() == "GPU 0"
    machine.card(0, compute=[[first.pid, 10 * GIB]])
    assert machine.run("second", 10).said() == "GPU 0"


def test_so_does_what_nvml_names_nobody_for(machine: Machine) -> None:
    machine.card(0, held=GIB)
    first = machine.run("first", 10)
    assert first.said() == "GPU 0"
    machine.card(0, held=11 * GIB)
    assert machine.run("second", 10).said() == "GPU 0"


def test_many_at_once_never_take_more_than_there_is(two: Machine) -> None:
    runs = [two.run(f"run {i}", 11) for i in range(6)]
    said = [run.said() for run in runs]
    assert sorted(line for line in said if line.startswith("GPU")) == ["GPU 0", "GPU 0", "GPU 1", "GPU 1"]


def test_what_a_killed_run_left_is_removed(machine: Machine) -> None:
    run = machine.run("first", 16)
    run.said()
    run.process.kill()
    run.process.wait()
    (machine.leases / "123-x.part").write_text("half")
    assert len(list(machine.leases.iterdir())) == 3
    with lease("next", lambda: Wanted({GPU: GIB}, True), pytest.fail):
        assert sorted(path.suffix for path in machine.leases.iterdir()) == ["", ".lease"]
    assert leases() == ([], ())


def test_a_lease_says_who_and_what(machine: Machine) -> None:
    with lease("runs/x", lambda: Wanted({GPU: GIB}, True), pytest.fail):
        [file] = machine.leases.glob("*.lease")
        said = json.loads(file.read_text())
        assert abs(said.pop("since") - time.time()) < 60
        assert said == {"pid": os.getpid(), "what": "runs/x", "gpus": {"GPU-0": {"asked": GIB, "others": 0}}}
        assert leases()[0] == [Lease.of(json.loads(file.read_text()))]


def test_only_the_user_may_look(machine: Machine) -> None:
    mask = os.umask(0)
    try:
        with lease("runs/x", lambda: Wanted({GPU: GIB}, True), pytest.fail):
            modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in machine.leases.iterdir()}
    finally:
        os.umask(mask)
    assert stat.S_IMODE(machine.leases.stat().st_mode) == 0o700
    assert modes == {"": 0o600, ".lease": 0o600}


def test_without_the_variable_it_is_one_folder_for_each_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.PLACE)
    assert module.place() == Path(f"/tmp/orchestrator-leases-{os.geteuid()}")


def _a_file(folder: Path) -> None:
    folder.write_text("")


def _open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _a_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to("elsewhere")


def _no_lock(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "lock").mkdir()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_a_file, "File exists"),
        (_open_to_all, "others can write to it"),
        (_a_link, "it is not a folder"),
        (_no_lock, "Is a directory"),
    ],
)
def test_where_no_lease_can_be_taken_the_run_goes_on_and_says_so(tmp_path: Path, spoil: Any, why: str) -> None:
    spoil(tmp_path / "leases")
    said: list[str] = []
    with lease("runs/x", lambda: Wanted({GPU: GIB}, True), said.append):
        pass
    assert len(said) == 1
    assert said[0].startswith("note: other runs cannot see")
    assert why in said[0]
    assert module.PLACE in said[0]


def test_leases_in_a_folder_that_others_can_write_to_do_not_count(tmp_path: Path) -> None:
    _open_to_all(tmp_path / "leases")
    (tmp_path / "leases" / "1-x.lease").write_text("{}")
    found, [said] = leases()
    assert (found, "others can write to it" in said) == ([], True)
    assert (tmp_path / "leases" / "1-x.lease").exists()


class Choices:
    """What a run finds at each look at the GPUs: room, none, or an error."""

    def __init__(self, *found: bool | Exception) -> None:
        self._found = list(found)

    def __call__(self) -> Wanted:
        found = self._found.pop(0)
        if isinstance(found, Exception):
            raise found
        return Wanted({GPU: GIB}, found)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.001)


@pytest.mark.usefixtures("_quick")
def test_what_does_not_fit_is_said_at_once() -> None:
    with pytest.raises(DoesNotFitError), lease("x", Choices(DoesNotFitError("too large")), pytest.fail):
        pass


@pytest.mark.usefixtures("_quick")
def test_a_killed_run_may_hold_its_memory_for_a_moment() -> None:
    full = DoesNotFitError("its engine is still there")
    said: list[str] = []
    with lease("x", Choices(False, full, full, True), said.append):
        assert len(leases()[0]) == 1
    assert said == ["waiting for 1.00 GiB on GPU 0"]


@pytest.mark.usefixtures("_quick")
def test_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.0)
    full = DoesNotFitError("somebody else has it now")
    with pytest.raises(DoesNotFitError), lease("x", Choices(False, full), lambda text: None):
        pass


@contextmanager
def locked(file: Path, content: bytes) -> Iterator[None]:
    """A file that some process holds."""
    file.write_bytes(content)
    with file.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
SHARES = st.dictionaries(st.text(), st.fixed_dictionaries({"asked": JSON, "others": JSON}) | JSON, max_size=3)
NEARLY = st.fixed_dictionaries(
    {"pid": st.integers() | JSON, "what": JSON, "since": st.floats() | JSON, "gpus": SHARES | JSON}
)


@given(st.binary() | (JSON | NEARLY).map(lambda value: json.dumps(value).encode()))
def test_what_is_not_a_lease_does_not_count(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "leases"
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / "1-x.lease"
    with locked(file, content):
        found, notes = leases()
        assert len(found) + len(notes) == 1
        shared((GPU,), found, idle=False)
    assert leases() == ([], ())  # nobody holds it: a run that was killed while it wrote
    assert not file.exists()


@pytest.mark.parametrize("content", [b"[" * 60000, b"{}" * 60000, b'{"pid": 1e999}', b'{"pid": ' + b"9" * 5000 + b"}"])
def test_nor_does_what_was_made_to_hurt(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "leases"
    folder.mkdir(mode=0o700)
    with locked(folder / "1-x.lease", content):
        assert leases()[0] == []
    os.mkfifo(folder / "2-x.lease")
    (folder / "3-x.lease").mkdir()
    (folder / "4-x.lease").symlink_to("/etc/passwd")
    found, notes = leases()
    assert found == []
    assert len(notes) == 2
    with lease("x", lambda: Wanted({GPU: GIB}, True), pytest.fail):
        assert len(leases()[0]) == 1


def held(asked: int, others: int = 0, pid: int = 2**22 + 1) -> Lease:
    return Lease(pid, "runs/x", 1.0, {"GPU-0": Share(asked * GIB, others * GIB)})


def gpu(free: int, held: int, *holders: Holder) -> Gpu:
    return Gpu(0, "a card", 24 * GIB, free * GIB, (8, 6), "GPU-0", held * GIB, holders)


@pytest.mark.parametrize(
    ("there", "runs", "free", "alone"),
    [
        (gpu(24, 0), [held(10)], 14, 24),  # nothing loaded yet
        (gpu(20, 4, Holder(7, "x", 4 * GIB)), [held(10, pid=7)], 14, 24),  # a part
        (gpu(14, 10, Holder(7, "x", 10 * GIB)), [held(10, pid=7)], 14, 24),  # all
        (gpu(12, 12, Holder(7, "x", 12 * GIB)), [held(10, pid=7)], 12, 24),  # more than it said
        (gpu(20, 4, Holder(7, "x", None)), [held(10, pid=7)], 14, 24),  # NVML names it without its size
        (gpu(22, 2), [held(10, 2)], 12, 22),  # of others, before it began
        (gpu(15, 9), [held(10, 2)], 12, 22),  # then 7 are its own
        (gpu(11, 13), [held(10, 2)], 11, 21),  # no more than it asked for
        (gpu(10, 14), [held(10, 2), held(6, 2, 8)], 6, 22),  # 12 of 16 are taken, by one or the other
        (gpu(4, 20), [held(6), held(10, 6, 8)], 4, 20),  # who was first has ended, and something else has come
        (gpu(10, 14, Holder(7, "x", 8 * GIB)), [held(10, pid=7), held(6, 2, 8)], 6, 22),
        (gpu(2, 22), [held(10, 2)], 2, 12),
        (gpu(1, 0), [held(10)], 0, 1),
    ],
)
def test_what_is_free_beside_leases(there: Gpu, runs: list[Lease], free: int, alone: int) -> None:
    [now] = shared((there,), runs, idle=False)
    assert now.free == free * GIB
    [then] = shared((there,), runs, idle=True)
    assert then.free == alone * GIB
    # What is held by nobody that is named stays what it was to those who come: the runs' own parts are named.
    assert now.unnamed == then.unnamed


def test_the_plan_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: ((GPU,), ()))
    with lease("runs/x", lambda: Wanted({GPU: 10 * GIB}, True), pytest.fail):
        [found] = detect(HardwareConfig(), planning=True).gpus
        assert (found.free, found.held) == (14 * GIB, 10 * GIB)
        assert found.held_by == (Holder(os.getpid(), "runs/x", 10 * GIB),)
        [alone] = detect(HardwareConfig(), planning=False, idle=True).gpus
        assert alone == GPU
    assert detect(HardwareConfig(), planning=False).gpus == (GPU,)


def test_gpus_with_room_come_first_unless_the_request_has_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(Gpu(i, "a card", 24 * GIB, (23 + i) * GIB, (8, 6), f"GPU-{i}") for i in range(3))
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: (gpus, ()))

    def order(**values: Any) -> list[int]:
        return [gpu.index for gpu in detect(HardwareConfig(**values), planning=False).gpus]

    assert order() == [0, 1, 2]
    with lease("runs/x", lambda: Wanted({gpus[2]: 10 * GIB}, True), pytest.fail):
        assert order() == [1, 0, 2]
        assert order(profile="2x24gb", cards=2) == [1, 0]
        assert order(gpus=[2, 0]) == [2, 0]
        assert order(memory_gib=[8.0, 9.0, 10.0]) == [0, 1, 2]


def test_without_a_gpu_nobody_looks_for_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: ((), ("no GPU",)))
    monkeypatch.setattr(hardware, "leases", pytest.fail)
    assert detect(HardwareConfig(), planning=False).gpus == ()
