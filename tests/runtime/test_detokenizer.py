"""The text of answers: the same however their tokens come, and cut at the first stop string, wherever it begins."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from compress.models.checkpoint import Checkpoint
from compress.runtime.answer import Answer
from compress.runtime.detokenizer import BROKEN, Detokenizer
from compress.runtime.protocol import SamplingParams
from compress.runtime.transformers_loader import load_tokenizer

WORDS = ("▁there", "▁was", "▁a", ",", "her", "the", "end")


class SentencePiece:
    """Words with their leading space, and every byte, as Llama's tokenizer decodes them."""

    end_ids: frozenset[int] = frozenset()
    context_length: int | None = None

    def __init__(self) -> None:
        tokens = ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS)
        self.vocabulary = {token: number for number, token in enumerate(tokens)}
        self._tokenizer = Tokenizer(BPE(vocab=self.vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
        self._tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self.decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return str(self._tokenizer.decode(list(token_ids)))

    def words(self, *words: str) -> list[int]:
        return [self.vocabulary[word] for word in words]

    def bytes(self, text: str | bytes) -> list[int]:
        return [1 + byte for byte in (text.encode() if isinstance(text, str) else text)]


READER = SentencePiece()
PROMPT = READER.words("▁a", ",")


def grown(tokens: Sequence[int], *stop: str, reader: SentencePiece = READER) -> tuple[Answer, list[str]]:
    """An answer with these tokens as far as it takes them, and what a stream of it gives."""
    answer = Answer(reader, PROMPT, SamplingParams(max_tokens=len(tokens), stop=stop), 0)
    pieces, shown = [], 0
    for token in tokens:
        answer.take(token)
        pieces.append(answer.settled()[shown:])
        shown += len(pieces[-1])
        if answer.reason is not None:
            break
    assert "".join(pieces) == answer.text() == answer.generation().text
    return answer, pieces


def test_a_stop_may_begin_with_the_space_that_begins_the_answer() -> None:
    answer, pieces = grown(READER.words("▁there", "▁was"), " there")
    assert (answer.text(), answer.reason, len(answer.fresh), pieces) == ("", "stop", 1, [""])


def test_a_stop_is_found_in_a_run_of_bytes() -> None:
    tokens = READER.bytes("你好世界。再见")
    answer, pieces = grown(tokens, "。")
    assert (answer.text(), answer.reason, len(answer.fresh)) == ("你好世界", "stop", 15)
    assert [piece for piece in pieces if piece] == list("你好世界")


def test_a_run_of_bytes_that_ends_unfinished_leaves_finished_characters() -> None:
    answer, pieces = grown(READER.bytes("你好世".encode()[:-1]))
    assert answer.text() == "你好" + 2 * BROKEN
    assert pieces[5] == "好"


@pytest.mark.parametrize("stop", [("her", "the"), ("the", "her"), ("her", "t")])
def test_the_earliest_of_several_stops_counts(stop: tuple[str, ...]) -> None:
    answer, _ = grown(READER.words("▁was", "▁there"), *stop)
    assert (answer.text(), answer.reason) == (" was ", "stop")


def test_what_may_become_a_stop_is_held_back() -> None:
    answer, pieces = grown(READER.words("▁was", "the", "end", "her"), "thender!", "endhe")
    assert pieces == [" was", "", "the", ""]
    assert answer.reason == "stop"
    assert grown(READER.words("▁was", "the", "end"), "thender")[1] == [" was", "", "theend"]


def test_each_token_is_decoded_a_fixed_number_of_times() -> None:
    def work(length: int) -> int:
        reader = SentencePiece()
        grown(reader.words(*["▁was", "her"] * length), "nothing", reader=reader)
        return reader.decoded

    assert work(400) < 2.1 * work(200)


def read_in_parts(
    decode: Callable[[Sequence[int]], str], prompt: list[int], tokens: list[int], draw: random.Random
) -> str:
    found, at, seen = Detokenizer(decode, prompt), 0, ""
    while at < len(tokens):
        size = draw.choice((1, 1, 2, 5, 40))
        found.extend(tokens[at : at + size])
        at += size
        assert found.steady.startswith(seen)
        seen = found.steady
    return found.text + found.rest


@pytest.mark.parametrize("seed", range(20))
def test_text_is_the_same_however_tokens_come(seed: int, packaged_model: Path) -> None:
    draw = random.Random(seed)
    bytewise = load_tokenizer(Checkpoint.open(packaged_model))
    for decode, size, faithful in (
        (READER.decode, len(READER.vocabulary), False),  # where bytes are no text, it drops those that are
        (lambda ids: str(bytewise.decode(ids, skip_special_tokens=True)), len(bytewise), True),
    ):
        prompt, tokens = ([draw.randrange(3, size) for _ in range(count)] for count in (12, 60))
        text = read_in_parts(decode, prompt, tokens, draw)
        assert text == read_in_parts(decode, prompt, tokens, draw)
        whole = decode(prompt + tokens)
        if faithful and whole.startswith(before := decode(prompt)):
            assert text == whole[len(before) :]
