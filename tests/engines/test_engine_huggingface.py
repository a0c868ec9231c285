"""The transformers adapter in this process: what it answers, compared with transformers itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from asking import answer, load_engine, make_plan
from transformers import AutoModelForCausalLM

from orchestrator.backends.huggingface import HuggingFaceEngine
from orchestrator.backends.protocol import Failed, Finished, Request
from orchestrator.errors import CheckpointError

PROMPTS = [[random.Random(i).randrange(256) for _ in range(3 + 7 * i)] for i in range(6)]


def greedy(name: str, prompt: list[int], count: int = 24, **changes: object) -> Request:
    return Request(name, prompt, max_tokens=count, **changes)  # type: ignore[arg-type]


def test_streaming_equals_generate(engine: HuggingFaceEngine, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = PROMPTS[2]
    whole = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()

    got = answer(engine, [greedy("a", prompt, 40)])["a"]

    assert got.tokens == whole
    assert got.text == engine._tokenizer.decode(whole, skip_special_tokens=True)
    assert isinstance(got.end, Finished)
    assert (got.end.reason, got.end.prompt_tokens, got.end.completion_tokens) == ("length", len(prompt), 40)
    assert 0 <= got.end.queue_s <= got.end.ttft_s
    assert got.end.ttft_s == pytest.approx(got.end.queue_s + got.end.prefill_s)
    assert got.end.decode_s > 0


def test_a_batch_of_mixed_lengths_equals_single_runs(engine: HuggingFaceEngine) -> None:
    requests = [greedy(str(i), prompt, 6 + 5 * i) for i, prompt in enumerate(PROMPTS)]
    together = answer(engine, requests)
    for request in requests:
        alone = answer(engine, [request])[request.id]
        assert together[request.id].tokens == alone.tokens
        assert together[request.id].text == alone.text
        assert len(alone.tokens) == request.max_tokens


def test_a_seed_gives_the_same_answer_whatever_else_is_in_flight(engine: HuggingFaceEngine) -> None:
    seeded = greedy("s", PROMPTS[1], temperature=0.9, top_p=0.95, seed=11)
    alone = answer(engine, [seeded])["s"]
    others = [
        greedy("g", PROMPTS[5]),
        greedy("o", PROMPTS[3], temperature=2.0, seed=5),
        greedy("n", PROMPTS[1], temperature=1.0),
    ]
    mixed = answer(engine, [*others, seeded])
    assert mixed["s"].tokens == alone.tokens
    assert mixed["g"].tokens == answer(engine, [others[0]])["g"].tokens  # greedy rows are not touched
    assert mixed["o"].tokens == answer(engine, [others[1]])["o"].tokens
    other_seed = greedy("s", PROMPTS[1], temperature=0.9, top_p=0.95, seed=12)
    assert answer(engine, [other_seed])["s"].tokens != alone.tokens


def test_samples_follow_the_distribution(engine: HuggingFaceEngine) -> None:
    prompt, temperature, top_p = PROMPTS[0], 0.4, 0.8
    logits = torch.tensor(engine.score([*prompt, 0], 512).top_logprobs[-1]) / temperature
    tokens = engine.score([*prompt, 0], 512).top_tokens[-1]
    wanted = logits.softmax(-1)
    wanted[1:][wanted.cumsum(0)[:-1] >= top_p] = 0
    wanted /= wanted.sum()
    requests = [greedy(str(seed), prompt, 1, temperature=temperature, top_p=top_p, seed=seed) for seed in range(800)]
    drawn = [a.tokens[0] for a in answer(engine, requests).values()]
    counts = torch.tensor([drawn.count(token) for token in tokens], dtype=torch.float)
    assert counts[wanted == 0].sum() == 0
    assert (counts / 800 - wanted).abs().sum() / 2 < 0.12  # total variation; 0.06 is usual for 800 draws


def test_stop_strings_end_the_text_before_them(engine: HuggingFaceEngine) -> None:
    free = answer(engine, [greedy("a", PROMPTS[4], 40)])["a"]
    stop = free.text[10:14]
    begins = free.text.index(stop)
    never = free.text[20:22] + "never"  # begins like the text: held back, then shown
    both = answer(
        engine,
        [greedy("stop", PROMPTS[4], 40, stop=[stop]), greedy("never", PROMPTS[4], 40, stop=[never])],
    )
    assert both["stop"].text == free.text[:begins]
    assert both["stop"].end.reason == "stop"  # type: ignore[union-attr]
    assert len(both["stop"].tokens) < 40
    assert both["never"].text == free.text
    assert both["never"].end.reason == "length"  # type: ignore[union-attr]


def test_a_stop_token_ends_like_an_end_token(engine: HuggingFaceEngine) -> None:
    free = answer(engine, [greedy("a", PROMPTS[4], 40)])["a"]
    count = free.tokens.index(free.tokens[7]) + 1
    both = answer(engine, [greedy("a", PROMPTS[4], 40, stop_tokens=[free.tokens[7]]), greedy("b", PROMPTS[4], 40)])
    assert both["a"].tokens == free.tokens[:count]
    assert both["a"].text == engine._tokenizer.decode(free.tokens[: count - 1])
    assert both["a"].end.reason == "stop"  # type: ignore[union-attr]
    assert both["b"].tokens == free.tokens  # of that request alone
    wrong = answer(engine, [greedy("a", PROMPTS[4], 4, stop_tokens=[10**6])])["a"]
    assert "a stop token is outside of the vocabulary" in wrong.end.message  # type: ignore[union-attr]


def test_an_end_token_ends_and_is_not_shown(engine: HuggingFaceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = answer(engine, [greedy("a", PROMPTS[4], 40)])["a"]
    end = free.tokens[7]
    count = free.tokens.index(end) + 1
    monkeypatch.setattr(engine, "_ends", frozenset({end}))
    ended = answer(engine, [greedy("a", PROMPTS[4], 40)])["a"]
    assert ended.tokens == free.tokens[:count]
    assert ended.text == engine._tokenizer.decode(free.tokens[: count - 1])
    assert ended.end.reason == "stop"  # type: ignore[union-attr]


def test_the_end_tokens_are_those_of_the_files(tied_checkpoint: Path) -> None:
    engine = load_engine(make_plan(tied_checkpoint))
    assert engine._ends == {engine._tokenizer.eos_token_id}
    assert engine._pad == engine._tokenizer.pad_token_id


def test_cancelled_requests_end_and_the_others_do_not_change(engine: HuggingFaceEngine) -> None:
    requests = [greedy(str(i), PROMPTS[i % 6], 20) for i in range(16)]
    alone = {prompt: answer(engine, [greedy("a", PROMPTS[prompt], 20)])["a"].tokens for prompt in range(6)}
    answers = {request.id: "" for request in requests}
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    for _ in range(5):
        collect(engine, tokens, answers)
    for i in range(0, 16, 3):  # of the running batch of 8 and of those that wait
        engine.cancel(str(i))
    engine.cancel("nobody")
    while not all(answers.values()):
        collect(engine, tokens, answers)
    for i in range(16):
        if i % 3 == 0:
            assert answers[str(i)] == "cancelled"
            assert tokens[str(i)] == alone[i % 6][: 5 if i < 8 else 0]
        else:
            assert answers[str(i)] == "length"
            assert tokens[str(i)] == alone[i % 6]
    assert engine.events() == []


def collect(engine: HuggingFaceEngine, tokens: dict[str, list[int]], answers: dict[str, str]) -> None:
    for event in engine.events():
        if isinstance(event, Finished):
            answers[event.id] = event.reason
        elif not isinstance(event, Failed):
            tokens[event.id] += event.tokens


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("x", [], 4), "the prompt is empty"),
        (Request("x", [1] * 500, 13), "500 tokens of prompt and 13 of answer are more than the 512"),
        (Request("x", [512], 4), "outside of the vocabulary of 512"),
        (Request("x", [1], 0), "max_tokens is 0"),
    ],
)
def test_what_cannot_be_answered_fails_alone(engine: HuggingFaceEngine, request_: Request, message: str) -> None:
    both = answer(engine, [greedy("good", PROMPTS[0], 3), request_])
    assert isinstance(both["x"].end, Failed)
    assert message in both["x"].end.message
    assert len(both["good"].tokens) == 3


def test_score_equals_the_models_own_log_softmax(engine: HuggingFaceEngine, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = [random.Random(3).randrange(256) for _ in range(300)]  # more than one piece of positions
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    score = engine.score(tokens, 5)
    assert score.logprobs == pytest.approx(wanted[torch.arange(299), torch.tensor(tokens[1:])].tolist(), abs=1e-5)
    assert score.top_tokens == wanted.topk(5).indices.tolist()
    torch.testing.assert_close(torch.tensor(score.top_logprobs), wanted.topk(5).values, atol=1e-5, rtol=0)
    sums = torch.tensor(score.top_logprobs).exp().sum(-1) + torch.tensor(score.tail)
    torch.testing.assert_close(sums, torch.ones(299), atol=1e-5, rtol=0)
    everything = engine.score(tokens[:4], 9999)
    assert len(everything.top_tokens[0]) == 512
    assert everything.tail == [0, 0, 0]


def test_score_between_steps_does_not_disturb_the_answer(engine: HuggingFaceEngine) -> None:
    alone = answer(engine, [greedy("a", PROMPTS[2], 12)])["a"].tokens
    engine.submit(greedy("a", PROMPTS[2], 12))
    tokens: list[int] = []
    while len(tokens) < 12:
        engine.score(PROMPTS[5], 1)
        tokens += [token for event in engine.events() for token in getattr(event, "tokens", [])]
    assert tokens == alone


def test_logits_that_are_not_finite_fail_their_request_only(
    engine: HuggingFaceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = engine._model.model.norm
    forward = norm.forward

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        result = forward(hidden)
        if hidden.shape[0] == 2 and hidden.shape[1] == 1:  # the decoding steps of a batch of two
            result[1] = float("nan")
        return result

    monkeypatch.setattr(norm, "forward", poisoned)
    both = answer(engine, [greedy("good", PROMPTS[0], 5), greedy("bad", PROMPTS[1], 5)])
    assert both["bad"].end == Failed("bad", "the logits of token 2 are not finite")
    assert len(both["good"].tokens) == 5


def test_stats_count_prompt_tokens_and_decoding_steps(engine: HuggingFaceEngine) -> None:
    before = engine.stats()
    answer(engine, [greedy("a", PROMPTS[0], 5), greedy("b", PROMPTS[1], 3)])
    after = engine.stats()
    assert after.prefill_tokens - before.prefill_tokens == len(PROMPTS[0]) + len(PROMPTS[1])
    assert after.decode_tokens - before.decode_tokens == 4 + 2  # the first of each comes from the prefill
    assert after.prefill_s > before.prefill_s
    assert after.decode_s > before.decode_s
    assert after.host_peak_bytes > 100 << 20


def test_a_missing_tensor_is_an_error_not_random_numbers(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        load_engine(make_plan(tmp_path))
