"""What a request writes to the disk, and what a conversion takes, is told and refused before anything starts."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
from composing import composed
from small_models import LLAMA_7B, LLAMA_70B, Llama

from orchestrator.config import Config
from orchestrator.engine import interpreters
from orchestrator.errors import ConfigError, DoesNotFitError, EngineUnavailableError
from orchestrator.hardware import DRIVER_KEEPS, GIB
from orchestrator.pipeline import disk_needs, merged
from orchestrator.plan import huggingface
from orchestrator.plan.conversion import Conversion
from orchestrator.plan.disk import Need, Part, must_have_room, output_need, store_need
from orchestrator.report.console import size
from orchestrator.runfolder import RunFolder
from orchestrator.stages import exl2
from orchestrator.tasks import session
from orchestrator.tasks.convert import convert
from orchestrator.tasks.plan import plan
from orchestrator.tasks.session import Planned, look, open_session

pytestmark = pytest.mark.usefixtures("hydra", "every_engine")

SHAPE = Llama()
MERGED = 2 * sum(math.prod(shape) for shape in SHAPE.tensors().values())
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another disk than tmp_path's."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every disk has 1 MiB left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**20, 2**20))


class Place:
    """A base, an adapter, a store and a run folder."""

    def __init__(self, folder: Path, shape: Llama = SHAPE) -> None:
        self.folder = folder
        self.base = small_models.write_headers(folder / "base", shape)
        self.adapter = small_models.write_adapter(folder / "lora", SHAPE)
        self.store = folder / "store"
        (folder / "run").mkdir()
        self.run = RunFolder(folder / "run")

    def config(self, *argv: str, task: str = "run") -> Any:
        return composed(f"task={task}", f"model.path={self.base}", f"paths.artifacts={self.store}", *argv)

    def look(self, *argv: str, task: str = "plan") -> Planned:
        return look(self.config(*argv, task=task), planning=True)

    def json(self) -> Any:
        return json.loads((self.run.path / "plan.json").read_text())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_is_safetensors_already_writes_nothing(place: Place) -> None:
    planned = place.look("hardware=1x24gb", "quant=nf4")
    assert [need.bytes for need in planned.disk] == [0]
    assert planned.to_json()["disk_needed"]["path"] == str(place.store)


def test_a_merge_writes_its_bytes_and_then_no_more(place: Place) -> None:
    small_models.write_noise(place.base, SHAPE)
    config = place.config(f"model.adapter={place.adapter}")
    _, source = session.open_source(config, session.find_places(config, latest=False))
    [need] = disk_needs(config, source, None)
    model = merged(config, source, place.run)
    written = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
    assert need.bytes <= written < need.bytes + 2**14  # a header
    assert disk_needs(config, source, None)[0].bytes == 0
    partial = model.path.rename(f"{model.path}.partial")  # as a killed run leaves it
    assert disk_needs(config, source, None)[0].bytes == 0
    (partial / "model.safetensors").unlink()
    assert 0.8 * need.bytes < disk_needs(config, source, None)[0].bytes < need.bytes


@pytest.mark.parametrize(("bits", "gib"), [(4, 3.36), (8, 6.37)])
def test_an_exl2_model_takes_its_bits_and_twice_of_them_meanwhile(tmp_path: Path, bits: int, gib: float) -> None:
    place = Place(tmp_path, LLAMA_7B)
    planned = place.look("hardware=1x24gb", "backend=exllamav2", f"quant.bits={bits}")
    [need] = planned.disk
    [source, exl2] = need.parts
    assert source.adds == 0
    assert exl2.size == pytest.approx(gib * GIB, rel=0.01)
    assert 2 * exl2.size < exl2.adds == need.bytes < 2 * exl2.size + 4 * GIB  # and the calibration's hidden states
    assert planned.elsewhere


def test_another_type_of_the_merged_model_is_counted(place: Place) -> None:
    small, large = (
        place.look("hardware=1x24gb", f"model.adapter={place.adapter}", f"convert.dtype={dtype}").disk[0].bytes
        for dtype in ("float16", "float32")
    )
    assert large == 2 * small > 0


def test_a_plan_says_it_in_a_line_and_in_its_file(place: Place, capsys: pytest.CaptureFixture[str], full: None) -> None:
    argv = ("hardware=1x24gb", "backend=exllamav2", "quant.bits=4", f"model.adapter={place.adapter}")
    plan(place.config(*argv, task="plan"), place.run)
    said = " ".join(capsys.readouterr().out.split())
    needed = place.json()["disk_needed"]
    assert needed == {"path": str(place.store), "bytes": needed["bytes"], "free": 2**20}
    assert needed["bytes"] > 2**20
    assert f"on disk: {size(MERGED)} for the merged model and" in said
    assert "of EXL2 (at most" in said
    assert f"in {place.store}, 1.00 MiB free, which is too little (this machine)" in said


def answer(config: Config, run: RunFolder) -> None:
    with open_session(look(config, planning=False), run):
        pass


@pytest.mark.parametrize("task", ["run", "convert", "plan"])
def test_a_real_run_is_refused_before_anything_long(
    place: Place, monkeypatch: pytest.MonkeyPatch, full: None, task: str
) -> None:
    monkeypatch.setattr(session, "runnable", lambda plan, *_: (plan.chosen, "python"))
    (place.base / "tokenizer.json").write_text("{}")
    config = place.config(f"model.adapter={place.adapter}", "convert.dtype=float32", "hardware=cpu", task=task)
    action = {"run": answer, "convert": convert, "plan": plan}[task]
    with pytest.raises(DoesNotFitError) as caught:
        action(config, place.run)
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        f"the disk of paths.artifacts={place.store} has 1.00 MiB free and the request takes {size(2 * MERGED)}: "
        f"{size(2 * MERGED)} for the merged model. "
        "Free some (task=artifacts artifacts.action=prune), or set paths.artifacts=FOLDER elsewhere."
    )
    assert not place.store.exists()


def test_an_output_on_another_disk_needs_its_room_there(place: Place, elsewhere: Path) -> None:
    argv = (f"model.adapter={place.adapter}", f"output.path={elsewhere / 'new' / 'model'}", "hardware=1x24gb")
    planned = place.look(*argv)
    store, output = planned.disk
    assert output.bytes == store.bytes > 0
    assert planned.to_json()["output_needed"] == output.to_json()
    assert (output.path, store.path) == (elsewhere / "new" / "model", place.store)
    assert len(place.look(*argv, task="run").disk) == 1  # it writes no such folder
    here = place.look(*argv[:1], f"output.path={place.folder / 'model'}", "hardware=1x24gb")
    assert [need.bytes for need in here.disk] == [store.bytes, 0]  # hard links
    copied = place.look(f"output.path={place.folder / 'model'}", "hardware=1x24gb")
    assert [need.bytes for need in copied.disk] == [0, copied.spec.nbytes]  # the user's own files are never linked


def test_a_result_that_has_no_room_on_another_disk_is_refused(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**30, 2**30))
    for needed in (2**30, 2**31):
        part = Part("for the merged model", needed, 0)
        needs = [store_need(tmp_path, [part]), output_need(elsewhere / "a" / "b", tmp_path, [part], linked=True)]
        if needed == 2**30:
            must_have_room(needs)
            continue
        with pytest.raises(DoesNotFitError, match=r"output\.path=.*has 1\.00 GiB free and the request takes 2\.00 GiB"):
            must_have_room(needs)


def test_a_disk_that_cannot_be_asked_refuses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    need = store_need(tmp_path / "file" / "store", [Part("for the merged model", GIB, GIB)])
    assert need.free is None
    must_have_room([need])
    assert str(need) == f"1.00 GiB for the merged model in {tmp_path / 'file' / 'store'}"


EXL2 = ("backend=exllamav2", "quant.bits=4")


def planned(place: Place, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a plan prints, in one line."""
    plan(place.config(*argv, task="plan"), place.run)
    return " ".join(capsys.readouterr().out.split())


