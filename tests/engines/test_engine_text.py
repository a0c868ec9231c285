"""Streaming text: whole characters, no special tokens, nothing of a stop string."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny

from orchestrator.backends.text import AnswerText, Detokenizer, StopFilter

TEXT = "Ünïcödé: 5 € für 日本語, 👩‍👩‍👧 and the rest\n\tin 🙂🙂 \ufffd end"


def byte_level() -> Any:
    return tiny.byte_tokenizer()


def byte_fallback() -> Any:
    """A vocabulary as of Llama 2: bytes as <0x..>, a space before the first word that decoding drops."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def decoder(tokenizer: Any) -> Any:
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_make_the_text_and_hold_whole_characters(make: Any) -> None:
    tokenizer = make()
    tokens = tokenizer(TEXT.replace("\ufffd", ""), add_special_tokens=False).input_ids
    tokens[5:5] = [tokenizer.eos_token_id]  # in the middle: not shown
    stream = Detokenizer(decoder(tokenizer))
    pieces = [stream.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.flush()]) == TEXT.replace("\ufffd", "")
    assert len(list(filter(None, pieces))) > 40  # not all at the end


def test_a_replacement_character_of_the_text_itself_is_shown() -> None:
    tokenizer = byte_level()
    stream = Detokenizer(decoder(tokenizer))
    assert "".join(map(stream.push, tokenizer(TEXT).input_ids)) == TEXT


def test_any_bytes_at_all_end_as_the_tokenizer_decodes_them() -> None:
    tokenizer = byte_level()
    for seed in range(100):
        chance = random.Random(seed)
        tokens = [chance.randrange(266) for _ in range(60)]
        stream = Detokenizer(decoder(tokenizer))
        assert "".join(map(stream.push, tokens)) + stream.flush() == decoder(tokenizer)(tokens)


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def test_the_text_ends_before_the_first_stop_string_however_it_is_cut() -> None:
    for seed in range(500):
        chance = random.Random(seed)
        text = "".join(chance.choice("ab\n") for _ in range(30))
        stops = ["".join(chance.choice("ab\n") for _ in range(chance.randrange(1, 6))) for _ in range(2)]
        answer, shown, start = StopFilter(stops), "", 0
        while start < len(text):
            size = chance.randrange(1, 4)
            shown += answer.push(text[start : start + size])
            # Nothing is shown that would have to be taken back.
            assert cut(text, stops).startswith(shown)
            start += size
        assert shown + answer.flush() == cut(text, stops)
        assert answer.hit == any(stop in text for stop in stops)


def test_a_stop_string_of_split_characters() -> None:
    tokenizer = byte_level()
    tokens = tokenizer("a € b 🙂 c").input_ids
    answer = AnswerText(decoder(tokenizer), ["🙂", ""])
    shown = ""
    for token in tokens:
        shown += answer.push(token)
        if answer.stopped:
            break
    assert shown == "a € b "
    assert answer.stopped
