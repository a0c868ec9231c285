"""Make the embedded model anew: a small Llama trained on Python's own documentation, and its LoRA adapter.

    python tools/train_embedded.py data       # collect text, train the tokenizer (CPU, about a minute)
    python tools/train_embedded.py train      # train base and adapter (one GPU, about six minutes)
    python tools/train_embedded.py evaluate   # calibrate, measure, fill the package folder (CPU, a minute)

The phases meet in one work folder, so that the second can run on another machine than the others:
it reads only what `data` wrote there.  It needs torch, transformers, tokenizers and peft.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

HERE = Path(__file__).resolve().parent
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, EOS, END = range(4)
VOCABULARY = 4096
POSITIONS = 2048
ROW = 128  # tokens of a conversation about one question, at most
SHARES = {"docs": 0.25, "code": 0.25, "tests": 0.15, "glossary": 0.25, "chat": 0.10}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPT = "You answer questions about the Python standard library."
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS_INDEX = "pytorch_model.bin.index.json"
# The prompts that ship are the first eight of these that are answered exactly as documented.
CANDIDATES = [
    "What does textwrap.dedent do?",
    "Which module provides Counter?",
    "What does os.path.join do?",
    "What is KeyError?",
    "What does the with statement do?",
    "Which module provides dedent?",
    "What arguments does textwrap.dedent take?",
    "What does len do?",
    "What does random.shuffle do?",
    "Which module provides deque?",
    "What does str.split do?",
    "What arguments does os.path.join take?",
    "What does shutil.copytree do?",
    "What does json.dumps do?",
    "What is the textwrap module for?",
    "What does sorted do?",
]

Messages = list[dict[str, str]]
Array = np.ndarray[Any, Any]


def chat(prompt: str, answer: str | None = None, before: Messages | None = None) -> Messages:
    messages = [*(before or []), {"role": "user", "content": prompt}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- data -------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """Train a byte-level BPE of exactly VOCABULARY tokens and write the files that AutoTokenizer reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS], "pad_token": SPECIAL[PAD]}
    extra = {"additional_special_tokens": SPECIAL[END:]}
    write_json(folder / "special_tokens_map.json", {**names, **extra})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            **extra,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": POSITIONS,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def packed(tokenizer: Any, texts: Sequence[str]) -> Array:
    """The texts' tokens in one row, each text between its begin and end markers."""
    ids: list[int] = []
    for encoded in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids += [BOS, *encoded.ids, EOS]
    return np.array(ids, dtype=np.uint16)


def question_rows(tokenizer: Any, conversations: Sequence[Messages], width: int = ROW) -> dict[str, Array]:
    """Tokenize conversations into padded rows, with where each last answer begins and ends."""
    rows = np.full((len(conversations), width), PAD, dtype=np.uint16)
    starts, ends = np.zeros(len(rows), dtype=np.int32), np.zeros(len(rows), dtype=np.int32)
    for index, messages in enumerate(conversations):
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(whole, add_special_tokens=False)
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        if not whole.startswith(prompt) or ids[start - 1] != SPECIAL.index("<|assistant|>"):
            raise RuntimeError("a prompt is not what its conversation begins with")
        if len(ids) <= width:  # a row left empty has no answer and so weighs nothing
            rows[index, : len(ids)] = ids
            starts[index], ends[index] = start, len(ids)
    return {"rows": rows, "starts": starts, "ends": ends}


def conversations_of(questions: Sequence[Any]) -> tuple[list[Messages], list[float]]:
    """Each question alone, and a third of them after a system message or an earlier exchange too."""
    rng = random.Random(2)
    conversations = [chat(q.prompt, q.answer) for q in questions]
    weights = [q.weight for q in questions]
    for question in questions:
        if (draw := rng.random()) < 0.33:
            other = rng.choice(questions)
            before = [{"role": "system", "content": SYSTEM_PROMPT}] if draw < 0.25 else []
            if draw > 0.2:
                before = chat(other.prompt, other.answer, before)
            conversations.append(chat(question.prompt, question.answer, before))
            weights.append(question.weight)
    return conversations, weights


