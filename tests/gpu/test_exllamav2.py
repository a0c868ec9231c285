"""ExLlamaV2 on real GPUs: from the embedded model's .bin and adapter to answers, the commands as a user types them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import embedded
from orchestrator.backends.protocol import Delta, Failed, Finished, Request
from orchestrator.checkpoint.exl2_layout import decode, packed_linears
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.config import (
    AdapterConfig,
    BackendConfig,
    CacheConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    PathsConfig,
    QuantConfig,
)
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import Planned, Session, look, open_session

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests: the measurement and each width are made once."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if importlib.util.find_spec("exllamav2") is None:
        pytest.skip("exllamav2 is not installed")
    return tmp_path_factory.mktemp("artifacts")


def run(folder: Path, store: Path, *options: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "orchestrator", "backend=exllamav2", "hardware.gpus=[0]"]
    command += [f"paths.artifacts={store}", f"paths.runs={folder}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | (env or {}))
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in folder.glob("*/*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    (run_folder,) = folder.iterdir()
    result: dict[str, Any] = json.loads((run_folder / "result.json").read_text())
    result["answers"] = [json.loads(line) for line in (run_folder / "answers.jsonl").read_text().splitlines()]
    return result


@contextmanager
def session(folder: Path, store: Path, bits: float = 4.0, in_flight: int = 4, **sections: Any) -> Iterator[Session]:
    """A live engine on the embedded model."""
    config = Config(
        backend=BackendConfig(name="exllamav2"), quant=QuantConfig(bits=bits), paths=PathsConfig(artifacts=str(store))
    )
    config = replace(config, run=replace(config.run, in_flight=in_flight), **sections)
    config.hardware.gpus = config.hardware.gpus or [0]
    folder.mkdir(exist_ok=True)
    with open_session(look(config, planning=False), RunFolder(folder)) as live:
        yield live


def assert_as_planned(result: dict[str, Any], near: int = 2**16) -> None:
    """Answers, the weights where the plan has them (to 2%, or `near` bytes), and no more memory than it says."""
    assert all(answer["answer"].strip() for answer in result["answers"])
    placement = result["measured"]["placement"]
    assert set(placement) == {"cpu", "cuda:0"}
    assert result["plan"]["gpus"][0]["weights"] == pytest.approx(placement["cuda:0"], rel=0.02, abs=near)
    assert result["measured"]["gpu_peak_bytes"][0] <= result["plan"]["gpus"][0]["total"]
    assert result["versions"]["engine"]["generator"].startswith(("paged", "unpaged"))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_width(bits: int, tmp_path: Path, store: Path) -> None:
    result = run(tmp_path, store, f"quant.bits={bits}")
    assert_as_planned(result, near=2**20)  # layers get widths of their own
    stages = [artifact["name"].partition("-")[0] for artifact in result["artifacts"]]
    assert stages == ["merge", "measurement", "exl2"][: len(stages)] or stages == ["merge", "exl2"]


def test_the_next_width_reuses_the_measurement(tmp_path: Path, store: Path) -> None:
    run(tmp_path / "first", store, "quant.bits=4")
    result = run(tmp_path / "second", store, "quant.bits=5", "generation.max_tokens=8")
    built = {artifact["name"].partition("-")[0]: artifact["built"] for artifact in result["artifacts"]}
    assert built == {"merge": False, "measurement": False, "exl2": True}


def test_sixteen_bits(tmp_path: Path, store: Path) -> None:
    result = run(tmp_path, store, "quant.method=none")
    assert (result["plan"]["method"], result["plan"]["bits"]) == ("none", 16.0)
    assert [artifact["name"].partition("-")[0] for artifact in result["artifacts"]] == ["merge"]
    assert_as_planned(result)
    assert any("`collections`" in answer["answer"] for answer in result["answers"])


def test_a_gptq_folder(tmp_path: Path, store: Path) -> None:
    pytest.importorskip("safetensors.torch")
    from gptq_models import write_embedded_gptq

    folder = write_embedded_gptq(tmp_path, store)
    result = run(tmp_path / "run", store, f"model.path={folder}", f"prompts.file={embedded.PROMPTS}")
    assert (result["plan"]["method"], result["plan"]["bits"], result["stages_run"]) == ("gptq", 4.0, [])
    assert_as_planned(result)
    assert any("`collections`" in answer["answer"] for answer in result["answers"])


@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_a_cache(bits: int, tmp_path: Path, store: Path) -> None:
    result = run(tmp_path, store, "quant.bits=8", f"cache.bits={bits}", "generation.max_tokens=24")
    assert result["plan"]["cache_bits"] == bits
    assert all(answer["answer"].strip() for answer in result["answers"])


def prompts(live: Session) -> list[list[int]]:
    lines = embedded.PROMPTS.read_text(encoding="utf-8").splitlines()
    values = [json.loads(line) for line in lines]
    messages = [v.get("messages") or [{"role": "user", "content": v["prompt"]}] for v in values]
    return [live.tokenizer.encode(m) for m in messages]


def answers(live: Session, requests: list[Request], cancel: set[str] | None = None) -> dict[str, list[int]]:
    """Tokens by request; those in `cancel` are cancelled after their first token."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    reasons: dict[str, str] = {}
    for request in requests:
        live.engine.submit(request)
    while len(reasons) < len(requests):
        for event in live.engine.events(timeout=60):
            assert not isinstance(event, Failed), event
            assert event.id not in reasons
            if isinstance(event, Delta):
                tokens[event.id] += event.tokens
                if cancel and event.id in cancel:
                    live.engine.cancel(event.id)
            if isinstance(event, Finished):
                reasons[event.id] = event.reason
    assert {name for name, reason in reasons.items() if reason == "cancelled"} == (cancel or set())
    return tokens


