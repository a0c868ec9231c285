"""The plan: exact bytes, the best that fits, and a refusal whose way out is one. From headers alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import small_models
from composing import composed
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LLAMA_7B, LLAMA_70B, Llama

from orchestrator.backends.table import BACKENDS, METHODS
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.config import Config
from orchestrator.engine import interpreters
from orchestrator.errors import CheckpointError, ConfigError, DoesNotFitError, EngineUnavailableError
from orchestrator.hardware import GIB, MIB, Gpu, Hardware, profile_gpus
from orchestrator.plan.huggingface import CUBLAS_WORKSPACE, CUDA_RUNTIME, HOST_RUNTIME, linear_bytes
from orchestrator.plan.planner import make_plan, must_fit, runnable
from orchestrator.plan.ranking import why
from orchestrator.plan.types import Candidate, Plan

SMALL = Llama()
TIED = Llama(tied=True)


pytestmark = pytest.mark.usefixtures("hydra", "every_engine")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[Llama, ModelSpec]:
    folder = tmp_path_factory.mktemp("models")
    shapes = (SMALL, TIED, LLAMA_7B, LLAMA_70B)
    return {
        shape: model_spec(open_checkpoint(small_models.write_headers(folder / str(i), shape)))
        for i, shape in enumerate(shapes)
    }


def cpu(gib: float = 32) -> Hardware:
    return Hardware("auto", (), int(64 * GIB), int(gib * GIB), 8)


def cards(count: int, gib: float = 24, capability: tuple[int, int] = (8, 6), host_gib: float = 64) -> Hardware:
    gpus = tuple(Gpu(i, "card", int(gib * GIB), int(gib * GIB) - 450 * MIB, capability) for i in range(count))
    return Hardware("auto", gpus, int(128 * GIB), int(host_gib * GIB), 16)


def best(spec: ModelSpec, hardware: Hardware, *argv: str) -> Candidate:
    return make_plan(composed(*argv), spec, hardware).chosen


# Bytes


def rotary_bytes(shape: Llama) -> int:
    """inv_freq and original_inv_freq: float32 for every second element of a head."""
    return 2 * 4 * shape.head_dim // 2


@pytest.mark.parametrize(
    ("shape", "method", "dtype", "double", "size"),
    [
        ((4096, 4096), "none", "float32", False, 67_108_864),
        ((4096, 4096), "none", "bfloat16", False, 33_554_432),
        # half a byte each; a float32 for 64; 16 float32 of the code
        ((4096, 4096), "nf4", "bfloat16", False, 8_388_608 + 1_048_576 + 64),
        ((4096, 4096), "fp4", "float16", False, 8_388_608 + 1_048_576 + 64),
        # ... the float32 become bytes, with a float32 for 256 of them, a code of 256 float32 and an offset
        ((4096, 4096), "nf4", "bfloat16", True, 8_388_608 + 262_144 + 4_096 + 1_028 + 64),
        ((4096, 4096), "int8", "bfloat16", False, 16_777_216 + 16_384),
        ((1024, 256), "int8", "float32", False, 262_144 + 4_096),
        # sizes that do not divide: 33 * 3 = 99 elements in 2 blocks
        ((33, 3), "nf4", "float32", False, 50 + 8 + 64),
        ((33, 3), "nf4", "float32", True, 50 + 2 + 4 + 1_028 + 64),
    ],
)
def test_bytes_of_a_linear(shape: tuple[int, int], method: str, dtype: str, double: bool, size: int) -> None:
    assert linear_bytes(shape, method, dtype, double) == size


@pytest.mark.parametrize("shape", [SMALL, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("argv", "item"), [(["quant.bits=32"], 4), (["quant.bits=16"], 2)])
def test_weights_of_the_unquantized_model_are_its_parameters(
    specs: dict[Llama, ModelSpec], shape: Llama, argv: list[str], item: int
) -> None:
    chosen = best(specs[shape], cpu(), "backend=transformers", *argv)
    parameters = sum(a * b for a, b in ((*s, 1)[:2] for s in shape.tensors().values()))
    assert chosen.host.weights == parameters * item + rotary_bytes(shape)
    assert chosen.weights == {"cpu": chosen.host.weights}


def test_only_the_linears_of_the_layers_are_quantized(specs: dict[Llama, ModelSpec]) -> None:
    chosen = best(specs[SMALL], cpu(), "quant=nf4")
    linears = sum(linear_bytes(shape, "nf4", "float32", False) for shape in SMALL.linears().values())
    others = 2 * SMALL.vocab * SMALL.hidden + (2 * SMALL.layers + 1) * SMALL.hidden
    assert chosen.host.weights == SMALL.layers * linears + 4 * others + rotary_bytes(SMALL)


def test_double_quantization_takes_less(specs: dict[Llama, ModelSpec]) -> None:
    single, double = (best(specs[LLAMA_7B], cards(1), "quant=nf4", f"quant.double={x}") for x in ("false", "true"))
    assert double.gpus[0].weights < single.gpus[0].weights
    assert double.double_quant


def test_the_cache_is_that_of_all_sequences_in_flight(specs: dict[Llama, ModelSpec]) -> None:
    chosen = best(specs[LLAMA_70B], cards(4), "quant=nf4", "model.max_context=1024", "run.in_flight=3")
    per_token = 2 * LLAMA_70B.kv_heads * LLAMA_70B.head_dim * 2 * LLAMA_70B.layers
    assert sum(gpu.kv_cache for gpu in chosen.gpus) == per_token * 1024 * 3


@pytest.mark.parametrize("hardware", [cpu(), cards(1), cards(4)], ids=["cpu", "1 card", "4 cards"])
def test_totals_add_up(specs: dict[Llama, ModelSpec], hardware: Hardware) -> None:
    for candidate in make_plan(composed(), specs[SMALL], hardware).candidates:
        for device in candidate.to_json()["gpus"] + [candidate.to_json()["host"]]:
            parts = device["weights"] + device["kv_cache"] + device["scratch"] + device["runtime"]
            assert device["total"] == parts


# The choice


def test_the_least_loss_that_fits_comes_first(specs: dict[Llama, ModelSpec]) -> None:
    plan = make_plan(composed(), specs[SMALL], cpu())
    assert [(c.method, c.bits) for c in plan.candidates] == [
        ("none", 32),
        ("none", 16),
        ("int8", 8),
        ("nf4", 4),
    ]
    assert all(c.fits for c in plan.candidates)


@pytest.mark.parametrize(("gib", "method"), [(80, "none"), (24, "none"), (12, "int8"), (7.5, "exl2")])
def test_a_7b_takes_what_its_card_has_room_for(specs: dict[Llama, ModelSpec], gib: float, method: str) -> None:
    chosen = best(specs[LLAMA_7B], cards(1, gib), "model.max_context=512", "run.in_flight=1")
    assert chosen.fits
    assert chosen.method == method


def test_a_70b_runs_on_four_cards_in_4_bits_and_not_in_16(specs: dict[Llama, ModelSpec]) -> None:
    plan = make_plan(composed("model.max_context=1024"), specs[LLAMA_70B], cards(4))
    fits = {(c.method, c.bits): c.fits for c in plan.candidates}
    assert plan.chosen.fits
    assert fits[("nf4", 4)]
    assert not fits[("none", 16)]
    assert [c for c in plan.candidates if not c.needs][-1].fits is False
    assert all(c.needs for c in plan.candidates[-2:])  # GPTQ at 4 and 8 bits, which nothing here makes


@settings(max_examples=20)
@given(gib=st.floats(1, 200), cards_=st.integers(0, 4))
def test_no_candidate_that_fits_stands_behind_one_that_does_not(
    specs: dict[Llama, ModelSpec], gib: float, cards_: int
) -> None:
    hardware = cards(cards_, gib) if cards_ else cpu(gib)
    plan = make_plan(composed(), specs[LLAMA_7B], hardware)
    order = [(not c.needs, c.fits) for c in plan.candidates]  # what nothing here makes is last, whether it fits or not
    assert order == sorted(order, reverse=True)
    assert plan.chosen is plan.candidates[0]
    for candidate in plan.candidates:
        over = any(device.total > device.capacity for device in candidate.devices)
        assert candidate.fits is (not over and candidate.max_context > 0)
        assert bool(candidate.reasons) is over


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["quant.bits=4"], ("bitsandbytes", "nf4", 4, "float32", False)),
        (["quant.bits=8"], ("bitsandbytes", "int8", 8, "float32", False)),
        (["quant.bits=16"], ("transformers", "none", 16, "bfloat16", False)),
        (["quant=fp4"], ("bitsandbytes", "fp4", 4, "float32", False)),
        (["quant=nf4", "quant.double=true"], ("bitsandbytes", "nf4", 4, "float32", True)),
        (["quant=nf4", "model.dtype=bfloat16"], ("bitsandbytes", "nf4", 4, "bfloat16", False)),
        (["backend=transformers"], ("transformers", "none", 32, "float32", False)),
        (["backend=transformers", "model.dtype=float16"], ("transformers", "none", 16, "float16", False)),
        (["model.dtype=float32", "quant=none"], ("transformers", "none", 32, "float32", False)),
    ],
)
def test_what_was_asked_for_is_what_is_chosen(
    specs: dict[Llama, ModelSpec], argv: list[str], expected: tuple[object, ...]
) -> None:
    c = best(specs[SMALL], cpu(), *argv)
    assert (c.backend, c.method, c.bits, c.dtype, c.double_quant) == expected


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 6), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_the_dtype_follows_the_card(specs: dict[Llama, ModelSpec], capability: tuple[int, int], dtype: str) -> None:
    plan = make_plan(composed(), specs[SMALL], cards(1, capability=capability))
    assert {c.dtype for c in plan.candidates if c.backend != "exllamav2"} == {dtype}
    assert {c.dtype for c in plan.candidates if c.backend == "exllamav2"} == {"float16"}  # it computes in nothing else


@pytest.mark.parametrize(
    ("capability", "argv", "said"),
    [
        ((7, 5), [], "GPU 0 (card, compute capability 7.5) has no bf16: float16"),
        ((7, 5), ["model.dtype=bfloat16"], "model.dtype=bfloat16 is slow there"),
        ((7, 5), ["model.dtype=float16"], ""),
        ((7, 5), ["backend=exllamav2"], ""),  # float16 on every card
        ((8, 0), [], ""),
    ],
)
def test_a_card_without_bf16_is_said(
    specs: dict[Llama, ModelSpec], capability: tuple[int, int], argv: list[str], said: str
) -> None:
    notes = " ".join(make_plan(composed(*argv), specs[SMALL], cards(1, capability=capability)).notes)
    assert said in notes
    assert ("bf16" in notes) == bool(said)


@pytest.mark.parametrize(
    ("capability", "argv", "named"),
    [
        ((6, 1), [], "vllm and exllamav2"),
        ((7, 0), ["backend=exllamav2"], "exllamav2"),
        ((6, 1), ["backend=vllm"], "vllm"),
        ((6, 1), ["backend=bitsandbytes"], ""),
        ((7, 5), [], ""),
    ],
)
def test_a_card_that_the_pinned_pytorch_has_no_kernels_for(
    specs: dict[Llama, ModelSpec], capability: tuple[int, int], argv: list[str], named: str
) -> None:
    plan = make_plan(composed(*argv), specs[SMALL], cards(1, capability=capability))
    notes = [note for note in plan.notes if "has no kernels" in note]
    assert len(notes) == bool(named)
    assert all(f"PyTorch pinned for {named} has no kernels: its least is 7.5" in note for note in notes)
    assert plan.chosen.fits  # an interpreter of the user's own may have others


@pytest.mark.parametrize(
    "argv", [["quant.bits=5"], ["backend=transformers", "quant.bits=4"], ["quant.bits=16", "model.dtype=float32"]]
)
def test_what_no_engine_has_is_refused_with_what_they_have(specs: dict[Llama, ModelSpec], argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="no engine runs") as caught:
        best(specs[SMALL], cpu(), *argv)
    message = str(caught.value)
    assert all(part.partition("=")[2] in message for part in argv)
    assert "quant=none at 16 or 32 bits" in message


def test_of_a_setting_that_does_not_go_with_the_width_its_engines_are_named(specs: dict[Llama, ModelSpec]) -> None:
    with pytest.raises(ConfigError, match="no engine runs") as caught:
        best(specs[SMALL], cards(1), "quant.bits=2.249999", "quant.measurement=/m.json")
    message = str(caught.value)
    assert message.startswith("no engine runs quant.bits=2.249999 with quant.measurement=/m.json: ")
    assert "quant.measurement is a setting of exllamav2; exllamav2 has exl2 at 2.25 to 8 bits" in message
    assert "bitsandbytes" not in message


def test_an_engine_of_one_dtype_says_so(specs: dict[Llama, ModelSpec]) -> None:
    with pytest.raises(ConfigError, match=r"all in float16: leave model\.dtype out"):
        best(specs[SMALL], cards(1), "backend=exllamav2", "quant.bits=4", "model.dtype=bfloat16")


@pytest.mark.parametrize(("split", "said"), [("[22,24]", True), ("[18,18]", False)])
def test_a_split_by_hand_that_leaves_little_room_for_the_cache(
    specs: dict[Llama, ModelSpec], split: str, said: bool
) -> None:
    asked = composed("backend=exllamav2", "quant.bits=4", f"parallel.gpu_split={split}")
    plan = make_plan(asked, specs[LLAMA_70B], cards(4))
    notes = [text for text in plan.notes if "leaves a context of" in text]
    assert (plan.chosen.max_context < 4096, bool(notes)) == (said, said)
    assert not said or "parallel.gpu_split=auto, which has 4096" in notes[0]


def test_the_plan_as_json_has_the_documented_fields(specs: dict[Llama, ModelSpec]) -> None:
    plan = make_plan(composed(), specs[SMALL], cards(1)).to_json()
    documented = {
        *("fits", "reasons", "backend", "method", "bits", "tensor_parallel", "pipeline_parallel", "gpu_split"),
        *("max_context", "gpus", "host"),
    }
    assert documented | {"hardware", "notes", "candidates"} <= set(plan)
    assert documented <= set(plan["candidates"][0])
    assert plan["hardware"] == cards(1).to_json()
    assert {"weights", "kv_cache", "scratch", "total", "capacity"} <= set(plan["gpus"][0]) & set(plan["host"])


# Placement


def layers_of(device_map: dict[str, str]) -> list[str]:
    """The devices of the layers, in the order of the forward pass."""
    found = {
        int(m[1]): device for name, device in device_map.items() if (m := re.fullmatch(r"model\.layers\.(\d+)", name))
    }
    return [found[i] for i in range(len(found))]


@pytest.mark.parametrize(("count", "gib"), [(2, 24), (4, 14)])
def test_a_70b_is_spread_in_order_and_every_module_once(specs: dict[Llama, ModelSpec], count: int, gib: float) -> None:
    chosen = best(specs[LLAMA_70B], cards(count, gib), "quant=nf4", "model.max_context=1024")
    assert chosen.fits
    expected = {"model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"}
    assert set(chosen.device_map) == expected | {f"model.layers.{i}" for i in range(80)}
    layers = layers_of(chosen.device_map)
    assert layers == sorted(layers)
    assert len(set(layers)) == count
    assert chosen.device_map["model.embed_tokens"] == chosen.device_map["model.rotary_emb"] == layers[0] == "cuda:0"
    assert chosen.device_map["model.norm"] == chosen.device_map["lm_head"] == f"cuda:{count - 1}"
    assert chosen.weights == {gpu.device: gpu.weights for gpu in chosen.gpus}
    one = best(specs[LLAMA_70B], cards(1, 200), "quant=nf4", "model.max_context=1024")
    assert sum(chosen.weights.values()) == sum(one.weights.values())


def test_what_fits_on_one_card_stays_on_one(specs: dict[Llama, ModelSpec]) -> None:
    chosen = best(specs[LLAMA_7B], cards(4), "quant=nf4")
    assert chosen.device_map == {"": "cuda:0"}
    assert len(chosen.gpus) == 1
    assert chosen.host.weights == 0


def test_a_tied_head_stays_with_its_embedding(tmp_path: Path) -> None:
    shape = Llama(4096, 8, 32, 8, 16384, 128_000, 4096, tied=True)
    spec = model_spec(open_checkpoint(small_models.write_headers(tmp_path, shape)))
    chosen = best(spec, cards(2, 4), "quant.bits=16", "model.max_context=256", "run.in_flight=1")
    assert len(set(layers_of(chosen.device_map))) == 2
    assert chosen.device_map["lm_head"] == chosen.device_map["model.embed_tokens"] == "cuda:0"
    assert chosen.device_map["model.norm"] == "cuda:1"


@settings(max_examples=20)
@given(gib=st.floats(2, 60), count=st.integers(1, 6), context=st.integers(16, 4096))
def test_a_plan_that_fits_overfills_no_card(
    specs: dict[Llama, ModelSpec], gib: float, count: int, context: int
) -> None:
    chosen = best(specs[LLAMA_70B], cards(count, gib), "quant=nf4", f"model.max_context={context}")
    on_cards = sum(chosen.weights.values())
    assert on_cards == sum(gpu.weights for gpu in chosen.gpus) > 0
    if chosen.fits:
        assert all(gpu.total <= gpu.capacity for gpu in chosen.gpus)
        assert chosen.max_context == context


def test_indexes_of_chosen_cards_are_kept(specs: dict[Llama, ModelSpec]) -> None:
    hardware = cards(4)
    chosen = best(specs[SMALL], Hardware("auto", hardware.gpus[2:3], GIB * 64, GIB * 64, 8), "backend=transformers")
    assert chosen.device_map == {"": "cuda:2"}


# The context


def test_a_context_beyond_the_models_is_refused(specs: dict[Llama, ModelSpec]) -> None:
    with pytest.raises(ConfigError, match=r"model\.max_context=2049.*2048 tokens"):
        best(specs[SMALL], cpu(), "model.max_context=2049")


def test_without_a_wish_the_context_is_4096_or_the_models(specs: dict[Llama, ModelSpec], tmp_path: Path) -> None:
    long = model_spec(open_checkpoint(small_models.write_headers(tmp_path, Llama(context=131_072))))
    assert best(specs[SMALL], cpu()).max_context == 2048
    assert best(long, cpu()).max_context == 4096
    assert best(long, cpu(), "model.max_context=8192").max_context == 8192


def test_the_context_shrinks_until_it_fits(specs: dict[Llama, ModelSpec]) -> None:
    roomy = best(specs[LLAMA_7B], cards(1, 80), "quant=nf4")
    tight = best(specs[LLAMA_7B], cards(1, 8), "quant=nf4", "run.in_flight=4")
    assert roomy.max_context == 4096
    assert tight.fits
    assert 0 < tight.max_context < 4096
    longer = f"model.max_context={tight.max_context + 65}"
    assert not best(specs[LLAMA_7B], cards(1, 8), "quant=nf4", "run.in_flight=4", longer).fits


def test_fewer_are_in_flight_before_the_context_is_shortened(specs: dict[Llama, ModelSpec]) -> None:
    roomy, tight = (best(specs[LLAMA_7B], cards(1, gib), "quant=nf4") for gib in (80, 8))
    assert (roomy.max_context, roomy.max_in_flight) == (4096, 4)
    assert tight.max_context == 4096
    assert tight.max_in_flight < 4


def test_a_context_that_many_in_flight_have_cut_is_said(specs: dict[Llama, ModelSpec]) -> None:
    """Its settings, typed: the first has the context of one alone, the second what is planned; neither a note."""
    many = ["backend=exllamav2", "quant.bits=4"]
    plan = make_plan(composed(*many, "run.in_flight=64"), specs[LLAMA_70B], cards(2))
    [note] = [line for line in plan.notes if line.startswith("run.in_flight=64 leaves")]
    fewer, context = re.findall(r"Type (run\.in_flight=\d+), .* (model\.max_context=\d+)\.$", note)[0]
    goal = min(4096, specs[LLAMA_70B].max_context)
    assert f"a context of {plan.chosen.max_context} each, where one alone has {goal}." in note
    assert context == f"model.max_context={plan.chosen.max_context}"
    for more, tokens in ([fewer], goal), (["run.in_flight=64", context], plan.chosen.max_context):
        then = make_plan(composed(*many, *more), specs[LLAMA_70B], cards(2))
        assert (then.chosen.fits, then.chosen.max_context) == (True, tokens)
        assert not any("leaves" in line for line in then.notes)
    alone = make_plan(composed(*many), specs[LLAMA_70B], cards(2))
    assert not any("leaves" in line for line in alone.notes)


@pytest.mark.parametrize("gib", [8, 14.5])
def test_a_context_too_short_to_work_in_does_not_win_by_its_precision(
    specs: dict[Llama, ModelSpec], gib: float
) -> None:
    plan = make_plan(composed(), specs[LLAMA_7B], cards(1, gib))
    assert max(c.max_context for c in plan.candidates if c.fits) > 1000
    assert plan.chosen.max_context >= 512


def test_the_reason_for_a_choice_is_what_decided_it(specs: dict[Llama, ModelSpec]) -> None:
    config = composed()
    plan = make_plan(config, specs[LLAMA_7B], cards(1, 8))
    chosen, six = plan.chosen, next(c for c in plan.candidates if (c.method, c.bits) == ("exl2", 6))
    assert chosen.max_context > six.max_context > 0
    said = f"it has room for {chosen.max_context} tokens of context, exllamav2 exl2 (6 bits) for {six.max_context}"
    assert why(chosen, plan, config) == said
    behind = replace(chosen, bits=2)  # as a run takes it where what comes first is not installed
    assert why(behind, replace(plan, candidates=(six, behind)), config) == "installed, unlike exllamav2 exl2 (6 bits)"


def test_a_wished_context_does_not_shrink(specs: dict[Llama, ModelSpec]) -> None:
    chosen = best(specs[LLAMA_7B], cards(1, 8), "quant=nf4", "model.max_context=4096", "run.in_flight=4")
    assert not chosen.fits
    assert chosen.max_context == 4096


# What does not fit


def refused(config: Config, spec: ModelSpec, hardware: Hardware) -> str:
    plan = make_plan(config, spec, hardware)
    with pytest.raises(DoesNotFitError) as caught:
        must_fit(plan, config, spec, hardware)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_a_plan_that_fits_is_let_through(specs: dict[Llama, ModelSpec]) -> None:
    config = composed()
    must_fit(make_plan(config, specs[SMALL], cpu()), config, specs[SMALL], cpu())


@pytest.mark.parametrize(
    ("shape", "hardware", "argv"),
    [
        (LLAMA_7B, cards(1), ["backend=transformers", "quant.bits=16", "model.max_context=4096", "run.in_flight=8"]),
        (LLAMA_7B, cards(1), ["quant.bits=32"]),
        (LLAMA_7B, cards(1, 8), ["quant=nf4", "model.max_context=4096", "run.in_flight=8"]),
        (LLAMA_7B, cards(1, 7), ["quant=int8"]),
        (LLAMA_7B, cpu(12), ["quant.bits=32", "model.max_context=2048"]),
        (LLAMA_70B, cards(4), ["quant.bits=16"]),
        (LLAMA_70B, cards(3), ["quant=int8", "model.max_context=4096"]),
    ],
)
def test_what_does_not_fit_is_told_with_numbers_and_a_way_out_that_works(
    specs: dict[Llama, ModelSpec], shape: Llama, hardware: Hardware, argv: list[str]
) -> None:
    message = refused(composed(*argv), specs[shape], hardware)
    assert re.search(r"(cuda:\d|cpu) needs \d+\.\d\d GiB and has \d+\.\d\d GiB free", message)
    told = re.search(r"What would fit: (.*?) \(\d", message)
    assert told, message
    changes = told[1].split()
    assert all("=" in change for change in changes), message
    kept = [a for a in argv if a.partition("=")[0] not in {c.partition("=")[0] for c in changes}]
    kept = [a for a in kept if not (a.startswith("quant=") and any(c.startswith("quant.") for c in changes))]
    config = composed(*kept, *changes)
    must_fit(make_plan(config, specs[shape], hardware), config, specs[shape], hardware)


def test_where_nothing_fits_that_is_said_with_numbers(specs: dict[Llama, ModelSpec]) -> None:
    message = refused(composed(), specs[LLAMA_70B], cards(1, 2))
    assert "Nothing that this version has would fit" in message
    assert len(re.findall(r"\d+\.\d\d GiB", message)) >= 4


def test_a_quantized_model_is_refused_by_its_method(tmp_path: Path) -> None:
    folder = small_models.write_headers(tmp_path, SMALL, quantization_config={"quant_method": "hqq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"are quantized \(hqq\), and none of them is"):
        best(model_spec(open_checkpoint(folder)), cpu())


# What is installed


def test_an_engine_that_is_not_installed_stays_in_the_plan(
    specs: dict[Llama, ModelSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(interpreters, "missing_here", lambda b: ["x"] if b.name == "transformers" else [])
    config = composed(f"paths.engines={tmp_path}")
    plan = make_plan(config, specs[SMALL], cpu())
    assert {c.backend: c.installed for c in plan.candidates} == {"transformers": False, "bitsandbytes": True}
    assert plan.chosen.backend == "transformers"
    assert runnable(plan, config, cpu())[0].backend == "bitsandbytes"


def test_an_engine_asked_for_and_not_installed_is_told_with_the_line_to_type(
    specs: dict[Llama, ModelSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(interpreters, "missing_here", lambda b: ["torch"])
    for backend in BACKENDS.values():
        machine = cpu() if "cpu" in backend.devices else cards(1, 24)
        config = composed(f"backend={backend.name}", f"paths.engines={tmp_path}")
        plan: Plan = make_plan(config, specs[SMALL], machine)
        with pytest.raises(EngineUnavailableError, match=f"task=engine engine.name={backend.name}") as caught:
            runnable(plan, config, machine)
        assert caught.value.exit_code == 4


def test_an_interpreter_that_was_made_is_used(
    specs: dict[Llama, ModelSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(interpreters, "missing_here", lambda b: ["torch"])
    made = tmp_path / "bitsandbytes"
    config = composed("backend=bitsandbytes", f"paths.engines={tmp_path}")
    made.mkdir()
    assert not make_plan(config, specs[SMALL], cpu()).chosen.installed
    (made / interpreters.MANIFEST).write_text("{}")
    plan = make_plan(config, specs[SMALL], cpu())
    assert runnable(plan, config, cpu())[1] == str(made / "bin" / "python")


# Profiles


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_profile_is_so_many_cards_less_what_the_driver_keeps(count: int) -> None:
    gpus = profile_gpus(composed(f"hardware={count}x24gb").hardware)
    assert [gpu.index for gpu in gpus] == list(range(count))
    assert {gpu.total for gpu in gpus} == {24 * GIB}
    assert all(23 * GIB < gpu.free < 24 * GIB for gpu in gpus)


def test_runtime_is_counted_on_every_device(specs: dict[Llama, ModelSpec]) -> None:
    assert best(specs[SMALL], cpu()).host.runtime == HOST_RUNTIME["cpu"]
    for option, method in (("backend=transformers", ""), ("quant.bits=8", "int8")):
        gpu = best(specs[SMALL], cards(1), option).gpus[0]
        assert gpu.runtime == CUDA_RUNTIME[method]
        assert gpu.scratch > CUBLAS_WORKSPACE


def test_every_backend_has_a_known_method_and_a_memory_model() -> None:
    for backend in BACKENDS.values():
        assert set(backend.methods) <= set(METHODS)
        assert set(backend.speed) == set(backend.known_methods)


def test_rows_that_bitsandbytes_computes_wrongly_on_a_cpu_are_refused_there(specs: dict[Llama, ModelSpec]) -> None:
    spec = next(iter(specs.values()))
    odd = tuple(
        replace(tensor, shape=(tensor.shape[0], 80)) if "down_proj" in tensor.name else tensor
        for tensor in spec.tensors
    )
    asked = ("backend=bitsandbytes", "quant.bits=4")
    assert best(spec, cpu(), *asked).fits
    candidate = best(replace(spec, tensors=odd), cpu(), *asked)
    assert not candidate.fits
    assert "no multiple of 64 long, as in model.layers.0.mlp.down_proj.weight" in candidate.reasons[0]
    assert best(replace(spec, tensors=odd), cards(1), *asked).fits
    assert best(replace(spec, tensors=odd), cpu(), "backend=bitsandbytes", "quant.bits=8").fits
