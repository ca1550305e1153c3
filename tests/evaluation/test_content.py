"""The shipped texts are what their documents say, come from their sources, and do not overlap."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from compress import content
from compress.evaluation.text import DEFAULT, packaged, read_text

CALIBRATION = Path(content.calibration_dir()) / "tales.txt"
HELD_OUT = Path(content.eval_dir()) / "data" / "tales_heldout.txt"


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_manifest_of_the_calibration_text() -> None:
    entry = json.loads((CALIBRATION.parent / "MANIFEST.json").read_text())["corpora"]["tales"]
    data = CALIBRATION.read_bytes()
    assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    assert (entry["bytes"], entry["characters"]) == (len(data), len(data.decode()))
    assert entry["rows"] == len(lines(CALIBRATION)) == sum(book["rows"] for book in entry["books"])
    books = data.decode().strip().split("\n\n")
    assert [book.count("\n") + 1 for book in books] == [book["rows"] for book in entry["books"]]
    assert "public domain" in entry["license"]


def test_source_note_of_the_held_out_text() -> None:
    note = (HELD_OUT.parent / "SOURCE.md").read_text()
    data = HELD_OUT.read_bytes()
    assert hashlib.sha256(data).hexdigest() in note
    assert f"{len(data):,} / {len(data.decode()):,}" in note
    assert f"| rows (paragraphs) | {len(lines(HELD_OUT)):,} |" in note
    rows = [int(n) for n in re.findall(r"^\| [A-Z]\. .*\| (\d+) \|$", note, re.M)]
    assert rows == [book.count("\n") + 1 for book in data.decode().strip().split("\n\n")]


def test_no_line_is_in_both_texts() -> None:
    assert not set(lines(CALIBRATION)) & set(lines(HELD_OUT))


@pytest.mark.parametrize(("text", "source"), [(CALIBRATION, "tales_calib.txt"), (HELD_OUT, "tales_test.txt")])
def test_every_line_is_a_line_of_its_split(text: Path, source: str, shared: Path) -> None:
    path = shared / "data" / "tales" / source
    note = text.parent / ("SOURCE.md" if text == HELD_OUT else "MANIFEST.json")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in note.read_text()
    assert set(lines(text)) <= set(lines(path))


def test_no_front_matter_is_left() -> None:
    marks = re.compile(r"Gutenberg|etext|Fulcrum|Copyright|Frontispiece|PAGE \d|\bPage \d+, ", re.I)
    for text in (CALIBRATION, HELD_OUT):
        assert not [line[:80] for line in lines(text) if marks.search(line)]


def test_the_held_out_text_is_long_enough_for_64k_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(content.default_model(), local_files_only=True)
    ids = tokenizer(HELD_OUT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    assert len(ids) // 511 * 511 >= 65_536


def test_the_default_text_is_packaged() -> None:
    assert DEFAULT in packaged()
    text = read_text(DEFAULT)
    assert text.name == DEFAULT
    assert text.sha256 == hashlib.sha256(HELD_OUT.read_bytes()).hexdigest()
