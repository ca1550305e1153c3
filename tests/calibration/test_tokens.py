"""Calibration windows: where they come from, what they begin with, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.calibration.tokens import CalibrationSet, DrawnPart, draw, find
from compress.errors import IntegrityError, UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per letter."""
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **({"bos_token": "<s>"} if bos else {}))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """520 letters: twenty alphabets."""
    (tmp_path / "letters.txt").write_text(LETTERS * 20)
    return tmp_path / "letters.txt"


@pytest.fixture
def take(text: Path) -> Callable[..., CalibrationSet]:
    """take(samples, seq_len, seed): windows of the letters."""

    def take(samples: int = 6, seq_len: int = 11, seed: int = 0, bos: bool = True) -> CalibrationSet:
        return draw(str(text), tokenizer(bos), samples=samples, seq_len=seq_len, seed=seed, longest=64, vocabulary=27)

    return take


def test_windows_are_pieces_of_the_text_behind_the_begin_token(take: Callable[..., CalibrationSet]) -> None:
    drawn = take()
    assert drawn.tokens.shape == (6, 11)
    assert drawn.tokens.dtype == torch.int64
    assert drawn.tokens.is_contiguous()
    assert (drawn.tokens[:, 0] == tokenizer().bos_token_id).all()
    starts = []
    for window in drawn.tokens[:, 1:]:
        first = int(window[0])
        assert window.tolist() == [(first + i) % 26 for i in range(10)]
        starts.append(first)
    # Consecutive pieces of ten letters begin 10, 20, 4 (30 - 26) ... further on, so their beginnings are even.
    assert all(start % 2 == 0 for start in starts)


def test_no_window_is_drawn_twice(take: Callable[..., CalibrationSet]) -> None:
    everything = take(samples=52)
    counts: dict[tuple[int, ...], int] = {}
    for window in everything.tokens[:, 1:].tolist():
        counts[tuple(window)] = counts.get(tuple(window), 0) + 1
    # Fifty-two pieces cover the text once; its thirteen different pieces occur four times each.
    assert sorted(counts.values()) == [4] * 13


def test_without_a_begin_token_windows_are_all_text(take: Callable[..., CalibrationSet]) -> None:
    tokens = take(seq_len=13, bos=False).tokens
    assert tokens.shape == (6, 13)
    assert int(tokens.max()) < 26
    assert {int(window[0]) for window in tokens} <= {0, 13}


def test_the_seed_decides_and_nothing_else(take: Callable[..., CalibrationSet]) -> None:
    first = take(seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    again = take(seed=3)
    torch.random.set_rng_state(state)
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256
    other = take(seed=4)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.sha256 != other.sha256
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


def test_more_samples_begin_with_the_fewer(take: Callable[..., CalibrationSet]) -> None:
    assert torch.equal(take(samples=9).tokens[:4], take(samples=4).tokens)


def test_the_fingerprint_is_that_of_the_tokens(take: Callable[..., CalibrationSet], text: Path) -> None:
    drawn = take()
    assert drawn.sha256 == hashlib.sha256(drawn.tokens.numpy().tobytes()).hexdigest()
    assert drawn.parts == (DrawnPart("letters", "text", hashlib.sha256(text.read_bytes()).hexdigest(), 6),)
    assert drawn.name == "letters"
    # Frozen: other values mean that every artifact made before is no longer reproducible.
    assert drawn.sha256 == "f90a386d5d91d476c43d162577a601906384475b12e821e7df6e64221c0de756"


def test_the_packaged_text_has_a_name() -> None:
    assert find("tales").name == "tales.txt"
    assert find("tales").is_file()


@pytest.mark.parametrize(
    ("content", "match", "hint"),
    [
        (None, "neither a packaged name nor a file", "tales"),
        (b"", "is empty", "words"),
        (b"\n \t\n", "is empty", "words"),
        (b"abc", "holds 0 windows of 11 tokens, 6 are asked for", "a shorter --seq-len, or a longer text"),
        (b"abcdefghij" * 5, "holds 5 windows of 11 tokens, 6 are asked for", "--samples 5"),
        (b"abc\xff", r"not UTF-8 \(byte 3\)", "UTF-8"),
    ],
)
def test_bad_texts(content: bytes | None, match: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        draw(str(path), tokenizer(), samples=6, seq_len=11, seed=0, longest=64, vocabulary=27)
    assert hint in caught.value.hint


def test_windows_longer_than_the_context_are_refused(take: Callable[..., CalibrationSet]) -> None:
    assert take(samples=1, seq_len=64).tokens.shape == (1, 64)
    with pytest.raises(UserError, match="65 tokens exceed the model's context of 64") as caught:
        take(samples=1, seq_len=65)
    assert "--seq-len 64" in caught.value.hint


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a packaged name nor a file"):
        draw(str(tmp_path), tokenizer(), samples=1, seq_len=4, seed=0, longest=64, vocabulary=27)


def test_tokens_of_another_tool_are_taken_as_they_are(tmp_path: Path) -> None:
    given = torch.arange(24).reshape(4, 6)
    path = tmp_path / "given.safetensors"
    save_file({"tokens": given.to(torch.int32)}, path)
    drawn = draw(str(path), tokenizer(), samples=3, seq_len=5, seed=7, longest=64, vocabulary=27)
    assert torch.equal(drawn.tokens, given[:3, :5])
    assert drawn.tokens.dtype == torch.int64
    for options in ({"samples": 5, "seq_len": 6}, {"samples": 4, "seq_len": 7}):
        with pytest.raises(UserError, match="are asked for"):
            draw(str(path), tokenizer(), **options, seed=0, longest=64, vocabulary=27)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="cannot read"):
        draw(str(path), tokenizer(), samples=3, seq_len=5, seed=0, longest=64, vocabulary=27)


@pytest.mark.parametrize("bad", [torch.tensor([[0, 27]]), torch.tensor([[-1, 2]]), torch.rand(1, 2), torch.arange(4)])
def test_token_ids_that_the_model_does_not_know_are_refused(bad: torch.Tensor, tmp_path: Path) -> None:
    save_file({"tokens": bad}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError):
        draw(str(tmp_path / "bad.safetensors"), tokenizer(), samples=1, seq_len=2, seed=0, longest=64, vocabulary=27)


@pytest.mark.parametrize("stored", [True, False])
def test_ids_beyond_the_embedding_are_refused_wherever_they_come_from(stored: bool, text: Path, tmp_path: Path) -> None:
    """A tokenizer that grew, or belongs to another model: the embedding has rows for 20 of its 27 ids."""
    source = text
    if stored:
        source = tmp_path / "given.safetensors"
        save_file({"tokens": torch.arange(26).reshape(1, 26)}, source)
    options = {"samples": 1, "seq_len": 26, "seed": 0, "longest": 64}
    assert draw(str(source), tokenizer(False), **options, vocabulary=26).tokens.max() == 25
    with pytest.raises(UserError, match="has the token id 25, and the model knows 0 to 19"):
        draw(str(source), tokenizer(False), **options, vocabulary=20)
