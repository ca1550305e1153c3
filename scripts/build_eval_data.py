"""Makes eval/data/tasks/*.jsonl, the items that ship, and eval/data/catalogue.toml.

    python scripts/build_eval_data.py ../shared/data

Each file of items is the beginning of a task's order of choice (compress/evaluation/harness/selection.py), so that a
suite that asks for no more gets from it exactly what it would get from the whole data. Run it after
scripts/build_cloze.py. eval/data/SOURCE.md says whose the items are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from compress.artifact.canonical import sha256_file
from compress.evaluation.harness import rows, selection
from compress.evaluation.harness.definitions import definition, packaged_tasks
from compress.evaluation.suites import SEED

SHIPPED = {"blimp": 2010, "lambada_openai": 300, "hellaswag": 200, "openbookqa": 200, "winogrande": 200, "wsc": 273}
"""Items per task: those whose licence allows it, as many as smoke and pr ask for."""
TEXTS = {
    "wikitext-2": "wikitext-2-raw/wiki.test.raw",
    "tinyshakespeare": "tinyshakespeare/input.txt",
    "tinystories": "tinystories/tinystories_val.txt",
}
WHOLE = ("cloze.jsonl", "prompts.jsonl", "tales_heldout.txt")
OUTPUT = Path(__file__).resolve().parent.parent / "eval" / "data"


def items(task: str, count: int, directory: Path) -> list[str]:
    """The first `count` items of a task's order, one JSON line each."""
    source = definition(task).data
    everything = rows.READERS[source.reader](directory / source.test, None)
    strata = ["" if source.stratum is None else str(row[source.stratum]) for row in everything]
    chosen = selection.order(strata, SEED, task)[:count]
    lines = [{"id": selection.item_id(number), "doc": everything[number]} for number in chosen]
    return [json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines]


def catalogue(directory: Path) -> str:
    """The catalogue's text."""
    sources = [definition(name).data for name in packaged_tasks()]
    paths = {path for source in sources if not source.ships for path in (source.test, source.train) if path}
    lines = [
        "# What evaluation data must be: made by scripts/build_eval_data.py.",
        "",
        "# SHA-256 of the files below a data directory (COMPRESS_DATA).",
        "[files]",
        *(f'"{path}" = "{sha256_file(directory / path)}"' for path in sorted(paths | set(TEXTS.values()))),
        "",
        "# Texts that suites and `--data` name.",
        "[texts]",
        *(f'"{name}" = "{path}"' for name, path in sorted(TEXTS.items())),
        "",
        "# Files that ship beside this one.",
    ]
    for path in sorted([*(f"tasks/{task}.jsonl" for task in SHIPPED), *WHOLE]):
        count = len((OUTPUT / path).read_text(encoding="utf-8").splitlines())
        lines += [f'[shipped."{path}"]', f'sha256 = "{sha256_file(OUTPUT / path)}"', f"items = {count}", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the data directory")
    directory = parser.parse_args().data
    (OUTPUT / "tasks").mkdir(exist_ok=True)
    for task, count in SHIPPED.items():
        text = "".join(f"{line}\n" for line in items(task, count, directory))
        (OUTPUT / "tasks" / f"{task}.jsonl").write_text(text, encoding="utf-8")
    (OUTPUT / "catalogue.toml").write_text(catalogue(directory), encoding="utf-8")


if __name__ == "__main__":
    main()
