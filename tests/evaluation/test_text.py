"""Which texts can be scored, and what their documents are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.evaluation.text import DEFAULT, read_text, split_documents


def test_the_packaged_text_has_five_books() -> None:
    text = read_text(DEFAULT)
    assert text.name == DEFAULT
    assert len(text.documents) == 5


def test_a_plain_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\n\ntwo\n\nthree")
    text = read_text(tmp_path / "notes.txt")
    assert (text.name, text.documents) == ("notes", ("one\n\ntwo\n\nthree",))


def test_wikitext_is_split_at_its_top_level_headings() -> None:
    whole = " \n = First = \n \n Words . \n = = Part = = \n More . \n = Second = \n \n The = sign . \n = Third = \n"
    documents = split_documents(whole, empty_lines=False)
    assert "".join(documents) == whole
    assert [d.strip().split("\n")[0].strip() for d in documents] == ["= First =", "= Second =", "= Third ="]
    one = " = First = \n \n Words . \n"
    assert split_documents(one, empty_lines=False) == [one]


def test_wikitext_2_test_has_62_articles(shared: Path) -> None:
    path = shared / "data" / "wikitext-2-raw" / "wiki.test.raw"
    text = read_text(path)
    assert len(text.documents) == 62
    assert "".join(text.documents) == path.read_text(encoding="utf-8")


def test_empty_lines_separate_documents_where_the_source_says_so() -> None:
    assert split_documents("a\nb\n\nc\n \t\nd\n", empty_lines=True) == ["a\nb", "c", "d\n"]


def test_a_jsonl_file_has_a_document_per_row(tmp_path: Path) -> None:
    rows = ["one\n\ntwo", "three\u2028four", "", " = Title = \n"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": row, "id": 1}, ensure_ascii=False) for row in rows) + "\n\n")
    text = read_text(path)
    assert text.documents == ("one\n\ntwo", "three\u2028four", " = Title = \n")
    assert text.name == "rows"


@pytest.mark.parametrize("line", ["plain text", "[1]", '{"page": "a"}', '{"text": 5}', "{"])
def test_a_jsonl_line_without_text_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"line 2: no JSON object with a string `text`"):
        read_text(path)


@pytest.mark.parametrize("content", [b"", b" \n\n\t\n"])
def test_white_space_is_no_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match="empty"):
        read_text(tmp_path / "empty.txt")
