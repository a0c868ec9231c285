"""Made-up EXL2 models: right headers and groups, zeros as weights; and a converter that makes them, for its faults."""

from __future__ import annotations

import json
import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from small_models import Llama

SIZES = {"I32": 4, "I16": 2, "F16": 2}
WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP = 32  # rows
HEAD = {4: [(32, 6, 0.15), (32, 4, 1)], 6: [(128, 8, 0.15), (128, 6, 1)], 8: [(128, 8, 1)]}  # rows, bits, share


def pad32(columns: int) -> int:
    return -(-columns // 32) * 32


def stored(size: tuple[int, int], groups: list[tuple[int, int]]) -> int:
    """Bits of a linear of (out, in) with these groups of (rows, bits)."""
    out, rows = pad32(size[0]), size[1]
    return sum(n * bits * out for n, bits in groups) + len(groups) * (4 * out + 48) + 32 * rows


def groups_of(shape: Llama, bits: float, head_bits: int) -> dict[str, list[tuple[int, int]]]:
    """Module -> (rows, bits) of its groups: as many bits as the target has room for, spread evenly."""
    sizes = {f"model.layers.{i}.{m}": size for i in range(shape.layers) for m, size in shape.linears().items()}
    found = {module: [(GROUP, 2)] * (size[1] // GROUP) for module, size in sizes.items()}
    left = int(bits * sum(pad32(out) * rows for out, rows in sizes.values()))
    left -= sum(stored(sizes[module], groups) for module, groups in found.items())
    for low, high in pairwise(WIDTHS):
        for module, groups in found.items():
            for i in range(len(groups)):
                cost = GROUP * (high - low) * pad32(sizes[module][0])
                if cost <= left:
                    groups[i], left = (GROUP, high), left - cost
    head: list[tuple[int, int]] = []
    rows = shape.hidden
    for size, width, share in HEAD[head_bits]:
        for _ in range(math.ceil(min(shape.hidden * share, rows) / size)):
            head.append((min(size, rows), width))
            rows -= head[-1][0]
    return found | {"lm_head": head}


def exl2_arrays(size: tuple[int, int], groups: list[tuple[int, int]]) -> dict[str, Any]:
    """Part -> array of a linear of (out, in); q_weight and q_scale as their (dtype, shape) only: zeros."""
    out, starts = pad32(size[0]), [0]
    for rows, bits in groups:
        starts.append(starts[-1] + math.ceil(rows * bits / 32))
    pairs = [number for (_, bits), start in zip(groups, starts, strict=False) for number in (bits, start)]
    return {
        "q_weight": ("I32", (starts[-1], out)),
        "q_invperm": np.arange(size[1], dtype=np.int32)[::-1],
        "q_scale": ("I32", (len(groups), out // 8)),
        "q_scale_max": np.ones(len(groups), np.float16),
        "q_groups": np.array(pairs, np.int16),
    }


def write_exl2(
    folder: Path,
    shape: Llama,
    bits: float = 4,
    head_bits: int = 6,
    leave_out: str = "",
    signed: dict[str, Any] | None = None,
    changed: dict[str, Any] | None = None,
    layers: dict[str, list[tuple[int, int]]] | None = None,
) -> Path:
    """A converter's result folder, config.json signed as it signs it.

    `changed`: other arrays for some names; `layers`: the groups of the layers' linears, instead of those of `bits`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {f"model.layers.{i}.{m}": size for i in range(shape.layers) for m, size in shape.linears().items()}
    sizes["lm_head"] = (shape.vocab, shape.hidden)
    groups = groups_of(shape, bits, head_bits) | (layers or {})
    tensors: dict[str, Any] = {}
    for module, size in sizes.items():
        tensors |= {f"{module}.{part}": value for part, value in exl2_arrays(size, groups[module]).items()}
    tensors |= {n: ("F16", size) for n, size in shape.tensors().items() if n.removesuffix(".weight") not in sizes}
    tensors |= changed or {}
    tensors.pop(leave_out, None)
    write_tensors(folder / "output.safetensors", tensors)
    signature = {"quant_method": "exl2", "version": "0.3.2", "bits": float(bits), "head_bits": head_bits}
    config = shape.config() | {"quantization_config": signature | (signed or {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file of arrays, and of zeros (a sparse file) where there is a (dtype, shape) instead."""
    names = {"int32": "I32", "int16": "I16", "float16": "F16", "int64": "I64"}
    entries, data, end = {}, {}, 0
    for name, value in tensors.items():
        dtype, size = value if isinstance(value, tuple) else (names[str(value.dtype)], value.shape)
        length = math.prod(size) * SIZES.get(dtype, 8)
        if not isinstance(value, tuple):
            data[end] = np.ascontiguousarray(value).tobytes()
        entries[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for start, content in data.items():
            file.seek(8 + len(text) + start)
            file.write(content)


def measurement(shape: Llama, steps: int = 0) -> dict[str, Any]:
    """A measurement of every block of a model: from one width to the next group by group, or in `steps` options."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    for block in ("self_attn", "mlp"):
        sizes = {m.partition(".")[2]: size for m, size in shape.linears().items() if m.startswith(block)}
        groups = {name: [2] * (size[1] // GROUP) for name, size in sizes.items()}
        options = [_option(sizes, groups)]
        for high in WIDTHS[1:]:
            for widths in groups.values():
                for i in range(len(widths)):
                    widths[i] = high
                    options.append(_option(sizes, groups))
        every = max(1, len(options) // steps) if steps else 1
        for layer in range(shape.layers):
            blocks[f"model.layers.{layer}.{block}"] = options[::every]
    return {"measurement": blocks, "last_module_idx": 2 * shape.layers + 2}


def _option(sizes: dict[str, tuple[int, int]], groups: dict[str, list[int]]) -> dict[str, Any]:
    """An option of a block, as the converter writes it; `groups`: the width of each group of its linears."""
    option: dict[str, Any] = {"accuracy": 1 - 0.5 ** (sum(map(sum, groups.values())) / 8), "total_bits": 0}
    for name, widths in groups.items():
        used = sorted(set(widths), reverse=True)
        option["total_bits"] += stored(sizes[name], [(GROUP, bits) for bits in widths])
        option[name] = {
            "group_size": {str(bits): GROUP for bits in used},
            "bits": used,
            "bits_prop": [widths.count(bits) / len(widths) for bits in used],
            "scale_bits": 4,
        }
    return option


def optimized(measured: dict[str, list[dict[str, Any]]], shape: Llama, bits: float) -> dict[str, dict[str, Any]]:
    """The strategy for a target: the next option of the block with the fewest, as long as it fits."""
    chosen = dict.fromkeys(measured, 0)
    weights = sum(pad32(out) * rows for out, rows in shape.linears().values()) * shape.layers

    def fits(block: str) -> bool:
        wider = chosen | {block: chosen[block] + 1}
        totals = [measured[name][i]["total_bits"] for name, i in wider.items() if i < len(measured[name])]
        return len(totals) == len(measured) and sum(totals) <= bits * weights

    while able := [block for block in measured if fits(block)]:
        chosen[min(able, key=lambda block: chosen[block] / len(measured[block]))] += 1
    return {block: measured[block][i] for block, i in chosen.items()}


def strategy_groups(strategy: dict[str, dict[str, Any]], shape: Llama) -> dict[str, list[tuple[int, int]]]:
    """Module -> (rows, bits) of its groups."""
    found: dict[str, list[tuple[int, int]]] = {}
    for layer in range(shape.layers):
        for module, (_, rows) in shape.linears().items():
            block, _, name = module.partition(".")
            said = strategy[f"model.layers.{layer}.{block}"][name]
            counts = [round(share * rows / GROUP) for share in said["bits_prop"]]
            widths = [bits for bits, count in zip(said["bits"], counts, strict=True) for _ in range(count)]
            found[f"model.layers.{layer}.{module}"] = [(GROUP, bits) for bits in widths]
    return found


# exllamav2.conversion.convert_exl2 as a caller sees it: its record and its checkpoints are as 0.3.2 writes them.
# FAKE_FAULT says what goes wrong; "kill MOMENT MODULE" when it is killed ("nan MOMENT MODULE": after a NaN).
FAKE = """
import argparse, json, os, shutil, signal, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, os.environ["FAKE_TESTS"])
from exl2_models import measurement, optimized, strategy_groups, write_exl2, write_tensors
from small_models import Llama

parser = argparse.ArgumentParser()
for flag, kind in {"-i": str, "-o": str, "-om": str, "-cf": str, "-m": str, "-c": str, "-b": float, "-hb": int}.items():
    parser.add_argument(flag, type=kind)
for flag, number in {"-l": 2048, "-ml": 2048, "-r": 100, "-mr": 16}.items():
    parser.add_argument(flag, type=int, default=number)
parser.add_argument("-so", action="store_true")
args = parser.parse_args()
fault, _, kill = os.environ.get("FAKE_FAULT", "").partition(" ")
where = Path(args.o)
job_file, states, temp = where / "job_new.json", where / "hidden_states.safetensors", where / "temp.safetensors"
print("arguments", json.dumps(vars(args)))
job = {"in_dir": args.i, "progress": "begin", "compile_full": args.cf, "output_measurement": args.om, "bits": args.b,
       "head_bits": args.hb, "length": args.l, "measurement_length": args.ml, "cal_dataset": args.c,
       "dataset_rows": args.r, "measurement_rows": args.mr}
if args.m:
    job["measurement"] = json.loads(Path(args.m).read_text())["measurement"]
    job["strategy"] = optimized(job["measurement"], Llama(layers=2), args.b - (1 if fault == "narrow" else 0))
if job_file.exists():
    job.update(json.loads(job_file.read_text()))
    print(" -- Resuming job", job["progress"], job.get("done", 0))
    if "invalid" in job:
        print(" ** Error: Corrupted job")
        sys.exit()
step, done = ("measure_quant", "last_module_idx") if args.om else ("quant", "q_last_module_idx")

def save():
    job_file.write_text(json.dumps(job))

def status(stage, completion):
    print('[STATUS]' + json.dumps({"stage": stage, "completion": completion}) + '[/STATUS]')

def point(*moment):
    if kill.split() == list(map(str, moment)):
        if moment[0] == "half":
            job_file.write_text('{"in_dir": ')
        os.kill(os.getpid(), signal.SIGKILL)

def write_states(file, index):
    write_tensors(file, {"row.00000": np.full(4, index, np.float16)})

if args.c:
    print("calibration", json.dumps(Path(args.c).read_text()))
save()
if job["progress"] == "begin":
    write_tensors(where / "cal_data.safetensors", {"input_ids": np.zeros((1, 4), np.int64)})
    write_states(states, 0)
    job["progress"] = step
    save()
if fault == "half":
    job_file.write_text('{"in_dir": ')
for part in (0, 0.5):
    status("Embeddings", part)
    time.sleep(0.3)
if fault == "nothing":
    print(" ## Error: 7 is not a supported option for head layer bitrate")
    sys.exit()
if fault == "oom":
    raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB")
if fault == "fault":
    raise KeyError("hidden_size")
if fault == "raise":
    raise ValueError("Hessian is not invertible")
if fault == "overflow":
    print(" -- Layer: model.layers.1 (MLP)")
    print(" ## Measurement/inference error (3): hidden_states")
    print(" ## inf elements in output states row 3: 22 / 99 = 0.83%")
    print(" ## Number of inf elements above threshold, aborting")
    os._exit(1)
if fault == "nan" and not args.om:
    print(" -- Layer: model.layers.1 (MLP)")
    print(" -- Module quantized, rfn_error: nan")
    if kill == "sleep":
        print('[STATUS]' + json.dumps({"stage": "Quantizing", "completion": 0.75}) + '[/STATUS]')
        time.sleep(600)
if fault in ("sleep", "half"):
    time.sleep(600)
if job["progress"] == step:
    index = job.get(done, 0)
    assert np.frombuffer(states.read_bytes()[-8:], np.float16)[0] == index, "the states are of another module"
    while index < 3:
        status("Measuring" if args.om else "Quantizing", index / 4)
        index += 1
        print(f" -- Layer: model.layers.{index // 2} ({('MLP', 'Attention')[index % 2]})")
        print("module", index)
        point("working", index)
        write_states(temp, index)
        point("temp", index)
        job["invalid"] = True
        save()
        point("invalid", index)
        os.replace(temp, states)
        point("swapped", index)
        job[done] = index
        del job["invalid"]
        point("half", index)
        save()
        time.sleep(0.7 if kill else 0)  # three minutes to the next one
    status("Measuring" if args.om else "Quantizing", 1.0)
    job["progress"] = "compile"
shape = Llama(layers=2)
if args.om:
    Path(args.om).write_text(json.dumps(measurement(shape)))
else:
    out = Path(args.cf)
    mix = optimized(job["measurement"], shape, args.b - 0.6) if fault == "less" else job["strategy"]
    left_out = "model.norm.weight" if fault == "norm" else ""
    write_exl2(out, shape, args.b, args.hb, left_out, layers=strategy_groups(mix, shape))
    for file in Path(args.i).iterdir():
        if not file.name.endswith(".safetensors") and file.name != "config.json":
            shutil.copy(file, out / file.name)
    (out / "model.safetensors.index.json").write_text("{}")
    if fault == "tokenizer":
        (out / "tokenizer.json").write_text("")
job["progress"] = "finished"
save()
print(" -- Finished")
"""


# What of pandas the calibration needs; its .parquet is JSON.
PANDAS = """
import json

class DataFrame:
    def __init__(self, columns):
        self.columns = columns

    def to_parquet(self, file, engine):
        with open(file, "w") as out:
            out.write(f"PAR1{json.dumps(self.columns)}PAR1")

    def itertuples(self, index):
        return zip(*self.columns.values())

def read_parquet(file, engine):
    with open(file) as lines:
        return DataFrame(json.loads(lines.read().removeprefix("PAR1").removesuffix("PAR1")))
"""


def write_fake(folder: Path) -> Path:
    """A package `exllamav2` whose converter is FAKE, and a `pandas`; returns what to put on the path."""
    package = folder / "exllamav2" / "conversion"
    package.mkdir(parents=True)
    (folder / "exllamav2" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "convert_exl2.py").write_text(FAKE)
    (folder / "pandas.py").write_text(PANDAS)
    return folder
