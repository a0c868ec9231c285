"""Writes the measured tables of the README from benchmarks/results/. usage: readme_tables.py [--check]"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def environment(result: dict[str, Any]) -> str:
    """The line under a table that says where it was measured."""
    env = result["environment"]
    machine = ", ".join(env["gpus"]) or f"{env['cpu']}, {env['cpus']} cores, no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return f"{machine}; Python {env['python']}, {versions}; {env['when']}."


def embedded() -> str:
    """Perplexity and KL of the embedded model, per width, with and without the adapter."""
    result = json.loads((RESULTS / "embedded_quality.json").read_text())
    rows = []
    cells: dict[tuple[str, bool, str], dict[str, Any]] = {
        (r["way"], r["adapter"], r["data"]): r for r in result["rows"]
    }
    for way in dict.fromkeys(row["way"] for row in result["rows"]):
        line = [way]
        for adapter, data in ((False, "text"), (True, "text"), (True, "questions")):
            row = cells[way, adapter, data]
            line += [f"{row['perplexity']:.2f}", f"{row['kl_mean']:.2g}", f"{row['top1_agreement']:.1%}"]
        rows.append(line)
    head = ["weights", "base, text: perplexity", "KL", "top-1"]
    head += ["with adapter, text: perplexity", "KL", "top-1", "with adapter, questions: perplexity", "KL", "top-1"]
    tokens = {row["data"]: row["tokens"] for row in result["rows"]}
    return (
        f"Held-out text ({tokens['text']:,} tokens) and held-out conversations ({tokens['questions']:,} tokens), "
        f"teacher-forced through our own engines; KL in nats per token and top-1 agreement against float32. The model "
        f"is far too small to rank 4-bit methods: this shows that the ways are right.\n\n{table(head, rows)}\n\n"
        f"`benchmarks/embedded_quality.py`: {environment(result)}"
    )


def measured() -> str:
    """What the light commands take, and what a merge takes of memory."""
    start = json.loads((RESULTS / "startup.json").read_text())
    rows = [[f"`{name}`", f"{value:.2f} s"] for name, value in start["median_s"].items()]
    rows.append(["(for comparison) `import torch`", f"{start['import_torch_median_s']:.2f} s"])
    runs = "; ".join(
        f"{run['wall_s']:.1f} s (load {run['load_s']:.1f}, answers {run['answers_s']:.1f}, "
        f"stages: {', '.join(run['stages_run']) or 'none'})"
        for run in (start["first_run"], *start["later_runs"])
    )
    merge = json.loads((RESULTS / "merge_memory.json").read_text())
    merged = [
        [
            str(row["layers"]),
            f"{row['base_bytes'] / 10**9:.2f} GB",
            f"{row['peak_resident'] / MIB:.0f} MiB",
            f"{row['peak_anonymous'] / MIB:.0f} MiB",
        ]
        for row in merge["rows"]
    ]
    return (
        f"Light commands, whole processes, median of {start['rounds']}:\n\n{table(['command', 'time'], rows)}\n\n"
        f"`benchmarks/startup.py`: {environment(start)}\n\n"
        f"The default command, first and again: {runs}. A second run builds nothing; its time is the engine's load and "
        "the answers, beside the tokenizer's import.\n\n"
        "Memory of a merge (rank 16 on every linear, sharded `.bin` in float16), four times the layers:\n\n"
        f"{table(['layers', 'base', 'peak resident', 'of it anonymous'], merged)}\n\n"
        f"`benchmarks/merge_memory.py`: {environment(merge)}"
    )


def checkpoints() -> str:
    """Conversion and merge beside transformers, PEFT and a plain copy."""
    result = json.loads((RESULTS / "checkpoints.json").read_text())
    rows = []
    for name, model in result["models"].items():
        for job, contenders in (("convert", model["convert"]), ("merge", model["merge"])):
            floor = contenders["copy"]["wall_s"]
            for who, row in contenders.items():
                peaks = [f"{row[key] / MIB:.0f} MiB" for key in ("peak_resident", "peak_anonymous")]
                label = f"{job} {name.upper()} ({model['bytes'] / 10**9:.1f} GB)"
                rows.append([label, who, f"{row['wall_s'] / floor:.2f}", *peaks])
    head = ["", "whole process of", "time / copy", "peak resident", "of it anonymous"]
    return (
        "Whole processes, medians (rounds in one run: "
        f"{result['rounds']}), sources in the page cache, results flushed to the disk; `copy` is `cp` "
        f"and `sync` of the same files:\n\n{table(head, rows)}\n\n"
        f"`benchmarks/checkpoints.py`: {environment(result)}"
    )


def gpus() -> str:
    """The embedded model through the GPU engines: quality, and the plan's weights against what lies there."""
    result = json.loads((RESULTS / "thin_gpu.json").read_text())
    rows, tokens = [], 0
    for name, part in result["parts"].items():
        if not name.startswith("embedded-") or "error" in part:
            continue
        bits = [f"{r['measured_bits']:.3f}" for r in part["reports"].values() if "measured_bits" in r]
        planned = sum(gpu["weights_planned"] for gpu in part["gpus"])
        found = sum(gpu["weights"] for gpu in part["gpus"])
        tokens = part["tokens"]
        quality = [f"{part['kl_mean']:.2g}", f"{part['top1_agreement']:.1%}"]
        weights = [f"{planned / MIB:.3f} MiB", f"{found / MIB:.3f} MiB"]
        rows.append([name.removeprefix("embedded-"), *(bits or ["16"]), *quality, *weights, f"{part['load_s']:.0f} s"])
    head = ["way", "bits", "KL", "top-1", "weights planned", "weights placed", "load"]
    return (
        "The embedded model, merged from `.bin` and adapter by one command each; KL and top-1 agreement against "
        f"float32 on the CPU over {tokens:,} held-out tokens:\n\n{table(head, rows)}\n\n"
        f"{random_1b(result['parts'])}\n\n`benchmarks/thin_gpu.py`: {environment(result)}"
    )