def test_sixteen_in_flight_a_third_cancelled_none_mixed_up(tmp_path: Path, store: Path) -> None:
    with session(tmp_path / "run", store, 8.0, in_flight=16) as live:
        texts = prompts(live)
        requests = [Request(str(i), texts[i % len(texts)], 24 + i) for i in range(16)]
        alone = {r.id: answers(live, [r])[r.id] for r in requests[: len(texts)]}
        gone = {str(i) for i in range(0, 16, 3)}
        together = answers(live, requests, cancel=gone)
        score = live.engine.score(texts[0], 5)
        assert len(score.logprobs) == len(texts[0]) - 1
        for i in set(range(16)) - {int(name) for name in gone}:
            own, shared = alone[str(i % len(texts))], together[str(i)]
            # float16 in another batch: a near tie may break, but not at the first tokens of another's answer.
            assert shared[:4] == own[:4], (i, own, shared)


def text_of(live: Session, request: Request) -> tuple[str, str]:
    """(text, reason of its end) of one answer."""
    text = ""
    live.engine.submit(request)
    while True:
        for event in live.engine.events(timeout=60):
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                text += event.text
            if isinstance(event, Finished):
                return text, event.reason


def test_stop_strings_and_stop_tokens(tmp_path: Path, store: Path) -> None:
    with session(tmp_path / "run", store, 8.0, in_flight=4) as live:
        prompt = prompts(live)[0]
        free = answers(live, [Request("free", prompt, 32)])["free"]
        at = next(i for i in range(4, len(free)) if free[i] not in free[:i])
        ended = answers(live, [Request("ended", prompt, 32, stop_tokens=[free[at]])])["ended"]
        assert ended in (free[:at], free[: at + 1])  # the token itself is shown by no engine
        whole, _ = text_of(live, Request("whole", prompt, 32))
        stop = whole[10:14]
        cut = text_of(live, Request("cut", prompt, 32, stop=[stop]))
        assert cut == (whole[: whole.index(stop)], "stop")


def test_a_seed_is_the_generators(tmp_path: Path, store: Path) -> None:
    """Of 64 first tokens about 61 come again with their seed, 43 with another: the kernels' sums have no fixed order,
    and top_p puts what is nearly equal in the order that they gave."""
    with session(tmp_path / "run", store, 8.0, in_flight=4) as live:
        drawn = [
            Request(f"{at}-{seed}", prompt, 1, temperature=1.0, top_p=0.95, seed=seed)
            for at, prompt in enumerate(prompts(live))
            for seed in range(8)
        ]
        once, again = ([answers(live, [request])[request.id] for request in drawn] for _ in range(2))
    assert sum(a == b for a, b in zip(once, again, strict=True)) >= 0.875 * len(drawn)
    assert any(once[at : at + 8].count(once[at]) < 8 for at in range(0, len(once), 8))  # another seed, another token


def planned_for(sections: dict[str, Any]) -> Planned:
    config = Config(backend=BackendConfig(name="exllamav2"), quant=QuantConfig(bits=8.0))
    return look(replace(config, **sections), planning=False)


