"""The configuration: every shipped file composes, and every problem is found before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from composing import CONF, composed, hydra_ready

from orchestrator.backends import vllm
from orchestrator.backends.protocol import LoadPlan
from orchestrator.backends.table import BACKENDS, Backend, backends_with_key
from orchestrator.config import ENGINE_KEYS, Config, did_you_mean, get, keys, parse_size
from orchestrator.errors import ConfigError
from orchestrator.tasks.run import check_stop_tokens

CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with hydra_ready():
        yield


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        composed(*argv)
    return str(caught.value)


def test_the_shipped_configuration_is_the_default_of_every_key() -> None:
    config = composed()
    assert {key: get(config, key) for key in keys()} == {key: get(Config(), key) for key in keys()}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_shipped_choice_composes(choice: str) -> None:
    group, name = choice.split("=")
    config = composed(choice)
    if group in ("backend", "task"):
        assert getattr(config, group).name == name
    if group == "hardware":
        assert config.hardware.profile == name


def test_there_is_a_choice_for_every_backend_and_task() -> None:
    from orchestrator.app import TASKS

    assert {f"backend={name}" for name in BACKENDS} <= set(CHOICES)
    assert {f"task={name}" for name in TASKS} == {choice for choice in CHOICES if choice.startswith("task=")}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["quant.bits=1"], "quant.bits=1"),
        (["quant.bits=nan"], "quant.bits=nan"),
        (["generation.temperature=-1"], "generation.temperature=-1"),
        (["generation.temperature=inf"], "generation.temperature=inf"),
        (["generation.top_p=0"], "generation.top_p=0"),
        (["generation.max_tokens=0"], "generation.max_tokens=0"),
        (["generation.seed=-1"], "generation.seed=-1"),
        (["run.in_flight=0"], "run.in_flight=0"),
        (["model.max_context=8"], "model.max_context=8"),
        (["hardware.memory_gib=0"], "hardware.memory_gib=0"),
        (["hardware.reserve_gib=-1"], "hardware.reserve_gib=-1"),
        (["hardware.profile=4x24gb"], "hardware=4x24gb"),
        (["hardware=4x24gb", "hardware.cards=0"], "hardware.cards=0"),
        (["convert.shard_size=big"], "500MB"),
        (["model.dtype=fp16"], "float16"),
        (["quant.method=marlin"], "nf4"),
        (["artifacts.action=delete"], "prune"),
        (["backend.name=vllmm"], "backend.name=vllmm"),
        (["merge.base=nf4", "model.path=base"], "merge.base"),
        (["merge.base=int4"], "merge.base"),
        (["merge.double=true"], "merge.double"),
        (
            ["model.merge=false", "backend=vllm"],
            "is not run by backend=vllm: type backend=exllamav2, or leave model.merge",
        ),
        (["model.merge=false", "model.path=/m"], "model.adapter=PATH"),
        (["model.merge=false", "merge.base=nf4"], "merge.base=nf4 is for an adapter that is merged"),
        (["model.merge=false", "task=convert"], "task=convert writes one model"),
        (["prompts.text=hi", "prompts.file=a.txt"], "prompts.file"),
        (["model.path=/m", "model.adapter=/a", "model.adapters=[{path: /b}]"], "model.adapters"),
        (["model.revision=main"], "model.revision"),
        (["model.path=org/name", "model.revision=../main"], "model.revision='../main'"),
        (["server.port=65536"], "server.port=65536"),
        (["server.host="], "server.host"),
        (["server.api_key="], "server.api_key"),
        (["server.api_key=a\tb"], "server.api_key"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_possible(argv: list[str], said: str) -> None:
    message = refusal(*argv)
    assert said in message
    assert "\n" not in message


def test_all_problems_are_told_at_once() -> None:
    message = refusal("quant.bits=1", "generation.top_p=2", "model.dtype=fp16", "convert.shard_size=1KB")
    assert all(key in message for key in ("quant.bits", "generation.top_p", "model.dtype", "convert.shard_size"))


def test_a_missing_adapter_path_is_named() -> None:
    assert "path" in refusal("model.path=/m", "model.adapters=[{weight: 0.5}]")


def test_a_setting_of_another_engine_is_refused_and_not_ignored() -> None:
    message = refusal("backend=transformers", "quant.double=true")
    assert "quant.double" in message
    assert "backend=bitsandbytes" in message


def test_settings_of_two_engines_are_refused_together() -> None:
    message = refusal("backend=bitsandbytes", "quant.double=true", "parallel.tensor=4")
    assert "parallel.tensor" in message
    assert "quant.double" not in message


def test_a_method_of_another_engine_names_the_engine_that_has_it() -> None:
    assert "backend=bitsandbytes has it" in refusal("backend=transformers", "quant=nf4")


@pytest.mark.parametrize("key", [key for key in ENGINE_KEYS if not backends_with_key(key)])
def test_an_engine_setting_that_nothing_takes_is_refused_with_any_backend(key: str) -> None:
    assert key in refusal(f"{key}=1")
    assert all(key in refusal(f"{key}=1", f"backend={name}") for name in BACKENDS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["backend=vllm", "backend.engine_args.tensor_parallel_size=2"],
            "tensor_parallel_size would undo what is planned for backend=vllm: type parallel.tensor",
        ),
        (["backend=vllm", "backend.engine_args.gpu_memory_utilization=0.9"], "type hardware.memory_gib instead"),
        (["backend=vllm", "+backend.engine_args={kv_cache_dtype: fp8}"], "type cache.bits instead"),
        (["backend=vllm", "+backend.engine_args={hf_overrides: {rope_theta: 1}}"], "leave it out"),
        (["backend=vllm", "+backend.engine_args={speculative_config: {method: ngram}}"], "leave it out"),
        (["generation.stop=['']"], "generation.stop has an empty text"),
        (["generation.seed=99999999999999999999"], "is out of range: 0 to 9223372036854775807"),
        (["generation.max_tokens=99999999"], "is out of range: 1 to 1048576 tokens"),
        (["cache.bits=3"], "cache.bits=3 is not a width of any backend: there are 16, 8, 6 or 4"),
        (["backend=vllm", "cache.bits=6"], "cache.bits=6 is not a width of backend=vllm, which has 16 or 8"),
        (["backend=vllm", "backend.engine_args.load_format=dummy"], "planned for backend=vllm: leave it out"),
        (["backend=exllamav2", "backend.engine_args.max_seq_len=9"], "type model.max_context instead"),
        (["backend=transformers", "backend.engine_args.device_map=auto"], "type hardware.gpus instead"),
        (["backend=bitsandbytes", "backend.engine_args.quantization_config.bits=4"], "type quant.method instead"),
        (["backend.engine_args.max_model_len=9"], "planned for backend=vllm: type model.max_context"),
        (
            ["backend.engine_args.torch_dtype=half", "task=plan"],
            "backend=bitsandbytes or transformers: type model.dtype",
        ),
    ],
)
def test_an_engines_own_argument_that_the_plan_decides_names_our_key(argv: list[str], said: str) -> None:
    assert said in refusal(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["backend=vllm", "backend.engine_args.enforce_eager=true"],
        ["backend=transformers", "backend.engine_args.attn_implementation=eager"],
        ["backend=exllamav2", "backend.engine_args.scale_alpha_value=2.0"],
        ["backend=exllamav2", "backend.engine_args.max_model_len=9"],  # of vllm: this engine says that it has none
        ["backend.engine_args.enforce_eager=true"],
    ],
)
def test_what_the_plan_does_not_decide_goes_to_the_engine(argv: list[str]) -> None:
    assert composed(*argv).backend.engine_args


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_an_argument_that_the_plan_decides_has_a_key_of_that_backend(backend: Backend) -> None:
    named = {key for key in backend.planned_args.values() if key}
    assert named <= set(keys())
    assert named & set(ENGINE_KEYS) <= backend.keys | {"offload.folder"}
    for argument, key in backend.planned_args.items():  # with backend=auto one key is named for all
        assert {b.planned_args[argument] for b in BACKENDS.values() if argument in b.planned_args} == {key}


def test_what_vllms_adapter_sets_is_refused() -> None:
    plan = LoadPlan("m", "vllm", "none", 16, "bfloat16", 64, 4, {"": "cpu"}, {"cpu": 1}, kv_cache={"cpu": 1})
    ours = vllm._arguments(plan) | vllm._cpu_arguments(plan)
    assert set(ours) - set(BACKENDS["vllm"].planned_args) == {"generation_config", "disable_log_stats", "enforce_eager"}


def test_model_adapter_is_short_for_one_adapter() -> None:
    adapters = composed("model.path=/m", "model.adapter=/a b,c=d").model.adapters
    assert [(a.path, a.weight) for a in adapters] == [("/a b,c=d", 1.0)]


def test_keys_are_dotted_and_complete() -> None:
    found = list(keys())
    assert {"quant.bits", "quant.calibration.file", "backend.engine_args", "task.name"} <= set(found)
    assert len(found) == len(set(found))
    assert set(ENGINE_KEYS) <= set(found)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500 * 10**6),
        ("5GB", 5 * 10**9),
        ("2GiB", 2 * 2**30),
        ("1.5 gb", 1_500_000_000),
        ("1048576", 2**20),
        ("64MiB", 64 * 2**20),
        (" 3gib ", 3 * 2**30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-5GB", "nanGB", "infGB", "999999", "0", "1KB", "5TB5"])
def test_what_is_no_size_of_a_shard(text: str) -> None:
    with pytest.raises(ValueError, match=r"shard|number and a unit"):
        parse_size(text)


def test_a_suggestion_is_near_or_there_is_none() -> None:
    assert did_you_mean("model.pth", list(keys())) == "Did you mean model.path?"
    assert did_you_mean("zzzz", list(keys())) == ""


def test_a_stop_token_that_the_model_does_not_have_is_refused_before_it_is_loaded() -> None:
    check_stop_tokens(composed("generation.stop_tokens=[0,4095]"), 4096)
    for wrong in (-1, 4096):
        with pytest.raises(ConfigError, match=rf"stop_tokens has {wrong}, and the model's tokens are 0 to 4095"):
            check_stop_tokens(composed(f"generation.stop_tokens=[5,{wrong}]"), 4096)