def test_a_plan_says_what_its_conversion_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path, LLAMA_70B)
    said = planned(place, capsys, "hardware=2x24gb", *EXL2)
    assert "converting to EXL2: at most " in said
    needed = place.json()["conversion_needed"]
    assert f"{size(needed['gpu']['bytes'])} of one GPU (23.56 GiB free)" in said
    assert f"and {size(needed['host']['bytes'])} of host memory" in said
    assert 22 * GIB < needed["gpu"]["bytes"] < needed["gpu"]["free"] == 24 * GIB - DRIVER_KEEPS
    assert 24 * GIB < needed["host"]["bytes"] < 40 * GIB  # exllamav2's documentation says a machine of 64 GB
    assert needed["host"]["free"] is None  # a profile's
    assert "converting" not in planned(place, capsys, "hardware=2x24gb", "quant=nf4")
    assert place.json()["conversion_needed"] is None


def test_a_conversion_that_no_card_holds_is_said_and_ends_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, LLAMA_70B)
    with pytest.raises(
        DoesNotFitError, match=r"takes 23\.\d+ GiB of one GPU, and none has more than 15\.56 GiB"
    ) as caught:
        planned(place, capsys, "hardware=4x24gb", "hardware.memory_gib=16", *EXL2)
    assert caught.value.exit_code == 3
    assert "hardware.memory_gib" in str(caught.value)
    said = capsys.readouterr().out
    assert said == ""  # kept in a file, it would be taken for a plan
    written = place.json()
    assert (written["fits"], written["command"], written["candidates"][0]["fits"]) == (False, None, False)
    assert written["reasons"] == written["candidates"][0]["reasons"]
    assert "the conversion to EXL2 takes 23." in written["reasons"][0]
    assert written["conversion_needed"]["gpu"]["free"] == 16 * GIB - DRIVER_KEEPS


