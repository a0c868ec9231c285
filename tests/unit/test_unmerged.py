"""Adapters that run on top of their base: what is written for the engine, what is refused, planned and cached."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import small_models
import torch
from composing import composed
from exl2_models import write_exl2
from packed_models import PACK, write_packed
from safetensors.torch import load_file, save_file
from small_models import LLAMA_70B, Llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from orchestrator.artifacts import Store
from orchestrator.backends.exl2_adapters import sort_factors
from orchestrator.backends.exl2_setup import RESERVE_FIRST, RESERVE_OTHERS
from orchestrator.backends.exl2_tensors import bytes_per_tensor
from orchestrator.backends.exllamav2 import ExLlamaV2Engine, end_tokens
from orchestrator.backends.protocol import LoadPlan
from orchestrator.backends.table import BACKENDS, backends_with_adapters
from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.adapter_unmerged import lora_targets
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.roles import SpecLora
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.config import Config
from orchestrator.engine.wire import Load, decode, encode
from orchestrator.errors import CheckpointError, ConfigError, EngineUnavailableError, StageError
from orchestrator.hardware import GIB, Gpu, Hardware
from orchestrator.pipeline import Model, Source, disk_needs, planned_spec, prepare, tokenizer_folder
from orchestrator.plan.exllamav2 import estimate
from orchestrator.plan.planner import make_plan
from orchestrator.plan.types import Ask, Candidate
from orchestrator.report.console import size
from orchestrator.runfolder import RunFolder
from orchestrator.stages.exl2_adapters import CONFIG, WEIGHTS, write_adapter, write_adapters
from orchestrator.stages.merge import merge
from orchestrator.tasks.session import load_plan, look
from tests import checkpoints
from tests.checkpoints import LINEARS, Q_PROJ, SCALED, adapter_tensors, write_json, write_model

pytestmark = [pytest.mark.usefixtures("hydra"), pytest.mark.filterwarnings("ignore")]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """An adapter of PEFT's with random weights, saved; and for each linear what it adds by PEFT's own account."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows := options.pop("resize", None):
        model.resize_token_embeddings(rows)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    wrapped.save_pretrained(folder)
    linears = {n: m for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    return {n.removeprefix("base_model.model."): m.get_delta_weight("default").detach() for n, m in linears.items()}


def written(base: Path, lora: Path, out: Path, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """For each linear what the engine will add: the product of the factors that were written."""
    out.mkdir()
    write_adapter(open_checkpoint(base), open_adapter(lora), weight, out)
    tensors = load_file(out / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    products = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            products[module.removeprefix("base_model.model.")] = tensors[f"{module}.lora_B.weight"].float() @ a.float()
    assert 2 * len(products) == len(tensors)
    return products


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To what float16 leaves of each factor."""
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=2e-3, atol=2e-3 * float(delta.abs().max()))


# --- what is written


@pytest.mark.parametrize(
    "options",
    [
        *SCALED.values(),
    ],
    ids=[*SCALED],
)
def test_it_adds_what_peft_does(tmp_path: Path, llama: Path, options: dict[str, Any]) -> None:
    wanted = trained(llama, tmp_path / "lora", **options)
    assert_same(written(llama, tmp_path / "lora", tmp_path / "out"), wanted)
    half = {name: -0.5 * delta for name, delta in wanted.items()}
    assert_same(written(llama, tmp_path / "lora", tmp_path / "half", -0.5), half)


def test_nothing_is_left_for_the_engine_to_scale(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "lora", r=4, lora_alpha=64, target_modules=LINEARS, use_rslora=True)
    written(llama, tmp_path / "lora", tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["fan_in_fan_out"]) == (1, 1, False, False)
    assert sorted(config["target_modules"]) == sorted(LINEARS)
    theirs, ours = load_file(tmp_path / "lora" / "adapter_model.safetensors"), load_file(tmp_path / "out" / WEIGHTS)
    a = f"base_model.model.{Q_PROJ}.lora_A.weight"
    assert torch.equal(ours[a], theirs[a].half())  # as it is
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]


def test_it_adds_what_the_merge_does_where_linears_are_stored_the_other_way_round(tmp_path: Path) -> None:
    unknown = {"architectures": ["SomeForCausalLM"], "model_type": "some"}
    base = write_model(tmp_path / "base", config=unknown)
    lora = checkpoints.write_adapter(tmp_path / "lora", config={"fan_in_fan_out": True})
    one, two = open_checkpoint(base), open_adapter(lora)
    assert lora_targets(two, one)[0].transposed
    merge(one, [(two, 1.0)], tmp_path / "merged", dtype=None, shard_size=2**30, progress=lambda *_: None)
    before, after = (
        load_file(folder / "model.safetensors")[f"{Q_PROJ}.weight"] for folder in (base, tmp_path / "merged")
    )
    assert_same(written(base, lora, tmp_path / "out"), {Q_PROJ: after - before})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bin_and_safetensors_give_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_model(tmp_path / "base")
    tensors = {name: tensor.to(dtype) for name, tensor in adapter_tensors([Q_PROJ]).items()}
    found = []
    for kind in ("bin", "safetensors"):
        lora = checkpoints.write_adapter(tmp_path / kind, tensors, kind=kind)
        written(base, lora, tmp_path / f"{kind}-out")
        found.append((tmp_path / f"{kind}-out" / WEIGHTS).read_bytes())
    assert found[0] == found[1]


def refused(base: Path, lora: Path, out: Path, *said: str, hint: str = "model.merge=true", weight: float = 1.0) -> None:
    out.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError) as caught:
        write_adapter(open_checkpoint(base), open_adapter(lora), weight, out)
    for part in (*said, hint):
        assert part in str(caught.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("part", "weight"), [("A", 1.0), ("B", 1.0), ("B", 1e6)])
def test_what_float16_cannot_hold_is_refused_by_name(tmp_path: Path, part: str, weight: float) -> None:
    tensors = adapter_tensors([Q_PROJ])
    name = f"base_model.model.{Q_PROJ}.lora_{part}.weight"
    if weight == 1:
        tensors[name][1, 2] = 7e4
    lora = checkpoints.write_adapter(tmp_path / "lora", tensors)
    base = write_model(tmp_path / "base")
    refused(base, lora, tmp_path / "out", name, "does not fit into float16", "its largest value is", weight=weight)


def test_a_change_that_float16_rounds_away_is_refused(tmp_path: Path) -> None:
    base, lora = write_model(tmp_path / "base"), checkpoints.write_adapter(tmp_path / "lora")
    refused(base, lora, tmp_path / "out", "would change nothing", hint="larger weight", weight=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "(DoRA)"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "it replaces lm_head.weight"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
            "layernorm.weight (a trained embedding, head, bias or other module)",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.weight"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens.weight"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, "replaces rows of model.embed_tokens"),
        ({"target_modules": ["q_proj"], "resize": 72}, "it replaces lm_head.weight"),
    ],
    ids=["DoRA", "a saved head", "saved norms", "a LoRA of the head", "of the embedding", "trained rows", "resized"],
)
def test_what_the_engine_cannot_do_is_refused_by_name(
    tmp_path: Path, llama: Path, options: dict[str, Any], said: str
) -> None:
    trained(llama, tmp_path / "lora", r=4, **options)
    refused(llama, tmp_path / "lora", tmp_path / "out", "model.merge=false", said)


@pytest.mark.parametrize(
    ("bias", "lora_bias", "said"),
    [("all", False, "it replaces model.layers.0.self_attn."), ("none", True, "q_proj.bias (lora_bias)")],
)
def test_biases_are_refused(tmp_path: Path, bias: str, lora_bias: bool, said: str) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(tmp_path / "base")
    trained(tmp_path / "base", tmp_path / "lora", r=4, target_modules=["q_proj"], bias=bias, lora_bias=lora_bias)
    refused(tmp_path / "base", tmp_path / "lora", tmp_path / "out", said)


def test_experts_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    trained(tmp_path / "base", tmp_path / "lora", r=2, **options)
    refused(tmp_path / "base", tmp_path / "lora", tmp_path / "out", "experts")


def test_a_lora_elsewhere_than_in_the_layers_is_refused(tmp_path: Path) -> None:
    sizes = {"lora_A.weight": (4, checkpoints.HIDDEN), "lora_B.weight": (checkpoints.VOCAB, 4)}
    tensors = {f"base_model.model.lm_head.{name}": torch.randn(size) for name, size in sizes.items()}
    lora = checkpoints.write_adapter(tmp_path / "lora", tensors)
    said = "it changes lm_head.weight, which is no linear of attention or MLP"
    refused(write_model(tmp_path / "base"), lora, tmp_path / "out", said)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PREFIX_TUNING"])
def test_other_adapters_than_lora_are_refused(tmp_path: Path, kind: str) -> None:
    lora = checkpoints.write_adapter(tmp_path / "lora", config={"peft_type": kind})
    refused(write_model(tmp_path / "base"), lora, tmp_path / "out", f"the adapter is {kind}, not LORA", hint="PEFT")


def test_damaged_values_are_refused(tmp_path: Path) -> None:
    tensors = adapter_tensors([Q_PROJ])
    next(iter(tensors.values()))[0, 0] = float("nan")
    lora = checkpoints.write_adapter(tmp_path / "lora", tensors)
    refused(write_model(tmp_path / "base"), lora, tmp_path / "out", "NaN", hint="diverged")


# --- the store


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def on_top(base: Path, *loras: Path, weights: tuple[float, ...] = ()) -> Source:
    opened = [(open_adapter(lora), weight) for lora, weight in zip(loras, weights or (1.0,) * len(loras), strict=True)]
    return Source(open_checkpoint(base), unmerged=tuple(opened))


def made(config: Config, source: Source, run: RunFolder) -> Model:
    return Model(source.base.path).with_adapters(write_adapters(config, source, run))


def test_a_folder_for_each_adapter_made_once(tmp_path: Path, run: RunFolder) -> None:
    base = write_model(tmp_path / "base")
    one = checkpoints.write_adapter(tmp_path / "one")
    two = checkpoints.write_adapter(tmp_path / "two", adapter_tensors([Q_PROJ], seed=3))
    config = composed(f"paths.artifacts={tmp_path / 'store'}", "convert.verify=true")
    first = made(config, on_top(base, one, two, weights=(1.0, 0.5)), run)
    assert len(first.adapters) == len(first.built) == 2
    assert first.path == base
    assert [path.name.partition("-")[0] for path in first.adapters] == ["adapter", "adapter"]
    again = made(config, on_top(base, one, two, weights=(1.0, 0.5)), run)
    assert (again.built, again.adapters) == ((), first.adapters)
    alone = made(config, on_top(base, two, weights=(0.5,)), run)
    assert (alone.built, alone.adapters) == ((), first.adapters[1:])
    other = made(config, on_top(base, two, weights=(0.25,)), run)
    assert len(other.built) == 1
    assert {a.name for a in Store(tmp_path / "store").finished()} == {
        a.name for a in (*first.artifacts, *other.artifacts)
    }
    checkpoints.write_adapter(two, adapter_tensors([Q_PROJ], seed=4))
    assert len(made(config, on_top(base, two, weights=(0.25,)), run).built) == 1


def test_what_a_killed_one_left_is_gone_on_with(tmp_path: Path, run: RunFolder) -> None:
    base, lora = write_model(tmp_path / "base"), checkpoints.write_adapter(tmp_path / "lora")
    config = composed(f"paths.artifacts={tmp_path / 'store'}")
    [whole] = made(config, on_top(base, lora), run).adapters
    wanted = {file.name: file.read_bytes() for file in whole.iterdir() if file.name in (CONFIG, WEIGHTS)}
    partial = whole.rename(whole.with_name(f"{whole.name}.partial"))
    (partial / "manifest.json").unlink()
    (partial / f"{WEIGHTS}.part").write_bytes(wanted[WEIGHTS][:50])
    again = made(config, on_top(base, lora), run)
    assert again.built == (whole.name,)
    found = {file.name: file.read_bytes() for file in whole.iterdir() if file.name != "manifest.json"}
    assert found == wanted


def test_what_it_writes_is_known_before(tmp_path: Path, run: RunFolder) -> None:
    base, lora = write_model(tmp_path / "base"), checkpoints.write_adapter(tmp_path / "lora")
    config, source = composed(f"paths.artifacts={tmp_path / 'store'}"), on_top(base, lora)
    chosen: Any = SimpleNamespace(backend="exllamav2", method="none", bits=16.0)
    [before] = disk_needs(config, source, chosen)
    model = made(config, source, run)
    assert before.bytes == before.parts[-1].size == (model.adapters[0] / WEIGHTS).stat().st_size
    assert "for an adapter" in str(before)
    [after] = disk_needs(config, source, chosen)
    assert after.bytes == 0


def test_several_adapters_are_said_once(tmp_path: Path, run: RunFolder) -> None:
    base = write_model(tmp_path / "base")
    loras = [checkpoints.write_adapter(tmp_path / name) for name in ("one", "other")]
    one, both = on_top(base, loras[0]), on_top(base, *loras)
    config = composed(f"paths.artifacts={tmp_path / 'store'}")
    chosen: Any = SimpleNamespace(backend="exllamav2", method="none", bits=16.0)
    [alone], [before] = (disk_needs(config, source, chosen) for source in (one, both))
    assert before.bytes == 2 * alone.bytes > 0
    assert str(before).startswith(f"{size(before.bytes)} for 2 adapters in ")
    made(config, one, run)
    [after] = disk_needs(config, both, chosen)
    assert str(after).startswith(f"{size(alone.bytes)} for an adapter in ")


def test_a_damaged_folder_is_found_by_verify(tmp_path: Path, run: RunFolder) -> None:
    base, lora = write_model(tmp_path / "base"), checkpoints.write_adapter(tmp_path / "lora")
    config = composed(f"paths.artifacts={tmp_path / 'store'}", "convert.verify=true")
    file = made(config, on_top(base, lora), run).adapters[0] / WEIGHTS
    was, data = file.stat(), file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(StageError, match=r"another digest.*lora_B\.weight is not what its sources give"):
        made(config, on_top(base, lora), run)


# --- the plan


def machine(*gib: float) -> Hardware:
    gpus = tuple(Gpu(i, f"{g} GiB", int(g * GIB), int(g * GIB), (8, 6)) for i, g in enumerate(gib))
    return Hardware("auto", gpus, 256 * GIB, 256 * GIB, 8)


def ask(bits: float = 4.0, method: str = "exl2", **settings: Any) -> Ask:
    return Ask("exllamav2", method, bits, "float16", False, 2048, 4096, 1, settings)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return model_spec(open_checkpoint(small_models.write_headers(tmp_path_factory.mktemp("70b"), LLAMA_70B)))


def with_loras(spec: ModelSpec, shape: Llama, rank: int) -> ModelSpec:
    loras = [
        SpecLora(f"model.layers.{layer}.{module}", layer, rank, size[1], size[0])
        for layer in range(shape.layers)
        for module, size in shape.linears().items()
    ]
    return replace(spec, loras=tuple(loras))


def weights_of(plan: Candidate) -> int:
    return sum(gpu.weights for gpu in plan.gpus)


@pytest.mark.parametrize(
    ("cards", "settings"), [((80,), {}), ((24, 24), {}), ((24, 24), {"parallel.gpu_split": [20, 22]})]
)
def test_the_plan_counts_the_factors_and_their_scratch(big: ModelSpec, cards: Any, settings: Any) -> None:
    plain, loaded = (estimate(s, machine(*cards), ask(**settings)) for s in (big, with_loras(big, LLAMA_70B, 16)))
    assert plain.fits, plain.reasons
    assert loaded.fits, loaded.reasons
    whole = 2 * sum(16 * sum(size) for size in LLAMA_70B.linears().values()) * LLAMA_70B.layers
    assert weights_of(loaded) - weights_of(plain) == whole == sum(loaded.adapter_bytes.values())
    assert loaded.weights["+".join(gpu.device for gpu in loaded.gpus)] == weights_of(loaded)
    assert plain.adapter_bytes == {}
    assert set(loaded.adapter_bytes) == {gpu.device for gpu in loaded.gpus}
    scratch = [gpu.scratch for gpu in plain.gpus]
    assert [gpu.scratch - before for gpu, before in zip(loaded.gpus, scratch, strict=True)] == [2 * 2048 * 16] * len(
        cards
    )
    assert loaded.to_json()["adapter_bytes"] == loaded.adapter_bytes


def test_factors_can_be_what_does_not_fit(big: ModelSpec) -> None:
    rank = 1024  # 26 GB
    assert estimate(big, machine(40), ask()).fits
    assert not estimate(with_loras(big, LLAMA_70B, rank), machine(40), ask()).fits
    assert estimate(with_loras(big, LLAMA_70B, rank), machine(80), ask()).fits


def test_an_unquantized_linear_takes_a_sum_as_well(tmp_path: Path) -> None:
    spec = model_spec(open_checkpoint(small_models.write_headers(tmp_path, Llama())))
    plain, loaded = (estimate(s, machine(24), ask(16.0, "none")) for s in (spec, with_loras(spec, Llama(), 8)))
    assert loaded.gpus[0].scratch - plain.gpus[0].scratch == 2 * 2048 * (8 + Llama().intermediate)


@pytest.fixture
def planned_pair(tmp_path: Path) -> tuple[Path, Path]:
    base = small_models.write_noise(tmp_path / "base", Llama())
    return base, small_models.write_adapter(tmp_path / "lora", Llama())


@pytest.mark.usefixtures("every_engine", "no_margins")
def test_a_plan_is_of_the_base_and_of_its_adapters(planned_pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = planned_pair
    argv = ("hardware=1x24gb", f"model.path={base}", f"paths.artifacts={tmp_path / 'store'}", "model.merge=false")
    adapters = f"model.adapters=[{{path: {lora}}}, {{path: {lora}, weight: 0.5}}]"
    planned = look(composed(*argv, "quant.bits=4", adapters), planning=True)
    assert {c.backend for c in planned.plan.candidates} == set(backends_with_adapters())
    pair = 2 * sum(8 * sum(size) for size in Llama().linears().values()) * Llama().layers
    chosen = planned.plan.chosen
    assert chosen.adapter_bytes == {"cuda:0": 2 * pair}
    assert planned.spec.nbytes == model_spec(open_checkpoint(base)).nbytes
    plan = load_plan(planned, chosen, Path("model"), [Path("one"), Path("two")])
    assert (plan.adapters, plan.adapter_bytes, plan.tokenizer) == (("one", "two"), chosen.adapter_bytes, "")
    [back] = [decode(encode(Load(plan, "a:B"))[4:])]
    assert back == Load(plan, "a:B")
    merged = look(composed(*argv[:-1], "backend=exllamav2", "quant.bits=4", adapters), planning=True).plan.chosen
    assert merged.adapter_bytes == {}
    assert chosen.gpus[0].weights == merged.gpus[0].weights + 2 * pair


def test_without_a_gpu_it_says_who_runs_it(planned_pair: tuple[Path, Path]) -> None:
    base, lora = planned_pair
    argv = (f"model.path={base}", f"model.adapter={lora}", "model.merge=false", "hardware=cpu")
    with pytest.raises(
        EngineUnavailableError, match=r"model\.merge=false: backend=exllamav2 needs a CUDA GPU"
    ) as caught:
        look(composed(*argv), planning=True)
    assert "Leave model.merge out" in caught.value.hint


def test_an_architecture_that_adds_it_elsewhere(planned_pair: tuple[Path, Path]) -> None:
    base, lora = planned_pair
    config = composed(f"model.path={base}", f"model.adapter={lora}", "model.merge=false")
    spec = replace(planned_spec(config, on_top(base, lora)), architecture="Gemma2ForCausalLM")
    for name in ("auto", "exllamav2"):
        config.backend.name = name
        with pytest.raises(ConfigError, match="runs no adapter on top of a Gemma2ForCausalLM"):
            make_plan(config, spec, machine(24))
    config.model.merge = True
    assert make_plan(config, replace(spec, loras=()), machine(24)).chosen.backend == "exllamav2"


def test_a_plan_of_what_is_refused_is_refused(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "lora", r=4, target_modules=["q_proj"], use_dora=True)
    argv = ("hardware=1x24gb", f"model.path={llama}", f"model.adapter={tmp_path / 'lora'}")
    with pytest.raises(CheckpointError, match=r"\(DoRA\)\. Set model\.merge=true"):
        look(composed(*argv, "model.merge=false"), planning=True)
    look(composed(*argv, "backend=exllamav2"), planning=True)


def test_the_tokenizer_is_that_of_a_merge(tmp_path: Path) -> None:
    base, lora = write_model(tmp_path / "base"), checkpoints.write_adapter(tmp_path / "lora")
    assert tokenizer_folder(on_top(base, lora)) == base
    (lora / "tokenizer.json").write_text('{"version": "1.0"}')
    write_json(lora / "tokenizer_config.json", {"chat_template": "{{ messages }}", "eos_token": "<|im_end|>"})
    assert tokenizer_folder(on_top(base, lora)) == lora
    assert end_tokens(base, {"<|im_end|>": 7}.get, lora) == {2, 7}


# --- a base that is quantized already


PADDED = Llama(hidden=96, heads=6, kv_heads=1, intermediate=160, vocab=500)  # EXL2 has 32 outputs for k_proj's 16


@pytest.mark.parametrize("shape", [Llama(), PADDED, Llama(tied=True)], ids=["plain", "padded", "tied"])
def test_an_exl2_base_takes_what_its_original_does(tmp_path: Path, shape: Llama) -> None:
    bases = {"exl2": write_exl2(tmp_path / "exl2", shape), "plain": small_models.write_noise(tmp_path / "plain", shape)}
    lora = small_models.write_adapter(tmp_path / "lora", shape)
    for name, base in bases.items():
        written(base, lora, tmp_path / f"{name}-out")
    files = [{file.name: file.read_bytes() for file in (tmp_path / f"{name}-out").iterdir()} for name in bases]
    assert files[0] == files[1]
    config = composed("model.path=x", "model.adapter=y", "model.merge=false")
    specs = {name: planned_spec(config, on_top(base, lora)) for name, base in bases.items()}
    assert specs["exl2"].loras == specs["plain"].loras
    assert specs["exl2"].quantization is not None  # it is planned as what it is
    assert tokenizer_folder(on_top(bases["exl2"], lora)) == bases["exl2"]


def test_shapes_of_another_model_are_refused_on_exl2_too(tmp_path: Path) -> None:
    lora = small_models.write_adapter(tmp_path / "lora", replace(Llama(), kv_heads=1))
    hint = "Give the model that it was trained on"
    refused(write_exl2(tmp_path / "base", Llama()), lora, tmp_path / "out", "64 outputs, this model has 128", hint=hint)
    base = write_exl2(tmp_path / "padded", PADDED)
    lora = small_models.write_adapter(tmp_path / "wide", replace(PADDED, kv_heads=2))
    refused(base, lora, tmp_path / "out", "32 outputs, this model has 16", hint=hint)  # what is stored has 32, too


def test_what_an_exl2_base_cannot_get_says_where_it_can_be_merged(tmp_path: Path) -> None:
    lora = small_models.write_adapter(tmp_path / "lora", Llama())
    config = json.loads((lora / CONFIG).read_text())
    write_json(lora / CONFIG, config | {"modules_to_save": ["lm_head"]})
    tensors = load_file(lora / WEIGHTS) | {"base_model.model.lm_head.weight": torch.ones(Llama().vocab, Llama().hidden)}
    save_file(tensors, lora / WEIGHTS)
    hint = "Set model.merge=true with the unquantized model as model.path"
    refused(write_exl2(tmp_path / "base", Llama()), lora, tmp_path / "out", "it replaces lm_head.weight", hint=hint)


@pytest.mark.parametrize("method", PACK)
def test_on_top_of_another_format_it_is_refused(tmp_path: Path, method: str) -> None:
    shape = Llama(hidden=256, heads=4, kv_heads=4, intermediate=512)
    base, lora = write_packed(tmp_path / "base", shape, method), small_models.write_adapter(tmp_path / "lora", shape)
    refused(base, lora, tmp_path / "out", "is quantized, and not to EXL2", hint="Give the original 16-bit model")


@pytest.mark.parametrize(
    ("leave_out", "said"),
    [("model.norm.weight", "model.norm.weight is missing"), ("lm_head.q_groups", "there is no lm_head.q_groups")],
)
def test_a_damaged_exl2_base_is_refused(tmp_path: Path, leave_out: str, said: str) -> None:
    base = write_exl2(tmp_path / "base", Llama(), leave_out=leave_out)
    lora = small_models.write_adapter(tmp_path / "lora", Llama())
    argv = ("hardware=1x24gb", f"model.path={base}", f"model.adapter={lora}", "model.merge=false")
    with pytest.raises(CheckpointError, match=said):
        look(composed(*argv), planning=True)


def test_into_a_quantized_base_nothing_is_merged(tmp_path: Path) -> None:
    shape = Llama(hidden=256, heads=4, kv_heads=4, intermediate=512)
    lora, original = small_models.write_adapter(tmp_path / "lora", shape), "give the original 16-bit model"
    ways = {
        write_exl2(tmp_path / "exl2", shape): f"Set model.merge=false, which runs it on top, or {original}",
        write_packed(tmp_path / "gptq", shape, "gptq"): original.capitalize(),
    }
    for base, way in ways.items():
        for more in ((), ("backend=exllamav2",)):
            argv = ("hardware=1x24gb", f"model.path={base}", f"model.adapter={lora}", *more)
            with pytest.raises(CheckpointError, match="is quantized: an adapter cannot be merged into it") as caught:
                look(composed(*argv), planning=True)
            assert caught.value.hint.startswith(way)


@pytest.mark.usefixtures("every_engine", "no_margins")
@pytest.mark.parametrize("named", [(), ("backend=exllamav2",)], ids=["auto", "named"])
def test_a_plan_and_a_model_of_an_exl2_base(
    tmp_path: Path, run: RunFolder, named: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora = write_exl2(tmp_path / "base", Llama()), small_models.write_adapter(tmp_path / "lora", Llama())
    argv = ("hardware=1x24gb", f"model.path={base}", f"paths.artifacts={tmp_path / 'store'}", "convert.verify=true")
    argv += named
    alone = look(composed(*argv), planning=True).plan.chosen
    planned = look(composed(*argv, f"model.adapter={lora}", "model.merge=false"), planning=True)
    (chosen,) = planned.plan.candidates
    pair = 2 * sum(8 * sum(size) for size in Llama().linears().values()) * Llama().layers
    assert (chosen.backend, chosen.method, chosen.bits) == ("exllamav2", "exl2", 4.0)
    assert chosen.adapter_bytes == {"cuda:0": pair}
    assert chosen.gpus[0].weights == alone.gpus[0].weights + pair
    [need] = planned.disk
    model = prepare(planned.config, planned.source, chosen, run)
    [adapter] = model.artifacts
    assert (model.path, model.adapters) == (base, (adapter.path,))  # it is loaded as it is
    said = capsys.readouterr().err
    assert "verified: 2 files" in said
    assert "nothing to verify" not in said
    assert need.bytes == (adapter.path / WEIGHTS).stat().st_size
    plan = load_plan(planned, chosen, model.path, model.adapters)
    assert (plan.model, plan.adapters, plan.tokenizer) == (str(base), (str(adapter.path),), "")


# --- the engine's side


class Linear:
    """What there is of exllamav2's linear: weights [in, out] as in its kernels, factors as its reader leaves them."""

    def __init__(self, key: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, order: torch.Tensor) -> None:
        self.key, self.weight_, self.q_tensors = key, weight, {"q_weight": weight}
        self.lora_a_tensors, self.lora_b_tensors = {"lora": a}, {"lora": b}
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight_ + (x @ self.lora_a_tensors["lora"]) @ self.lora_b_tensors["lora"]

    def load_multi(self, key: str, names: list[str], cpu: bool) -> dict[str, torch.Tensor]:
        assert (key, names, cpu) == (self.key, ["q_invperm"], True)
        return {"q_invperm": self.order}


@pytest.mark.parametrize("is_sorted", [True, False])
def test_factors_are_sorted_as_the_mlp_is(is_sorted: bool) -> None:
    torch.manual_seed(0)
    hidden, inner, rank = 8, 16, 2
    sizes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    weight = {name: torch.randn(size) for name, size in sizes.items()}
    a = {name: torch.randn(size[0], rank) for name, size in sizes.items()}
    b = {name: torch.randn(rank, size[1]) for name, size in sizes.items()}
    x = torch.randn(3, hidden)
    full = {name: weight[name] + a[name] @ b[name] for name in sizes}
    wanted = (torch.nn.functional.silu(x @ full["gate"]) * (x @ full["up"])) @ full["down"]
    invperm = torch.randperm(inner).int()
    perm = invperm.argsort()
    stored = weight
    if is_sorted:  # as linear.py: rows of down as the file has them, outputs of the others remapped
        stored = {"gate": weight["gate"][:, perm], "up": weight["up"][:, perm], "down": weight["down"][perm]}
    with torch.inference_mode():
        linears = {n: Linear(f"{n}_proj", stored[n], a[n].clone(), b[n].clone(), invperm) for n in sizes}
    if not is_sorted:
        linears["down"].q_tensors["q_perm"] = perm
    mlp = SimpleNamespace(gate_proj=linears["gate"], up_proj=linears["up"], down_proj=linears["down"])
    places = [linear.lora_b_tensors["lora"].data_ptr() for linear in linears.values()]
    sort_factors(SimpleNamespace(modules=[SimpleNamespace(q_proj=None), mlp]))
    gate, up = (linears[name].forward(x) for name in ("gate", "up"))
    found = linears["down"].forward(torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # Its kernels have been given their addresses.
    assert [linear.lora_b_tensors["lora"].data_ptr() for linear in linears.values()] == places


def test_an_mlp_that_is_not_quantized_is_left_as_it_is() -> None:
    down = SimpleNamespace(q_tensors=None, lora_a_tensors={}, lora_b_tensors={})
    sort_factors(SimpleNamespace(modules=[SimpleNamespace(gate_proj=None, up_proj=down, down_proj=down)]))


def test_the_placement_has_the_factors() -> None:
    linear = SimpleNamespace(
        key="model.layers.0.self_attn.q_proj",
        q_tensors={"q_weight": torch.zeros(4, 8, dtype=torch.int32)},
        lora_a_tensors={"x": torch.zeros(8, 2, dtype=torch.half), "y": torch.zeros(8, 4, dtype=torch.half)},
        lora_b_tensors={"x": torch.zeros(2, 16, dtype=torch.half), "y": torch.zeros(4, 16, dtype=torch.half)},
    )
    model = SimpleNamespace(modules=[SimpleNamespace(submodules=[linear])])
    found = bytes_per_tensor(model, [])["cpu"]
    module = "model.layers.0.self_attn.q_proj"
    assert found == {
        f"{module}.q_weight": 128,
        f"{module}.lora_a_tensors.0": 32,
        f"{module}.lora_a_tensors.1": 64,
        f"{module}.lora_b_tensors.0": 64,
        f"{module}.lora_b_tensors.1": 128,
    }


def fake_engine(monkeypatch: pytest.MonkeyPatch, *adapters: str, fails: str = "") -> ExLlamaV2Engine:
    """One whose model is there, with a package of ours in the place of exllamav2."""

    class Lora:
        @staticmethod
        def from_directory(model: Any, folder: str) -> tuple[Any, str]:
            if fails:
                raise ValueError(fails)
            return model, folder

    package = ModuleType("exllamav2")
    package.ExLlamaV2Lora = Lora  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exllamav2", package)
    engine = ExLlamaV2Engine()
    engine._plan = LoadPlan("m", "exllamav2", "exl2", 4.0, "float16", 64, 1, {}, {}, adapters=adapters)
    engine._model = SimpleNamespace(modules=[])
    return engine


def test_the_engine_loads_every_adapter_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine(monkeypatch, "/a", "/b")
    engine._load_adapters()
    assert engine._adapters == [(engine._model, "/a"), (engine._model, "/b")]
    none = fake_engine(monkeypatch)
    none._load_adapters()
    assert none._adapters == []
    with pytest.raises(CheckpointError, match="cannot run the adapter /a on m: incompatible tensor shape"):
        fake_engine(monkeypatch, "/a", fails="incompatible tensor shape")._load_adapters()


def whole_package(monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any]) -> None:
    """A package of ours in the place of exllamav2, which notes what it is given."""

    class Any_(SimpleNamespace):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(given=given, **named)

    class Model(Any_):
        modules: tuple[Any, ...] = ()

        def load_autosplit(self, cache: Any, reserve_vram: list[int], last_id_only: bool) -> None:
            seen["reserve"] = reserve_vram

    class Lora:
        @staticmethod
        def from_directory(model: Any, folder: str) -> str:
            return folder

    class Tokenizer:
        def __init__(self, config: Any) -> None:
            seen["tokenizer"] = config.model_dir
            self.tokenizer_model = SimpleNamespace(
                hf_tokenizer=SimpleNamespace(token_to_id={"<|im_end|>": 7}.get, decode=str)
            )

    class Generator(Any_):
        def set_loras(self, loras: Any) -> None:
            seen["loras"] = loras

    package, generator = ModuleType("exllamav2"), ModuleType("exllamav2.generator")
    vars(package).update(ExLlamaV2=Model, ExLlamaV2Cache=Any_, ExLlamaV2Lora=Lora, ExLlamaV2Tokenizer=Tokenizer)
    vars(generator).update(ExLlamaV2DynamicGenerator=Generator)
    monkeypatch.setitem(sys.modules, "exllamav2", package)
    monkeypatch.setitem(sys.modules, "exllamav2.generator", generator)


@pytest.mark.parametrize("with_adapters", [True, False])
def test_what_the_engine_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_adapters: bool) -> None:
    seen: dict[str, Any] = {}
    whole_package(monkeypatch, seen)
    own = tmp_path / "own"
    own.mkdir()
    write_json(own / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    write_json(tmp_path / "config.json", {"eos_token_id": 2})
    adapters: dict[str, Any] = {"adapters": ("/a", "/b"), "adapter_bytes": {"cuda:1": 1000}, "tokenizer": str(own)}
    engine = ExLlamaV2Engine()
    limits: list[list[int]] = []
    monkeypatch.setattr("orchestrator.backends.exllamav2.limit_memory", limits.append)
    memory = {"memory": {"cuda:0": 8000, "cuda:1": 6000}, "margin": {"cuda:0": 300, "cuda:1": 200}}
    plan = LoadPlan(str(tmp_path), "exllamav2", "exl2", 4.0, "float16", 64, 2, {}, {}, **memory)
    engine._plan = replace(plan, **adapters) if with_adapters else plan
    engine._devices = ["cuda:0", "cuda:1"]
    config = SimpleNamespace(model_dir=str(tmp_path), max_seq_len=256, max_input_len=256, vocab_size=64)
    engine._load_weights(config)
    engine._load_adapters()
    engine._start_generator(config)
    more = 1000 if with_adapters else 0
    assert seen["reserve"] == [RESERVE_FIRST, RESERVE_OTHERS + more]
    assert limits == [[7700], [8000, 6000]]  # while it splits: the margin of all but the last stays free
    assert seen.get("loras") == (["/a", "/b"] if with_adapters else None)
    assert seen["tokenizer"] == str(own if with_adapters else tmp_path)
    assert engine._ends == ({2, 7} if with_adapters else {2})
    assert config.model_dir == str(tmp_path)


def test_scores_are_with_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def forward(tokens: torch.Tensor, cache: Any, loras: Any) -> torch.Tensor:
        seen.append(loras)
        return torch.zeros(1, tokens.shape[1], 8)

    for adapters, given in ((("/a",), 1), ((), None)):
        engine = fake_engine(monkeypatch, *adapters)
        engine._load_adapters()
        engine._torch, engine._vocabulary = torch, 8
        engine._model.forward = forward
        engine._cache = SimpleNamespace(current_seq_len=0)
        engine._generator = SimpleNamespace(reset_page_table=lambda: None)
        assert len(engine.score([1, 2, 3], 2).logprobs) == 2
        assert seen[-1] is None if given is None else len(seen[-1]) == given


def test_the_table_names_who_runs_them() -> None:
    assert backends_with_adapters() == ["exllamav2"]
    module, _, function = BACKENDS["exllamav2"].unmerged.partition(":")
    assert (module, function) == (write_adapters.__module__, write_adapters.__name__)
