"""task=run: the command that the README begins with, and what one can ask of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Done, Orchestrator, read_lines

from orchestrator import embedded

QUESTION = "What does len do?"
ANSWER = "Return the number of items in a container."
MEASURED = {
    *("load_s", "gpu_peak_bytes", "host_peak_bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s"),
    *("placement", "total_s"),
}


@pytest.fixture(scope="module")
def again(shared: Orchestrator, default_run: Done) -> Done:
    """The default command a second time."""
    return shared()


# The default command


def test_the_default_command_answers_every_shipped_prompt_in_order(default_run: Done) -> None:
    assert default_run.code == 0, default_run.err
    prompts = read_lines(embedded.PROMPTS)
    assert [answer["prompt"] for answer in default_run.answers] == [line["prompt"] for line in prompts]
    assert [answer["id"] for answer in default_run.answers] == [line["id"] for line in prompts]
    assert [answer["index"] for answer in default_run.answers] == list(range(len(prompts)))
    expected = "".join(f"> {answer['prompt']}\n{answer['answer']}\n\n" for answer in default_run.answers)
    assert default_run.out == expected


def test_the_merged_adapter_is_what_answers(default_run: Done) -> None:
    answers = {answer["prompt"]: answer["answer"] for answer in default_run.answers}
    assert answers[QUESTION] == ANSWER


def test_answers_tell_how_they_ended_and_what_they_cost(default_run: Done) -> None:
    for answer in default_run.answers:
        assert answer["answer"].strip()
        assert answer["finish_reason"] in ("stop", "length")
        assert answer["prompt_tokens"] > 0
        assert 0 < answer["completion_tokens"] <= 128
        assert answer["seconds"] >= answer["ttft_s"] >= 0


def test_the_runs_folder_has_the_documented_files(default_run: Done) -> None:
    assert default_run.folder is not None
    documented = "config.yaml plan.json result.json status.json run.log engine.log prompts.jsonl answers.jsonl"
    assert {path.name for path in default_run.folder.iterdir()} == set(documented.split())


def test_status_says_that_it_is_done(default_run: Done) -> None:
    status = default_run.json("status.json")
    assert (status["state"], status["exit_code"]) == ("done", 0)
    assert status["started"] <= status["updated"]


def test_the_plan_has_the_documented_fields_and_was_kept(default_run: Done) -> None:
    plan, result = default_run.json("plan.json"), default_run.json("result.json")
    documented = {
        *("fits", "reasons", "backend", "method", "bits", "tensor_parallel", "pipeline_parallel", "gpu_split"),
        *("max_context", "gpus", "host", "candidates"),
    }
    assert documented <= set(plan)
    assert (plan["fits"], plan["bits"]) == (True, 4)
    assert plan | result["plan"] == plan
    assert {"model", "model_revision", "adapters"} <= set(plan)
    assert result["measured"]["placement"] == {"cpu": plan["host"]["weights"]}


def test_stdout_is_the_answers(default_run: Done) -> None:
    assert default_run.out.startswith("> ")
    assert "Plan: " in default_run.err


def test_the_width_that_nobody_asked_for_is_said(default_run: Done, orchestrator: Orchestrator) -> None:
    said = "runs at 4 bits unless"
    assert said in default_run.err
    assert said not in orchestrator("task=plan", "quant.bits=4").err


def test_the_result_has_what_was_measured_and_the_versions(default_run: Done) -> None:
    result = default_run.json("result.json")
    measured = result["measured"]
    assert set(measured) >= MEASURED
    for key in ("load_s", "host_peak_bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "total_s"):
        assert measured[key] > 0, key
    assert {"orchestrator", "python", "transformers", "engine"} <= set(result["versions"])
    assert {"torch", "bitsandbytes"} <= set(result["versions"]["engine"])


def test_the_plan_bounds_what_was_measured(default_run: Done) -> None:
    plan, measured = default_run.json("plan.json"), default_run.json("result.json")["measured"]
    assert 0.4 * plan["host"]["total"] < measured["host_peak_bytes"] < 1.1 * plan["host"]["total"]


def test_the_first_run_merges_and_the_second_finds_it(default_run: Done, again: Done) -> None:
    first, second = default_run.json("result.json"), again.json("result.json")
    assert again.code == 0, again.err
    assert len(first["stages_run"]) == 1
    assert first["stages_run"][0].startswith("merge-")
    assert second["stages_run"] == []
    assert [artifact["name"] for artifact in second["artifacts"]] == first["stages_run"]


def test_greedy_answers_are_the_same_in_every_run(default_run: Done, again: Done) -> None:
    assert again.out == default_run.out


# What can be asked for


@pytest.mark.parametrize(
    ("argv", "method", "bits"),
    [
        (["backend=transformers", "model.dtype=float32"], "none", 32),
        (["backend=transformers", "model.dtype=bfloat16"], "none", 16),
        (["backend=bitsandbytes", "quant=nf4", "quant.double=true"], "nf4", 4),
        (["quant=fp4"], "fp4", 4),
        (["quant.bits=8"], "int8", 8),
    ],
    ids=["float32", "bfloat16", "nf4 double", "fp4", "int8"],
)
def test_every_engine_and_width_answers(
    orchestrator: Orchestrator, merged: Path, argv: list[str], method: str, bits: int
) -> None:
    done = orchestrator(f"model.path={merged}", f"prompts.text={QUESTION}", *argv)
    assert done.code == 0, done.err
    [answer] = done.answers
    plan = done.json("plan.json")
    assert (plan["method"], plan["bits"]) == (method, bits)
    assert done.json("result.json")["stages_run"] == []
    if bits > 4:
        assert answer["answer"] == ANSWER
    assert answer["answer"].strip()


@pytest.fixture(scope="module")
def carried(shared: Orchestrator, merged: Path) -> Done:
    """A JSONL file with fields of its own, a system message, and at most four tokens an answer."""
    lines = [
        {"prompt": QUESTION, "id": 7, "tags": ["a, b = c"]},
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}], "id": "ü"},
        {"prompt": "What is {x}, ${y} and 'z'?"},
    ]
    file = shared.folder / "prompts with a blank, and = .jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return shared(f"model.path={merged}", f"prompts.file={file}", "generation.max_tokens=4", "quant.bits=32")


def test_fields_of_a_prompts_line_are_carried_to_its_answer(carried: Done) -> None:
    assert carried.code == 0, carried.err
    first, second, third = carried.answers
    assert (first["id"], first["tags"]) == (7, ["a, b = c"])
    assert second["id"] == "ü"
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert third["prompt"] == "What is {x}, ${y} and 'z'?"


def test_max_tokens_ends_an_answer(carried: Done) -> None:
    assert {(a["finish_reason"], a["completion_tokens"]) for a in carried.answers[:2]} == {("length", 4)}
    assert ANSWER.startswith(carried.answers[0]["answer"])


def test_prompts_come_from_standard_input(orchestrator: Orchestrator, merged: Path) -> None:
    done = orchestrator(
        *(f"model.path={merged}", "prompts.file=-", "quant.bits=32", "generation.stop=[number]"),
        stdin=f"{QUESTION}\n\nWhat is KeyError?\n",
    )
    assert done.code == 0, done.err
    assert [answer["prompt"] for answer in done.answers] == [QUESTION, "What is KeyError?"]
    assert done.answers[0]["answer"] == "Return the "
    assert done.answers[0]["finish_reason"] == "stop"


@pytest.mark.slow
def test_samples_are_repeated_by_the_seed(orchestrator: Orchestrator, long_winded: Path) -> None:
    """A prompt's seed is generation.seed and its place: the second prompt of one run is the first of the next seed."""
    argv = [f"model.path={long_winded}", "prompts.text=[a, a]", "generation.temperature=1", "generation.max_tokens=12"]
    five, six = (orchestrator(*argv, f"generation.seed={seed}") for seed in (5, 6))
    assert five.code == six.code == 0, five.err + six.err
    assert five.answers[1]["answer"] == six.answers[0]["answer"]
    assert len({answer["answer"] for answer in five.answers + six.answers}) == 3


