"""What users bring that is wrong costs one line with the right exit code, and leaves nothing half done."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from checkpoints import raw_bin
from commands import Done, Orchestrator

from orchestrator import embedded

Spoil = Callable[[Path], Any]


def refused(orchestrator: Orchestrator, code: int, *argv: str, prompts: str = "prompts.text=hi") -> str:
    """The error of a run that has to be refused; its folder tells the same, and the store is as it was."""
    before = sorted(orchestrator.store.iterdir()) if orchestrator.store.is_dir() else []
    done = orchestrator(*argv, *([prompts] if prompts else []))
    assert done.code == code, done.err
    after = sorted(orchestrator.store.iterdir()) if orchestrator.store.is_dir() else []
    assert [path for path in after if path not in before and path.name != ".locks" and path.suffix != ".partial"] == []
    if done.folder is not None:
        status = done.json("status.json")
        assert (status["state"], status["exit_code"]) == ("failed", code)
        assert status["error"] in done.error
        assert not (done.folder / "result.json").exists()
    return done.error


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["Llama')


def other_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["MambaForCausalLM"], model_type="mamba")


def drop_shard(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def truncate_shard(folder: Path) -> None:
    file = folder / "pytorch_model-00002-of-00003.bin"
    os.truncate(file, file.stat().st_size // 2)


def index_leads_out(folder: Path) -> None:
    index = folder / "pytorch_model.bin.index.json"
    text = index.read_text().replace("pytorch_model-00002-of-00003.bin", "../../../etc/passwd")
    index.write_text(text)


def break_index(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text("[]")


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def malicious(folder: Path) -> None:
    raw_bin(folder / "pytorch_model-00001-of-00003.bin", pickle.dumps(Evil(folder / "was-executed")))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drop_config, "has no config.json"),
        (break_config, "is not valid JSON"),
        (other_architecture, "MambaForCausalLM is not supported"),
        (drop_tokenizer, "has no tokenizer"),
        (drop_shard, "pytorch_model-00002-of-00003.bin is missing"),
        (truncate_shard, "pytorch_model-00002-of-00003.bin"),
        (index_leads_out, "passwd"),
        (break_index, "pytorch_model.bin.index.json"),
        (malicious, "pytorch_model-00001-of-00003.bin"),
    ],
)
def test_a_model_that_is_wrong(orchestrator: Orchestrator, base: Path, spoil: Spoil, said: str) -> None:
    spoil(base)
    assert said in refused(orchestrator, 2, f"model.path={base}")
    assert not (base / "was-executed").exists()


def adapter_alone(folder: Path) -> None:
    """The adapter's folder given as the model."""
    shutil.rmtree(folder)
    shutil.copytree(embedded.ADAPTER, folder)


@pytest.mark.parametrize("spoil", [adapter_alone, shutil.rmtree], ids=["an adapter", "nothing"])
def test_a_model_that_is_none(orchestrator: Orchestrator, base: Path, spoil: Spoil) -> None:
    spoil(base)
    error = refused(orchestrator, 2, f"model.path={base}")
    assert f"model.adapter={base}" in error or f"there is no folder {base}" in error


def test_bin_and_safetensors_side_by_side_take_the_safetensors_and_say_so(
    orchestrator: Orchestrator, model: Path, base: Path
) -> None:
    for file in base.glob("pytorch_model*"):
        shutil.copy(file, model)
    done = orchestrator("task=plan", f"model.path={model}")
    assert done.code == 0, done.err
    assert "safetensors and bin weights: the safetensors ones are used" in done.err


# Adapters


def adapter_copy(folder: Path) -> Path:
    return Path(shutil.copytree(embedded.ADAPTER, folder / "adapter"))


def test_an_adapter_of_another_model_names_the_mismatch(orchestrator: Orchestrator, base: Path) -> None:
    other = small_models.write_adapter(orchestrator.folder / "adapter", small_models.Llama())
    error = refused(orchestrator, 2, f"model.path={base}", f"model.adapter={other}")
    assert "the adapter was trained on 128 inputs, this model has 256" in error


