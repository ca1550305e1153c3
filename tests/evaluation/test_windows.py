"""How documents become windows and clusters."""

from __future__ import annotations

import random

import pytest
import torch

from compress.errors import UserError
from compress.evaluation.window_sizes import BLOCK_TOKENS, MIN_DOCUMENTS
from compress.evaluation.windows import Windows, cut
from tests.evaluation.fakes import TableRuntime

TEXT = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10_000))


def ids(windows: Windows) -> list[list[int]]:
    """The tokens of each window, padding left out."""
    return [row[:n].tolist() for row, n in zip(windows.tokens, windows.lengths, strict=True)]


def test_windows_begin_with_the_prefix_and_tile_the_text() -> None:
    windows = cut([TEXT], TableRuntime())
    assert windows.seq_len == 32
    assert set(windows.tokens[:, 0].tolist()) == {299}
    assert [token for row in ids(windows) for token in row[1:]] == list(TEXT.encode())
    assert set(windows.lengths[:-1].tolist()) == {32}
    assert windows.lengths[-1] == 1 + len(TEXT) % 31
    assert windows.scored == windows.text_tokens == len(TEXT) == int(windows.text_bytes.sum())


def test_without_a_prefix_the_first_token_of_a_window_is_not_scored() -> None:
    text = TEXT[: 31 * 32 * 3 + 1]  # the last token stands alone: nothing precedes it, so it cannot be scored
    windows = cut([text], TableRuntime(prefix=None))
    assert [token for row in ids(windows) for token in row] == list(text.encode())[:-1]
    assert windows.scored == len(windows.tokens) * 31 == int(windows.text_bytes.sum())


def test_windows_never_cross_documents() -> None:
    documents = [TEXT[:500], "x" * 3, TEXT[500:5000], "y" * 31, TEXT[5000:]]
    windows = cut(documents, TableRuntime())
    rows = [bytes(row[1:]).decode() for row in ids(windows)]
    for document in documents:
        parts = [document[i : i + 31] for i in range(0, len(document), 31)]
        assert rows[: len(parts)] == parts
        rows = rows[len(parts) :]
    assert rows == []


