"""Prompts from every kind of file, and windows in which only answers count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.calibration.answered import windows
from compress.calibration.prompts import read_prompts
from compress.content import default_model
from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.pipeline.work import load_tokenizer


def test_windows_hold_whole_pairs_and_count_answers_alone() -> None:
    prompts, answers = [[1, 2], [3], [4, 5, 6], [7]], [[11, 12], [13] * 9, [14], []]
    tokens, counted = windows(prompts, answers, 8, 0)
    assert tokens.shape == counted.shape
    assert tokens.shape[1] == 8
    assert sorted(tokens[counted].tolist()) == [11, 12, *[13] * 7, 14], "the long one is cut, the empty one left out"
    for ids, flags in zip(tokens, counted, strict=True):
        assert not flags[0], "a window begins with a prompt"
        assert not ids[int(flags.nonzero().max()) + 1 :].any()
    again, _ = windows(prompts, answers, 8, 0)
    assert torch.equal(again, tokens)
    with pytest.raises(UserError, match="leaves no room"):
        windows([[1] * 8], [[2]], 8, 0)
    with pytest.raises(UserError, match="with nothing"):
        windows([[1]], [[]], 8, 0)


def test_prompts_are_lines_or_rows_and_none_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Checkpoint.open(default_model()))
    lines, rows, empty = tmp_path / "lines.txt", tmp_path / "rows.jsonl", tmp_path / "empty.txt"
    lines.write_text("Once upon a time\n\n  The king said \n")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Once upon a time", "The king said")))
    empty.write_text(" \n\n")
    found = read_prompts(str(lines), tokenizer, None)
    assert found.ids == read_prompts(str(rows), tokenizer, None).ids
    assert [ids[0] for ids in found.ids] == [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(found.ids[1], skip_special_tokens=True) == "The king said"
    assert [len(ids) for ids in read_prompts(str(lines), tokenizer, 3).ids] == [3, 3]
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(str(empty), tokenizer, None)
    with pytest.raises(UserError, match="neither"):
        read_prompts(str(tmp_path / "nowhere"), tokenizer, None)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    with pytest.raises(UserError, match="no chat template"):
        read_prompts(str(chats), tokenizer, None)
    turns, ask = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "<assistant>"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}" + ask + "{% endif %}"
    chats.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}) + "\n"
    )
    (asked,) = read_prompts(str(chats), tokenizer, None).ids
    assert tokenizer.decode(asked) == "<user>Hi<assistant>", "the answer in the file is left out"
