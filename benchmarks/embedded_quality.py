"""What quantization costs the embedded model: held-out perplexity, and KL against float32, through our own engines.

Base and base + adapter, on held-out text and on held-out questions with their answers. The model is small: this
shows that the ways are right, not which 4-bit method is better on a large one.
usage: embedded_quality.py [WINDOWS]
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import save

from orchestrator import embedded
from orchestrator.backends.protocol import Score
from orchestrator.config import BackendConfig, Config, ModelConfig, PathsConfig, QuantConfig
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import look, open_session
from orchestrator.tokenizer import Tokenizer

WINDOW = 256  # tokens
WAYS = {  # name -> backend, method, bits, dtype, double
    "float32": ("transformers", "none", 32.0, "float32", None),
    "bfloat16": ("transformers", "none", 16.0, "bfloat16", None),
    "int8": ("bitsandbytes", "int8", 8.0, "float32", None),
    "nf4": ("bitsandbytes", "nf4", 4.0, "float32", None),
    "nf4 double": ("bitsandbytes", "nf4", 4.0, "float32", True),
    "fp4": ("bitsandbytes", "fp4", 4.0, "float32", None),
}


def sequences(windows: int) -> dict[str, list[list[int]]]:
    """Held-out tokens: windows of the text, and whole conversations."""
    tokenizer = Tokenizer(embedded.BASE, None, False)
    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer.encode_text(text)
    cut = [tokens[i * WINDOW : (i + 1) * WINDOW] for i in range(min(windows, len(tokens) // WINDOW))]
    lines = (embedded.FOLDER / "heldout_chat.jsonl").read_text(encoding="utf-8").splitlines()[: windows * 3]
    chats = [tokenizer.encode(json.loads(line)["messages"], answer=False) for line in lines]
    return {"text": cut, "questions": chats}


def scores(way: str, adapter: bool, data: dict[str, list[list[int]]], store: str) -> dict[str, list[Score]]:
    """Every sequence scored by one engine, the whole distribution of each position."""
    backend, method, bits, dtype, double = WAYS[way]
    config = Config(
        backend=BackendConfig(name=backend),
        quant=QuantConfig(method=method, bits=bits, double=double),
        model=ModelConfig(path=None if adapter else str(embedded.BASE), dtype=dtype),
        paths=PathsConfig(artifacts=store),
    )
    config = replace(config, run=replace(config.run, in_flight=1))
    with tempfile.TemporaryDirectory() as folder:
        planned = look(config, planning=False)
        with open_session(planned, RunFolder(Path(folder))) as session:
            return {name: [session.engine.score(t, planned.spec.vocab) for t in part] for name, part in data.items()}


def dense(score: Score) -> np.ndarray:
    """The distributions of one sequence as log-probabilities, [T - 1, vocabulary]."""
    tokens, values = np.asarray(score.top_tokens), np.asarray(score.top_logprobs)
    out = np.empty_like(values)
    np.put_along_axis(out, tokens, values, axis=1)
    return out


def compare(found: list[Score], reference: list[np.ndarray]) -> dict[str, float]:
    """Perplexity, and KL(float32 || way) and top-1 agreement over all positions."""
    logprobs = np.concatenate([np.asarray(score.logprobs) for score in found])
    kl, agree = [], []
    for score, want in zip(found, reference, strict=True):
        have = dense(score)
        kl.append((np.exp(want) * (want - have)).sum(axis=1))
        agree.append(want.argmax(axis=1) == have.argmax(axis=1))
    every = np.concatenate(kl)
    return {
        "tokens": len(logprobs),
        "perplexity": round(math.exp(-logprobs.mean()), 4),
        "kl_mean": float(f"{max(0.0, every.mean()):.3g}"),
        "kl_p99": float(f"{np.quantile(every, 0.99):.3g}"),
        "top1_agreement": round(float(np.concatenate(agree).mean()), 4),
    }


def main() -> None:
    windows = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    data = sequences(windows)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as store:
        for adapter in (False, True):
            reference: dict[str, list[np.ndarray]] = {}
            for way in WAYS:
                found = scores(way, adapter, data, store)
                reference = reference or {name: [dense(s) for s in part] for name, part in found.items()}
                for name, part in found.items():
                    row = {"way": way, "adapter": adapter, "data": name, **compare(part, reference[name])}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    save("embedded_quality", {"window": WINDOW, "rows": rows})


if __name__ == "__main__":
    main()
