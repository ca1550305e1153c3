"""Attachments, the card they show up on, and the list of artifacts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.artifact import card, store
from compress.artifact.attach import attach, attach_eval
from compress.artifact.layers import LayerRecord
from compress.artifact.lock import FileLock
from compress.artifact.reader import Artifact
from compress.artifact.scores import Score, headline_scores
from compress.artifact.staging import Staging
from compress.artifact.store import family_directory, list_artifacts, next_version, open_next, update_latest
from compress.artifact.verify import verify
from compress.errors import IntegrityError, UserError
from tests.artifact import producer

Produce = Callable[..., producer.Outcome]
RECORD: dict[str, Any] = {
    "summary": {
        "perplexity": {"estimate": 36.41, "low": 35.1, "high": 37.9, "level": 0.95},
        "kl_mean": {"estimate": 0.0235},
        "kl_percentiles": {"p50": 0.01},
        "top1_agreement": None,
    }
}


def test_attaching_keeps_the_id_and_verifies(finished: Path) -> None:
    before = Artifact.open(finished)
    after = attach_eval(finished, RECORD, samples=b"samples")
    assert after.artifact_id == before.artifact_id
    assert after.manifest.manifest_sha256 != before.manifest.manifest_sha256
    assert after.eval() == RECORD
    assert sorted(after.manifest.attachments) == ["README.md", "eval.json", "layers.json", "samples.jsonl.gz"]
    assert verify(finished).ok
    same = ("version", "created", "ledger", "tensors", "files", "sizes", "recipe", "parents")
    assert all(getattr(after.manifest, field) == getattr(before.manifest, field) for field in same)


def test_attaching_again_replaces(finished: Path) -> None:
    attach_eval(finished, {"summary": {"kl_mean": {"estimate": 0.5}}})
    assert attach_eval(finished, RECORD).eval() == RECORD
    assert verify(finished).ok


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "compress_manifest.json", "../out", "a/b", ".hidden", "recipe.yaml"]
)
def test_a_name_that_cannot_be_an_attachment_is_refused(finished: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be an attachment"):
        attach(finished, {"fine.txt": b"", name: b""})
    assert verify(finished).ok
    assert not (finished / "fine.txt").exists()


def test_a_damaged_manifest_is_not_given_new_digests(finished: Path) -> None:
    manifest = finished / "compress_manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(IntegrityError, match="was edited"):
        attach_eval(finished, RECORD)


def test_attaching_clears_what_an_interrupted_one_left(finished: Path) -> None:
    (finished / ".samples.jsonl.gz.tmp").write_bytes(b"half")
    assert "interrupted" in str(verify(finished).problems)
    attach_eval(finished, RECORD)
    assert verify(finished).ok


@pytest.mark.parametrize("what", ["nothing", "directory"])
def test_there_must_be_an_artifact(tmp_path: Path, what: str) -> None:
    if what == "directory":
        (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is not an artifact"):
        attach(tmp_path / "there", {"eval.json": b"{}"})


def test_headline_scores() -> None:
    assert headline_scores(RECORD) == {"perplexity": Score(36.41, 35.1, 37.9), "kl_mean": Score(0.0235)}
    assert headline_scores(None) == headline_scores({}) == headline_scores({"summary": [1]}) == {}


# The card


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """The card's YAML header and its body."""
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_card_says_how_it_was_made(finished: Path) -> None:
    header, body = front_matter((finished / "README.md").read_text())
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "tiny",
        "base_model_relation": "quantized",
        "tags": ["compress", "gptq", "w4a16-g16"],
    }
    artifact = Artifact.open(finished)
    for fact in (
        artifact.artifact_id,
        "# tiny-gptq-w4a16-g16",
        "4 sequences of 8 tokens\nof `tales`, seed 0, fingerprint `cccccccccccccccc`",
        "| bits per weight, quantised linears | 5 ",
        "1 dropped, 11 kept, 10 quantized, 1 tied",
        "from_pretrained(path)",
        "- `model.layers.0.q_proj`: damping raised to 0.1 (Hessian not definite)",
        "| 4 | 2 | 0.005 | 0.005 | model.layers.4.q_proj | 20 |",
        "Not scored yet",
        "licence",
    ):
        assert fact in body, fact


def test_the_card_shows_scores_once_there_are_some(finished: Path) -> None:
    attach_eval(finished, RECORD)
    _, body = front_matter((finished / "README.md").read_text())
    assert "| perplexity | 36.41 | 35.1 to 37.9 |" in body
    assert "| kl_mean | 0.0235 | - |" in body
    assert "Not scored yet" not in body


