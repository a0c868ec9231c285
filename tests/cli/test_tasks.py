"""task=plan, convert, artifacts and engine; exit codes 2, 3 and 4; other folders."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_models
from commands import Done, Orchestrator

PROFILES = ("auto", "cpu", "1x8gb", "1x16gb", "4x24gb", "8x80gb")

# task=plan


@pytest.mark.parametrize("profile", PROFILES)
def test_a_plan_for_a_profile(orchestrator: Orchestrator, profile: str) -> None:
    done = orchestrator("task=plan", f"hardware={profile}")
    assert done.code == 0, done.err
    plan = done.json("plan.json")
    assert plan["fits"]
    on_gpus = {"bitsandbytes", "exllamav2", "vllm"}
    assert {c["backend"] for c in plan["candidates"]} == (on_gpus if plan["gpus"] else {"bitsandbytes"})
    assert len(plan["gpus"]) == (0 if profile in ("auto", "cpu") else 1)
    assert "NF4" in done.out
    assert done.json("status.json")["state"] == "done"


def test_a_70b_is_planned_for_four_cards_from_its_headers(orchestrator: Orchestrator) -> None:
    model = small_models.write_headers(orchestrator.folder / "70b", small_models.LLAMA_70B)
    done = orchestrator("task=plan", f"model.path={model}", "hardware=4x24gb", "model.max_context=2048")
    assert done.code == 0, done.err
    plan = done.json("plan.json")
    assert (plan["backend"], plan["fits"]) == ("bitsandbytes", True)
    assert 1 < len(plan["gpus"]) <= 4
    assert {c["fits"] for c in plan["candidates"] if c["bits"] == 16} == {False}
    assert f"To run it: {plan['command']}" in done.out
    assert plan["command"].startswith(
        f"python -m orchestrator model.path={model} hardware=4x24gb model.max_context=2048"
    )
    assert plan["command"].endswith("backend=bitsandbytes quant.bits=8 prompts.text=Hello")


def test_where_the_best_is_not_installed_the_best_that_is_stands_beside_it(orchestrator: Orchestrator) -> None:
    model = small_models.write_headers(orchestrator.folder / "7b", small_models.LLAMA_7B)
    done = orchestrator("task=plan", f"model.path={model}", "hardware=2x24gb", "prompts.text=Hi")
    best, here = (line for line in done.out.splitlines() if "python -m orchestrator model.path=" in line)
    assert best.startswith("To run it (once its engine is installed): ")
    assert best.endswith(" backend=vllm quant.bits=16")
    assert here.startswith(
        f"With what is installed (transformers (16 bits)): python -m orchestrator model.path={model}"
    )
    assert here.endswith(" backend=transformers quant.bits=16")


def test_the_command_of_a_plan_can_be_typed(orchestrator: Orchestrator) -> None:
    planned = orchestrator("task=plan", "prompts.text=What's len?", "generation.max_tokens=4").json("plan.json")
    done = orchestrator(*shlex.split(planned["command"])[3:])
    assert done.code == 0, done.err
    assert done.answers[0]["prompt"] == "What's len?"
    assert done.json("result.json")["plan"]["backend"] == planned["backend"]


PLAN = ("LlamaForCausalLM", "1 x 24 GiB card", "Plan: ", "kept free: ", "on disk: ", "What could run it", "To run it: ")


def test_a_plan_is_on_stdout_as_a_whole_and_what_is_to_be_known_of_it_on_stderr(orchestrator: Orchestrator) -> None:
    done = orchestrator("task=plan", "hardware=1x24gb", "convert.dtype=float32")
    assert done.code == 0, done.err
    places = [done.out.find(part) for part in PLAN]
    assert places[0] > -1
    assert places == sorted(places)
    assert done.err
    assert all(line.startswith("note: ") for line in done.err.splitlines())


def test_a_plan_that_does_not_fit_is_on_stdout_too(orchestrator: Orchestrator) -> None:
    model = small_models.write_headers(orchestrator.folder / "7b", small_models.LLAMA_7B)
    done = orchestrator("task=plan", "hardware=1x8gb", f"model.path={model}", "quant.bits=16")
    assert done.code == 3
    assert all(part in done.out for part in ("Does not fit: ", ", too much", "What to change, cheapest first"))
    assert {line.partition(": ")[0] for line in done.err.splitlines()} == {"note", "error"}


@pytest.mark.parametrize(("profile", "code"), [("1x24gb", 0), ("cpu", 2)])
def test_a_plan_says_that_the_store_cannot_be_written(orchestrator: Orchestrator, profile: str, code: int) -> None:
    """For another machine it is no mistake: that one may have another disk."""
    file = orchestrator.folder / "file"
    file.write_text("")
    done = orchestrator("task=plan", f"hardware={profile}", f"paths.artifacts={file}")
    said = f"the store cannot be written: paths.artifacts={file} (Not a directory); set paths.artifacts=FOLDER"
    assert done.code == code
    assert -1 < done.out.find(said) < done.out.find("To run it: ")
    if code:
        assert f"paths.artifacts={file} cannot be written (Not a directory)" in done.error


@pytest.mark.parametrize("task", ["plan", "run"])
def test_what_does_not_fit_ends_with_3_and_the_numbers(orchestrator: Orchestrator, task: str) -> None:
    done = orchestrator(f"task={task}", "hardware=cpu", "hardware.memory_gib=0.2", "hardware.margin_gib=0")
    assert done.code == 3
    assert "GiB and has 0.20 GiB free" in done.error
    assert done.json("status.json")["state"] == "does_not_fit"
    assert done.json("plan.json")["fits"] is False


def test_a_reserve_that_leaves_nothing_is_a_mistake(orchestrator: Orchestrator) -> None:
    done = orchestrator("task=plan", "hardware=cpu", "hardware.reserve_gib=4096")
    assert done.code == 2
    assert "hardware.reserve_gib=4096 leaves nothing: this machine has" in done.error


def test_a_plan_says_what_the_machine_is(orchestrator: Orchestrator) -> None:
    done = orchestrator("task=plan", "hardware=2x16gb", "hardware.memory_gib=[15,8]")
    hardware = done.json("plan.json")["hardware"]
    assert [(gpu["total"], gpu["capability"]) for gpu in hardware["gpus"]] == [(15 * 2**30, "7.5"), (8 * 2**30, "7.5")]
    assert hardware["host"]["cpus"] >= 1
    assert hardware["disk"]["free"] > 0
    assert "has no bf16: float16" in done.err


def test_a_cap_that_is_too_small_ends_with_3_and_what_would_fit(orchestrator: Orchestrator) -> None:
    model = small_models.write_headers(orchestrator.folder / "7b", small_models.LLAMA_7B)
    argv = ["task=plan", f"model.path={model}", "hardware=1x24gb", "quant.bits=16"]
    done = orchestrator(*argv, "hardware.memory_gib=8")
    assert done.code == 3
    assert "cuda:0 needs" in done.error
    assert "What would fit: " in done.error
    fits = orchestrator(*argv)
    assert fits.code == 0, fits.err


@pytest.mark.parametrize("task", ["run", "chat"])
def test_a_profile_of_cards_that_are_not_there_ends_with_4(orchestrator: Orchestrator, task: str) -> None:
    done = orchestrator(f"task={task}", "hardware=4x24gb")
    assert done.code == 4
    assert "runs on 4 GPUs" in done.error
    assert "task=plan" in done.error


# Sweeps


def states(done: Done) -> list[str]:
    """How each job of a sweep ended."""
    assert done.folder is not None, done.err
    jobs = sorted(path for path in done.folder.iterdir() if path.is_dir())
    return [json.loads((job / "status.json").read_text())["state"] for job in jobs]


def test_in_a_sweep_what_does_not_fit_is_a_result(orchestrator: Orchestrator) -> None:
    done = orchestrator("-m", "task=plan", "hardware=cpu", "hardware.memory_gib=0.2,8")
    assert done.code == 0, done.err
    assert states(done) == ["does_not_fit", "done"]
    assert "does not fit:" in done.err


def test_in_a_sweep_a_job_that_fails_does_not_stop_the_others(orchestrator: Orchestrator) -> None:
    done = orchestrator("-m", "task=plan", "quant.bits=5,4")
    assert done.code == 1
    assert states(done) == ["failed", "done"]
    assert "error: no engine runs" in done.err
    assert "Traceback" not in done.err


# task=convert


def test_a_converted_model_is_one_that_transformers_loads(merged: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    chat = [{"role": "user", "content": "What does len do?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "Return the number of items in a container."


def test_a_converted_model_is_all_there_and_nothing_else(merged: Path) -> None:
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(name.endswith((".bin", ".part", ".done")) or name == "manifest.json" for name in names)
    assert not [path for path in merged.parent.iterdir() if path.name.startswith(".merged")]


def test_the_dtype_and_the_shards_are_as_asked_for(orchestrator: Orchestrator, merged: Path) -> None:
    output = orchestrator.folder / "a = b, c" / "out"
    done = orchestrator(
        *("task=convert", f"model.path={merged}", f"output.path={output}"),
        *("convert.dtype=bfloat16", "convert.shard_size=3MB"),
    )
    assert done.code == 0, done.err
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 3.2e6 for path in shards)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert (json.loads((output / "config.json").read_text()).get("torch_dtype")) == "bfloat16"


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(orchestrator: Orchestrator) -> None:
    output = orchestrator.folder / "out"
    output.mkdir()
    (output / "mine").write_text("mine")
    done = orchestrator("task=convert", f"output.path={output}")
    assert done.code == 2
    assert "is not empty" in done.error
    assert [path.name for path in output.iterdir()] == ["mine"]


@pytest.mark.parametrize("output", ["/dev/null/out", "/proc/out"])
def test_an_output_that_cannot_be_written_is_named(orchestrator: Orchestrator, default_run: Done, output: str) -> None:
    done = orchestrator("task=convert", f"output.path={output}")
    assert done.code == 2
    assert f"output.path={output}" in done.error


def test_what_needs_no_conversion_is_said(orchestrator: Orchestrator, merged: Path) -> None:
    done = orchestrator("task=convert", f"model.path={merged}")
    assert done.code == 0, done.err
    assert "nothing to do" in done.err
    assert done.json("result.json")["stages_run"] == []


# task=artifacts


@pytest.fixture
def own_store(orchestrator: Orchestrator, shared: Orchestrator, default_run: Done) -> Orchestrator:
    """A working folder with a copy of the default run's store."""
    orchestrator.store = Path(shutil.copytree(shared.store, orchestrator.folder / "store"))
    return orchestrator


