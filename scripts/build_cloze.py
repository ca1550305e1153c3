"""Makes eval/data/cloze.jsonl and eval/data/prompts.jsonl from held-out books.

    python scripts/build_cloze.py ../shared/data/tales/tales_test.txt --without ../shared/data/tales/tales_train.txt.xz

The text has one paragraph per line and an empty line between books. A passage is a run of whole sentences of at least
60 words; its last word is asked for. As in LAMBADA (Paperno et al. 2016) the word must occur in the passage before its
last sentence, so that the passage tells it, and its last sentence has at least six words, so that it does not begin
there. Passages do not overlap, and none has a line in common with a text that models were trained on: some books
exist in several editions. A prompt is the beginning of a long sentence, from a paragraph that no passage uses.
The same text gives the same bytes; which passages are kept is decided by their hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

ITEMS = 560
PROMPTS = 32
PASSAGE_WORDS = range(60, 121)
LAST_SENTENCE_WORDS = range(6, 31)
PROMPT_WORDS = 8
SHORTEST = 4  # letters of a word that is asked for
PIECE = 60  # characters that no passage shares with the training text
OUTPUT = Path(__file__).resolve().parent.parent / "eval" / "data"

_SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?]['\"])) +(?=['\"]?[A-Z])")
_LAST_WORD = re.compile(r"^(.*\S) ([A-Za-z]+)[.!?]['\"]?$", re.DOTALL)


def books(text: str) -> list[list[str]]:
    """The paragraphs of each book."""
    return [book.split("\n") for book in re.split(r"\n\s*\n", text.strip())]


def passages(paragraphs: list[str]) -> Iterator[tuple[str, str]]:
    """(context, last word) of every passage that fits, none of them overlapping."""
    taken: list[str] = []
    for paragraph in paragraphs:
        sentences = _SENTENCE.split(paragraph.strip())
        for number, sentence in enumerate(sentences):
            taken.append(sentence)
            while sum(map(_words, taken[1:])) >= PASSAGE_WORDS.start:
                taken.pop(0)
            found = _item(taken)
            if found is not None:
                yield found
                taken = []
            elif number + 1 == len(sentences):
                taken[-1] += "\n"


def _item(sentences: list[str]) -> tuple[str, str] | None:
    passage = re.sub(r"\n ", "\n", " ".join(sentences))
    match = _LAST_WORD.match(passage)
    if match is None or _words(passage) not in PASSAGE_WORDS or _words(sentences[-1]) not in LAST_SENTENCE_WORDS:
        return None
    context, word = match.groups()
    before = re.findall(r"[a-z]+", " ".join(sentences[:-1]).lower())
    return (context, word) if len(word) >= SHORTEST and word.lower() in before else None


def _words(text: str) -> int:
    return len(text.split())


def _kept(values: list[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """`count` of the values, chosen by hash, in their order."""
    if len(values) < count:
        raise SystemExit(f"error: {len(values)} found, {count} wanted")
    rank = sorted(range(len(values)), key=lambda i: hashlib.sha256("\n".join(values[i]).encode()).digest())
    return [values[i] for i in sorted(rank[:count])]


def prompts(paragraphs: list[str], used: str) -> Iterator[tuple[str]]:
    """Beginnings of long paragraphs that no passage uses."""
    for paragraph in paragraphs:
        words = paragraph.split()
        start = " ".join(words[:PROMPT_WORDS])
        if len(words) >= 30 and start not in used and re.fullmatch(r"[A-Z][A-Za-z', ]+[a-z]", start):
            yield (start,)


def seen(context: str, trained_on: str) -> bool:
    """Whether a long piece of one of the passage's lines stands in the training text."""
    pieces = [line[start : start + PIECE] for line in context.split("\n") for start in range(0, len(line), PIECE)]
    return any(len(piece) == PIECE and piece in trained_on for piece in pieces)


def build(text: str, trained_on: str) -> tuple[list[str], list[str]]:
    """The lines of both files."""
    found, beginnings = [], []
    for number, paragraphs in enumerate(books(text)):
        fresh = (entry for entry in passages(paragraphs) if not seen(entry[0], trained_on))
        found += [(context, word, f"book {number + 1}") for context, word in fresh]
    kept = _kept(found, ITEMS)
    used = "\n".join(context for context, _, _ in kept)
    for paragraphs in books(text):
        beginnings += list(prompts(paragraphs, used))
    items = [json.dumps({"context": c, "word": w, "book": b}, ensure_ascii=False) for c, w, b in kept]
    return items, [json.dumps({"prompt": prompt}) for (prompt,) in _kept(beginnings, PROMPTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="tales_test.txt")
    parser.add_argument("--without", type=Path, required=True, help="the training text, plain or .xz")
    arguments = parser.parse_args()
    with (lzma.open if arguments.without.suffix == ".xz" else open)(arguments.without, "rt", encoding="utf-8") as file:
        items, beginnings = build(arguments.text.read_text(encoding="utf-8"), file.read())
    for name, lines in (("cloze.jsonl", items), ("prompts.jsonl", beginnings)):
        (OUTPUT / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
