"""Checkpoints that are quantized already, as a user types it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import Orchestrator
from exl2_models import write_exl2
from packed_models import write_packed
from small_models import Llama, write_adapter

SHAPE = Llama(hidden=512, heads=8, kv_heads=4, intermediate=1024, vocab=1000)
QUESTION = "What does len do?"


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("models") / "gptq", SHAPE, "gptq")


def test_a_plan_of_a_gptq_folder(orchestrator: Orchestrator, gptq: Path) -> None:
    done = orchestrator("task=plan", f"model.path={gptq}", "hardware=2x24gb", "parallel.tensor=2")
    assert done.code == 0, done.err
    plan = done.json("plan.json")
    assert (plan["backend"], plan["method"], plan["bits"], plan["tensor_parallel"]) == ("vllm", "gptq", 4.0, 2)
    assert plan["needs"] == ""
    assert done.err.count("quantized") >= 1


def test_a_plan_of_an_exl2_folder(orchestrator: Orchestrator, tmp_path: Path) -> None:
    folder = write_exl2(tmp_path / "exl2", SHAPE)
    done = orchestrator("task=plan", f"model.path={folder}", "hardware=1x24gb")
    assert done.code == 0, done.err
    assert done.json("plan.json")["backend"] == "exllamav2"


def test_a_damaged_exl2_folder(orchestrator: Orchestrator, tmp_path: Path) -> None:
    part = "model.layers.1.mlp.up_proj.q_groups"
    folder = write_exl2(tmp_path / "header", SHAPE, changed={part: ("I32", (8,))})
    done = orchestrator("task=plan", f"model.path={folder}", "hardware=1x24gb")
    assert done.code == 2
    assert f"{folder}/output.safetensors: {part} is I32, not I16" in done.error
    folder = write_exl2(tmp_path / "data", SHAPE, changed={"lm_head.q_invperm": ("I32", (512,))})
    argv = ("task=convert", f"model.path={folder}", "convert.verify=true")
    for more in ((), ("backend=exllamav2", "hardware=1x24gb")):
        done = orchestrator(*argv, *more)
        assert done.code == 2
        assert f"{folder}/output.safetensors: lm_head.q_invperm is no order of 512 rows" in done.error
    whole = write_exl2(tmp_path / "whole", SHAPE)
    done = orchestrator(*argv[::2], f"model.path={whole}")
    assert done.code == 0, done.err
    assert "verified: 15 linears' parts, groups, order and scales; layers of 3.999" in done.err
    assert "nothing to verify" not in done.err


def test_gptq_in_the_plan_of_a_model_that_is_not_quantized(
    orchestrator: Orchestrator, long_winded: Path, gptq: Path
) -> None:
    done = orchestrator("task=plan", f"model.path={long_winded}", "hardware=1x24gb")
    needs = {c["needs"] for c in done.json("plan.json")["candidates"] if c["method"] == "gptq"}
    assert needs == {f"a GPTQ checkpoint of it ({bits} bits, groups of 128)" for bits in (4, 8)}


@pytest.mark.parametrize(("argv", "code"), [(["quant.bits=4"], 2), (["quant.bits=4", "quant.method=gptq"], 0)])
def test_what_nothing_here_makes_is_shown_only_to_who_names_it(
    orchestrator: Orchestrator, long_winded: Path, argv: list[str], code: int
) -> None:
    done = orchestrator("task=plan", f"model.path={long_winded}", "hardware=1x24gb", "backend=vllm", *argv)
    assert done.code == code, done.err
    assert ("needs a GPTQ checkpoint of it (4 bits, groups of 128), and this version makes none" in done.err) is bool(
        code
    )
    assert done.json("plan.json")["command"] is None


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["quant.bits=8"], 2, "quant.bits=8 cannot be made of it"),
        (["quant=nf4"], 2, "quant.method=nf4 cannot be made of it"),
        (["backend=bitsandbytes"], 2, "does not load gptq checkpoints (backend=vllm or exllamav2 does)"),
        (["backend=exllamav2"], 4, "needs a CUDA GPU"),
        (["backend=vllm", "task=plan", "hardware=2x24gb", "parallel.tensor=16"], 3, "does not divide"),
    ],
)
def test_what_it_cannot_be_asked_for(
    orchestrator: Orchestrator, gptq: Path, argv: list[str], code: int, said: str
) -> None:
    done = orchestrator(
        f"model.path={gptq}", "prompts.text=hi", *(argv if "task=plan" in argv else ["task=plan", *argv])
    )
    assert done.code == code, done.err
    assert said in done.error


def test_an_adapter_on_a_quantized_base(orchestrator: Orchestrator, gptq: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", SHAPE)
    done = orchestrator(f"model.path={gptq}", f"model.adapter={adapter}", "prompts.text=hi")
    assert done.code == 2
    assert "is quantized: an adapter cannot be merged into it. Give the original 16-bit model" in done.error
    on_top = orchestrator(f"model.path={gptq}", f"model.adapter={adapter}", "prompts.text=hi", "model.merge=false")
    assert on_top.code == 2
    assert "is quantized, and not to EXL2: no engine here runs an adapter on top of it" in on_top.error


def test_an_adapter_on_an_exl2_folder(orchestrator: Orchestrator, tmp_path: Path) -> None:
    base, lora = write_exl2(tmp_path / "exl2", SHAPE), write_adapter(tmp_path / "lora", SHAPE)
    argv = (f"model.path={base}", f"model.adapter={lora}", "prompts.text=hi")
    refused = orchestrator(*argv)
    assert refused.code == 2
    assert "an adapter cannot be merged into it. Set model.merge=false, which runs it on top" in refused.error
    done = orchestrator(*argv, "model.merge=false", "task=plan", "hardware=1x24gb")
    assert done.code == 0, done.err
    plan = done.json("plan.json")
    assert (plan["backend"], plan["method"], plan["bits"]) == ("exllamav2", "exl2", 4.0)
    assert plan["adapter_bytes"]["cuda:0"] > 0
    assert "1 adapter on top" in done.out
    here = orchestrator(*argv, "model.merge=false", "hardware=cpu")
    assert here.code == 4
    assert "the model is quantized already (exl2, 4 bits), and backend=exllamav2 needs a CUDA GPU" in here.error


def test_a_folder_in_nf4_answers_and_nothing_is_made_for_it(
    orchestrator: Orchestrator, merged: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path / "nf4"
    shutil.copytree(merged, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(merged, device_map={"": "cpu"}, quantization_config=options)
    model.save_pretrained(folder)
    done = orchestrator(f"model.path={folder}", f"prompts.text={QUESTION}", "hardware=cpu")
    assert done.code == 0, done.err
    result = done.json("result.json")
    assert (result["plan"]["backend"], result["plan"]["method"], result["plan"]["bits"]) == ("bitsandbytes", "nf4", 4.0)
    assert (result["artifacts"], result["stages_run"]) == ([], [])
    assert result["measured"]["placement"] == result["plan"]["weights"]
    assert done.answers[0]["answer"] == "Return the number of items in a container."
