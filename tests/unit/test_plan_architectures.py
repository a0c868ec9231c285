"""Plans of architectures that are no Llama: what is counted, what is refused, and what is said of the rest."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoints import write_json
from composing import composed
from published_models import PUBLISHED

from orchestrator.backends.known_models import COUNTED, LOADED, TRIED
from orchestrator.backends.table import BACKENDS
from orchestrator.checkpoint.architectures import ARCHITECTURES
from orchestrator.checkpoint.bare import from_config
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.hardware import GIB, MIB, Gpu, Hardware
from orchestrator.plan import exl2_sizes, huggingface, vllm
from orchestrator.plan.planner import make_plan
from orchestrator.plan.types import Plan

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("hydra", "every_engine")


def spec_of(folder: Path, name: str, **config: Any) -> ModelSpec:
    write_json(folder / "config.json", PUBLISHED[name][0] | {"max_position_embeddings": 8192} | config)
    return model_spec(from_config(folder))


def plan(spec: ModelSpec, count: int, gib: int, *argv: str) -> Plan:
    gpus = tuple(Gpu(i, "card", gib * GIB, gib * GIB - 450 * MIB, (8, 6)) for i in range(count))
    return make_plan(composed(*argv), spec, Hardware("auto", gpus, 512 * GIB, 400 * GIB, 16))


def test_every_engine_says_which_architectures_it_runs() -> None:
    assert COUNTED.keys() == TRIED.keys() == BACKENDS.keys()
    for name, counted in COUNTED.items():
        assert TRIED[name] <= counted <= ARCHITECTURES.keys()
        assert counted <= LOADED.get(name, counted)


def test_experts_stay_in_16_bits_under_bitsandbytes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "Mixtral-8x7B")
    nf4 = plan(spec, 8, 24, "backend=bitsandbytes", "quant.bits=4").chosen
    experts = sum(tensor.nbytes for tensor in spec.tensors if tensor.role == "expert")
    assert experts == 2 * 32 * 8 * 3 * 4096 * 14336
    assert experts < sum(nf4.weights.values()) < spec.nbytes


def test_a_plan_reads_the_tensors_of_many_experts_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()

    def count(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def counted(*args: Any) -> Any:
            counts[name] += 1
            return real(*args)

        monkeypatch.setattr(module, name, counted)

    count(huggingface, "tensor_bytes")
    count(vllm, "shard_bytes")
    count(exl2_sizes, "linear_bytes")
    spec = spec_of(tmp_path, "Qwen3-30B-A3B")
    assert plan(spec, 1, 8).changes  # with every context, width and number of cards that was tried for them
    each = {"tensor_bytes": 6, "shard_bytes": 16, "linear_bytes": 40}
    assert counts.keys() <= each.keys()
    for name, times in counts.items():
        assert times <= each[name] * len(spec.tensors), (name, times / len(spec.tensors))


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"num_hidden_layers": 9999}, "claims 9,999 layers: refused"),
        ({"max_position_embeddings": 2**60}, f"is {2**60}, not a positive whole number below 2\\^40"),
        ({"vocab_size": -1}, "vocab_size is -1, not a positive whole number$"),
    ],
)
def test_sizes_that_no_model_has_are_refused(tmp_path: Path, lie: dict[str, int], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        spec_of(tmp_path, "Llama-3-8B", **lie)


def test_latent_attention_caches_one_vector(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "DeepSeek-V2-Lite")
    assert spec.cache_elements(4096) == 4096 * 27 * (512 + 64)
    chosen = plan(
        spec, 1, 80, "backend=transformers", "quant.bits=16", "model.max_context=4096", "run.in_flight=1"
    ).chosen
    assert chosen.gpus[0].kv_cache == 2 * spec.cache_elements(4096)


def test_windows_bound_what_has_to_be_kept(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "Gemma-2-27B")
    assert [cache.kind for cache in spec.layer_caches[:3]] == ["sliding", "full", "sliding"]
    token = 2 * 16 * 128
    assert spec.cache_elements(8192) == 23 * token * (4096 + 8192)
    assert spec_of(tmp_path, "Gemma-2-27B", sliding_window=None).cache_elements(8192) == 46 * token * 8192


@pytest.mark.parametrize("name", ["Mixtral-8x7B", "Qwen3-30B-A3B", "Phi-3-medium", "InternLM2-7B"])
def test_vllm_shards_experts_and_fused_linears(tmp_path: Path, name: str) -> None:
    spec = spec_of(tmp_path, name)
    one, two = (plan(spec, 2, 141, "backend=vllm", f"parallel.tensor={tp}", "quant.bits=16").chosen for tp in (1, 2))
    padding = 2 * 2 * spec.hidden * (-spec.vocab % 64)
    assert one.gpus[0].weights == spec.nbytes + padding
    whole = sum(t.nbytes for t in spec.tensors if t.role == "other")  # norms and routers, on every rank
    assert two.gpus[0].weights == (spec.nbytes + padding - whole) // 2 + whole


def test_vllm_repeats_the_key_heads_of_a_fused_linear(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "Phi-3-medium", num_key_value_heads=2)
    two, four = (plan(spec, 4, 80, "backend=vllm", f"parallel.tensor={tp}", "quant.bits=16").chosen for tp in (2, 4))
    keys = 2 * 40 * 2 * 128 * spec.hidden  # of one head in all layers, in bytes
    norms = sum(t.nbytes for t in spec.tensors if t.role == "other")
    assert 2 * (four.gpus[0].weights - norms - keys) == two.gpus[0].weights - norms - keys


def test_what_was_never_tried_is_said(tmp_path: Path) -> None:
    notes = plan(spec_of(tmp_path, "Gemma-2-9B"), 1, 24).notes
    assert any("vllm and exllamav2 with a Gemma2ForCausalLM" in note and "never tried" in note for note in notes)
    assert not any("never tried" in note for note in plan(spec_of(tmp_path, "Llama-3-8B"), 1, 24).notes)


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("Qwen-7B", [], "what an engine needs for a QWenLMHeadModel is not known here; its weights take 14.38 GiB"),
        ("InternLM2-7B", ["backend=transformers"], "its cache 65,536 elements a token"),
        ("DeepSeek-V3", ["backend=vllm"], "backend=vllm needs for a DeepseekV3ForCausalLM is not known"),
        (
            "DeepSeek-V3",
            ["backend=exllamav2"],
            "backend=exllamav2 does not know the architecture DeepseekV3ForCausalLM",
        ),
        ("Mixtral-8x7B", ["backend=exllamav2"], "backend=exllamav2 needs for a MixtralForCausalLM is not known"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(tmp_path: Path, name: str, argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(spec_of(tmp_path, name), 1, 24, *argv)
    assert said in str(caught.value)


def test_a_config_alone_is_enough_to_plan_and_not_to_run(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_json(model / "config.json", PUBLISHED["Llama-3-70B"][0])
    typed = [sys.executable, "-m", "orchestrator", f"model.path={model}", f"paths.runs={tmp_path / 'runs'}"]
    planned, run = (
        subprocess.run([*typed, *more], cwd=ROOT, capture_output=True, text=True, timeout=120)
        for more in (["task=plan", "hardware=4x24gb"], ["prompts.text=Hello"])
    )
    assert planned.returncode == 0, planned.stderr
    assert "sizes are derived from config.json" in planned.stderr
    assert "70,553.7 M parameters in BF16" in planned.stdout
    assert run.returncode == 2
    assert "holds no weights" in run.stderr