def random_1b(parts: dict[str, Any]) -> str:
    """Speed and memory of a model whose weights are random, on cards that are capped."""
    rows: list[list[str]] = []
    for name, part in parts.items():
        if not name.startswith("speed-") or "error" in part:
            continue
        rates = [f"{part['tokens_per_s'][count]['median']:,.0f}" for count in ("1", "16")]
        gib = [[gpu[key] / 2**30 for gpu in part["gpus"]] for key in ("peak_planned", "peak")]
        peaks = [" + ".join(f"{size:.2f}" for size in sizes) for sizes in gib]
        rows.append([name.removeprefix("speed-"), f"{part['load_s']:.0f} s", *rates, *peaks])
    for name, part in parts.items():
        if name.startswith("ratio-"):
            ratios = [
                f"{found['ratio']:.3f} of bare, {spread(found['quartiles_of_turns'])}"
                for found in part["in_flight"].values()
            ]
            rows.append([f"{name.removeprefix('ratio-')}, beside a bare script", "", *ratios, "", ""])
    head = ["way", "load", "tokens/s, 1 in flight", "16 in flight", "allocator planned, GiB", "measured, GiB"]
    return (
        "A random Llama of 1B on cards that are capped to 24 GiB (`hardware.memory_gib=24`); `exl2-split` is "
        f"`parallel.gpu_split=[0.4,24]`, vLLM takes what the cap leaves it:\n\n{table(head, rows)}"
    )


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
PLANNED = ("1x24gb", "2x24gb", "4x24gb")


def planned() -> str:
    """What `task=plan` says of a 70B on cards of 24 GB; nothing is measured."""
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(LLAMA_70B))
        for profile in PLANNED:
            for found in plans(Path(place), profile):
                name = f"{found['backend']} {found['method'].upper() if found['method'] != 'none' else ''}".strip()
                fullest = min(found["gpus"], key=lambda gpu: gpu["capacity"] - gpu["total"])
                figures = [f"{fullest[part] / 2**30:.1f}" for part in ("weights", "kv_cache", "scratch", "total")]
                context = f"{found['largest_context']:,}" if found["fits"] else "does not fit"
                rows.append([f"`{profile}`: {name} {found['bits']:g}", str(len(found["gpus"])), *figures, context])
    head = ["cards, engine, bits", "GPUs used", "weights", "KV cache", "scratch", "in all", "largest context"]
    return (
        "A 70B of Llama 3's shape (context 131,072) on cards of 24 GB, as `task=plan` has it: GiB on the fullest card; "
        f"the largest context is that of one answer at a time.\n\n{table(head, rows)}"
    )


