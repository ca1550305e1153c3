"""How a text becomes windows and blocks."""

from __future__ import annotations

import random

import pytest
import torch

from compress.errors import UserError
from compress.evaluation.windows import BLOCK_TOKENS, cut
from tests.evaluation.fakes import TableRuntime

TEXT = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10_000))


def test_windows_begin_with_the_prefix_and_tile_the_text() -> None:
    windows = cut(TEXT, TableRuntime())
    assert windows.seq_len == 32
    assert set(windows.tokens[:, 0].tolist()) == {299}
    joined = windows.tokens[:, 1:].flatten().tolist()
    assert joined == list(TEXT.encode())[: len(joined)]
    assert len(TEXT) - len(joined) < 31
    assert windows.scored == len(joined)
    assert windows.text_tokens == len(TEXT)


def test_without_a_prefix_the_first_token_is_not_scored() -> None:
    windows = cut(TEXT, TableRuntime(prefix=None))
    assert windows.tokens.flatten().tolist() == list(TEXT.encode())[: windows.tokens.numel()]
    assert windows.scored == len(windows.tokens) * 31


def test_default_length_is_512_or_the_context() -> None:
    assert cut(TEXT, TableRuntime(context=None)).seq_len == 512
    assert cut(TEXT, TableRuntime(context=100_000)).seq_len == 512
    assert cut(TEXT, TableRuntime(context=40)).seq_len == 40
    assert cut(TEXT, TableRuntime(context=40), seq_len=16).seq_len == 16


@pytest.mark.parametrize(("seq_len", "per_block"), [(32, 64), (512, 4), (600, 3), (2048, 1), (4000, 1)])
def test_blocks_hold_about_2048_tokens(seq_len: int, per_block: int) -> None:
    windows = cut(TEXT * 3, TableRuntime(context=None), seq_len=seq_len)
    assert windows.per_block == per_block
    assert windows.blocks == -(-len(windows.tokens) // per_block)
    assert per_block == 1 or BLOCK_TOKENS / 2 < per_block * seq_len <= BLOCK_TOKENS


def test_max_tokens_spreads_over_the_whole_text() -> None:
    runtime = TableRuntime()
    every = cut(TEXT, runtime)
    some = cut(TEXT, runtime, max_tokens=100 * 31 + 30)
    assert len(some.tokens) == 100
    at = [int((every.tokens == row).all(1).nonzero()[0]) for row in some.tokens]
    assert at == [i * len(every.tokens) // 100 for i in range(100)]
    assert torch.equal(cut(TEXT, runtime, max_tokens=10**9).tokens, every.tokens)


def test_hash_tells_tokens_and_shapes_apart() -> None:
    runtime = TableRuntime()
    first = cut(TEXT, runtime)
    assert first.sha256() == cut(TEXT, runtime).sha256()
    others = [
        cut(TEXT.upper(), runtime),
        cut(TEXT, runtime, seq_len=31),
        cut(TEXT, runtime, max_tokens=5000),
        cut(TEXT, TableRuntime(prefix=298)),
    ]
    assert len({w.sha256() for w in [first, *others]}) == 5


@pytest.mark.parametrize("text", ["", " \n\n ", "a" * (64 * 31)])
def test_texts_too_short_for_an_interval_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"empty|has 1984 tokens"):
        cut(text, TableRuntime())
    assert cut("a" * (65 * 31), TableRuntime()).blocks == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 33}, "exceeds the context of 32"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"seq_len": -5}, "seq_len is -5"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": 65 * 31 - 1}, "needs 65"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cut(TEXT, TableRuntime(), **options)
