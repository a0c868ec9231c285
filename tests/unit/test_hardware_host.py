"""The host under cgroups of both versions, nested, seen from outside and from inside a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.hardware import host
from orchestrator.hardware.types import GIB


class Host:
    """A /proc/self and cgroup trees in a folder. psutil says 64 GiB of memory, 40 of it available."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._mounts, self._groups = folder, [""], [""]
        self._proc = folder / "proc"
        self._proc.mkdir()
        monkeypatch.setattr(host, "PROC", self._proc)
        monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(16)))

        class Memory:
            total, available = 64 * GIB, 40 * GIB

        monkeypatch.setattr(host.psutil, "virtual_memory", Memory)

    def mount(self, where: str, kind: str, options: str = "rw", root: str = "/") -> None:
        self._mounts.append(f"31 23 0:28 {root} {self.folder / where} rw,relatime shared:5 - {kind} {kind} {options}")
        (self.folder / where).mkdir(parents=True, exist_ok=True)
        (self._proc / "mountinfo").write_text("\n".join(self._mounts[1:]) + "\n")

    def group(self, line: str) -> None:
        self._groups.append(line)
        (self._proc / "cgroup").write_text("\n".join(self._groups[1:]) + "\n")

    def files(self, where: str, **files: object) -> None:
        """Files of one cgroup: memory_max=... is the file memory.max."""
        (self.folder / where).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (self.folder / where / name.replace("_", ".", 1)).write_text(f"{value}\n")

    def memory(self) -> tuple[float, float]:
        total, available = host.host_memory()
        return total / GIB, available / GIB


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def v2(made: Host) -> Host:
    """Version 2, this process in /user/job."""
    made.mount("fs", "cgroup2", "rw,nsdelegate")
    made.group("0::/user/job")
    made.files("fs/user/job")
    return made


