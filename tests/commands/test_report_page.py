"""The page of `compress report`: every number on it is read back and found in layers.json, eval.json or the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lxml.html
import pytest
from safetensors import safe_open

from compress.artifact.reader import Artifact
from tests.pipeline.harness import decoded

pytestmark = pytest.mark.usefixtures("one_thread")
Rows = list[dict[str, str]]


def same(shown: str, number: float | None) -> bool:
    """Whether a cell shows a number to its four digits."""
    if number is None:
        return shown == "-"
    return float(shown.rstrip("%")) == float(f"{number:.4g}")


def tables(page: Path) -> dict[str, Rows]:
    """The rows of every section's last table, by heading."""
    found = {}
    for part in lxml.html.fromstring(page.read_text(encoding="utf-8")).xpath("//section | //details"):
        heading = part.xpath("./h2 | ./summary")[0].text_content()
        for table in part.xpath(".//table[thead]"):
            names = [cell.text_content() for cell in table.xpath("./thead//th")]
            rows = [[cell.text_content() for cell in row] for row in table.xpath("./tbody/tr")]
            found[heading] = [dict(zip(names, row, strict=True)) for row in rows]
    return found


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, one_thread: None, small_smoke: Path) -> Path:
    """A scored AWQ artifact, whose layers.json has errors of outputs."""
    from compress.cli import main

    path = tmp_path_factory.mktemp("learnt") / "awq3"
    flags = ["--bits", "3", "--samples", "4", "--seq-len", "64", "--quiet"]
    assert main(["quantize", "--method", "awq", *flags, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def page(learnt: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """The report of both artifacts."""
    from compress.cli import main

    path = tmp_path_factory.mktemp("page") / "r.html"
    assert main(["report", str(learnt), str(made), "--html", str(path), "--quiet"]) == 0
    return tables(path)


def error(layer: dict[str, Any]) -> float:
    return layer["output_error"] if layer["output_error"] is not None else 10 ** (-layer["weight_sqnr_db"] / 10)


@pytest.mark.parametrize("which", ["learnt", "made"])
def test_every_number_of_the_linears_is_that_of_layers_json(
    which: str, page: dict[str, Rows], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(which)
    layers = {layer["name"]: layer for layer in json.loads((path / "layers.json").read_text())}
    what = {"learnt": "output", "made": "weight"}[which]
    for heading in (f"Every linear ({len(layers)})", "Where the error went"):
        rows = page[f"{path.name}: {heading}"]
        for row in rows:
            layer = layers[row["linear"]]
            assert row["scheme"] == layer["scheme"]
            assert same(row["bits per weight"], layer["bits_per_weight"])
            assert same(row[f"relative {what} error"], error(layer))
            assert same(row["weight SQNR, dB"], layer["weight_sqnr_db"])
            assert row["fallback"] == (layer["fallback"] or "")
        names = [row["linear"] for row in rows]
        if heading == "Where the error went":
            assert names == sorted(layers, key=lambda name: -error(layers[name]))[:10]
        else:
            assert names == list(layers)
    heat = page[f"{path.name}: Error by layer"]
    cells = {f"{row['block']} {kind}": cell for row in heat for kind, cell in row.items() if kind != "block"}
    assert len(cells) == len(layers)
    for name, layer in layers.items():
        assert same(cells[f"{layer['block']} {name.rpartition('.')[2]}"], error(layer))


@pytest.mark.parametrize("which", ["learnt", "made"])
def test_sizes_are_those_of_the_files(which: str, page: dict[str, Rows], request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    stored: dict[str, tuple[int, int]] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                kind = {
                    "weight_packed": "codes of quantised linears",
                    "weight_scale": "scales",
                    "weight_shape": "shapes and other small parts of quantised linears",
                }.get(name.rpartition(".")[2], "embeddings" if "embed" in name else "norms and biases")
                tensors, size = stored.get(kind, (0, 0))
                stored[kind] = (tensors + 1, size + tensor.nbytes)
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    stored["file headers"] = (0, total - sum(size for _, size in stored.values()))
    rows = {row["part"]: row for row in page[f"{path.name}: What the bytes are"]}
    *parts, whole = rows
    assert set(parts) == set(stored)
    units = {"MB": 1e6, "kB": 1e3, "B": 1}
    for part, (tensors, size) in stored.items():
        number, unit = rows[part]["size"].split()
        assert same(number, size / units[unit]), part
        assert rows[part]["tensors"] == (str(tensors) if tensors else "")
        assert same(rows[part]["share"], 100 * size / total)
    assert same(rows[whole]["size"].split()[0], total / 1e6)


@pytest.mark.parametrize("which", ["learnt", "made"])
def test_scores_and_answers_are_those_of_eval_json(
    which: str, page: dict[str, Rows], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(which)
    record = json.loads((path / "eval.json").read_text())
    summary = record["texts"][0]["summary"]
    rows = {row["what"]: row for row in page[f"{path.name}: Scores"]}
    for what, key in (
        ("perplexity", "perplexity"),
        ("mean KL, nats per token", "kl_mean"),
        ("bits per byte", "bits_per_byte"),
    ):
        estimate, low, high = rows[what]["value [95%]"].replace("[", "").replace("]", "").replace(",", "").split()
        assert same(estimate, summary[key]["estimate"])
        assert (same(low, summary[key]["low"]), same(high, summary[key]["high"])) == (True, True)
    assert same(rows["answers identical"]["value [95%]"], 100 * record["generation"]["identical"])
    samples = record["generation"]["samples"]
    assert len(samples) == 1
    answers = page[f"{path.name}: Before and after"]
    assert [(row["prompt"], row["before"], row["after"]) for row in answers] == [
        (each["prompt"], each["baseline"], each["answer"]) for each in samples
    ]
    assert samples[0]["answer"]
    side_by_side = {row["model"]: row for row in page["Scores"]}[path.name]
    assert same(side_by_side["KL, nats"].split()[0], summary["kl_mean"]["estimate"])
    assert same(side_by_side["bits per weight"], Artifact.open(path).manifest.sizes.file_bits_per_weight)


def test_values_of_the_worst_linears_are_those_that_compressed_tensors_decodes(
    page: dict[str, Rows], learnt: Path
) -> None:
    weights = decoded(Artifact.open(learnt))
    rows = page["awq3: Weights and scales of the worst linears"]
    worst = [row["linear"] for row in page["awq3: Where the error went"]]
    assert [row["linear"] for row in rows] == worst[:4]
    for row in rows:
        weight = weights[row["linear"] + ".weight"].float()
        assert same(row["standard deviation"], float(weight.std()))
        assert same(row["largest |w|"], float(weight.abs().max()))
        with safe_open(learnt / "model.safetensors", "pt") as file:
            scale = file.get_tensor(row["linear"] + ".weight_scale").float().abs()
        assert same(row["median |scale|"], float(scale.median()))
        assert same(row["largest |scale|"], float(scale.max()))


def test_the_page_needs_no_network_and_names_both_on_one_front(
    learnt: Path, made: Path, run: Callable, tmp_path: Path
) -> None:
    assert run("report", learnt, made, "--html", "r.html", "--quiet").code == 0
    root = lxml.html.fromstring((tmp_path / "r.html").read_text(encoding="utf-8"))
    fetched = [value for _, name, value, _ in root.iterlinks() if not value.startswith("#")]
    assert fetched == []
    assert root.xpath("//script | //link | //img") == []
    labels = [svg.get("aria-label") for svg in root.xpath("//*[local-name()='svg']")]
    assert "weight size against mean KL of awq3, rtn4" in labels
    ids = [element.get("id") for element in root.xpath("//*[@id]")]
    assert len(ids) == len(set(ids)), "pictures share no ids"
    contents = [link.get("href") for link in root.xpath("//nav/a")]
    assert [link.removeprefix("#") for link in contents] == root.xpath("//section/@id | //details/@id")
    assert len(contents) > 12
    shades = [
        float(cell.get("style").split(":")[1].rstrip("%")) for cell in root.xpath("//td[contains(@class, 'tinted')]")
    ]
    assert min(shades) == 0.0
    assert max(shades) == pytest.approx(68.0)
    assert all(math.isfinite(shade) for shade in shades)


def test_damage_is_found_before_anything_is_written(run: Callable, copy: Path, tmp_path: Path) -> None:
    data = bytearray((copy / "layers.json").read_bytes())
    data[200] ^= 1
    (copy / "layers.json").write_bytes(data)
    assert "is not what the manifest says" in run("report", copy, "--html", "r.html").refused(5)
    assert not (tmp_path / "r.html").exists()
