"""Help, a mistake and a plan answer at once: they load no framework."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import packed_models
import pytest
import small_models

from orchestrator import embedded
from tests.checkpoints import write_model

ROOT = Path(__file__).parents[2]
ENGINES = {"torch", "transformers", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "huggingface_hub"}
SCRIPT = """
import json, sys
from orchestrator.app import main
try:
    code = main(json.loads(sys.argv.pop()))
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def modules_after(folder: Path, *argv: str) -> tuple[int, set[str]]:
    """The exit code of a command line, and the packages that it has imported."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(argv)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize(("argv", "expected"), [(["--help"], 0), (["quant.bitz=4"], 2), (["hardware=4x24"], 2)])
def test_help_and_mistakes_load_next_to_nothing(tmp_path: Path, argv: list[str], expected: int) -> None:
    code, modules = modules_after(tmp_path, *argv)
    assert (code or 0) == expected
    assert not modules & (ENGINES | {"rich", "pynvml"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hardware", ["auto", "cpu", "4x24gb"])
def test_a_plan_loads_no_engine(tmp_path: Path, hardware: str) -> None:
    model = small_models.write_headers(tmp_path / "model", small_models.Llama())
    lora = small_models.write_adapter(tmp_path / "lora", small_models.Llama())
    argv = ("task=plan", f"model.path={model}", f"model.adapter={lora}", f"hardware={hardware}")
    code, modules = modules_after(tmp_path, *argv, "backend=exllamav2" if hardware == "4x24gb" else "backend=auto")
    assert code == 0
    assert not modules & ENGINES


def test_a_plan_of_an_adapter_on_top_loads_no_engine(tmp_path: Path) -> None:
    model = small_models.write_headers(tmp_path / "model", small_models.Llama())
    lora = small_models.write_adapter(tmp_path / "lora", small_models.Llama())
    argv = ("task=plan", f"model.path={model}", f"model.adapter={lora}", "hardware=4x24gb", "model.merge=false")
    code, modules = modules_after(tmp_path, *argv)
    assert code == 0
    assert not modules & ENGINES


def test_a_plan_of_packed_weights_loads_no_engine(tmp_path: Path) -> None:
    model = packed_models.write_packed(tmp_path / "model", small_models.Llama(), "gptq")
    code, modules = modules_after(tmp_path, "task=plan", f"model.path={model}", "hardware=4x24gb")
    assert code == 0
    assert not modules & ENGINES


def test_a_plan_of_headers_looks_at_no_data(tmp_path: Path) -> None:
    model = small_models.write_headers(tmp_path / "model", small_models.Llama())
    code, modules = modules_after(tmp_path, "task=plan", f"model.path={model}", "hardware=4x24gb")
    assert code == 0
    assert "numpy" not in modules


def test_a_plan_that_counts_calibration_texts_loads_their_tokenizer_alone(tmp_path: Path) -> None:
    model = small_models.write_headers(tmp_path / "model", small_models.Llama())
    shutil.copy(embedded.BASE / "tokenizer.json", model)
    (tmp_path / "one.txt").write_text("six words, and no more here\n")
    texts = (f"quant.calibration.file={tmp_path / 'one.txt'}", "quant.calibration.rows=1000")
    argv = ("task=plan", f"model.path={model}", "hardware=1x24gb", "backend=exllamav2", "quant.bits=4", *texts)
    code, modules = modules_after(tmp_path, *argv)
    assert code == 2
    assert modules & ENGINES == {"tokenizers"}


def test_a_checkpoint_that_is_refused_loads_no_engine(tmp_path: Path) -> None:
    code, modules = modules_after(tmp_path, f"model.path={tmp_path}", "prompts.text=hi")
    assert code == 2
    assert not modules & ENGINES


def test_a_plain_conversion_moves_bytes_without_torch(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind="bin", shards=2)
    argv = ("task=convert", f"model.path={model}", f"paths.artifacts={tmp_path / 'store'}", "convert.verify=true")
    code, modules = modules_after(tmp_path, *argv)
    assert code == 0
    assert not modules & ENGINES