def test_artifacts_are_listed_verified_and_pruned(own_store: Orchestrator, default_run: Done) -> None:
    [name] = default_run.json("result.json")["stages_run"]
    listed = own_store("task=artifacts")
    assert listed.code == 0, listed.err
    assert name in listed.out
    assert name in [row["name"] for row in listed.json("result.json")["artifacts"]]
    verified = own_store("task=artifacts", "artifacts.action=verify", f"artifacts.name={name}")
    assert (verified.code, verified.out) == (0, f"{name}: ok\n")
    rehearsed = own_store(
        "task=artifacts", "artifacts.action=prune", f"artifacts.name={name}", "artifacts.dry_run=true"
    )
    assert f"would remove {name}" in rehearsed.out
    assert (own_store.store / name).is_dir()
    pruned = own_store("task=artifacts", "artifacts.action=prune", f"artifacts.name={name}")
    assert pruned.code == 0, pruned.err
    assert not (own_store.store / name).exists()


def test_a_flipped_byte_ends_with_1_and_names_the_file(own_store: Orchestrator, default_run: Done) -> None:
    [name] = default_run.json("result.json")["stages_run"]
    file = own_store.store / name / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    done = own_store("task=artifacts", "artifacts.action=verify")
    assert done.code == 1
    assert f"{name}: model.safetensors has another digest" in done.out
    assert name in done.error
    assert done.json("status.json")["state"] == "failed"