def test_the_card_names_what_was_left_as_it_was(tmp_path: Path, produce: Produce) -> None:
    layers = [
        LayerRecord(name="model.layers.0.down_proj", block=0, reason="172 inputs do not divide into groups of 128"),
        LayerRecord(name="model.layers.0.up_proj", block=0, scheme="w4a16-g128", output_error=0.25),
    ]
    artifact = produce(
        tmp_path / "out", layers=layers, fallbacks=[], calibration=None, who=producer.identity(calibration=None)
    ).artifact
    _, body = front_matter((artifact.path / "README.md").read_text())
    assert "- `model.layers.0.down_proj`: 172 inputs do not divide into groups of 128" in body
    assert "| 0 | 1 | 0.25 | 0.25 | model.layers.0.up_proj | - |" in body
    assert "No calibration text was used." in body
    assert "None: everything was done as the recipe says." in body


@pytest.mark.parametrize(
    ("quantization", "library", "said", "unsaid"),
    [
        ({"quant_method": "compressed-tensors"}, "transformers", "pip install compressed-tensors", "export"),
        ({"reader": "compress"}, "compress", "compress export PATH --to dense", "AutoModelForCausalLM"),
        (None, "transformers", "AutoModelForCausalLM", "pip install compressed-tensors"),
    ],
)
def test_the_card_says_what_loads_it(
    finished: Path, quantization: dict[str, str] | None, library: str, said: str, unsaid: str
) -> None:
    config = {"quantization_config": quantization}
    header, body = front_matter(card.render(Artifact.open(finished).manifest, config, [], None))
    assert header["library_name"] == library
    assert said in body
    assert unsaid not in body


def test_names_cannot_break_out_of_the_card(finished: Path) -> None:
    manifest = Artifact.open(finished).manifest
    parent = manifest.parents[0].model_copy(update={"name": 'a"\ntags: [x]\n---\n'})
    text = card.render(manifest.model_copy(update={"parents": [parent]}), {}, [], None)
    header, _ = front_matter(text)
    assert header["base_model"] == parent.name
    assert header["tags"] == ["compress", "gptq", "w4a16-g16"]


# The store


def test_versions_count_up_and_latest_names_the_newest(tmp_path: Path, produce: Produce) -> None:
    family = family_directory("tiny", "gptq", "w4a16-g16", root=tmp_path)
    assert family == tmp_path / "tiny-gptq-w4a16-g16"
    for number in (1, 2, 3):
        path = next_version(family, producer.identity())
        assert path == family / f"v{number}"
        assert produce(path).artifact.manifest.version == number
        update_latest(path)
        assert (family / "latest").is_symlink()
        assert os.readlink(family / "latest") == f"v{number}"
        assert Artifact.open(family / "latest").path == family / "latest"
    update_latest(family / "v1")
    assert os.readlink(family / "latest") == "v3", "finishing an older version does not move it back"