def test_a_plan_that_is_refused_shows_what_would_not_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, LLAMA_7B)
    monkeypatch.setattr(exl2, "host_needed", lambda source, bits, *_: int(bits * GIB))
    monkeypatch.setattr(exl2, "most_free", lambda *_, **__: (24 * GIB, 5 * GIB))
    with pytest.raises(DoesNotFitError, match=r"the conversion to EXL2 takes 8\.00 GiB of host memory"):
        planned(place, capsys, "hardware=1x24gb", "backend=exllamav2")
    said = capsys.readouterr().out
    assert said.startswith("No plan: what was asked for is refused. What was looked at")
    assert not any(words in said for words in ("Plan: ", "best first", "To run it"))
    written = place.json()
    assert (written["fits"], written["bits"], written["command"]) == (False, 8, None)
    assert [(c["bits"], c["fits"]) for c in written["candidates"]] == [(6, True), (4, True), (8, False)]


@pytest.mark.parametrize("engine", ["backend=exllamav2", "backend=auto"])
@pytest.mark.parametrize("cards", ["1x16gb", "2x16gb", "2x24gb"])
def test_what_is_suggested_needs_no_conversion_that_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, cards: str
) -> None:
    """Each suggestion is typed: it fits, and is not refused then."""
    monkeypatch.setattr(huggingface, "disk_room", lambda folder: 1 << 40)
    place = Place(tmp_path, LLAMA_70B)
    argv = [engine, "quant.bits=7", f"hardware={cards}", "hardware.margin_gib=0"]
    found = place.look(*argv).plan
    assert not found.chosen.fits
    assert bool(found.unmade) == (cards != "2x24gb")
    assert found.changes
    for change in found.changes:
        typed = [setting.replace("=/path", f"={tmp_path}") for setting in change.settings]
        keys = {setting.partition("=")[0] for setting in typed}
        if change.cards:
            typed.append(f"hardware.cards={change.cards.split('(')[1].split()[0]}")
        then = place.look(*[text for text in argv if text.partition("=")[0] not in keys], *typed)
        assert then.plan.chosen.fits, change.said
        assert then.conversion is None or not then.conversion.lacks, change.said


def test_where_nothing_is_left_to_suggest_the_conversion_is_why(tmp_path: Path) -> None:
    place = Place(tmp_path, LLAMA_70B)
    planned = place.look("backend=exllamav2", "quant.bits=5", "hardware=2x16gb")
    without = replace(planned, plan=replace(planned.plan, changes=()))
    for one, some in ((planned, True), (without, False)):
        with pytest.raises(DoesNotFitError) as caught:
            session.fits(one)
        assert ("What would fit: " in str(caught.value)) is some
        assert "Nothing that has to be converted first would: the conversion to EXL2 takes 23." in str(caught.value)
        assert "quant.bits=2" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "instead"),
    [
        (["quant.bits=2.5", "hardware=4x16gb"], "backend=bitsandbytes quant.bits=4"),
        (["backend=exllamav2", "quant.bits=4", "hardware=4x16gb"], "backend=bitsandbytes"),
        (["quant=exl2", "quant.bits=3", "hardware=4x16gb"], "backend=bitsandbytes quant.bits=4 quant.method=auto"),
        (["quant.bits=2.5", "quant.head_bits=8", "hardware=4x16gb"], "backend=bitsandbytes quant.bits=4 quant.head"),
        (["quant.bits=2.25", "hardware=2x16gb"], ""),  # it does not fit there
        (["backend=exllamav2", "quant.bits=4", "hardware=4x16gb", "backend.engine_args.fasttensors=true"], ""),
    ],
)
def test_what_quantizes_when_it_loads_is_named_with_bits_that_it_has(
    tmp_path: Path, argv: list[str], instead: str
) -> None:
    place = Place(tmp_path, LLAMA_70B)
    with pytest.raises(DoesNotFitError, match="the conversion to EXL2 takes") as caught:
        session.can_run(place.look(*argv))
    said = str(caught.value).partition("; or type ")[2]
    assert said.startswith(instead)
    assert bool(said) == bool(instead)
    if instead:
        typed = said.partition(", which")[0].split()
        keys = {setting.partition("=")[0] for setting in typed}
        kept = [text for text in argv if text.partition("=")[0] not in keys]
        session.fits(place.look(*kept, *typed))