@pytest.fixture
def v1(made: Host) -> Host:
    """Version 1 with an empty unified tree, this process in /docker/x of memory and of cpu."""
    made.mount("fs/memory", "cgroup", "rw,memory")
    made.mount("fs/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
    made.mount("fs/unified", "cgroup2")
    for line in ("11:memory:/docker/x", "4:cpu,cpuacct:/docker/x", "0::/"):
        made.group(line)
    return made


def test_without_cgroups_the_machine_counts(made: Host) -> None:
    assert made.memory() == (64, 40)
    assert host.cpu_count() == 16


def test_without_a_limit_the_machine_counts(v2: Host) -> None:
    v2.files("fs/user/job", memory_max="max", memory_high="max", memory_current=GIB, cpu_max="max 100000")
    assert v2.memory() == (64, 40)
    assert host.cpu_count() == 16


def test_a_limit_is_the_total_and_what_is_used_is_not_available(v2: Host) -> None:
    v2.files("fs/user/job", memory_max=16 * GIB, memory_current=4 * GIB)
    assert v2.memory() == (16, 12)


def test_a_limit_above_the_machine_says_nothing(v2: Host) -> None:
    v2.files("fs/user/job", memory_max=100 * GIB, memory_current=0)
    assert v2.memory() == (64, 40)


def test_more_used_than_allowed_leaves_nothing(v2: Host) -> None:
    v2.files("fs/user/job", memory_max=GIB, memory_current=2 * GIB)
    assert v2.memory() == (1, 0)


def test_the_smallest_limit_up_the_tree_counts_with_what_the_neighbours_use(v2: Host) -> None:
    v2.files("fs/user/job", memory_max=32 * GIB, memory_current=2 * GIB)
    v2.files("fs/user", memory_max=20 * GIB, memory_current=15 * GIB)
    assert v2.memory() == (20, 5)


def test_the_limit_of_one_level_and_the_room_of_another(v2: Host) -> None:
    v2.files("fs/user/job", memory_max=10 * GIB, memory_current=0)
    v2.files("fs/user", memory_max=20 * GIB, memory_current=17 * GIB)
    assert v2.memory() == (10, 3)


def test_memory_high_is_a_limit(v2: Host) -> None:
    v2.files("fs/user/job", memory_max=32 * GIB, memory_high=8 * GIB, memory_current=GIB)
    assert v2.memory() == (8, 7)


def test_swap_is_not_counted(v2: Host) -> None:
    v2.files("fs/user/job", memory_max=8 * GIB, memory_current=GIB)
    (v2.folder / "fs/user/job/memory.swap.max").write_text(f"{64 * GIB}\n")
    assert v2.memory() == (8, 7)


def test_page_cache_that_is_given_back_is_available(v2: Host) -> None:
    stat = f"anon {GIB}\ninactive_file {10 * GIB}\nactive_file {GIB}"
    v2.files("fs/user/job", memory_max=16 * GIB, memory_current=12 * GIB, memory_stat=stat)
    assert v2.memory() == (16, 14)


def test_in_a_container_the_mount_is_the_group(made: Host) -> None:
    made.mount("fs", "cgroup2")
    made.group("0::/")
    made.files("fs", memory_max=4 * GIB, memory_current=GIB, cpu_max="250000 100000")
    assert made.memory() == (4, 3)
    assert host.cpu_count() == 3


@pytest.mark.parametrize("path", ["/../other", "/somewhere/else"])
def test_a_group_outside_of_what_is_mounted_is_the_mount(made: Host, path: str) -> None:
    made.mount("fs", "cgroup2")
    made.group(f"0::{path}")
    made.files("fs", memory_max=4 * GIB, memory_current=GIB)
    made.files("other", memory_max=GIB, memory_current=0)
    assert made.memory() == (4, 3)


def test_version_1_goes_up_the_tree(v1: Host) -> None:
    unlimited = 9223372036854771712
    v1.files("fs/memory/docker/x", memory_limit_in_bytes=unlimited, memory_usage_in_bytes=GIB)
    v1.files("fs/memory/docker", memory_limit_in_bytes=8 * GIB, memory_usage_in_bytes=3 * GIB)
    v1.files("fs/memory", memory_limit_in_bytes=unlimited, memory_usage_in_bytes=30 * GIB)
    assert v1.memory() == (8, 5)


def test_version_1_counts_the_cache_of_the_whole_subtree(v1: Host) -> None:
    stat = f"inactive_file 0\ntotal_inactive_file {2 * GIB}"
    v1.files("fs/memory/docker/x", memory_limit_in_bytes=8 * GIB, memory_usage_in_bytes=3 * GIB, memory_stat=stat)
    assert v1.memory() == (8, 7)


def test_version_1_in_a_container_that_keeps_the_hosts_path(made: Host) -> None:
    made.mount("fs/memory", "cgroup", "rw,memory", root="/docker/x")
    made.group("11:memory:/docker/x/inner")
    made.files("fs/memory", memory_limit_in_bytes=8 * GIB, memory_usage_in_bytes=GIB)
    made.files("fs/memory/inner", memory_limit_in_bytes=6 * GIB, memory_usage_in_bytes=GIB)
    assert made.memory() == (6, 5)


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [("-1", "100000", 16), ("150000", "100000", 2), ("10000", "100000", 1), ("9900000", "100000", 16), ("1", "0", 16)],
)
def test_version_1_quota(v1: Host, quota: str, period: str, cpus: int) -> None:
    v1.files("fs/cpu,cpuacct/docker/x", cpu_cfs_quota_us=quota, cpu_cfs_period_us=period)
    assert host.cpu_count() == cpus


def test_a_quota_further_up_counts(v2: Host) -> None:
    v2.files("fs/user/job", cpu_max="800000 100000")
    v2.files("fs/user", cpu_max="400000 100000")
    assert host.cpu_count() == 4


def test_the_affinity_counts(v2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: {0, 5})
    v2.files("fs/user/job", cpu_max="800000 100000")
    assert host.cpu_count() == 2


@pytest.mark.parametrize("text", ["", "0::", "nonsense\n", "0::/user/job\n1:\n"])
def test_files_of_another_shape_say_nothing(v2: Host, text: str) -> None:
    (v2.folder / "proc" / "cgroup").write_text(text)
    (v2.folder / "proc" / "mountinfo").write_text("a line of another shape\n")
    assert v2.memory() == (64, 40)


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    here, there = host.disk_room(tmp_path), host.disk_room(tmp_path / "a" / "b")
    assert here is not None
    assert there is not None
    assert there.path == str(tmp_path / "a" / "b")
    assert there.total == here.total


def test_a_disk_that_cannot_be_asked_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert host.disk_room(tmp_path / "file" / "in it") is None