def test_latest_is_a_file_where_links_are_impossible(
    tmp_path: Path, produce: Produce, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    artifact = produce(tmp_path / "family" / "v1").artifact
    update_latest(artifact.path)
    latest = tmp_path / "family" / "latest"
    assert not latest.is_symlink()
    assert latest.read_text() == "v1\n"
    assert Artifact.open(latest).artifact_id == artifact.artifact_id
    assert verify(latest).ok
    assert [row.latest for row in list_artifacts(tmp_path)] == [True]


def test_a_path_that_is_no_version_gets_no_latest(finished: Path) -> None:
    update_latest(finished)
    assert not (finished.parent / "latest").exists()


class Stop(Exception):
    """Ends a run of the fake pipeline."""


def stop(block: int) -> None:
    """A `made` that ends the run at once."""
    raise Stop


def test_an_unfinished_version_of_the_same_run_is_the_next(tmp_path: Path, produce: Produce) -> None:
    produce(tmp_path / "v1")
    for output, who in (("v2", producer.identity(recipe_hash="1" * 64)), ("v3", producer.identity())):
        with pytest.raises(Stop):
            produce(tmp_path / output, who=who, made=stop)
    assert next_version(tmp_path, producer.identity()) == tmp_path / "v3"
    assert next_version(tmp_path, producer.identity(recipe_hash="1" * 64)) == tmp_path / "v2"
    assert next_version(tmp_path, producer.identity(recipe_hash="2" * 64)) == tmp_path / "v4"
    assert next_version(tmp_path, producer.identity(), restart=True) == tmp_path / "v4"
    with open_next(tmp_path, producer.identity()) as staging:
        assert len(staging.journal()) == 2


def test_a_complete_version_without_scores_is_the_next_of_a_run_that_scores(tmp_path: Path, produce: Produce) -> None:
    for number in (1, 2, 3):
        who = producer.identity(recipe_hash="1" * 64) if number == 3 else producer.identity()
        update_latest(produce(tmp_path / f"v{number}", who=who).artifact.path)
    assert next_version(tmp_path, producer.identity()) == tmp_path / "v4"
    assert next_version(tmp_path, producer.identity(), scored=True) == tmp_path / "v2"
    assert next_version(tmp_path, producer.identity(), scored=True, restart=True) == tmp_path / "v4"
    with open_next(tmp_path, producer.identity(), scored=True) as staging:
        assert staging.completed() is not None
    attach_eval(tmp_path / "v2", RECORD)
    assert next_version(tmp_path, producer.identity(), scored=True) == tmp_path / "v4", "only the newest counts"
    (tmp_path / "v3" / "tokenizer.json").unlink()
    other = producer.identity(recipe_hash="1" * 64)
    assert next_version(tmp_path, other, scored=True) == tmp_path / "v4", "a damaged one is not taken up"


def test_a_complete_version_that_latest_does_not_name_yet_is_the_next(tmp_path: Path, produce: Produce) -> None:
    update_latest(produce(tmp_path / "v1").artifact.path)
    produce(tmp_path / "v2")
    assert next_version(tmp_path, producer.identity()) == tmp_path / "v2"
    update_latest(tmp_path / "v2")
    assert next_version(tmp_path, producer.identity()) == tmp_path / "v3"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert next_version(tmp_path, producer.identity()) == tmp_path / "v3", "somebody's own directory says nothing"


def test_two_writers_get_two_versions(tmp_path: Path) -> None:
    with open_next(tmp_path, producer.identity()) as one, open_next(tmp_path, producer.identity()) as two:
        assert [one.output.name, two.output.name] == ["v1", "v2"]


def test_a_version_taken_between_look_and_lock_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    held = []

    def late(family: Path, identity: Any, **options: bool) -> Path:
        path = next_version(family, identity, **options)
        if not looked:
            held.append(FileLock(family / f".{path.name}.lock", path))
        looked.append(path.name)
        return path

    monkeypatch.setattr(store, "next_version", late)
    with open_next(tmp_path, producer.identity()) as staging:
        assert staging.output.name == "v2"
    assert looked == ["v1", "v2"]
    held[0].release()


def test_family_names_are_file_names(tmp_path: Path) -> None:
    assert family_directory("org/Model Name", "awq", "w4a16-g128").name == "org-Model-Name-awq-w4a16-g128"
    assert family_directory("..", "", "").name == "model"


def test_list_shows_what_there_is_and_changes_nothing(finished: Path, tmp_path: Path, produce: Produce) -> None:
    root = tmp_path / "artifacts"
    produce(root / "fam" / "v1")
    attach_eval(produce(root / "fam" / "v10", who=producer.identity(recipe_hash="1" * 64)).artifact.path, RECORD)
    produce(root / "fam" / "v2")
    update_latest(root / "fam" / "v10")
    with pytest.raises(Stop):
        produce(root / "fam" / "v11", made=stop)
    shutil.copytree(finished, root / "alone")
    shutil.copytree(finished, root / "broken")
    (root / "broken" / "compress_manifest.json").write_text("{}")
    before = sorted(root.rglob("*"))
    rows = list_artifacts(root)
    assert [(row.name, row.version, row.latest) for row in rows] == [
        ("alone", 1, False),
        ("broken", None, False),
        ("fam", 1, False),
        ("fam", 2, False),
        ("fam", 10, True),
    ]
    assert sorted(root.rglob("*")) == before
    scored = rows[4]
    assert (scored.method, scored.scheme, scored.bits_per_weight) == ("gptq", "w4a16-g16", 5.0)
    assert scored.scores["kl_mean"].value == 0.0235
    assert scored.bytes == sum(file.stat().st_size for file in scored.path.glob("*.safetensors"))
    assert rows[1].problem is not None
    assert list_artifacts(tmp_path / "nowhere") == []


def test_list_names_a_damaged_eval(finished: Path) -> None:
    attach_eval(finished, RECORD)
    (finished / "eval.json").write_text(json.dumps(RECORD) + " ")
    assert "eval.json" in (list_artifacts(finished.parent)[0].problem or "")


def test_the_staging_of_a_version_is_beside_it(tmp_path: Path) -> None:
    with Staging(tmp_path / "v4", producer.identity()) as staging:
        assert staging.path == tmp_path / ".v4.partial"
