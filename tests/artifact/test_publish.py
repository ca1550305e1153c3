"""What a finished run leaves: a directory other libraries read, complete records, and the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compress.artifact.canonical import sha256_file, sha256_json
from compress.artifact.ledger import LedgerEntry
from compress.artifact.reader import Artifact
from compress.artifact.tensorfile import read_header
from compress.artifact.verify import verify
from compress.errors import IntegrityError, UserError
from compress.formats.int_packed import unpack
from tests.artifact import producer

Produce = Callable[..., producer.Outcome]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors library."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_the_safetensors_library_reads_every_tensor(tmp_path: Path, produce: Produce) -> None:
    artifact = produce(tmp_path / "out").artifact
    tensors = weights(artifact.path)
    source = producer.source()
    for name, record in artifact.manifest.tensors.items():
        assert list(tensors[name].shape) == record.shape
        assert producer.sha(tensors[name]) == record.sha256
    assert set(tensors) == set(artifact.manifest.tensors)
    assert torch.equal(tensors["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    assert tensors["model.layers.1.flag"].shape == ()
    assert not tensors["model.layers.1.flag"]
    stored = {
        part: tensors[f"model.layers.0.q_proj.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")
    }
    weight = source["model.layers.0.q_proj.weight"].float()
    assert (unpack(stored, producer.SCHEME).dequantize().float() - weight).norm() < 0.2 * weight.norm()


def test_shards_and_their_index_agree(tmp_path: Path, produce: Produce) -> None:
    path = produce(tmp_path / "out", max_shard_bytes=3000).artifact.path
    index = json.loads((path / "model.safetensors.index.json").read_bytes())
    shards = sorted(path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    held = {name: shard.name for shard in shards for name in read_header(shard)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in read_header(shard).values())
    for shard in shards:
        tensors = read_header(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 3000
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_one_file_where_it_fits(tmp_path: Path, produce: Produce) -> None:
    path = produce(tmp_path / "out", max_shard_bytes=1 << 30).artifact.path
    assert [file.name for file in path.glob("model*")] == ["model.safetensors"]


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path, produce: Produce) -> None:
    path = produce(tmp_path / "out", max_shard_bytes=1 << 30).artifact.path
    widths = {"I64": 8, "I32": 4, "BF16": 2, "BOOL": 1}
    tensors = read_header(path / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == set(widths)
    assert all(tensor.start % widths[tensor.dtype] == 0 for tensor in tensors)


def test_two_runs_make_the_same_bytes_and_id(tmp_path: Path, produce: Produce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000")
    a = produce(tmp_path / "a").artifact
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "2000000")
    b = produce(tmp_path / "b", environment={"torch": "3"}).artifact
    assert a.manifest.created != b.manifest.created
    assert a.artifact_id == b.artifact_id
    assert [f.name for f in a.weight_files] == [f.name for f in b.weight_files]
    assert [sha256_file(f) for f in a.weight_files] == [sha256_file(f) for f in b.weight_files]


def test_the_id_is_of_the_model_not_of_its_shards(tmp_path: Path, produce: Produce) -> None:
    assert (
        produce(tmp_path / "a", max_shard_bytes=3000).artifact.artifact_id
        == produce(tmp_path / "b", max_shard_bytes=1 << 30).artifact.artifact_id
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"config": {"model_type": "mistral"}},
        {"recipe": producer.recipe(damp=0.02)},
        {"aux_files": []},
    ],
    ids=["config", "recipe", "tokenizer"],
)
def test_the_id_changes_with_what_it_names(
    tmp_path: Path, produce: Produce, finished: Path, changed: dict[str, object]
) -> None:
    assert produce(tmp_path / "out", **changed).artifact.artifact_id != Artifact.open(finished).artifact_id


def test_where_the_source_lay_does_not_change_the_id(tmp_path: Path, produce: Produce, finished: Path) -> None:
    moved = {**producer.recipe(), "model": "/elsewhere/tiny"}
    artifact = produce(tmp_path / "out", recipe=moved).artifact
    assert artifact.manifest.recipe["model"] == "/elsewhere/tiny"
    assert artifact.artifact_id == Artifact.open(finished).artifact_id


def test_the_reader_gives_back_what_was_published(finished: Path) -> None:
    artifact = Artifact.open(finished)
    assert artifact.config == {"model_type": "llama", "hidden_size": producer.WIDTH}
    assert artifact.recipe_text == "version: 1\nseed: 0\n"
    assert artifact.manifest.recipe == producer.recipe()
    assert (artifact.method, artifact.scheme) == ("gptq", "w4a16-g16")
    assert [layer["name"] for layer in artifact.layers()][:2] == ["model.layers.0.q_proj", "model.layers.0.o_proj"]
    assert artifact.eval() is None
    assert artifact.manifest.version == 1
    assert sorted(artifact.manifest.attachments) == ["README.md", "layers.json"]
    assert (finished / "tokenizer.json").is_file()


def test_sizes_by_hand(finished: Path) -> None:
    sizes = Artifact.open(finished).manifest.sizes
    linears = producer.BLOCKS * 2 * producer.WIDTH**2
    rest = 20 * producer.WIDTH + producer.BLOCKS * (producer.WIDTH + 1)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weights(finished).values())
    assert sizes.quantized_parameters == linears
    assert sizes.parameters == linears + rest
    assert sizes.bits_per_weight == 4 + 16 / 16
    assert sizes.file_bits_per_weight == pytest.approx(8 * stored / (linears + rest), abs=1e-6)
    assert sizes.bytes == sum(file.stat().st_size for file in finished.glob("*.safetensors"))
    assert sizes.ratio_to_parent == sizes.ratio_to_root == pytest.approx(sizes.bytes / 100_000, abs=1e-6)


def test_ratios_of_a_second_stage(tmp_path: Path, produce: Produce) -> None:
    def parent(kind: str, digest: str, nbytes: int) -> producer.Parent:
        return producer.Parent(kind=kind, name="p", digest=digest, stage="s", bytes=nbytes)

    sizes = produce(
        tmp_path / "out", parents=[parent("model", "1" * 64, 200_000), parent("artifact", "5" * 64, 50_000)]
    ).artifact.manifest.sizes
    assert sizes.ratio_to_root == pytest.approx(sizes.bytes / 200_000, abs=1e-6)
    assert sizes.ratio_to_parent == pytest.approx(sizes.bytes / 50_000, abs=1e-6)


def test_ledger_covers_the_source(finished: Path) -> None:
    ledger = Artifact.open(finished).manifest.ledger
    assert set(ledger) == set(producer.source())
    packed = ledger["model.layers.0.q_proj.weight"]
    assert packed.action == "quantized"
    assert packed.into == [
        f"model.layers.0.q_proj.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")
    ]
    hashes = {name: producer.sha(tensor) for name, tensor in weights(finished).items()}
    assert packed.output_sha256 == sha256_json([[name, hashes[name]] for name in packed.into])
    kept = ledger["model.embed_tokens.weight"]
    assert kept.source_sha256 == kept.output_sha256 == hashes["model.embed_tokens.weight"]
    assert ledger["model.rotary.inv_freq"].into == []
    assert ledger["model.rotary.inv_freq"].output_sha256 is None


def broken_ledger(how: str, ledger: dict[str, LedgerEntry]) -> dict[str, LedgerEntry]:
    norm = ledger["model.layers.3.norm.weight"]
    if how == "a source tensor is forgotten":
        return {name: entry for name, entry in ledger.items() if name != "model.rotary.inv_freq"}
    if how == "an output tensor has no producer":
        return {
            **ledger,
            "model.layers.3.norm.weight": norm.model_copy(
                update={"action": "dropped", "into": [], "output_sha256": None}
            ),
        }
    if how == "a tensor of no source":
        return {**ledger, "mtp.weight": norm}
    if how == "an output that is not there":
        return {
            **ledger,
            "model.layers.3.norm.weight": norm.model_copy(update={"into": ["model.layers.9.norm.weight"]}),
        }
    if how == "dropped into something":
        return {**ledger, "model.layers.3.norm.weight": norm.model_copy(update={"action": "dropped"})}
    if how == "kept but changed":
        return {**ledger, "model.layers.3.norm.weight": norm.model_copy(update={"source_sha256": "a" * 64})}
    assert how == "wrong output hash"
    return {**ledger, "model.layers.3.norm.weight": norm.model_copy(update={"output_sha256": "a" * 64})}


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("a source tensor is forgotten", "inv_freq"),
        ("an output tensor has no producer", "model.layers.3.norm.weight"),
        ("a tensor of no source", "mtp.weight"),
        ("an output that is not there", "model.layers.9.norm.weight"),
        ("dropped into something", "model.layers.3.norm.weight"),
        ("kept but changed", "model.layers.3.norm.weight"),
        ("wrong output hash", "model.layers.3.norm.weight"),
    ],
)
def test_nothing_is_published_when_the_ledger_does_not_add_up(
    tmp_path: Path, produce: Produce, finished: Path, how: str, named: str
) -> None:
    ledger = broken_ledger(how, dict(Artifact.open(finished).manifest.ledger))
    with pytest.raises(IntegrityError, match=named.replace(".", r"\.")):
        produce(tmp_path / "out", ledger=ledger)
    assert not (tmp_path / "out").exists()
    again = produce(tmp_path / "out")
    assert again.computed == []
    assert verify(again.artifact.path).ok


def test_contents_of_another_recipe_are_refused(tmp_path: Path, produce: Produce) -> None:
    parent = producer.Parent(kind="model", name="p", digest="f" * 64, stage="s", bytes=1)
    for changed in ({"recipe_hash": "f" * 64}, {"parents": [parent]}, {"calibration": None}):
        with pytest.raises(IntegrityError, match="another recipe, source or calibration"):
            produce(tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "README.md", "extra.safetensors", "eval.json"])
def test_a_source_file_cannot_take_the_place_of_ours(tmp_path: Path, produce: Produce, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(IntegrityError, match=name):
        produce(tmp_path / "out", aux_files=[tmp_path / name])
    assert not (tmp_path / "out").exists()


def test_version_follows_the_directory_or_what_it_replaces(tmp_path: Path, produce: Produce) -> None:
    assert produce(tmp_path / "v7").artifact.manifest.version == 7
    assert produce(tmp_path / "out").artifact.manifest.version == 1
    assert produce(tmp_path / "out", restart=True).artifact.manifest.version == 2


@pytest.mark.parametrize("what", ["nothing", "a file", "a directory"])
def test_open_says_why_it_is_no_artifact(tmp_path: Path, what: str) -> None:
    path = tmp_path / "there"
    if what == "a file":
        path.write_text("x")
    elif what == "a directory":
        path.mkdir()
    with pytest.raises(UserError, match="is not an artifact"):
        Artifact.open(path)


def test_reading_a_changed_file_is_an_error(finished: Path) -> None:
    for name in ("config.json", "recipe.yaml", "layers.json"):
        (finished / name).write_bytes((finished / name).read_bytes().replace(b"0", b"1", 1) + b" ")
    artifact = Artifact.open(finished)
    for read in (lambda: artifact.config, lambda: artifact.recipe_text, artifact.layers):
        with pytest.raises(IntegrityError, match="not what the manifest says"):
            read()