def test_an_adapter_that_changes_nothing_is_refused(orchestrator: Orchestrator, base: Path) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = adapter_copy(orchestrator.folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeroed = {name: array * 0 if ".lora_B." in name else array for name, array in tensors.items()}
    save_file(zeroed, adapter / "adapter_model.safetensors")
    error = refused(orchestrator, 2, f"model.path={base}", f"model.adapter={adapter}")
    assert "would change nothing" in error


def test_an_adapter_with_a_feature_that_is_not_merged_is_refused(orchestrator: Orchestrator, base: Path) -> None:
    adapter = adapter_copy(orchestrator.folder)
    edit_json(adapter / "adapter_config.json", use_qalora=True)
    assert "QALoRA" in refused(orchestrator, 2, f"model.path={base}", f"model.adapter={adapter}")


def test_a_model_given_as_an_adapter_is_told(orchestrator: Orchestrator, base: Path) -> None:
    error = refused(orchestrator, 2, f"model.path={base}", f"model.adapter={base}")
    assert f"model.path={base}" in error


def test_an_adapter_without_a_model_is_refused(orchestrator: Orchestrator) -> None:
    assert "Set model.path" in refused(orchestrator, 2, f"model.adapter={embedded.ADAPTER}")


# Weights that are not numbers


def poison(file: Path, tensor: str) -> None:
    """Makes the first value of an F16 tensor of a safetensors file NaN."""
    with file.open("r+b") as data:
        length = int.from_bytes(data.read(8), "little")
        entry = json.loads(data.read(length))[tensor]
        assert entry["dtype"] == "F16"
        data.seek(8 + length + entry["data_offsets"][0])
        data.write(np.array([np.nan], np.float16).tobytes())


def test_a_weight_that_is_nan_stops_the_smoke_pass(orchestrator: Orchestrator, model: Path) -> None:
    poison(model / "model.safetensors", "model.layers.3.mlp.down_proj.weight")
    error = refused(orchestrator, 1, f"model.path={model}", "backend=transformers")
    assert "not finite" in error
    assert "NaN" in error


def test_a_weight_that_is_nan_stops_a_merge_by_name(orchestrator: Orchestrator, model: Path) -> None:
    poison(model / "model.safetensors", "model.layers.3.mlp.down_proj.weight")
    error = refused(orchestrator, 2, f"model.path={model}", f"model.adapter={embedded.ADAPTER}")
    assert "model.layers.3.mlp.down_proj.weight" in error


# Prompts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2"),
        ("p.txt", None, "No such file"),
    ],
)
def test_prompts_that_are_wrong(orchestrator: Orchestrator, name: str, content: str | None, said: str) -> None:
    file = orchestrator.folder / name
    if content is not None:
        file.write_text(content)
    assert said in refused(orchestrator, 2, prompts=f"prompts.file={file}")


def test_standard_input_without_a_prompt(orchestrator: Orchestrator) -> None:
    assert "standard input holds no prompt" in refused(orchestrator, 2, prompts="prompts.file=-")


def test_a_model_without_prompts(orchestrator: Orchestrator, base: Path) -> None:
    assert "prompts.text" in refused(orchestrator, 2, f"model.path={base}", prompts="")


def test_a_prompt_longer_than_the_context(orchestrator: Orchestrator, merged: Path) -> None:
    prompt = "prompts.text=" + "word " * 100
    error = refused(orchestrator, 2, f"model.path={merged}", "model.max_context=64", "quant.bits=32", prompts=prompt)
    assert "and the context is 64" in error
    assert "prompt 1" in error


def test_a_chat_template_that_is_not_there(orchestrator: Orchestrator, merged: Path) -> None:
    error = refused(orchestrator, 2, f"model.path={merged}", "model.chat_template=/nowhere.jinja", "quant.bits=32")
    assert "model.chat_template=/nowhere.jinja" in error


# The machine and the command line


@pytest.mark.parametrize("place", ["paths.artifacts", "paths.runs"])
@pytest.mark.parametrize("path", ["/dev/null/x", "/proc/x"])
def test_a_place_that_cannot_be_written(orchestrator: Orchestrator, place: str, path: str) -> None:
    assert place in refused(orchestrator, 2, f"{place}={path}")


def test_an_interpreter_without_the_engine_ends_with_4(orchestrator: Orchestrator) -> None:
    venv.create(orchestrator.folder / "bare", symlinks=True)
    python = orchestrator.folder / "bare" / "bin" / "python"
    error = refused(orchestrator, 4, f"backend.python={python}", "backend=bitsandbytes")
    assert "lacks torch" in error
    assert f"{python} -m pip install" in error


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/true"])
def test_an_interpreter_that_is_none(orchestrator: Orchestrator, python: str) -> None:
    assert f"backend.python={python}" in refused(orchestrator, 2, f"backend.python={python}")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["quant.bitz=4"], "quant.bits"),
        (["quant.bits=four"], "quant.bits=four is not a number"),
        (["quant.bits=1"], "quant.bits=1"),
        (["generation.max_tokens=1.5"], "generation.max_tokens=1.5 is not a whole number"),
        (["hardware=4x24gb", "hardware.cards=two"], "hardware.cards=two is not a whole number"),
        (["model.dtype=fp16"], "float16"),
        (["backend=llama"], "backend is one of"),
        (["backend=transformers", "quant.double=true"], "backend=bitsandbytes"),
        (["backend=bitsandbytes", "quant.double=true", "parallel.tensor=2"], "parallel.tensor"),
        (["quant.bits=5"], "no engine runs"),
        (["hardware.gpus=[7]"], "no GPU 7"),
        (["model.max_context=100000"], "2048"),
        (["task=plan", "hardware"], "KEY=VALUE"),
        (["run.resume=/nowhere"], "not a run folder"),
        (["generation.stop=3"], "generation.stop=3 is not a list: put brackets around it"),
        (["quant=[a"], "quant"),
        (["quant.double=maybe"], "quant.double=maybe is neither true nor false"),
        (["model.adapters=[lora]"], "model.adapters=[lora] is not a list of {path: FOLDER}"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_is_wrong(orchestrator: Orchestrator, argv: list[str], said: str) -> None:
    prompts = "" if argv[0].startswith("run.resume") else "prompts.text=hi"
    assert said in refused(orchestrator, 2, *argv, prompts=prompts)


def test_a_mistake_leaves_no_run_folder(orchestrator: Orchestrator) -> None:
    done: Done = orchestrator("quant.bitz=4")
    assert done.folder is None
    assert not orchestrator.runs.exists()