def test_a_text_arrives_as_it_was_typed(orchestrator: Orchestrator, model: Path) -> None:
    """Through a model without a chat template, which is said."""
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    text = "a, b = 'c' \\ \"d\" ${e} [f] {g: h} #"
    done = orchestrator(f"model.path={model}", f"prompts.text={text}", "generation.max_tokens=2", "quant.bits=32")
    assert done.code == 0, done.err
    assert done.answers[0]["prompt"] == text
    assert done.json("prompts.jsonl")["messages"] == [{"role": "user", "content": text}]
    assert "no chat template" in done.err


def test_a_chat_template_of_ones_own_is_used(orchestrator: Orchestrator, merged: Path) -> None:
    template = orchestrator.folder / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }} {{ 'word ' * 40 }}")
    argv = [f"model.path={merged}", "prompts.text=hi", "generation.max_tokens=1", "quant.bits=32"]
    done = orchestrator(*argv, f"model.chat_template={template}")
    assert done.code == 0, done.err
    assert done.answers[0]["prompt_tokens"] > 40


@pytest.mark.slow
def test_a_sweep_runs_every_width(orchestrator: Orchestrator, merged: Path) -> None:
    done = orchestrator("-m", "quant.bits=4,8", f"model.path={merged}", "+prompts.text=hi", "generation.max_tokens=2")
    assert done.code == 0, done.err
    assert done.folder is not None
    plans = [json.loads((done.folder / job / "plan.json").read_text()) for job in ("0", "1")]
    assert [plan["bits"] for plan in plans] == [4, 8]
    assert all(len(read_lines(done.folder / job / "answers.jsonl")) == 1 for job in ("0", "1"))
