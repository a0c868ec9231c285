"""Made-up EXL2 models: right headers, zeros as weights; and a converter that makes them, for its faults."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from small_models import Llama

SIZES = {"I32": 4, "I16": 2, "F16": 2}


def pad32(columns: int) -> int:
    return -(-columns // 32) * 32


def exl2_tensors(shape: Llama, bits: int, head_bits: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape) of a model whose linears all have one width, in groups of 128 rows."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    linears = {
        f"model.layers.{layer}.{module}": (size, bits)
        for layer in range(shape.layers)
        for module, size in shape.linears().items()
    }
    linears["lm_head"] = ((shape.vocab, shape.hidden), head_bits)
    for module, ((out, rows), width) in linears.items():
        groups = math.ceil(rows / 128)
        found[f"{module}.q_weight"] = ("I32", (rows * width // 32, pad32(out)))
        found[f"{module}.q_invperm"] = ("I32", (rows,))
        found[f"{module}.q_scale"] = ("I32", (groups, pad32(out) // 8))
        found[f"{module}.q_scale_max"] = ("F16", (groups,))
        found[f"{module}.q_groups"] = ("I16", (2 * groups,))
    for name, size in shape.tensors().items():
        if name.removesuffix(".weight") not in linears:
            found[name] = ("F16", size)
    return found


def write_exl2(
    folder: Path,
    shape: Llama,
    bits: int = 4,
    head_bits: int = 6,
    leave_out: str = "",
    signed: dict[str, Any] | None = None,
) -> Path:
    """A converter's result folder, config.json signed as it signs it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = exl2_tensors(shape, bits, head_bits)
    tensors.pop(leave_out, None)
    entries, end = {}, 0
    for name, (dtype, size) in tensors.items():
        length = math.prod(size) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(entries).encode()
    with (folder / "output.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    signature = {"quant_method": "exl2", "version": "0.3.2", "bits": float(bits), "head_bits": head_bits}
    config = shape.config() | {"quantization_config": signature | (signed or {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def measurement(shape: Llama) -> dict[str, Any]:
    """A measurement of every block of a model."""
    blocks = [f"model.layers.{layer}.{block}" for layer in range(shape.layers) for block in ("self_attn", "mlp")]
    return {"measurement": {block: [{"accuracy": 0.9, "total_bits": 1}] for block in blocks}, "last_module_idx": 6}


# exllamav2.conversion.convert_exl2, as far as a caller sees it; FAKE_FAULT says what goes wrong.
FAKE = """
import argparse, json, os, shutil, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["FAKE_TESTS"])
from exl2_models import measurement, write_exl2
from small_models import Llama

parser = argparse.ArgumentParser()
for flag in ("-i", "-o", "-om", "-cf", "-m", "-b", "-hb", "-l", "-ml", "-c", "-r", "-mr"):
    parser.add_argument(flag)
parser.add_argument("-so", action="store_true")
args = parser.parse_args()
fault = os.environ.get("FAKE_FAULT", "")
job_file = Path(args.o, "job_new.json")
print("arguments", json.dumps(vars(args)))
job = {"in_dir": args.i, "progress": "begin", "compile_full": args.cf, "output_measurement": args.om}
if job_file.exists():
    print(" -- Resuming job", json.loads(job_file.read_text())["progress"])
job_file.write_text(json.dumps(job | {"progress": "quant"}))
for done in (0, 0.5):
    print('[STATUS]' + json.dumps({"stage": "Quantizing", "completion": done}) + '[/STATUS]')
    time.sleep(0.3)
if fault == "nothing":
    print(" ## Error: 7 is not a supported option for head layer bitrate")
    sys.exit()
if fault == "oom":
    raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB")
if fault == "raise":
    raise ValueError("Hessian is not invertible")
if fault == "half":
    job_file.write_text('{"in_dir": ')
if fault in ("sleep", "half"):
    time.sleep(600)
shape = Llama(layers=2)
if args.om:
    Path(args.om).write_text(json.dumps(measurement(shape)))
else:
    out = Path(args.cf)
    write_exl2(out, shape, int(float(args.b)), int(args.hb), "model.norm.weight" if fault == "norm" else "")
    (out / "model.safetensors.index.json").write_text("{}")
job_file.write_text(json.dumps(job | {"progress": "finished"}))
print(" -- Finished")
"""


def write_fake(folder: Path) -> Path:
    """A package `exllamav2` whose converter is FAKE; returns what to put on the path."""
    package = folder / "exllamav2" / "conversion"
    package.mkdir(parents=True)
    (folder / "exllamav2" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "convert_exl2.py").write_text(FAKE)
    return folder
