"""Offload through the real engine on the CPU: answers, placement, the folder and what is left in it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asking import answer, load_engine, make_plan
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.backends.hf_tensors import offload_hooks
from orchestrator.backends.huggingface import HuggingFaceEngine
from orchestrator.backends.offload_folder import OffloadFolder
from orchestrator.backends.protocol import LoadPlan, Request
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.config import (
    BackendConfig,
    Config,
    HardwareConfig,
    ModelConfig,
    OffloadConfig,
    QuantConfig,
    RunConfig,
)
from orchestrator.engine.handle import EngineProcess
from orchestrator.engine.placement import bytes_per_device, check_placement
from orchestrator.errors import DoesNotFitError, EngineError
from orchestrator.hardware import GIB, Hardware
from orchestrator.plan import planner
from orchestrator.plan.types import Candidate

PROMPT = [70, 71, 72, 73, 74]
Start = Callable[..., EngineProcess]


def offloaded(checkpoint: Path, folder: Path, bits: int = 32) -> tuple[Candidate, LoadPlan]:
    """The plan for a host that is one byte too small, and keeps nothing free."""
    spec = model_spec(open_checkpoint(checkpoint))
    config = Config(
        backend=BackendConfig("transformers"),
        quant=QuantConfig(bits=bits),
        model=ModelConfig(max_context=512),
        run=RunConfig(in_flight=4),
        hardware=HardwareConfig(margin_gib=0),
    )
    roomy = planner.make_plan(config, spec, Hardware("cpu", (), GIB * 64, GIB * 64, 2)).chosen
    small = Hardware("cpu", (), GIB * 64, roomy.host.total - 1, 2)
    chosen = planner.make_plan(replace(config, offload=OffloadConfig(str(folder))), spec, small).chosen
    assert chosen.fits
    return chosen, make_plan(
        checkpoint,
        bits=float(bits),
        dtype=chosen.dtype,
        max_in_flight=4,
        device_map=chosen.device_map,
        weights=chosen.weights,
        offload_folder=chosen.offload_folder,
    )


def ask(engine: EngineProcess | HuggingFaceEngine) -> list[list[int]]:
    requests = [Request(str(i), PROMPT[i:], max_tokens=16) for i in range(3)]
    return [a.tokens for a in answer(engine, requests).values()]


def test_from_disk_it_answers_as_from_memory_and_leaves_nothing(
    checkpoint: Path, engine: HuggingFaceEngine, start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "offload"
    chosen, plan = offloaded(checkpoint, folder)
    process = start(plan)
    ready = process.wait_ready()
    assert ready.placement == chosen.weights
    assert set(ready.placement) == {"cpu", "disk"}
    assert ask(process) == ask(engine)
    assert len(list(folder.iterdir())) == 2  # this run's own, and its lock
    process.close()
    assert list(folder.iterdir()) == []


def test_in_16_bit_it_scores_as_from_memory(checkpoint: Path, tmp_path: Path) -> None:
    chosen, plan = offloaded(checkpoint, tmp_path, bits=16)
    some = load_engine(plan)
    assert bytes_per_device(some.placement()) == chosen.weights  # in bfloat16, whatever the file has
    whole = load_engine(make_plan(checkpoint, dtype="bfloat16", bits=16.0))
    assert some.score(PROMPT, 3) == whole.score(PROMPT, 3)
    assert bytes_per_device(some.placement()) == chosen.weights  # nothing of it stayed in memory
    some.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_goes_with_the_next_one(checkpoint: Path, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "offload"
    _, plan = offloaded(checkpoint, folder)
    (folder).mkdir()
    (folder / "mine.txt").write_text("not ours to remove")
    running = start(plan)
    running.wait_ready()
    alive = set(folder.iterdir())
    killed = start(plan)
    killed.wait_ready()
    (left,) = (path for path in set(folder.iterdir()) - alive if path.is_dir())
    (left / "weights").write_bytes(b"x")
    os.killpg(killed.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="SIGKILL"):
        killed.events(timeout=20)
    assert left.exists()
    again = start(plan)
    again.wait_ready()
    assert not left.exists()
    assert alive < set(folder.iterdir())  # the one that still runs keeps its own
    again.close()
    running.close()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_tied_head_stays_with_its_embedding(tied_checkpoint: Path, tmp_path: Path) -> None:
    chosen, plan = offloaded(tied_checkpoint, tmp_path)
    assert chosen.device_map["lm_head"] == chosen.device_map["model.embed_tokens"] == "cpu"
    some = load_engine(plan)
    check_placement(plan, some.placement())
    assert bytes_per_device(some.placement()) == chosen.weights
    assert some.score(PROMPT, 3) == load_engine(make_plan(tied_checkpoint)).score(PROMPT, 3)
    some.close()


def test_a_tensor_that_is_nowhere_is_named(checkpoint: Path, tmp_path: Path) -> None:
    _, plan = offloaded(checkpoint, tmp_path)
    some = load_engine(plan)
    check_placement(plan, some.placement())
    held = offload_hooks(some._model.lm_head)[0].weights_map.dataset
    del held.index["lm_head.weight"]
    with pytest.raises(EngineError, match=r"lm_head\.weight is on meta, planned on disk"):
        check_placement(plan, some.placement())
    some.close()


def test_a_load_that_fails_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    _, plan = offloaded(checkpoint, tmp_path / "offload")
    (tmp_path / "model").mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="no file named"):
        load_engine(replace(plan, model=str(tmp_path / "model")))
    assert list((tmp_path / "offload").iterdir()) == []


def test_a_disk_with_too_little_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"offload\.folder=.* GiB free, and 1073741824\.00 GiB are planned"):
        OffloadFolder(str(tmp_path), 2**60)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"offload\.folder=.*/file cannot be written"):
        OffloadFolder(str(tmp_path / "file"), 1)


@pytest.mark.parametrize("way", ["load_in_4bit", "load_in_8bit"])
def test_transformers_quantizes_nothing_of_a_map_of_cpu_and_disk(checkpoint: Path, tmp_path: Path, way: str) -> None:
    # Why the plan refuses bitsandbytes with an offload and no GPU. If this fails, it may not have to any more.
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk")
    options = {"device_map": places, "offload_folder": tmp_path, "dtype": torch.float32}
    with pytest.raises(ValueError, match="dispatched on the CPU or the disk"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint, **options, quantization_config=BitsAndBytesConfig(**{way: True})
        )
    allowed = BitsAndBytesConfig(**{way: True}, llm_int8_enable_fp32_cpu_offload=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options, quantization_config=allowed)
    assert {type(m) for name, m in model.named_modules() if name.endswith("_proj")} == {torch.nn.Linear}
