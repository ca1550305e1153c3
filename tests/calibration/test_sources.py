"""Where calibration windows come from: files of rows, conversations, data sets of the hub, and mixes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.calibration.mix import Part, counts, parse_mix, spell
from compress.calibration.tokens import CalibrationSet, draw
from compress.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz<>|"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}|{% endfor %}"
)
START, END = len(LETTERS), len(LETTERS) + 1


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per letter, a begin and an end token behind them."""
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def take(
    source: object, samples: int = 4, seq_len: int = 9, seed: int = 0, template: str | None = TEMPLATE
) -> CalibrationSet:
    return draw(
        str(source), tokenizer(template), samples=samples, seq_len=seq_len, seed=seed, longest=64, vocabulary=END + 1
    )  # fmt: skip


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(said: str, answer: str = "ok") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]}


def words(window: torch.Tensor) -> str:
    names = {START: "^", END: "$"}
    return "".join(names.get(int(i), LETTERS[i] if int(i) < START else "?") for i in window)


def test_documents_follow_one_another_with_an_end_token_between(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": letter * 5} for letter in "abcdefgh"] + [{"text": "  "}])
    drawn = take(path)
    assert [words(window)[0] for window in drawn.tokens] == ["^"] * 4
    stream = "".join(words(window)[1:] for window in drawn.tokens)
    documents = stream.split("$")
    assert all(document == document[0] * 5 for document in documents[:-1])
    assert len(set(documents[:-1])) == len(documents[:-1]) == 5
    assert (drawn.parts[0].kind, drawn.parts[0].samples) == ("rows", 4)
    assert torch.equal(take(path, samples=3).tokens, drawn.tokens[:3]), "more samples begin with the fewer"
    assert not torch.equal(take(path, seed=1).tokens, drawn.tokens)


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "sharegpt"])
def test_every_form_of_the_same_conversations_gives_the_same_tokens(form: str, tmp_path: Path) -> None:
    rows = [chat(letter * 6) for letter in "abcdef"]
    expected = take(lines(tmp_path / "expected.jsonl", rows))
    path = tmp_path / f"chats.{form}"
    if form == "jsonl":
        lines(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": 1, **row} for row in rows]), path)
    else:
        names = {"user": "human", "assistant": "gpt"}
        path = lines(
            tmp_path / "shared.jsonl",
            [
                {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}
                for row in rows
            ],
        )
    found = take(path)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.parts[0].kind == "chat"


def test_every_window_begins_with_a_conversation_as_the_template_writes_it(tmp_path: Path) -> None:
    path = lines(tmp_path / "chats.jsonl", [chat(letter * 3) for letter in "abcdefghijkl"])
    for window in take(path, samples=3, seq_len=20).tokens:
        text = words(window)
        assert text.startswith("<u>")
        assert text[3] * 3 + "|<a>ok|" == text[3:13]
        assert text[13:16] == "<u>", "the next conversation follows in the same window"


@pytest.mark.parametrize("column", ["text", "content"])
def test_parquet_rows_of_text(column: str, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({column: ["abcdefgh"] * 8, "other": [1] * 8}), tmp_path / "x.parquet")
    assert words(take(tmp_path / "x.parquet").tokens[0]) == "^abcdefgh"


def test_a_mix_takes_windows_by_share_and_scatters_them(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("x" * 400)
    path = lines(tmp_path / "rows.jsonl", [{"text": "a" * 400}])
    drawn = take(f"{tmp_path / 'plain.txt'}:3,{path}:1", samples=16)
    ours = [words(window)[1] for window in drawn.tokens]
    assert (ours.count("x"), ours.count("a")) == (12, 4)
    assert ours != sorted(ours, reverse=True), "any stretch of the windows is mixed"
    assert [(part.name, part.kind, part.samples) for part in drawn.parts] == [
        ("plain", "text", 12),
        ("rows", "rows", 4),
    ]
    assert drawn.name == "plain:0.75,rows:0.25"
    equal = take(f"{tmp_path / 'plain.txt'},{path}", samples=16)
    assert [part.samples for part in equal.parts] == [8, 8]
    assert equal.sha256 != drawn.sha256


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: str, **options: Any) -> list[dict[str, str]]:
        asked.append((names, options))
        return [{"text": "abcdefgh"}] * 20

    monkeypatch.setattr(datasets, "load_dataset", load)
    drawn = take("someone/some-texts/plain@test")
    assert asked == [(("someone/some-texts", "plain"), {"split": "test", "streaming": True})]
    assert (drawn.name, drawn.parts[0].kind) == ("someone/some-texts/plain@test", "rows")
    take("someone/some-texts")
    assert asked[1] == (("someone/some-texts",), {"split": "train", "streaming": True})


def test_a_hub_out_of_reach_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: str, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="could not be fetched: no route to host"):
        take("someone/some-texts")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "  "}\n', "is empty"),
        ("a.jsonl", '{"text": "abc"}\nnot json\n', "line 2: no JSON"),
        ("a.jsonl", '[1, 2]\n', "row 1 is no JSON object"),
        ("a.jsonl", '{"prompt": "abc"}\n', "row 1 has neither a text nor messages, but prompt"),
        ("a.jsonl", '{"text": "abcdefghij"}\n', "holds 1 windows of 9 tokens, 4 are asked for"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "a message without a role"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [1]}]}\n', "a text as its content"),
        ("a.jsonl", '{"text": "abc"}\n' + json.dumps(chat("a")), "mixes documents and conversations, from row 2"),
        ("a.jsonl", json.dumps({"messages": [{"role": "tool", "content": "abc"}]}), "refuses a conversation of tool"),
        ("a.json", '{"text": "abc"}', "no JSON list"),
        ("a.json", "{", "not JSON"),
        ("a.parquet", "PAR1 but not really", "no Parquet file"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_by_number(name: str, content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match) as caught:
        take(tmp_path / name)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_bytes_that_are_no_text_and_columns_that_hold_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 10\)"):
        take(tmp_path / "a.jsonl")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has the columns prompt"):
        take(tmp_path / "a.parquet")


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    path = lines(tmp_path / "chats.jsonl", [chat("a" * 9)] * 9)
    assert take(path).tokens.shape == (4, 9)
    with pytest.raises(UserError, match="the model has no chat template"):
        take(path, template=None)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tales:0.5,", "empty source"),
        ("tales,tales", "names tales twice"),
        ("tales:0.5,other", "to some sources only"),
        ("tales:0,other:1", "share of nothing"),
    ],
)
def test_bad_mixes(text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        take(text)


def test_a_share_that_gives_no_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"missing.txt's share of 4 calibration windows is less than one"):
        take("missing.txt:0.01,tales:0.99")


def test_names_of_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_mix("tales") == (Part("tales", 1.0),)
    assert parse_mix("a.txt:2, b.txt:1") == (Part("a.txt", 2 / 3), Part("b.txt", 1 / 3))
    assert spell(parse_mix("x/a.txt:2,org/name@train:1"), placeless=True) == "a:0.666667,org/name@train:0.333333"
    again = spell(parse_mix("a:1,b:1,c:1"), placeless=False)
    assert spell(parse_mix(again), placeless=False) == again
    monkeypatch.chdir(tmp_path)
    for odd in ("a,b.txt", "half:0.5"):
        (tmp_path / odd).write_text("x")
        assert parse_mix(odd) == (Part(odd, 1.0),), "a file is a file, whatever it is called"


def test_counts_add_up_and_follow_the_shares() -> None:
    for samples in (1, 7, 128):
        for text in ("a", "a,b", "a,b,c", "a:0.9,b:0.1", "a:1,b:2,c:4"):
            parts = parse_mix(text)
            found = counts(parts, samples)
            assert sum(found) == samples
            assert all(abs(n - part.share * samples) < 1 for n, part in zip(found, parts, strict=True))