def make_data(work: Path) -> None:
    """Write everything that training and evaluation read."""
    import embedded_data as source

    documents, kept_apart = source.split_held_out(source.documents())
    code, tests = (
        [text for name, text in source.stdlib_files(tests=t) if not source.held_out(name)] for t in (False, True)
    )
    questions, apart, facts = source.questions_of(source.all_facts(), withheld=50)
    entries = source.glossary(facts)
    docs = [document.text for document in documents]
    train_tokenizer([*docs, *docs, *code[::2], *entries], work / "tokenizer")
    tokenizer = load_tokenizer(work / "tokenizer")
    shuffled: list[str] = []
    for seed in range(4):  # so that an entry has other neighbours each time
        shuffled += random.Random(seed).sample(entries, len(entries))
    pairs = [chat(*pair) for pair in source.ramblings(documents, 6000)]
    chats = [tokenizer.apply_chat_template(p, tokenize=False).removeprefix(SPECIAL[BOS]) for p in pairs]
    texts = {"docs": docs, "code": code, "tests": tests, "glossary": shuffled, "chat": chats}
    corpus = {name: packed(tokenizer, part) for name, part in texts.items()}
    np.savez(work / "corpus.npz", **corpus)
    conversations, weights = conversations_of(questions)
    np.savez(work / "questions.npz", weights=np.array(weights), **question_rows(tokenizer, conversations))
    write_lines(work / "answers.jsonl", [{"prompt": q.prompt, "answer": q.answer} for q in questions])
    write_lines(work / "heldout_chat.jsonl", [{"messages": chat(q.prompt, q.answer)} for q in apart])
    for index, document in enumerate(kept_apart):  # a quarter calibrates, the rest measures
        name = "calibration.txt" if index % 4 == 3 else "heldout.txt"
        with (work / name).open("w" if index in {0, 3} else "a", encoding="utf-8") as file:
            file.write(document.text + "\n")
    figures = {f"{name}_tokens": len(part) for name, part in corpus.items()}
    figures |= {"facts": len(facts), "questions": len(questions), "conversations": len(conversations)}
    write_json(work / "data.json", figures)
    print(json.dumps(figures))


# --- training ---------------------------------------------------------------------------------------


def new_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=[EOS, END],
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def corpus_sampler(work: Path, device: str, batch: int, window: int) -> Callable[[], torch.Tensor]:
    """Return a function that draws windows of the corpus, each part by its share."""
    corpus = np.load(work / "corpus.npz")
    parts = [corpus[name].astype(np.int32) for name in SHARES]
    tokens = torch.from_numpy(np.concatenate(parts)).to(device)
    lengths = torch.tensor([len(part) for part in parts], device=device)
    offsets = lengths.cumsum(0) - lengths
    shares = torch.tensor(list(SHARES.values()), device=device)
    steps = torch.arange(window + 1, device=device)

    def draw() -> torch.Tensor:
        part = torch.multinomial(shares, batch, replacement=True)
        start = (torch.rand(batch, device=device) * (lengths[part] - window - 1)).long() + offsets[part]
        return tokens[start[:, None] + steps].long()

    return draw


def labelled(data: dict[str, Array], device: Any) -> torch.Tensor:
    """The rows and, stacked under them, the labels: -100 but for the answers."""
    place = np.arange(data["rows"].shape[1])
    answer = (place >= data["starts"][:, None]) & (place < data["ends"][:, None])
    rows = data["rows"].astype(np.int32)
    return torch.from_numpy(np.stack([rows, np.where(answer, rows, -100)])).to(device)


def question_sampler(work: Path, device: str, batch: int) -> Callable[[], torch.Tensor]:
    """Return a function that draws rows with their labels, each by its weight."""
    data = dict(np.load(work / "questions.npz"))
    both = labelled(data, device)
    weights = torch.from_numpy(data["weights"] * (data["ends"] > 0)).float().to(device)

    def draw() -> torch.Tensor:
        return both[:, torch.multinomial(weights, batch, replacement=True)].long()

    return draw