def plans(model: Path, profile: str) -> list[dict[str, Any]]:
    """The candidates of one command that this version makes itself, best first."""
    command = [sys.executable, "-m", "orchestrator", "task=plan", f"model.path={model}", f"hardware={profile}"]
    runs = model / "runs" / profile
    subprocess.run(
        [*command, f"hydra.run.dir={runs}", f"paths.artifacts={model / 'artifacts'}"],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    found = json.loads((runs / "plan.json").read_text())["candidates"]
    return [candidate for candidate in found if not candidate["needs"]]


def depth() -> str:
    """ExLlamaV2: sweeps, speed, a 70B and killed conversions."""
    result = json.loads((RESULTS / "exl2_depth.json").read_text())
    return (
        "EXL2 beside what it is compared with; models are made up (true shapes, random words), and answer noise. "
        "Both generators are loaded and work in turns; rates are medians of the turns, and behind the ratio of the two "
        "medians stand the quartiles of the single turns, which a busy host scatters:\n\n"
        f"{table(['', 'ours', 'beside it', 'ratio', 'to reach'], depth_rows(result['summary']))}\n\n"
        "A Llama-3-70B's shape in EXL2 at 4.0 bits (35 GB) on two GPUs, each capped to 24 GiB "
        "(`hardware.memory_gib=24`): split automatically, by hand, with a part of every layer on each GPU, and with "
        "the largest context that a 4-bit cache leaves. Of the decoding speed, the limit is what the copy's bandwidth "
        "allows, were nothing but weights read. GiB as planned / as NVML saw the process hold:\n\n"
        f"{table(BIG_HEAD, big_rows(result['summary']))}\n\n"
        f"`benchmarks/exl2_depth.py`: {environment(result)}"
    )


def spread(quartiles: list[float]) -> str:
    """The middle half of the ratios of single turns."""
    return f"{quartiles[0]:.2f} to {quartiles[2]:.2f}"


BIG_HEAD = ["way", "context", "load", "decode, tokens/s", "prefill, tokens/s", "first GPU, GiB", "second GPU, GiB"]


def depth_rows(found: dict[str, Any]) -> list[list[str]]:
    """The lines of that table."""
    rows: list[list[str]] = []
    names = {"in-turn": "in turn on one GPU", "one": "at once on one GPU", "two": "at once on two GPUs"}
    for name, sweep in found["sweep"].items():
        seconds = [f"{sweep['ours_s']:.0f} s", f"{sweep['separate_s']:.0f} s, three runs of the converter"]
        bound = f"at most {sweep['bound']}" if sweep["bound"] else ""
        rows.append([f"4, 6 and 8 bits of 4 layers of a 1B, {names[name]}", *seconds, f"{sweep['ratio']:.2f}", bound])
    for name, speed in found["speed"].items():
        for count, ratio in speed["ratio"].items():
            ours, bare = f"{speed['ours'][count]:,.0f} tokens/s", f"{speed['bare'][count]:,.0f}, the bare generator"
            both = f"{ratio:.3f}, {spread(speed['quartiles_of_turns'][count])}"
            rows.append([f"{name.upper()}, {count} in flight", ours, bare, both, f"at least {speed['bound']}"])
        read, copied = (speed[key] / 1e9 for key in ("read_bytes_per_s", "copy_bytes_per_s"))
        share = f"{speed['share_of_copy']:.2f}"
        rows.append([f"{name.upper()}, weights read", f"{read:,.0f} GB/s", f"{copied:,.0f}, a copy", share, ""])
    if kill := found["kill"]:
        label = "conversions that were killed and resumed: with the tensors of one that was not"
        repeated = f"{int(kill['uninterrupted_equal'] or 0)} of 1 that was only repeated"
        bound = "all, or the engine explains it"
        rows.append([label, f"{kill['equal']} of {kill['killed']}", repeated, "", bound])
        kl = {name: f"{value:.3f}" for name, value in kill["kl"].items()}
        if resumed := [value for name, value in kl.items() if name not in ("whole", "again")]:
            others = [kl[name] for name in ("whole", "again") if name in kl]
            rows.append(
                ["their KL to float32", ", ".join(resumed), f"{', '.join(others)} of those that were not", "", ""]
            )
    return rows


def big_rows(found: dict[str, Any]) -> list[list[str]]:
    """A line for each load of the 70B."""
    rows: list[list[str]] = []
    for name, load in found["big"].items():
        held = [f"{gpu['planned'] / 2**30:.2f} / {gpu['measured'] / 2**30:.2f}" for gpu in load["gpus"].values()]
        decode = f"{load['decode_tokens_per_s']:.1f}"
        if load["limit_tokens_per_s"]:
            decode += f" ({load['share_of_limit']:.2f} of {load['limit_tokens_per_s']:.0f})"
        prefill = f"{load['prefill_tokens_per_s']:,.0f}"
        rows.append([name, f"{load['context']:,}", f"{load['load_s']:.0f} s", decode, prefill, *held])
    return rows


def accuracy() -> str:
    """The plan against what the engines' processes held."""
    result = json.loads((RESULTS / "plan_accuracy.json").read_text())
    lines = "\n".join(result["table"])
    return (
        "Made-up Llamas of 1B and 8B, contexts of 2,048 to 32,768 that are full in every answer in flight, KV caches "
        "of 16, 8 and 4 bits, one GPU and two, whole and offloaded: the plan against the most that NVML saw the "
        "engine's processes hold on each GPU. Right is within 300 MiB or 2%. vLLM takes what it is given: of it the "
        "cache that was promised is compared with the one that it has. Beside it the parameters times the bytes of "
        f"one, which is how `accelerate estimate-memory` counts.\n\n{lines}\n\n"
        f"`benchmarks/plan_accuracy.py`: {environment(result)}"
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "planned": planned,
    "embedded": embedded,
    "checkpoints": checkpoints,
    "measured": measured,
    "gpus": gpus,
    "accuracy": accuracy,
}

if (RESULTS / "exl2_depth.json").exists():
    SECTIONS["depth"] = depth


def rendered(text: str) -> str:
    """The README with every measured section as the results have it.

    Raises:
        SystemExit: a section's markers are missing.
    """
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no <!-- {name} --> section")
        body = section()
        text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    text = README.read_text(encoding="utf-8")
    new = rendered(text)
    if "--check" in sys.argv:
        sys.exit(0 if new == text else "README.md is not what benchmarks/results say: run tools/readme_tables.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