def split_in_half(sections: dict[str, Any]) -> dict[str, Any]:
    """`sections` with the share of the first of two GPUs that holds about half of so small a model, by our own plan."""
    hardware = replace(Config().hardware, gpus=[0, 1])
    for share in (step / 20000 for step in range(100, 400)):
        found = sections | {"hardware": hardware, "parallel": ParallelConfig(gpu_split=[share, 1.0])}
        first, second = planned_for(found).plan.chosen.gpus
        if first.weights > second.weights > 0:
            return found
    raise AssertionError("no split")


def test_a_split_by_hand_over_two_gpus(tmp_path: Path, store: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    context = replace(Config().model, max_context=1024)
    with session(tmp_path / "one", store, 8.0, model=context) as live:
        texts = prompts(live)
        alone = answers(live, [Request("a", texts[0], 16)])["a"]
    sections = split_in_half({"model": context})
    first, second = planned_for(sections).plan.chosen.gpus
    with session(tmp_path / "two", store, 8.0, **sections) as live:
        placement = live.ready.placement
        assert answers(live, [Request("a", texts[0], 16)])["a"][:4] == alone[:4]
    assert placement["cuda:0"] == pytest.approx(first.weights, rel=0.3)
    assert placement["cuda:1"] == pytest.approx(second.weights, rel=0.3)


def test_scores_do_not_depend_on_the_way_of_attention(tmp_path: Path, store: Path) -> None:
    """Without flash-attn it is another kernel, which has to mask the future too (torch's SDPA does not in 0.3.2)."""
    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")
    found = {}
    for flash in (True, False):
        patch = pytest.MonkeyPatch()
        if not flash:
            patch.setenv("EXLLAMA_NO_FLASH_ATTN", "1")
        try:
            with session(tmp_path / str(flash), store, 8.0) as live:
                tokens = live.tokenizer.encode_text(text)[:700]
                found[flash] = live.engine.score(tokens, 1).logprobs
                generator = live.ready.versions["generator"]
                texts = prompts(live)
                assert answers(live, [Request(str(i), texts[i % 2], 12) for i in range(4)])
        finally:
            patch.undo()
    assert generator.startswith("unpaged")
    worst = max(abs(a - b) for a, b in zip(found[True], found[False], strict=True))
    mean = sum(abs(a - b) for a, b in zip(found[True], found[False], strict=True)) / len(found[True])
    assert mean < 0.02, (mean, worst)


def test_a_quantized_cache_changes_little(tmp_path: Path, store: Path) -> None:
    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")
    means = {}
    for bits in (16, 8, 6, 4):
        with session(tmp_path / str(bits), store, 8.0, cache=CacheConfig(bits=bits)) as live:
            scores = live.engine.score(live.tokenizer.encode_text(text)[:512], 1).logprobs
            means[bits] = -sum(scores) / len(scores)
    for bits in (8, 6, 4):
        assert means[bits] == pytest.approx(means[16], abs=0.3), means


def test_one_kept_inside_a_smaller_card(tmp_path: Path, store: Path) -> None:
    result = run(tmp_path, store, "quant.bits=4", "hardware.memory_gib=4", "generation.max_tokens=8")
    assert result["plan"]["gpus"][0]["capacity"] < 4 * 2**30
    assert result["measured"]["gpu_peak_bytes"][0] < 4 * 2**30


def test_a_finished_folder_is_a_model_that_is_loaded_as_it_is(tmp_path: Path, store: Path) -> None:
    prompts = f"prompts.file={embedded.PROMPTS}"
    made = run(tmp_path / "made", store, "quant.bits=4", prompts, "generation.max_tokens=24")
    (name,) = [a["name"] for a in made["artifacts"] if a["name"].startswith("exl2-")]
    again = run(tmp_path / "again", store, f"model.path={store / name}", prompts, "generation.max_tokens=24")
    assert (again["artifacts"], again["stages_run"]) == ([], [])
    assert (again["plan"]["method"], again["plan"]["bits"]) == ("exl2", 4.0)
    assert again["measured"]["placement"] == made["measured"]["placement"]
    planned = again["plan"]["gpus"][0]["weights"]  # by the headers, not by an average width
    assert again["measured"]["placement"]["cuda:0"] == pytest.approx(planned, rel=0.001)
    assert [a["answer"] for a in again["answers"]] == [a["answer"] for a in made["answers"]]


def test_a_conversion_that_was_killed_goes_on(tmp_path: Path, store: Path) -> None:
    own = tmp_path / "store"
    command = [sys.executable, "-m", "orchestrator", "backend=exllamav2", "hardware.gpus=[0]", "quant.bits=4"]
    command += [f"paths.artifacts={own}", f"paths.runs={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not any(
        "Measured: model.layers.0" in log.read_text() for log in (tmp_path / "killed").glob("*/convert.log")
    ):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    (record,) = own.glob("measurement-*.partial/work/job_new.json")
    assert json.loads((record.parent / "last_good" / record.name).read_text())["progress"] == "measure_quant"
    record.write_text(record.read_text()[:100])  # as if killed while it was written
    result = run(tmp_path / "again", own, "quant.bits=4", "generation.max_tokens=8")
    (log,) = (tmp_path / "again").glob("*/convert.log")
    assert "-- Resuming job" in log.read_text()
    assert "Tokenizing samples (measurement)" not in log.read_text()
    assert result["answers"][0]["answer"]


def test_a_base_is_measured_for_its_merges(tmp_path: Path, store: Path) -> None:
    own = tmp_path / "store"
    short = ("quant.bits=4", "generation.max_tokens=8", "prompts.text=Hello")
    run(tmp_path / "base", own, f"model.path={embedded.BASE}", *short)
    result = run(
        tmp_path / "merged", own, f"model.path={embedded.BASE}", f"model.adapter={embedded.FOLDER / 'adapter'}", *short
    )
    built = {artifact["name"].partition("-")[0]: artifact["built"] for artifact in result["artifacts"]}
    assert built == {"merge": True, "measurement": False, "exl2": True}


def log_probabilities(live: Session, tokens: list[int]) -> Any:
    """Of every token of the vocabulary at each position: float64 (tokens - 1, vocabulary)."""
    score = live.engine.score(tokens, live.planned.spec.vocab)
    found = torch.full((len(tokens) - 1, live.planned.spec.vocab), float("nan"), dtype=torch.float64)
    found.scatter_(1, torch.tensor(score.top_tokens), torch.tensor(score.top_logprobs, dtype=torch.float64))
    assert not found.isnan().any()
    return found


def kl(wanted: Any, found: Any) -> float:
    """Nats per token."""
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


HALF = AdapterConfig(path=str(embedded.ADAPTER), weight=0.5)
ON_TOP = {
    "one": ModelConfig(merge=False),
    "two halves": ModelConfig(path=str(embedded.BASE), adapters=[HALF, HALF], merge=False),
}


@pytest.mark.parametrize("which", ON_TOP)
def test_an_adapter_on_top_of_its_base_is_the_merged_model(which: str, tmp_path: Path, store: Path) -> None:
    """The adapter changes every linear of attention and MLP, by 0.7 nats on this text; so does one of its factors in
    another order than the MLP's own."""
    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")
    models = {"merged": ModelConfig(), "base": ModelConfig(path=str(embedded.BASE)), "on top": ON_TOP[which]}
    scores, tokens, placed = {}, {}, {}
    for name, model in models.items():
        with session(tmp_path / name.replace(" ", "-"), store, 8.0, in_flight=2, model=model) as live:
            scores[name] = log_probabilities(live, live.tokenizer.encode_text(text)[:256])
            # Few rows and many go through other kernels: these are the steps of a generator.
            tokens[name] = answers(live, [Request(str(i), p, 8) for i, p in enumerate(prompts(live))])
            placed[name] = live.ready.placement["cuda:0"]
            adapters, built = live.chosen.adapter_bytes, live.model.built
            planned = sum(gpu.weights for gpu in live.chosen.gpus)
    assert [name.partition("-")[0] for name in built] in (["adapter"], [])  # the base's own quantized model
    assert kl(scores["merged"], scores["on top"]) < 0.02
    assert kl(scores["base"], scores["on top"]) > 0.2
    same = [tokens["merged"][name][:4] == tokens["on top"][name][:4] for name in tokens["merged"]]
    assert sum(same) > len(same) / 2, tokens
    assert tokens["on top"] != tokens["base"]
    assert placed["on top"] == placed["base"] + adapters["cuda:0"]
    assert placed["on top"] == pytest.approx(planned, rel=0.02, abs=2**20)


def test_an_adapter_on_top_of_a_finished_folder(tmp_path: Path, store: Path) -> None:
    """A base that is quantized already, with nothing else of it there: the same weights, the same factors."""
    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")
    with session(tmp_path / "base", store, 8.0, model=ModelConfig(path=str(embedded.BASE))) as live:
        tokens = live.tokenizer.encode_text(text)[:256]
        base, folder = log_probabilities(live, tokens), live.model.path
    whole = [AdapterConfig(path=str(embedded.ADAPTER))]
    scores, placed = {}, {}
    for name, path in {"original": embedded.BASE, "finished": folder}.items():
        model = ModelConfig(path=str(path), adapters=whole, merge=False)
        with session(tmp_path / name, store, 8.0, model=model) as live:
            assert live.model.path == folder
            stages = [artifact.name.partition("-")[0] for artifact in live.model.artifacts]
            scores[name], placed[name] = log_probabilities(live, tokens), live.ready.placement
            planned = sum(gpu.weights for gpu in live.chosen.gpus)
    assert stages == ["adapter"]
    assert kl(scores["original"], scores["finished"]) < 1e-3
    assert kl(base, scores["finished"]) > 0.2
    assert placed["finished"] == placed["original"]
    assert placed["finished"]["cuda:0"] == pytest.approx(planned, rel=0.001)  # by the headers


def test_a_run_with_an_adapter_on_top(tmp_path: Path, store: Path) -> None:
    result = run(tmp_path, store, "quant.bits=8", "model.merge=false", "convert.verify=true")
    assert all(answer["answer"].strip() for answer in result["answers"])
    stages = [artifact["name"].partition("-")[0] for artifact in result["artifacts"]]
    assert stages[0] == "convert"
    assert stages[-2:] == ["exl2", "adapter"]
    assert result["plan"]["adapter_bytes"]["cuda:0"] > 0
    assert result["measured"]["gpu_peak_bytes"][0] <= result["plan"]["gpus"][0]["total"]


def test_an_adapter_over_two_gpus(tmp_path: Path, store: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")
    sections: dict[str, Any] = {"model": ModelConfig(merge=False, max_context=1024)}
    with session(tmp_path / "one", store, 8.0, **sections) as live:
        alone = log_probabilities(live, live.tokenizer.encode_text(text)[:256])
    split = split_in_half(sections)
    with session(tmp_path / "two", store, 8.0, **split) as live:
        assert min(live.chosen.adapter_bytes.values()) > 0
        assert len(live.chosen.adapter_bytes) == 2
        assert kl(alone, log_probabilities(live, live.tokenizer.encode_text(text)[:256])) < 1e-3


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_texts_of_the_users(kind: str, tmp_path: Path, store: Path) -> None:
    file = embedded.FOLDER / {"txt": "heldout.txt", "jsonl": "heldout_chat.jsonl"}[kind]
    options = [f"quant.calibration.file={file}", "quant.calibration.rows=4", "quant.calibration.length=256"]
    result = run(tmp_path, store, "quant.bits=4", *options, "convert.verify=true", "generation.max_tokens=8")
    (name,) = [a["name"] for a in result["artifacts"] if a["name"].startswith("exl2-")]
    said = json.loads((store / name / "config.json").read_text())["quantization_config"]["calibration"]
    assert said == {"rows": 4, "length": 256, "dataset": f"{file.stem}.parquet"}


def test_decoding_agrees_with_the_engines_own(tmp_path: Path, store: Path) -> None:
    result = run(tmp_path, store, "quant.bits=4", "generation.max_tokens=8")
    (name,) = [a["name"] for a in result["artifacts"] if a["name"].startswith("exl2-")]
    script = """
import sys
from orchestrator.backends.exl2_setup import prepare_attention
prepare_attention()
import torch
from exllamav2 import ExLlamaV2, ExLlamaV2Config
model = ExLlamaV2(ExLlamaV2Config(sys.argv[1]))
model.load()
names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "lm_head")
torch.save({name: model.modules_dict[name].get_weight_tensor_dq().cpu() for name in names}, sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", script, store / name, tmp_path / "own.pt"], check=True, timeout=600)
    tensors = {i.name: i for f in (store / name).glob("*.safetensors") for i in read_safetensors_header(f).tensors}
    linears = packed_linears(tensors)
    for module, wanted in torch.load(tmp_path / "own.pt").items():
        assert torch.equal(torch.from_numpy(decode(linears[module])), wanted.float()), module