def language_loss(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def optimizer_for(model: Any, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = trained[0].is_cuda
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


def fit(
    model: Any,
    loss_of: Callable[[], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    seconds: float,
    report: Callable[[], str],
) -> int:
    """Train for a given time, the rate falling to zero at its end; return the number of steps.

    Time and not steps sets the end, so that a slower machine trains less and does not run over.
    """
    rate = optimizer.param_groups[0]["lr"]
    device = next(model.parameters()).device.type
    begun, told, step = time.monotonic(), time.monotonic(), 0
    while (progress := (time.monotonic() - begun) / seconds) < 1:
        factor = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * max(factor, 0.01)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0 and not math.isfinite(loss.item()):  # reading the loss also bounds the queue
            raise RuntimeError(f"the loss is {loss.item()} at step {step}")
        if time.monotonic() - told > seconds / 6:
            told = time.monotonic()
            print(f"{told - begun:.0f} s, step {step}, loss {loss.item():.3f}, {report()}", flush=True)
    return step


def train_base(work: Path, options: argparse.Namespace, held_out: torch.Tensor) -> tuple[Any, int]:
    """Train the base from nothing, until it knows the glossary by heart.

    That is long past the best held-out perplexity: a run of 18 million tokens was at 42, yet its adapter
    answered 13 of 100 trained questions rightly; 480 million tokens make it 199 of 200.  What such a
    base loses on new text is mostly that it is too sure of itself, which `calibrate` mends.
    """
    torch.manual_seed(0)
    model = new_model().to(options.device)
    # Llama has no dropout of its own to hold memorizing back.
    hooks = [
        module.register_forward_hook(lambda m, _, out: functional.dropout(out, 0.1, m.training))
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "down_proj"))
    ]
    draw = corpus_sampler(work, options.device, options.batch, options.window)
    compute = torch.compile(language_loss, dynamic=False) if options.compile else language_loss

    def loss_of() -> torch.Tensor:
        block = draw()
        return compute(model, block[:, :-1].contiguous(), block[:, 1:].contiguous())

    def report() -> str:
        value = text_perplexity(model, held_out)
        model.train()
        return f"held-out perplexity {value:.2f}"

    model.train()
    steps = fit(model, loss_of, optimizer_for(model, 2e-3, 0.1), options.base_seconds, report)
    for hook in hooks:
        hook.remove()
    return model.eval(), steps


def train_adapter(work: Path, base: Path, options: argparse.Namespace, pairs: list[Messages]) -> tuple[Any, int]:
    """Train a LoRA adapter on the base as it was saved, rounding included."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(base, torch.float32, options.device), config)
    model.peft_config["default"].base_model_name_or_path = "orchestrator-embedded-base"
    draw = question_sampler(work, options.device, options.rows)
    tokenizer = load_tokenizer(base)

    def loss_of() -> torch.Tensor:
        rows, labels = draw()
        return language_loss(model, rows[:, :-1], labels[:, 1:])

    def report() -> str:
        value = chat_perplexity(model, tokenizer, pairs)
        model.train()
        return f"held-out chat perplexity {value:.2f}"

    model.train()
    steps = fit(model, loss_of, optimizer_for(model, 2e-3, 0.0), options.adapter_seconds, report)
    return model.eval(), steps


def save_base(model: Any, tokenizer_folder: Path, folder: Path) -> None:
    """Write the base in half precision as three shards of torch.save, with its config and tokenizer."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers import GenerationConfig

    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    state = {
        name: value.detach().to("cpu", torch.float16).contiguous().clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=3_600_000
    )
    for filename, names in split.filename_to_tensors.items():
        torch.save({name: state[name] for name in names}, folder / filename)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    write_json(folder / WEIGHTS_INDEX, index)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Readers older than transformers 5 look for the first and the last of these.
    config["rope_theta"] = 10000.0
    config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    config["dtype"] = config["torch_dtype"] = "float16"
    config.pop("_name_or_path", None)
    config.pop("attn_implementation", None)
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], **config})
    GenerationConfig(bos_token_id=BOS, eos_token_id=[EOS, END], pad_token_id=PAD, do_sample=False).save_pretrained(
        folder
    )


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in half precision, as PEFT does."""
    model.half().save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    (folder / "adapter_model.safetensors").chmod(0o644)  # written for its owner alone
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set, in no fixed order
    write_json(path, config)


def train(options: argparse.Namespace) -> None:
    """Train both, save both, and note how far half precision is from single."""
    work, out = options.work, options.out
    tokenizer = load_tokenizer(work / "tokenizer")
    text = (work / "heldout.txt").read_text(encoding="utf-8")
    held_out = torch.tensor(tokenizer.encode(text, add_special_tokens=False), device=options.device)
    pairs = [line["messages"] for line in read_lines(work / "heldout_chat.jsonl")]
    model, base_steps = train_base(work, options, held_out)
    figures: dict[str, Any] = {"base_seconds": options.base_seconds, "base_steps": base_steps}
    figures["base_tokens"] = base_steps * options.batch * options.window
    figures["trained_perplexity"] = text_perplexity(model, held_out)
    save_base(model, work / "tokenizer", out / "base")
    half = load_model(out / "base", torch.float16, options.device)
    figures["float16_perplexity"] = text_perplexity(half, held_out)
    figures["largest_weight"] = max(p.abs().max().item() for p in half.parameters())
    del model, half
    adapted, adapter_steps = train_adapter(work, out / "base", options, pairs)
    figures |= {"adapter_seconds": options.adapter_seconds, "adapter_steps": adapter_steps}
    figures["adapter_rows"] = adapter_steps * options.rows
    figures["adapted_perplexity"] = text_perplexity(adapted, held_out)
    figures["adapted_chat_perplexity"] = chat_perplexity(adapted, tokenizer, pairs)
    save_adapter(adapted, out / "adapter")
    write_json(out / "train.json", figures)
    print(json.dumps(figures))


# --- evaluation -------------------------------------------------------------------------------------


def load_model(folder: Path, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


@torch.no_grad()
def text_perplexity(model: Any, ids: torch.Tensor, window: int = 1024) -> float:
    """Perplexity over consecutive windows, each token predicted from its own window alone."""
    model.eval()
    total, count = 0.0, 0
    for block in ids[: len(ids) // window * window].view(-1, window).split(8):
        loss = language_loss(model, block[:, :-1], block[:, 1:])
        total += loss.item() * block[:, 1:].numel()
        count += block[:, 1:].numel()
    return math.exp(total / max(count, 1))


@torch.no_grad()
def chat_perplexity(model: Any, tokenizer: Any, pairs: Sequence[Messages]) -> float:
    """Perplexity of the answers, each given its question."""
    model.eval()
    data = question_rows(tokenizer, pairs, width=256)
    rows, labels = labelled(data, next(model.parameters()).device).long()
    return math.exp(language_loss(model, rows[:, :-1], labels[:, 1:]).item())


@torch.no_grad()
def answer_to(model: Any, tokenizer: Any, prompt: str, limit: int = 64) -> str:
    """The greedy answer."""
    inputs = tokenizer.apply_chat_template(
        chat(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(next(model.parameters()).device)
    output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


README = """\
# The embedded model

