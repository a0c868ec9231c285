"""Tiny random Llama checkpoints and a byte-level tokenizer, made on the spot: no download, a few hundred KB.

The weights are drawn wide (std 0.12), so that the two likeliest tokens are far apart: greedy answers then do not
depend on the order of float32 sums, and a batch can be compared with single runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

END = "<|end|>"
PAD = "<|pad|>"
# Merges that split characters: "é" is two tokens, "€" and "🙂" several, " the" one.
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r"), ("Ġ", "a"), ("o", "n"), ("ð", "Ł")]


def byte_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 256 bytes, a few merges and two special tokens (a PreTrainedTokenizerFast)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + ["".join(pair) for pair in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.add_special_tokens({"eos_token": END, "pad_token": PAD})
    return fast


def write_checkpoint(
    folder: Path, *, tied: bool = False, end_token: bool = True, poison: bool = False, hidden: int = 128
) -> Path:
    """Writes a 2-layer Llama (safetensors, config, tokenizer) to `folder`.

    end_token=False leaves the config without an end token, so that greedy answers always run to max_tokens;
    poison=True sets one weight to NaN.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden,
        head_dim=64,
        num_attention_heads=hidden // 64,
        num_key_value_heads=1,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        vocab_size=512,
        max_position_embeddings=2048,
        initializer_range=0.12,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id if end_token else None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Ids without a token decode to nothing and would make most answers empty.
        model.get_output_embeddings().weight[len(tokenizer) :] = 0 if not tied else 0.001
        if poison:
            model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
