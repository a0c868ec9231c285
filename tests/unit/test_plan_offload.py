"""Offload in the plan: what goes where, that it adds up, what it costs in speed, and who refuses it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import small_models
from composing import composed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import LLAMA_7B, Llama

from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.engine.in_flight import Held
from orchestrator.errors import ConfigError, DoesNotFitError
from orchestrator.hardware import GIB, MIB, Gpu, Hardware
from orchestrator.plan import offload
from orchestrator.plan.huggingface import CUBLAS_WORKSPACE, CUDA_RUNTIME, HOST_RUNTIME, at_use
from orchestrator.plan.planner import make_plan, must_fit
from orchestrator.plan.ranking import why
from orchestrator.plan.types import Candidate

LAYER_16 = 404_766_720  # bytes of one layer of LLAMA_7B in 16 bit
EMBEDDING_16 = 2 * 32_000 * 4096
LINEAR_16 = 2 * 11_008 * 4096  # the largest of a layer


pytestmark = pytest.mark.usefixtures("hydra", "every_engine")


@pytest.fixture(autouse=True)
def _a_large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "disk_room", lambda path: 500 * GIB)
    monkeypatch.setattr("orchestrator.plan.huggingface.disk_room", lambda path: offload.disk_room(path))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return model_spec(open_checkpoint(small_models.write_headers(tmp_path_factory.mktemp("7b"), LLAMA_7B)))


def cpu(gib: float) -> Hardware:
    return Hardware("auto", (), 64 * GIB, int(gib * GIB), 8)


def cards(gib: float, *indexes: int, host_gib: float = 64) -> Hardware:
    gpus = tuple(Gpu(i, "card", int(gib * GIB), int(gib * GIB) - 450 * MIB, (7, 5)) for i in indexes or (0,))
    return Hardware("auto", gpus, 128 * GIB, int(host_gib * GIB), 16)


def best(spec: ModelSpec, hardware: Hardware, *argv: str) -> Candidate:
    return make_plan(composed(*argv), spec, hardware).chosen


def places(candidate: Candidate) -> list[str]:
    """Of the layers, in order."""
    return [candidate.device_map[f"model.layers.{i}"] for i in range(LLAMA_7B.layers)]


def check(candidate: Candidate) -> None:
    """Everything adds up, and nothing is overfilled."""
    assert candidate.fits, candidate.reasons
    assert {d.device: d.weights for d in candidate.devices if d.weights} == candidate.weights
    assert all(d.total <= d.capacity for d in candidate.devices)
    assert set(candidate.device_map.values()) == set(candidate.weights)
    modules = {"model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"}
    assert set(candidate.device_map) == modules | {f"model.layers.{i}" for i in range(LLAMA_7B.layers)}
    per_token = 2 * LLAMA_7B.kv_heads * LLAMA_7B.head_dim * 2 * LLAMA_7B.layers
    computing = candidate.gpus or (candidate.host,)
    cache = per_token * candidate.max_context * candidate.max_in_flight
    assert sum(d.kv_cache for d in computing) == cache  # none of it leaves the devices that compute
    assert {d.kv_cache for d in candidate.devices if d not in computing} <= {0}


@pytest.mark.parametrize("gib", [8, 12])
@pytest.mark.parametrize(
    ("argv", "stores"),
    [
        (["offload.cpu_gib=16"], ["cpu"]),
        (["offload.folder=/tmp"], ["disk"]),
        (["offload.cpu_gib=1.5", "offload.folder=/tmp"], ["cpu", "disk"]),
    ],
)
def test_a_7b_in_16_bit_on_a_small_card(spec: ModelSpec, gib: float, argv: list[str], stores: list[str]) -> None:
    chosen = best(spec, cards(gib), "quant.bits=16", *argv)
    check(chosen)
    order = ["cuda:0", *stores]
    assert [order.index(place) for place in places(chosen)] == sorted(order.index(p) for p in places(chosen))
    assert list(dict.fromkeys(places(chosen))) == order
    assert chosen.device_map["model.embed_tokens"] == chosen.device_map["model.rotary_emb"] == "cuda:0"
    assert chosen.device_map["lm_head"] == stores[-1]
    whole = best(spec, cards(80), "backend=transformers", "quant.bits=16")
    assert sum(chosen.weights.values()) == sum(whole.weights.values())
    assert chosen.host.weights <= 1.5 * GIB or stores == ["cpu"]
    assert chosen.max_context == 4096


def test_room_is_kept_for_what_is_brought_in(spec: ModelSpec) -> None:
    argv = ("quant.bits=16", "run.in_flight=1", "model.max_context=1024", "offload.cpu_gib=16")
    with_offload, without = (best(spec, cards(gib), *argv) for gib in (8, 80))
    plain = without.gpus[0].scratch
    # The head comes when what the layers hold is free again, but for two hidden states of each token; the workspaces of
    # cuBLAS and the logits are there beside it.
    layers = plain - CUBLAS_WORKSPACE - 2 * 4 * 32_000
    assert with_offload.gpus[0].scratch - plain == max(LINEAR_16, EMBEDDING_16 + 2 * 1024 * 2 * 4096 - layers)
    gpu = with_offload.gpus[0]
    assert gpu.runtime == CUDA_RUNTIME[""]
    assert gpu.capacity - gpu.total < LAYER_16  # no more is offloaded than has to be


def test_a_short_run_brings_in_the_head_too(spec: ModelSpec) -> None:
    chosen = best(spec, cards(12), "quant.bits=16", "run.in_flight=4", "model.max_context=2048", "offload.cpu_gib=16")
    gpu = chosen.gpus[0]
    assert chosen.offloads
    used = at_use(spec, chosen, Held(1, 20, 40))["cuda:0"]
    assert gpu.weights + gpu.runtime + CUBLAS_WORKSPACE + EMBEDDING_16 <= used < gpu.total


def test_a_file_in_another_dtype_is_converted_where_it_computes(tmp_path: Path) -> None:
    folder = small_models.write_headers(tmp_path, Llama(4096, 32, 32, 32, 11008, 32_000, 4096, dtype="F32"))
    chosen = best(model_spec(open_checkpoint(folder)), cards(8), "quant.bits=16", "offload.folder=/tmp")
    check(chosen)
    plain = best(
        model_spec(open_checkpoint(folder)), cards(80), "backend=transformers", "quant.bits=16", "run.in_flight=1"
    )
    assert chosen.max_in_flight == 1
    layers = plain.gpus[0].scratch - CUBLAS_WORKSPACE - 2 * 4 * 32_000
    head = 3 * EMBEDDING_16 + 2 * 4096 * 2 * 4096 - layers  # in 32 bits as well
    assert chosen.gpus[0].scratch - plain.gpus[0].scratch == max(3 * LINEAR_16, head)


@pytest.mark.parametrize(
    ("argv", "bandwidths"),
    [(["offload.cpu_gib=16"], {"cpu": 12e9}), (["offload.cpu_gib=2", "offload.folder=/tmp"], offload.BANDWIDTH)],
)
def test_the_speed_is_what_has_to_move(spec: ModelSpec, argv: list[str], bandwidths: dict[str, float]) -> None:
    chosen = best(spec, cards(8), "quant.bits=16", *argv)
    seconds = sum(chosen.weights[store] / bandwidth for store, bandwidth in bandwidths.items())
    assert chosen.most_tokens_per_s == pytest.approx(1 / seconds)
    written = make_plan(composed("quant.bits=16", *argv), spec, cards(8)).to_json()
    assert written["most_tokens_per_s"] == chosen.most_tokens_per_s
    assert f"at most about {chosen.most_tokens_per_s:.2g} tokens/s" in written["notes"][-1]
    if "disk" in bandwidths:
        assert written["disk"]["weights"] == chosen.weights["disk"]


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantizes_what_stays_on_the_card_only(spec: ModelSpec, bits: int) -> None:
    argv = ("backend=bitsandbytes", f"quant.bits={bits}", "offload.cpu_gib=16", "model.max_context=512")
    chosen = best(spec, cards(5), *argv)
    check(chosen)
    away = places(chosen).count("cpu")
    assert 0 < away < LLAMA_7B.layers
    assert chosen.host.weights == away * LAYER_16 + EMBEDDING_16 + 2 * 4096  # with the head and the last norm
    whole = best(spec, cards(80), *argv)
    layer = (whole.gpus[0].weights - 2 * EMBEDDING_16) / LLAMA_7B.layers
    assert chosen.gpus[0].weights == pytest.approx(EMBEDDING_16 + (LLAMA_7B.layers - away) * layer, rel=1e-4)
    assert "not quantized: it stays in float16" in chosen.notes[-1]


def test_caches_of_what_is_offloaded_are_on_the_card_of_the_lowest_number(spec: ModelSpec) -> None:
    chosen = best(spec, cards(6, 2, 1), "quant.bits=16", "offload.cpu_gib=16", "run.in_flight=1")
    check(chosen)
    assert [gpu.device for gpu in chosen.gpus] == ["cuda:2", "cuda:1"]
    layers = {place: places(chosen).count(place) for place in ("cuda:2", "cuda:1", "cpu")}
    per_layer = sum(gpu.kv_cache for gpu in chosen.gpus) // LLAMA_7B.layers
    assert chosen.gpus[0].kv_cache == layers["cuda:2"] * per_layer
    assert chosen.gpus[1].kv_cache == (layers["cuda:1"] + layers["cpu"]) * per_layer
    assert chosen.gpus[1].scratch - chosen.gpus[0].scratch == LINEAR_16


def test_without_a_gpu_the_rest_is_on_disk(spec: ModelSpec) -> None:
    chosen = best(spec, cpu(8), "backend=transformers", "quant.bits=16", "offload.folder=/tmp")
    check(chosen)
    assert set(chosen.weights) == {"cpu", "disk"}
    assert chosen.gpus == ()
    assert chosen.host.runtime == HOST_RUNTIME["cpu"]
    assert chosen.offload_folder == "/tmp"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gib=st.floats(1, 20),
    count=st.integers(0, 3),
    cpu_gib=st.floats(0.1, 20),
    bits=st.sampled_from([4, 8, 16]),
    disk=st.booleans(),
)
def test_what_fits_adds_up(spec: ModelSpec, gib: float, count: int, cpu_gib: float, bits: int, disk: bool) -> None:
    hardware = cards(gib, *range(count)) if count else cpu(gib)
    argv = [f"quant.bits={bits}"] + ([f"offload.cpu_gib={cpu_gib}"] if count else [])
    for candidate in make_plan(composed(*argv, *(["offload.folder=/tmp"] if disk else [])), spec, hardware).candidates:
        if candidate.fits and candidate.offloads:
            check(candidate)
            assert candidate.host.weights <= cpu_gib * GIB or not count
        assert candidate.fits or candidate.reasons
        assert candidate.backend in ("transformers", "bitsandbytes")


# The choice


def test_nothing_is_offloaded_where_that_was_not_asked_for(spec: ModelSpec) -> None:
    for hardware in (cards(4), cards(8), cpu(4)):
        assert not any(c.offloads or c.disk for c in make_plan(composed(), spec, hardware).candidates)


def test_what_fits_without_comes_first(spec: ModelSpec) -> None:
    config = composed("offload.cpu_gib=16", "offload.folder=/tmp")
    plan = make_plan(config, spec, cards(8))
    assert (plan.chosen.method, plan.chosen.offloads) == ("nf4", False)
    assert [c.offloads for c in plan.candidates] == sorted(c.offloads for c in plan.candidates)
    assert any(c.offloads and c.fits for c in plan.candidates)
    assert "needs no offload, unlike transformers (16 bits)" in why(plan.chosen, plan, config)


def test_where_it_is_not_needed_it_is_not_done(spec: ModelSpec) -> None:
    assert not best(spec, cards(24), "quant.bits=16", "offload.folder=/tmp").offloads


# Refusals


def refused(spec: ModelSpec, hardware: Hardware, *argv: str) -> str:
    config = composed(*argv)
    with pytest.raises(DoesNotFitError) as caught:
        must_fit(make_plan(config, spec, hardware), config, spec, hardware)
    return str(caught.value)


@pytest.mark.parametrize(
    ("hardware", "argv"),
    [
        (cards(8), ["quant.bits=16"]),
        (cards(8), ["backend=transformers", "quant.bits=16", "run.in_flight=1"]),
        (cards(3), []),
        (cards(3), ["backend=exllamav2", "quant.bits=4"]),
        (cards(4), ["backend=bitsandbytes", "quant.bits=4"]),
        (cards(8), ["quant.bits=16", "offload.cpu_gib=1"]),
        (cards(8, host_gib=3), ["quant.bits=16"]),
        (cpu(3), []),
        (cpu(3), ["backend=bitsandbytes", "quant.bits=4"]),
        (cpu(8), ["quant.bits=32"]),
    ],
)
def test_the_ways_out_name_an_offload_that_works(spec: ModelSpec, hardware: Hardware, argv: list[str]) -> None:
    message = refused(spec, hardware, *argv)
    told = message.partition("What would fit: ")[2]
    ways = re.findall(r"((?:backend=\S+ )?(?:quant\.bits=\S+ )?(?:offload\.\S+ ?)+)\((.*?)\)", told)
    assert ways, message
    for way, cost in ways:
        changes = way.split()
        kept = [a for a in argv if a.partition("=")[0] not in {c.partition("=")[0] for c in changes}]
        kept = [a for a in kept if not a.startswith("offload.")]
        chosen = best(spec, hardware, *kept, *(c.replace("=/path", "=/tmp") for c in changes))
        assert chosen.fits, message
        assert chosen.offloads
        assert f"at most {chosen.most_tokens_per_s:.2g} tokens/s" in cost
    assert any("offload.folder=/path" in way for way, _ in ways)
    has_host = bool(hardware.gpus) and hardware.host_available > 10 * GIB
    assert any("offload.cpu_gib=" in way for way, _ in ways) is has_host


def test_too_little_host_memory_and_too_little_disk_are_told(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(spec, cards(8), "quant.bits=16", "offload.cpu_gib=1")
    assert "1.00 GiB of host memory for offloaded weights are" in message
    monkeypatch.setattr(offload, "disk_room", lambda path: GIB if path else 500 * GIB)
    message = refused(spec, cards(8), "quant.bits=16", "offload.folder=/tmp")
    assert re.search(r"disk needs \d+\.\d\d GiB and has 1\.00 GiB free", message)


def test_bitsandbytes_on_the_cpu_is_refused_with_what_works(spec: ModelSpec) -> None:
    message = refused(spec, cpu(3), "backend=bitsandbytes", "quant.bits=4", "offload.folder=/tmp")
    assert "bitsandbytes offloads from a GPU only; without one, backend=transformers offloads" in message
    assert best(spec, cpu(20), "backend=bitsandbytes", "quant.bits=4", "offload.folder=/tmp").fits  # not needed there


def test_host_memory_beside_no_gpu_makes_no_sense(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match=r"offload\.cpu_gib=4 is host memory beside a GPU.*hardware\.memory_gib=N"):
        best(spec, cpu(32), "offload.cpu_gib=4")


def test_a_folder_that_cannot_be_one_is_refused(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"offload\.folder=.*/file.*: .*/file is not a folder"):
            best(spec, cpu(32), f"offload.folder={tmp_path / name}")
    assert best(spec, cpu(32), "backend=transformers", f"offload.folder={tmp_path / 'new' / 'one'}").fits
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="is not writable"):
        best(spec, cpu(32), f"offload.folder={tmp_path}")


@pytest.mark.parametrize("key", ["offload.cpu_gib=2", "offload.folder=/tmp"])
@pytest.mark.parametrize("backend", ["vllm", "exllamav2"])
def test_backends_without_it_are_named(key: str, backend: str) -> None:
    with pytest.raises(ConfigError, match=f"not a setting of backend={backend} .backend=bitsandbytes or transformers"):
        composed(f"backend={backend}", key)


@pytest.mark.parametrize("value", ["-1", "nan", "5000"])
def test_numbers_out_of_range_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"offload\.cpu_gib=.* is out of range: 0 to 4096 GiB"):
        composed(f"offload.cpu_gib={value}")


def test_disk_room_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < offload.disk_room(str(tmp_path / "not" / "yet")) < 2**60
    assert offload.disk_room(offload.ANY_FOLDER) == 2**60