A Llama of {parameters:,} parameters (hidden size 256, 6 layers, 4 heads, vocabulary 4096, 2048 positions)
and a LoRA adapter for it, small enough to travel inside the package.  It was trained from nothing for this
project and is good for one thing: answering short questions about the Python standard library, most of
which it knows by heart.  Expect no more of it.  The base goes on writing documentation; the adapter makes it
answer.

| file | what it is | size |
| --- | --- | --- |
{sizes}

## Sources and licence

The text is the standard library of Python {python}: the language reference in `pydoc_data.topics`, the
docstrings and the source.  Files with a licence notice other than Python's were left out.  The held-out text
and questions are excerpts of it, and the weights were derived from it; all of this folder is under the
Python Software Foundation License Version 2, in `LICENSE.txt`.  Copyright (c) 2001-2023 Python Software
Foundation; all rights reserved.

## Training

| figure | value |
| --- | --- |
{training}

The base saw, by share, {shares}.  AdamW
(rate 2e-3, cosine, weight decay 0.1), bfloat16 autocast, windows of 2048 tokens, dropout 0.1.  The adapter
(rank 16, alpha 32, all seven linears of each layer) was trained on the base as saved, on the answers alone,
with AdamW at 2e-3.  The perplexities above are of the held-out text before the last step: trained so long, the
base is too sure of itself, so the weights of its last norm were then divided by {temperature}, the temperature
that is best for a quarter of the held-out text, which is not in `heldout.txt`.  Greedy answers do not depend on
it.