# task=engine


def test_a_store_that_is_a_file_ends_with_2(orchestrator: Orchestrator) -> None:
    file = orchestrator.folder / "file"
    file.write_text("")
    done = orchestrator("task=artifacts", f"paths.artifacts={file}")
    assert done.code == 2
    assert f"paths.artifacts={file} is a file" in done.error


def test_prune_during_a_load_leaves_the_model_to_the_run(own_store: Orchestrator) -> None:
    run = own_store.start("prompts.text=What does len do?")
    run.until_state("loading")
    pruned = own_store("task=artifacts", "artifacts.action=prune", "artifacts.unused_days=0")
    assert pruned.code == 0, pruned.err
    assert "a run is building or loading it" in pruned.out
    assert run.done().code == 0
    again = own_store("task=artifacts", "artifacts.action=prune", "artifacts.unused_days=0")
    assert "removed merge-" in again.out


def test_engines_are_listed_with_what_they_serve(orchestrator: Orchestrator) -> None:
    done = orchestrator("task=engine")
    assert done.code == 0, done.err
    assert "bitsandbytes" in done.out
    assert "this Python has it" in done.out
    assert not (orchestrator.folder / "engines").exists()


def test_an_unknown_engine_is_answered_with_a_near_one(orchestrator: Orchestrator) -> None:
    done = orchestrator("task=engine", "engine.name=bitsandbites")
    assert done.code == 2
    assert "Did you mean bitsandbytes" in done.error


