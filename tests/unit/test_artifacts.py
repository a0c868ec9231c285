"""The store: built once, continued after a kill, trusted only with its manifest, honest about disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.artifacts import MANIFEST, RECIPE_NAME, Artifact, Built, Recipe, Store, bytes_below, kept, last_used
from orchestrator.checkpoint.digest import digest
from orchestrator.checkpoint.fingerprint import differences
from orchestrator.config import Config
from orchestrator.errors import DoesNotFitError, RequestError, StageError
from orchestrator.report import console
from orchestrator.runfolder import RunFolder
from orchestrator.tasks import artifacts as artifacts_module
from orchestrator.tasks.artifacts import artifacts as artifacts_task

ROOT = Path(__file__).parents[2]
RECIPE = Recipe("merge", 3, {"dtype": "auto", "shard_size": 5}, {"base": {"size": 7, "sha256": "ab"}})


def write_two(folder: Path) -> Built:
    """A stage: two files."""
    (folder / "a.safetensors").write_bytes(b"weights" * 100)
    (folder / "config.json").write_text("{}")
    return Built({"base": "/data/base"}, {})


def build(
    store: Store,
    recipe: Recipe = RECIPE,
    make: Callable[[Path], Built] = write_two,
    needed: int = 1,
    changed: Callable[[], list[str]] = list,
) -> tuple[Artifact, bool]:
    return store.build(recipe, make, needed, changed, waiting=lambda: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


# The key


def test_the_key_does_not_depend_on_the_order_of_what_it_is_made_of() -> None:
    turned = Recipe("merge", 3, {"shard_size": 5, "dtype": "auto"}, {"base": {"sha256": "ab", "size": 7}})
    assert turned.name == RECIPE.name


def test_the_key_is_the_same_in_every_process_and_version() -> None:
    assert RECIPE.name == "merge-20058d6d9f8e1cf41139"


@pytest.mark.parametrize(
    "changed",
    [
        replace(RECIPE, stage="convert"),
        replace(RECIPE, version=4),
        replace(RECIPE, options={"dtype": "float16", "shard_size": 5}),
        replace(RECIPE, inputs={"base": {"size": 8, "sha256": "ab"}}),
        replace(RECIPE, inputs={**RECIPE.inputs, "adapter0": {}}),
    ],
)
def test_the_key_changes_with_every_part(changed: Recipe) -> None:
    assert changed.name.partition("-")[2] != RECIPE.name.partition("-")[2]


# Building


def test_an_artifact_is_built_once_and_found_afterwards(store: Store) -> None:
    artifact, built = build(store)
    again, built_again = build(store, make=lambda folder: pytest.fail("built twice"))
    assert (built, built_again) == (True, False)
    assert again.path == artifact.path == store.root / RECIPE.name
    assert again.manifest == artifact.manifest
    assert store.partials() == []


def test_the_manifest_tells_what_it_was_made_of(store: Store) -> None:
    artifact, _ = build(store)
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    assert manifest["inputs"] == RECIPE.inputs
    assert manifest["options"] == RECIPE.options
    assert (manifest["stage"], manifest["stage_version"]) == ("merge", 3)
    file = artifact.path / "a.safetensors"
    said = {"size": 700, "xxh3_128": digest(file), "mtime_ns": file.stat().st_mtime_ns}
    assert manifest["files"]["a.safetensors"] == said
    assert set(manifest["files"]) == {"a.safetensors", "config.json"}
    assert artifact.size == 702


def test_digests_that_the_stage_computed_are_taken(store: Store) -> None:
    artifact, _ = build(store, make=lambda folder: replace(write_two(folder), digests={"config.json": "abc"}))
    assert artifact.manifest["files"]["config.json"]["xxh3_128"] == "abc"


def test_using_an_artifact_makes_it_young_again(store: Store) -> None:
    artifact, _ = build(store)
    os.utime(artifact.path / MANIFEST, (1, 1))
    assert last_used(artifact) == 1
    build(store)
    assert time.time() - last_used(artifact) < 60


def fails(folder: Path) -> Built:
    (folder / "first").write_text("1")
    raise StageError("no")


def test_a_build_that_fails_is_no_artifact_and_is_continued(store: Store) -> None:
    def goes_on(folder: Path) -> Built:
        assert (folder / "first").read_text() == "1"
        return write_two(folder)

    with pytest.raises(StageError):
        build(store, make=fails)
    assert store.find(RECIPE) is None
    assert store.finished() == []
    assert [path.name for path in store.partials()] == [f"{RECIPE.name}.partial"]
    assert build(store, make=goes_on)[1]


def test_a_build_that_fails_before_it_wrote_anything_leaves_nothing(store: Store) -> None:
    def refuses(folder: Path) -> Built:
        raise StageError("no")

    with pytest.raises(StageError):
        build(store, make=refuses)
    assert store.partials() == []


def test_inputs_that_change_during_the_build_are_noticed(store: Store) -> None:
    with pytest.raises(StageError, match=r"changed while they were read: base/config\.json"):
        build(store, changed=lambda: ["base/config.json"])
    assert store.find(RECIPE) is None
    assert store.partials() == []


def test_an_unfinished_build_of_files_that_changed_since_is_named(store: Store) -> None:
    def files(size: int) -> dict[str, Any]:
        named = [{"name": "config.json", "size": 2}, {"name": "a.bin", "size": size}]
        return {"base": {"format": "bin", "files": named[:1], "weights": named[1:]}}

    begun = Recipe("merge", "1", {}, files(1), ("/data/base",))
    with pytest.raises(StageError):
        build(store, begun, make=fails)
    assert store.outdated(begun) is None
    now = replace(begun, inputs=files(2))
    assert store.outdated(now) == (store.root / f"{begun.name}.partial", ["base/a.bin"])
    assert store.outdated(replace(now, sources=("/data/other",))) is None
    assert store.outdated(replace(now, stage="convert")) is None


def test_an_unfinished_build_has_its_recipe_as_long_as_that_is_whole(store: Store) -> None:
    recipe = replace(RECIPE, sources=("/data/base",), settings={"quant.bits": 4.0, "quant.measurement": None})
    assert recipe.name == RECIPE.name  # for a person only
    with pytest.raises(StageError):
        build(store, recipe, make=fails)
    partial = store.root / f"{recipe.name}.partial"
    assert list(store.unfinished()) == [(partial, recipe)]
    (store.root / "merge-0123.partial").mkdir()
    with store._lock(recipe.name, lambda: None):  # a running process is at it
        assert list(store.unfinished()) == []
    said = json.loads((partial / RECIPE_NAME).read_text())
    for damage in ({"stage": "exl2"}, {"sources": 7}, {"settings": [1]}, {"more": 1}, {"inputs": []}):
        (partial / RECIPE_NAME).write_text(json.dumps(said | damage))
        assert list(store.unfinished()) == []
    for text in ("{", "[]"):
        (partial / RECIPE_NAME).write_text(text)
        assert list(store.unfinished()) == []


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ({"a": {"files": [{"name": "x", "size": 1}]}}, {"a": {"files": [{"name": "x", "size": 1}]}}, []),
        ({"a": {"files": [{"name": "x", "size": 1}]}}, {"a": {"files": [{"name": "y", "size": 1}]}}, ["a/x", "a/y"]),
        ({"a": {"format": "bin"}}, {"a": {"format": "safetensors"}}, ["a"]),
        ({"a": "one"}, {"a": "two", "b": {}}, ["a", "b"]),
    ],
)
def test_what_differs_is_named(old: dict[str, Any], new: dict[str, Any], names: list[str]) -> None:
    assert differences(old, new) == names


# Two processes, and kills

CHILD = """
import sys, time
from pathlib import Path
from orchestrator.artifacts import Built, Recipe, Store

root, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def make(folder):
    with log.open("a") as file:
        file.write("built\\n")
    (folder / "first").write_text("1")
    print("building", flush=True)
    time.sleep(seconds)
    (folder / "second").write_text("2")
    return Built({}, {})

recipe = Recipe("merge", 1, {}, {})
artifact, built = Store(root).build(recipe, make, 1, list, lambda: print("waiting", flush=True))
print("built" if built else "found", flush=True)
"""


def builder(store: Store, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(store.root), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture
def killed_builder(store: Store, tmp_path: Path) -> None:
    """A build of Recipe("merge", 1, {}, {}) whose process was killed in its middle."""
    child = builder(store, tmp_path / "log", 60)
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_two_processes_at_once_build_it_once(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [builder(store, log, 0.7) for _ in range(2)]
    said = [child.communicate(timeout=60)[0].split() for child in both]
    assert [child.returncode for child in both] == [0, 0]
    assert log.read_text() == "built\n"
    assert sorted(words[-1] for words in said) == ["built", "found"]
    assert ["waiting", "found"] in said


def test_a_lock_that_is_held_is_reported_and_its_folder_is_no_leftover(store: Store, tmp_path: Path) -> None:
    child = builder(store, tmp_path / "log", 60)
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    assert store.partials() == []
    child.kill()
    child.communicate()
    assert len(store.partials()) == 1


@pytest.mark.usefixtures("killed_builder")
def test_a_killed_build_is_no_artifact_and_the_next_one_continues_it(store: Store) -> None:
    recipe = Recipe("merge", 1, {}, {})

    def goes_on(folder: Path) -> Built:
        assert {path.name for path in folder.iterdir()} == {"first", RECIPE_NAME}
        return write_two(folder)

    assert store.find(recipe) is None
    artifact, built = build(store, recipe, make=goes_on)
    assert built
    assert set(artifact.manifest["files"]) == {"first", "a.safetensors", "config.json"}


# What is not trusted


def test_without_a_manifest_there_is_no_artifact(store: Store) -> None:
    artifact, _ = build(store)
    (artifact.path / MANIFEST).unlink()
    assert store.find(RECIPE) is None
    assert store.finished() == []
    assert build(store)[1]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', "\x00\x01", '{"files": {"a": 1}}'])
def test_a_damaged_manifest_is_no_manifest(store: Store, text: str) -> None:
    artifact, _ = build(store)
    (artifact.path / MANIFEST).write_text(text)
    assert store.find(RECIPE) is None
    assert build(store)[1]
    assert store.verify(store.finished()[0]) == []


def test_verify_finds_nothing_wrong_with_what_was_just_built(store: Store) -> None:
    assert store.verify(build(store)[0]) == []


def damage_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_length(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("damage", "said"),
    [(damage_byte, "another digest"), (damage_length, "701 bytes, not 700"), (Path.unlink, "is missing")],
)
def test_verify_names_the_damaged_file(store: Store, damage: Callable[[Path], Any], said: str) -> None:
    artifact, _ = build(store)
    damage(artifact.path / "a.safetensors")
    [problem] = store.verify(artifact)
    assert problem.startswith("a.safetensors")
    assert said in problem


# Disks


@pytest.mark.parametrize("root", ["/dev/null/x", "/proc/x"])
def test_a_store_that_cannot_be_written_is_the_requests_fault(root: str) -> None:
    with pytest.raises(RequestError, match=f"paths.artifacts={root}") as caught:
        build(Store(Path(root)))
    assert caught.value.exit_code == 2


def test_too_little_room_is_said_before_anything_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 2**30))
    with pytest.raises(DoesNotFitError, match=r"1\.00 GiB free.*2\.00 GiB") as caught:
        build(store, needed=2**31)
    assert caught.value.exit_code == 3
    assert "prune" in caught.value.hint
    assert store.partials() == []


def test_what_a_killed_build_has_written_is_not_needed_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = store.root / f"{RECIPE.name}.partial"
    partial.mkdir(parents=True)
    (partial / "there").write_bytes(b"x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 500))
    assert build(store, needed=1500)[1]


def test_a_disk_that_fills_up_is_told_and_the_build_can_go_on(store: Store) -> None:
    def full(folder: Path) -> Built:
        (folder / "first").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "first"))

    with pytest.raises(StageError, match="is full") as caught:
        build(store, make=full)
    assert caught.value.exit_code == 1
    assert len(store.partials()) == 1
    assert build(store)[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_really_fills_up_leaves_no_artifact(small_disk: Path) -> None:
    def too_much(folder: Path) -> Built:
        (folder / "large").write_bytes(b"x" * 3 * 2**20)
        return Built({}, {})

    store = Store(small_disk / "artifacts")
    with pytest.raises(StageError, match="is full"):
        build(store, make=too_much)
    assert store.find(RECIPE) is None
    with pytest.raises(DoesNotFitError):
        build(store, needed=3 * 2**20)


# task=artifacts


@pytest.fixture
def three(store: Store) -> dict[str, Artifact]:
    """Artifacts that were last used now, 10 and 100 days ago, and an unfinished one of 50 days ago."""
    found = {}
    for i, days in enumerate((0, 10, 100)):
        artifact, _ = build(store, replace(RECIPE, version=i))
        used = time.time() - days * 86400
        os.utime(artifact.path / MANIFEST, (used, used))
        found[str(days)] = artifact
    partial = store.root / "merge-0123.partial"
    partial.mkdir()
    (partial / "first").write_text("1")
    used = time.time() - 50 * 86400
    os.utime(partial / "first", (used, used))
    os.utime(partial, (used - 1, used - 1))
    return found


def run_task(store: Store, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    config = Config()
    config.paths.artifacts = str(store.root)
    for name, value in settings.items():
        setattr(config.artifacts, name, value)
    artifacts_task(config, RunFolder(tmp_path))
    result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    return result


def test_list_has_the_last_used_first(store: Store, three: dict[str, Artifact], tmp_path: Path) -> None:
    result = run_task(store, tmp_path)
    assert [row["name"] for row in result["artifacts"]] == [three[days].name for days in ("0", "10", "100")]
    assert result["partials"] == ["merge-0123.partial"]


@pytest.mark.parametrize(
    ("unused_days", "left", "unfinished"),
    [(30, ["0", "10"], 0), (5, ["0"], 0), (70, ["0", "10"], 1), (200, ["0", "10", "100"], 1), (0, [], 0)],
)
def test_prune_removes_what_is_old_finished_or_not(
    store: Store, three: dict[str, Artifact], tmp_path: Path, unused_days: float, left: list[str], unfinished: int
) -> None:
    result = run_task(store, tmp_path, action="prune", unused_days=unused_days)
    assert {artifact.name for artifact in store.finished()} == {three[days].name for days in left}
    assert len(store.partials()) == unfinished
    assert len(result["removed"]) == 4 - len(left) - unfinished


def test_an_unfinished_build_is_as_young_as_what_it_last_wrote(
    store: Store, three: dict[str, Artifact], tmp_path: Path
) -> None:
    (store.root / "merge-0123.partial" / "second").write_text("2")
    assert run_task(store, tmp_path, action="prune", unused_days=30)["removed"] == [three["100"].name]
    assert len(store.partials()) == 1


def test_an_unfinished_build_has_the_size_of_all_that_is_below_it_each_file_once(
    store: Store, three: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = store.root / "merge-0123.partial"
    kept = partial / "work" / "kept"
    kept.mkdir(parents=True)
    (partial / "work" / "states").write_bytes(bytes(3 << 20))
    os.link(partial / "work" / "states", kept / "states")  # the same bytes under another name
    (partial / "work" / "model").symlink_to(tmp_path / "a-model-that-has-gone")
    assert bytes_below(partial) == pytest.approx(3 << 20, abs=200)
    run_task(store, tmp_path)
    assert "3.0 MiB" in capsys.readouterr().out
    partial.rename(store.root / f"{RECIPE.name}.partial")
    assert store.to_write(RECIPE, 5 << 20) == pytest.approx(2 << 20, abs=200)
    assert run_task(store, tmp_path, action="prune", unused_days=0)["bytes"] > 3 << 20
    assert "(3.00 MiB)" in capsys.readouterr().out


def test_prune_by_name_removes_that_one_whatever_its_age(
    store: Store, three: dict[str, Artifact], tmp_path: Path
) -> None:
    run_task(store, tmp_path, action="prune", name=three["0"].name)
    assert {artifact.name for artifact in store.finished()} == {three["10"].name, three["100"].name}
    assert len(store.partials()) == 1


def test_a_dry_run_removes_nothing(
    store: Store, three: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_task(store, tmp_path, action="prune", dry_run=True)
    assert set(result["removed"]) == {three["100"].name, "merge-0123.partial"}
    assert "would remove" in capsys.readouterr().out
    assert len(store.finished()) == 3
    assert len(store.partials()) == 1


def test_verify_of_a_damaged_store_fails_and_names_it(
    store: Store, three: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_byte(three["10"].path / "a.safetensors")
    with pytest.raises(StageError, match=f"1 of 3.*{three['10'].name}"):
        run_task(store, tmp_path, action="verify")
    out = capsys.readouterr().out
    assert f"{three['10'].name}: a.safetensors" in out
    assert f"{three['0'].name}: ok" in out


def test_an_unknown_name_is_answered_with_a_near_one(store: Store, three: dict[str, Artifact], tmp_path: Path) -> None:
    name = three["0"].name
    with pytest.raises(RequestError, match=f"Did you mean.*{name}"):
        run_task(store, tmp_path, action="prune", name=f"{name[:-1]}_")


def test_an_empty_store_is_no_error(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_task(store, tmp_path)["artifacts"] == []
    assert run_task(store, tmp_path, action="verify")["verified"] == {}
    assert f"nothing to verify in {store.root}" in capsys.readouterr().out
    assert run_task(store, tmp_path, action="prune")["removed"] == []


# What is damaged


@pytest.fixture(params=["{", "", None], ids=["half a manifest", "an empty one", "none"])
def damaged(store: Store, three: dict[str, Artifact], request: pytest.FixtureRequest) -> str:
    """The name of an artifact of `three` that has lost its manifest."""
    artifact = three["10"]
    manifest = artifact.path / MANIFEST
    manifest.unlink() if request.param is None else manifest.write_text(request.param)
    return artifact.name


def test_a_damaged_artifact_is_listed_and_told(
    store: Store, damaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_task(store, tmp_path)
    assert result["damaged"] == [damaged]
    assert len(result["artifacts"]) == 2
    [row] = [line for line in capsys.readouterr().out.splitlines() if damaged in line]
    assert row.rstrip().endswith("damaged")
    for name in (None, damaged):
        with pytest.raises(StageError, match=f"1 of .*{damaged}"):
            run_task(store, tmp_path, action="verify", name=name)
        assert f"{damaged}: {MANIFEST} is missing or cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("by_name", [True, False])
def test_a_damaged_artifact_is_pruned(store: Store, damaged: str, tmp_path: Path, by_name: bool) -> None:
    settings = {"name": damaged} if by_name else {"unused_days": 200}
    assert run_task(store, tmp_path, action="prune", dry_run=True, **settings)["removed"][-1] == damaged
    assert (store.root / damaged).is_dir()
    assert run_task(store, tmp_path, action="prune", **settings)["removed"][-1] == damaged
    assert not (store.root / damaged).exists()
    assert len(store.finished()) == 2


def test_a_folder_that_is_nobodys_artifact_is_left_alone(
    store: Store, three: dict[str, Artifact], tmp_path: Path
) -> None:
    (store.root / "photos").mkdir()
    (store.root / "photos-2020").mkdir()
    result = run_task(store, tmp_path, action="prune", unused_days=0)
    assert len(result["removed"]) == 4
    assert {path.name for path in store.root.iterdir()} == {".locks", "photos", "photos-2020"}


def test_an_unfinished_one_is_pruned_by_its_name(store: Store, three: dict[str, Artifact], tmp_path: Path) -> None:
    name = "merge-0123.partial"
    assert run_task(store, tmp_path, action="prune", name=name)["removed"] == [name]
    assert store.partials() == []
    assert len(store.finished()) == 3


def test_an_unfinished_one_that_is_being_built_is_not_pruned(store: Store, tmp_path: Path) -> None:
    child = builder(store, tmp_path / "log", 60)
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    name = f"{Recipe('merge', 1, {}, {}).name}.partial"
    try:
        with pytest.raises(RequestError, match="is being built"):
            run_task(store, tmp_path, action="prune", name=name)
        assert run_task(store, tmp_path, action="prune")["removed"] == []
        assert (store.root / name).is_dir()
    finally:
        child.kill()
        child.communicate()
    assert run_task(store, tmp_path, action="prune", name=name)["removed"] == [name]


def test_a_manifest_without_a_report_is_listed(store: Store, tmp_path: Path) -> None:
    artifact, _ = build(store)
    for report in ({}, {"report": None}, {"report": []}):
        rest = {key: value for key, value in artifact.manifest.items() if key != "report"}
        (artifact.path / MANIFEST).write_text(json.dumps(rest | report))
        assert [row["name"] for row in run_task(store, tmp_path)["artifacts"]] == [artifact.name]


def test_a_name_is_on_one_line_of_80_columns(
    store: Store,
    three: dict[str, Artifact],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, artifact in three.items():
        source = artifact.manifest | {"report": {"source": f"/data/models/{name}/of/somebody/with/long/names"}}
        (artifact.path / MANIFEST).write_text(json.dumps(source))
    partial = f"{RECIPE.name}.partial"
    (store.root / partial).mkdir()
    wide = console.console
    monkeypatch.setattr(artifacts_module, "console", lambda stream: narrow(wide(stream)))
    run_task(store, tmp_path)
    out = capsys.readouterr().out
    assert all(name in out for name in (partial, *(artifact.name for artifact in three.values())))
    assert max(map(len, out.splitlines())) <= 80


def narrow(console: Any) -> Any:
    console.width = 80
    return console


# What is in use


def test_prune_leaves_alone_what_a_run_loads(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with kept():
        artifact, _ = build(store)
        for settings in ({"unused_days": 0}, {"name": artifact.name}, {"unused_days": 0, "dry_run": True}):
            result = run_task(store, tmp_path, action="prune", **settings)
            assert (result["removed"], result["in_use"]) == ([], [artifact.name])
            assert f"kept {artifact.name}: a run is building or loading it" in capsys.readouterr().out
        build(store)  # a second use is no obstacle
    assert store.verify(artifact) == []
    assert run_task(store, tmp_path, action="prune", unused_days=0)["removed"] == [artifact.name]


def test_outside_of_a_run_nothing_is_marked(store: Store, tmp_path: Path) -> None:
    with kept():
        pass
    artifact, _ = build(store)
    assert not (store.root / ".locks" / f"{artifact.name}.use").exists()


def test_a_store_where_nothing_can_be_marked_is_used_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(store)

    def read_only(*args: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with kept():
        assert build(store)[1] is False


def test_a_store_that_is_a_file_is_the_requests_fault(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for action in ("list", "verify", "prune"):
        with pytest.raises(RequestError, match=f"paths.artifacts={file} is a file") as caught:
            run_task(Store(file), tmp_path, action=action)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("harm", ["missing", "shorter"])
def test_an_artifact_that_lost_a_file_is_built_again(tmp_path: Path, harm: str) -> None:
    store, recipe = Store(tmp_path), Recipe("merge", "1", {}, {})

    def make(partial: Path) -> Built:
        (partial / "weights").write_bytes(b"12345678")
        return Built({}, {})

    def build() -> bool:
        return store.build(recipe, make, 8, changed=list, waiting=lambda: None)[1]

    assert build()
    weights = tmp_path / recipe.name / "weights"
    weights.unlink() if harm == "missing" else weights.write_bytes(b"1234")
    assert store.find(recipe) is None
    assert build()
    assert weights.read_bytes() == b"12345678"
    assert not build()


def test_a_file_that_was_edited_in_place_is_built_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    artifact, _ = build(store)
    file = artifact.path / "a.safetensors"
    output = store.root.parent / "output"
    os.link(file, output)
    damage_byte(output)
    os.utime(output, ns=(1, file.stat().st_mtime_ns + 1))
    assert build(store)[1]
    assert f"{file} has changed since it was built: it is built again" in caplog.text
    assert file.read_bytes() == b"weights" * 100
    assert not build(store)[1]


def test_a_copied_store_is_taken_after_one_look_at_its_digests(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, _ = build(store)
    file = artifact.path / "a.safetensors"
    built = file.stat().st_mtime_ns
    os.utime(file, (1, 1))
    assert not build(store)[1]
    assert file.stat().st_mtime_ns == built
    monkeypatch.setattr("orchestrator.artifacts.digest", lambda path: pytest.fail("read twice"))
    assert not build(store)[1]


def test_a_manifest_without_times_is_no_manifest(store: Store) -> None:
    artifact, _ = build(store)
    rest = {name: {"size": e.size, "xxh3_128": e.xxh3_128} for name, e in artifact.files.items()}
    (artifact.path / MANIFEST).write_text(json.dumps(artifact.manifest | {"files": rest}))
    assert build(store)[1]