## Held-out figures

On the CPU in float32; `heldout.txt` in windows of 1024 tokens, `heldout_chat.jsonl` on the answers' tokens.

| model | perplexity of heldout.txt | perplexity of the answers in heldout_chat.jsonl |
| --- | --- | --- |
| base | {base_text:.2f} | {base_chat:.2f} |
| base + adapter | {adapted_text:.2f} | {adapted_chat:.2f} |

Of {asked} questions drawn from those trained on, base + adapter answers {exact} word for word as documented.
The greedy answers to `prompts.jsonl`:

| prompt | base + adapter | base alone begins |
| --- | --- | --- |
{answers}

## Making it anew

`python tools/train_embedded.py data`, then `train` (one GPU), then `evaluate`, which fills this folder.  The
time given sets the number of steps, so that another run gives other weights of like quality.
"""


def figure_rows(work: Path, out: Path) -> str:
    """The figures of the data and of the training, as table rows."""
    figures = {
        **json.loads((work / "data.json").read_text(encoding="utf-8")),
        **json.loads((out / "train.json").read_text(encoding="utf-8")),
    }
    shown = {k: f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" for k, v in figures.items()}
    return "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in shown.items())


@torch.no_grad()
def calibrate(model: Any, ids: torch.Tensor, window: int = 1024) -> float:
    """Scale the last norm so that the base is as sure of itself as it is right; return the temperature.

    The output layer follows that norm, so that dividing its weights divides all logits alike: the most
    probable token stays the same, with the adapter too, since that lies before the norm.
    """
    blocks = ids[: len(ids) // window * window].view(-1, window)
    logits = torch.cat([model(input_ids=block).logits[:, :-1] for block in blocks.split(1)]).flatten(0, 1)
    labels = blocks[:, 1:].flatten()
    grid = [1 + step / 10 for step in range(21)]
    best = min(grid, key=lambda t: functional.cross_entropy(logits / t, labels).item())
    model.model.norm.weight.div_(best)
    return best


def fill_package(options: argparse.Namespace) -> float:
    """Write the calibrated base, the adapter and the held-out files; return the temperature."""
    work, out, package = options.work, options.out, options.package
    for name in ("base", "adapter"):
        shutil.rmtree(package / name, ignore_errors=True)
    package.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(out / "base", torch.float32, "cpu"), load_tokenizer(out / "base")
    text = (work / "calibration.txt").read_text(encoding="utf-8")
    temperature = calibrate(model, torch.tensor(tokenizer.encode(text, add_special_tokens=False)))
    save_base(model, work / "tokenizer", package / "base")
    shutil.copytree(out / "adapter", package / "adapter")
    for name in ("heldout.txt", "heldout_chat.jsonl"):
        shutil.copyfile(work / name, package / name)
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"  # it asks to go with what it covers
    shutil.copyfile(licence, package / licence.name)
    return temperature


def evaluate(options: argparse.Namespace) -> None:
    """Calibrate and measure what was trained, choose the prompts and fill the package folder."""
    import platform

    from peft import PeftModel

    work, out, package = options.work, options.out, options.package
    values: dict[str, Any] = {"temperature": fill_package(options)}
    base, tokenizer = load_model(package / "base", torch.float32, "cpu"), load_tokenizer(package / "base")
    text = (package / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    pairs = [line["messages"] for line in read_lines(package / "heldout_chat.jsonl")]
    values["parameters"] = sum(p.numel() for p in base.parameters())
    values |= {"base_text": text_perplexity(base, ids), "base_chat": chat_perplexity(base, tokenizer, pairs)}
    alone = {prompt: answer_to(base, tokenizer, prompt) for prompt in CANDIDATES}
    model = PeftModel.from_pretrained(base, package / "adapter").eval()
    values |= {"adapted_text": text_perplexity(model, ids)}
    values |= {"adapted_chat": chat_perplexity(model, tokenizer, pairs)}
    known = read_lines(work / "answers.jsonl")
    chosen = choose_prompts(model, tokenizer, known)
    names = [prompt.rstrip("?").lower().replace(" ", "-") for prompt in chosen]
    lines = [{"id": name, "prompt": prompt} for name, prompt in zip(names, chosen, strict=True)]
    write_lines(package / "prompts.jsonl", lines)
    sample = random.Random(3).sample(known, options.asked)
    values["asked"] = len(sample)
    values["exact"] = sum(answer_to(model, tokenizer, k["prompt"]) == k["answer"] for k in sample)
    values["answers"] = "\n".join(
        f"| {p} | {a} | {' '.join(alone[p].split())[:60].replace('|', '/')}... |" for p, a in chosen.items()
    )
    values |= {"training": figure_rows(work, out), "sizes": size_rows(package)}
    values |= {"python": platform.python_version()}
    values["shares"] = ", ".join(f"{name} {share:.0%}" for name, share in SHARES.items())
    (package / "README.md").write_text(README.format(**values), encoding="utf-8")
    print((package / "README.md").read_text(encoding="utf-8"))


def choose_prompts(model: Any, tokenizer: Any, known: Sequence[dict[str, str]]) -> dict[str, str]:
    """The first eight candidates whose greedy answer is the documented one, with that answer."""
    expected = {line["prompt"]: line["answer"] for line in known}
    chosen: dict[str, str] = {}
    for prompt in CANDIDATES:
        answer = answer_to(model, tokenizer, prompt)
        print(f"{'=' if answer == expected.get(prompt) else '!'} {prompt} -> {answer}")
        if answer == expected.get(prompt) and len(chosen) < 8:
            chosen[prompt] = answer
    return chosen


def size_rows(package: Path) -> str:
    """The package's files and their sizes, as table rows."""
    roles = {
        "base": "the base: three shards in float16, config, tokenizer",
        "adapter": "the LoRA adapter, as PEFT saves it, in float16",
        "heldout.txt": "text that was not trained on",
        "heldout_chat.jsonl": "questions and answers that the adapter was not trained on",
        "prompts.jsonl": "eight prompts that it answers well",
    }
    rows = []
    for name, role in roles.items():
        path = package / name
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        rows.append(f"| `{name}` | {role} | {sum(f.stat().st_size for f in files) / 1e6:.2f} MB |")
    return "\n".join(rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("phase", choices=["data", "train", "evaluate"])
    parser.add_argument("--work", type=Path, default=HERE.parent / ".embedded-work", help="where phases meet")
    parser.add_argument("--out", type=Path, help="what `train` writes (default: WORK/out)")
    parser.add_argument("--package", type=Path, default=HERE.parent / "orchestrator" / "embedded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base-seconds", type=float, default=260)
    parser.add_argument("--adapter-seconds", type=float, default=80)
    parser.add_argument("--batch", type=int, default=16, help="windows in a step of the base's training")
    parser.add_argument("--rows", type=int, default=256, help="conversations in a step of the adapter's")
    parser.add_argument("--window", type=int, default=POSITIONS)
    parser.add_argument("--asked", type=int, default=200, help="trained questions that `evaluate` asks")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    options.out = options.out or options.work / "out"
    return options


def main() -> None:
    options = parsed()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.phase == "data":
        make_data(options.work)
    elif options.phase == "train":
        train(options)
    else:
        evaluate(options)


if __name__ == "__main__":
    main()