# Help, and where it runs


def test_help_names_every_task_and_exit_code(orchestrator: Orchestrator) -> None:
    done = orchestrator("--help")
    assert (done.code, done.err) == (0, "")
    assert "task: artifacts, chat, convert, engine, plan, run" in done.out
    assert "quant.bits" in done.out or "bits: null" in done.out
    assert "130 interrupted" in done.out
    assert not orchestrator.runs.exists()


def test_it_does_not_matter_from_where_it_is_called(orchestrator: Orchestrator) -> None:
    elsewhere = orchestrator.folder / "some where"
    elsewhere.mkdir()
    model = small_models.write_headers(elsewhere / "model", small_models.Llama())
    command = [sys.executable, "-m", "orchestrator", "task=plan", "model.path=model"]
    done = subprocess.run(command, cwd=elsewhere, env=orchestrator.env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [run] = (elsewhere / "runs").iterdir()
    assert json.loads((run / "plan.json").read_text())["fits"]
    assert str(model) in done.stdout.replace("\n", "")


def test_a_reader_that_goes_away_is_no_traceback(orchestrator: Orchestrator) -> None:
    command = f"{sys.executable} -m orchestrator --help | head -c 1"
    done = subprocess.run(command, shell=True, cwd=orchestrator.folder, env=orchestrator.env(), capture_output=True)
    assert b"Traceback" not in done.stderr


def test_a_plan_whose_reader_goes_away_says_so_in_its_folder(orchestrator: Orchestrator) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = orchestrator.command("task=plan")
    done = subprocess.run(
        command, cwd=orchestrator.folder, env=orchestrator.env(), stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert b"Traceback" not in done.stderr
    [run] = orchestrator.runs.iterdir()
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"


def test_a_model_of_any_architecture_is_converted(orchestrator: Orchestrator, base: Path) -> None:
    """Only an engine has to know it: a merge and a conversion do not."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyKnowsItForCausalLM"]}))
    output = orchestrator.folder / "out"
    done = orchestrator("task=convert", f"model.path={base}", f"output.path={output}")
    assert done.code == 0, done.err
    assert (output / "model.safetensors").exists()
    asked = orchestrator("task=plan", f"model.path={base}")
    assert asked.code == 2
    assert "NobodyKnowsItForCausalLM" in asked.error


def test_bits_that_only_an_engine_makes_are_said_to_be_unwritten(orchestrator: Orchestrator, base: Path) -> None:
    output = orchestrator.folder / "out"
    done = orchestrator(
        "task=convert", f"model.path={base}", "backend=bitsandbytes", "quant.bits=4", f"output.path={output}"
    )
    assert done.code == 0, done.err
    assert "bitsandbytes quantizes when it loads: what is written is the merged model, not 4 bits" in done.err


def test_safetensors_are_written_anew_for_another_shard_size(orchestrator: Orchestrator, merged: Path) -> None:
    output = orchestrator.folder / "out"
    ask = ("task=convert", f"model.path={merged}", f"output.path={output}", "convert.verify=true")
    done = orchestrator(*ask, "convert.shard_size=3MB")
    assert done.code == 0, done.err
    assert "verified:" in done.err
    assert len(list(output.glob("model-*.safetensors"))) > 2
    done = orchestrator("task=convert", f"model.path={merged}", "convert.verify=true")
    assert done.code == 0, done.err
    assert "nothing to verify" in done.err