def test_what_quantizes_when_it_loads_is_not_named_where_it_runs_no_adapter(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exl2, "needed", lambda *_: 48 * GIB)
    argv = ("backend=exllamav2", "quant.bits=4", "hardware=1x24gb", f"model.adapter={place.adapter}")
    for more, named in (((), True), (("model.merge=false",), False)):
        with pytest.raises(DoesNotFitError, match="the conversion to EXL2 takes") as caught:
            session.can_run(place.look(*argv, *more))
        assert ("backend=bitsandbytes" in str(caught.value)) is named


def test_where_the_engine_is_free_what_cannot_be_converted_is_not_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, LLAMA_7B)
    argv = ("hardware=1x24gb", "hardware.memory_gib=9")
    assert "converting to EXL2" in planned(place, capsys, *argv)
    assert place.json()["backend"] == "exllamav2"
    monkeypatch.setattr(exl2, "needed", lambda *_: 24 * GIB)
    assert "converting" not in planned(place, capsys, *argv)
    first, *others = place.json()["candidates"]
    assert (place.json()["backend"], first["fits"]) == ("bitsandbytes", True)
    why = "its conversion to EXL2 takes 24.00 GiB of one GPU, and none has more than 8.56 GiB free"
    assert [c["reasons"] for c in others if c["backend"] == "exllamav2" and c["bits"] == 6] == [[why]]
    assert f"exllamav2 exl2 (6 bits) is not taken: {why}" in place.json()["notes"]
    assert not any(c["fits"] for c in others if c["backend"] == "exllamav2")


def test_a_plan_refuses_what_its_conversion_would(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    file = place.folder / "mine.json"
    file.write_text("{}")
    argv = ("hardware=1x24gb", *EXL2)
    with pytest.raises(ConfigError, match=rf"quant\.measurement={file} is not of this model"):
        planned(place, capsys, *argv, f"quant.measurement={file}")
    assert capsys.readouterr().out == ""
    written = place.json()
    assert (written["fits"], written["command"]) == (False, None)
    assert written["reasons"] == [next(line for line in written["reasons"] if f"quant.measurement={file}" in line)]
    with pytest.raises(ConfigError, match=r"calibration\.length=4096 is more than the model's 2048 positions"):
        planned(place, capsys, *argv, "quant.calibration.length=4096")
    config = SHAPE.config() | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (place.base / "config.json").write_text(json.dumps(config))
    planned(place, capsys, *argv, "model.max_context=2048")
    with pytest.raises(ConfigError, match="exllamav2 does not scale beyond 2048 tokens"):
        planned(place, capsys, *argv, "model.max_context=4096")


def test_a_conversion_without_its_engine_merges_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreters, "missing_here", lambda backend: list(backend.packages))
    argv = ("hardware=1x24gb", *EXL2, f"model.adapter={place.adapter}", f"paths.engines={place.folder / 'none'}")
    with pytest.raises(EngineUnavailableError, match="backend=exllamav2 is not installed here") as caught:
        convert(place.config(*argv, task="convert"), place.run)
    assert caught.value.exit_code == 4
    assert not place.store.exists()


def test_the_line_is_in_plain_words(tmp_path: Path) -> None:
    parts = (Part("for the merged model", int(13.5 * GIB), int(13.5 * GIB)), Part("of EXL2", 4 * GIB, 8 * GIB))
    assert str(Need("paths.artifacts", Path("/store"), parts, 210 * GIB)) == (
        "13.50 GiB for the merged model and 4.00 GiB of EXL2 (at most 8.00 GiB while it is made) in /store, "
        "210.00 GiB free"
    )


@pytest.mark.parametrize(
    ("free", "said", "refused"),
    [
        (24 * GIB, "(24.00 GiB free)", False),
        (20 * GIB, "(20.00 GiB free, which may be too little)", False),  # the need is a bound
        (10 * GIB, "(10.00 GiB free, which is too little)", True),
        (None, "23.00 GiB of one GPU and", False),
    ],
)
def test_a_conversion_is_refused_where_it_is_far_too_large(free: int | None, said: str, refused: bool) -> None:
    found = Conversion("to EXL2", 23 * GIB, free, GIB, None)
    assert said in str(found)
    assert bool(found.lacks) == refused