def test_clusters_are_documents_where_there_are_enough() -> None:
    documents = [TEXT[i * 50 : (i + 1) * 50 + i] for i in range(MIN_DOCUMENTS)]
    windows = cut(documents, TableRuntime())
    assert windows.cluster_kind == "documents"
    assert windows.clusters == MIN_DOCUMENTS
    for index, document in enumerate(documents):
        assert int((windows.lengths - 1)[windows.cluster == index].sum()) == len(document)
        assert int(windows.text_bytes[windows.cluster == index].sum()) == len(document)
    fewer = cut(documents[1:], TableRuntime(), seq_len=17)
    assert fewer.cluster_kind == "blocks"
    assert fewer.clusters == -(-len(fewer.tokens) // (BLOCK_TOKENS // 17))


def test_documents_count_only_where_windows_of_them_are_kept() -> None:
    documents = [TEXT[:310]] * 40
    whole = cut(documents, TableRuntime())
    assert (whole.cluster_kind, whole.clusters) == ("documents", 40)
    some = cut(documents, TableRuntime(), max_tokens=35 * 31)
    assert (some.cluster_kind, some.clusters) == ("documents", 35)
    few = cut(documents, TableRuntime(context=None), max_tokens=18 * 127, seq_len=128)
    assert (few.cluster_kind, few.clusters) == ("blocks", 2)


@pytest.mark.parametrize(("seq_len", "per_block"), [(32, 64), (512, 4), (600, 3), (2048, 1), (4000, 1)])
def test_blocks_hold_about_2048_tokens(seq_len: int, per_block: int) -> None:
    windows = cut([TEXT * 3], TableRuntime(context=None), seq_len=seq_len)
    assert windows.cluster_kind == "blocks"
    assert windows.cluster.tolist() == [i // per_block for i in range(len(windows.tokens))]
    assert per_block == 1 or BLOCK_TOKENS / 2 < per_block * seq_len <= BLOCK_TOKENS


def test_default_length_is_512_or_the_context() -> None:
    assert cut([TEXT], TableRuntime(context=None)).seq_len == 512
    assert cut([TEXT], TableRuntime(context=100_000)).seq_len == 512
    assert cut([TEXT], TableRuntime(context=40)).seq_len == 40
    assert cut([TEXT], TableRuntime(context=40), seq_len=16).seq_len == 16


def test_max_tokens_spreads_over_the_whole_text() -> None:
    runtime = TableRuntime()
    every = cut([TEXT], runtime)
    some = cut([TEXT], runtime, max_tokens=100 * 31 + 30)
    assert some.scored <= 100 * 31 + 30
    assert len(some.tokens) == 100
    at = [int((every.tokens == row).all(1).nonzero()[0]) for row in some.tokens]
    assert at == [i * len(every.tokens) // 100 for i in range(100)]
    assert torch.equal(cut([TEXT], runtime, max_tokens=10**9).tokens, every.tokens)


def test_max_tokens_holds_where_windows_differ_in_length() -> None:
    pick = random.Random(1)
    documents = [TEXT[: pick.randint(1, 200)] for _ in range(200)]
    for limit in (1600, 2000, 7777):
        windows = cut(documents, TableRuntime(), max_tokens=limit)
        assert 0.9 * limit < windows.scored <= limit


def test_bytes_are_those_of_the_text() -> None:
    text = "".join(random.Random(2).choices(["a", "é", "日", "\U0001f600"], k=3000))

    class ByCharacter(TableRuntime):
        def encode(self, text: str) -> list[int]:
            return [ord(character) for character in text]

        def decode(self, token_ids: object) -> str:
            return "".join(map(chr, token_ids))  # type: ignore[call-overload]

    windows = cut([text], ByCharacter(vocab=300, prefix=1))
    expected = [len(text[i : i + 31].encode()) for i in range(0, len(text), 31)]
    assert windows.text_bytes.tolist() == expected


def test_bytes_of_a_document_are_exact_where_decoding_is_not() -> None:
    class Cleaning(TableRuntime):
        def decode(self, token_ids: object) -> str:
            return bytes(token_ids).decode().replace("e", "").strip("abc")  # type: ignore[call-overload]

    documents = [TEXT[i * 100 : (i + 1) * 100] for i in range(60)]
    windows = cut(documents, Cleaning())
    totals = [int(windows.text_bytes[windows.cluster == i].sum()) for i in range(60)]
    assert totals == [100] * 60


def test_hash_tells_tokens_and_shapes_apart() -> None:
    runtime = TableRuntime()
    first = cut([TEXT], runtime)
    assert first.sha256() == cut([TEXT], runtime).sha256()
    others = [
        cut([TEXT.upper()], runtime),
        cut([TEXT], runtime, seq_len=31),
        cut([TEXT], runtime, max_tokens=5000),
        cut([TEXT], TableRuntime(prefix=298)),
        cut([TEXT[: 31 * 64], TEXT[31 * 64 :]], runtime, max_tokens=31 * 200),
        cut([TEXT[:-1] + "\0"], runtime),
        cut([TEXT[:-1]], runtime),
    ]
    assert len({w.sha256() for w in [first, *others]}) == 8


@pytest.mark.parametrize("text", ["", "a", "a" * (64 * 31)])
def test_texts_too_short_for_an_interval_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=rf"has {len(text)} tokens"):
        cut([text], TableRuntime())
    assert cut(["a" * (64 * 31 + 1)], TableRuntime()).clusters == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 33}, "exceeds the context of 32"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"seq_len": -5}, "seq_len is -5"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": -3}, "max_tokens -3"),
        ({"max_tokens": 65 * 31 - 1}, "needs 65"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cut([TEXT], TableRuntime(), **options)
