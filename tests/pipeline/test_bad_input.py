"""What cannot be done is refused by name, leaves everything as it was, and nothing that looks finished."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress import pipeline
from compress.artifact import durable
from compress.artifact.output import staging_path
from compress.errors import CompressError, IntegrityError, UserError, WorkError
from compress.recipe import Recipe
from tests.pipeline import harness
from tests.pipeline.harness import METHODS, recipe
from tests.tiny_models import POSITIONS

BOTH = [pytest.param(pipeline.plan, id="plan"), pytest.param(pipeline.run, id="run")]
Carry = Callable[..., object]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that holds somebody's file; runs write into it."""
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "notes.txt").write_text("do not lose me")
    return tmp_path / "place"


@contextmanager
def untouched(*roots: Path, staged: Path | None = None) -> Iterator[None]:
    """Everything under `roots` is the same afterwards; the staging directory of `staged` alone may have been added."""
    before = [harness.snapshot(root) for root in roots]
    yield
    after = [harness.snapshot(root) for root in roots]
    if staged is not None:
        hidden = staging_path(staged.resolve())
        assert not list(hidden.glob("**/compress_manifest.json")), "an unfinished run must not look finished"
        name = str(hidden.relative_to(staged.parent.resolve()))
        after = [{path: sha for path, sha in tree.items() if not path.startswith(name)} for tree in after]
    assert after == before


def refused(
    kind: type[CompressError], wanted: Recipe, model: Path, output: Path, match: str, carry: Carry = pipeline.run
) -> CompressError:
    """The error of a run (or plan), which is of this kind and has a hint."""
    with pytest.raises(kind, match=match) as caught:
        carry(wanted, model=model, output=output)
    assert caught.value.hint
    return caught.value


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def damaged_header(model: Path) -> None:
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[9] ^= 0xFF
    weights.write_bytes(data)


def absent(model: Path) -> None:
    shutil.rmtree(model)


@pytest.mark.parametrize("carry", BOTH)
@pytest.mark.parametrize(
    ("spoil", "kind", "match"),
    [
        (absent, UserError, "no model directory"),
        (no_config, UserError, r"no config\.json"),
        (no_weights, UserError, r"no model\.safetensors"),
        (truncated, IntegrityError, "is damaged: its"),
        (damaged_header, IntegrityError, "is damaged: its"),
    ],
)
def test_a_bad_model_directory(
    spoil: Callable[[Path], None], kind: type[CompressError], match: str, carry: Carry, tiny: Callable[..., Path],
    tmp_path: Path, place: Path,
) -> None:  # fmt: skip
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    spoil(model)
    with untouched(tmp_path):
        refused(kind, recipe("rtn"), model, place / "out", match, carry)


@pytest.mark.parametrize("carry", BOTH)
@pytest.mark.parametrize(
    ("name", "shape"), [("mtp.fc.weight", (8, 8)), ("model.layers.7.mlp.up_proj.weight", (64, 96))]
)
def test_a_tensor_that_the_config_has_no_place_for(
    name: str, shape: tuple[int, int], carry: Carry, tiny: Callable[..., Path], tmp_path: Path, place: Path
) -> None:
    """What is made from it could not be loaded again."""
    model = harness.copy_with(tiny("llama"), tmp_path / "model", lambda tensors: {**tensors, name: torch.ones(shape)})
    with untouched(tmp_path):
        refused(IntegrityError, recipe("rtn"), model, place / "out", f"holds {name}, which", carry)


@pytest.mark.parametrize("carry", BOTH)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "compress_manifest.json"])
def test_an_artifact_with_a_flipped_byte(
    file: str, carry: Carry, tiny: Callable[..., Path], tmp_path: Path, place: Path
) -> None:
    source = pipeline.run(recipe("rtn"), model=tiny("llama"), output=tmp_path / "source").artifact.path
    with untouched(tmp_path):
        refused(UserError, recipe("rtn"), source, place / "out", "an artifact that compress quantised", carry)
    data = bytearray((source / file).read_bytes())
    data[-40] ^= 1
    (source / file).write_bytes(data)
    with untouched(tmp_path):
        refused(IntegrityError, recipe("rtn"), source, place / "out", f"(?s)damaged artifact.*{file}", carry)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_a_weight_that_is_not_finite(
    name: str, value: float, method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, place: Path
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[-7] = value
        return tensors

    model = harness.copy_with(tiny("llama"), tmp_path / "model", spoil)
    with untouched(place, model, staged=place / "out"):
        error = refused(WorkError, recipe(method, text), model, place / "out", re.escape(name))
    assert "NaN or infinite" in error.message


@pytest.mark.parametrize("carry", BOTH)
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "neither a packaged name nor a file"),
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"far too short", "holds 0 windows of 24 tokens, 8 are asked for"),
        (b"word " * 30, "holds 6 windows of 24 tokens, 8 are asked for"),
        (b"caf\xe9 " * 1000, r"not UTF-8 \(byte 3\)"),
    ],
)
def test_a_bad_calibration_text(
    content: bytes | None, match: str, carry: Carry, tiny: Callable[..., Path], tmp_path: Path, place: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with untouched(tmp_path):
        error = refused(UserError, recipe("awq", text), tiny("llama"), place / "out", match, carry)
    if content == b"word " * 30:
        samples = re.search(r"--samples (\d+)", error.hint)
        assert samples is not None
        carry(recipe("awq", text, samples=int(samples[1])), model=tiny("llama"), output=place / "out")


@pytest.mark.parametrize("carry", BOTH)
def test_windows_longer_than_the_context(carry: Carry, tiny: Callable[..., Path], text: Path, place: Path) -> None:
    wanted = recipe("gptq", text, seq_len=POSITIONS + 1)
    with untouched(place):
        error = refused(
            UserError, wanted, tiny("llama"), place / "out", f"exceed the model's context of {POSITIONS}", carry
        )
    assert f"--seq-len {POSITIONS}" in error.hint
    carry(recipe("gptq", text, seq_len=POSITIONS, samples=2), model=tiny("llama"), output=place / "out")


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 16])
@pytest.mark.parametrize("method", METHODS)
def test_bits_out_of_range(bits: int, method: str) -> None:
    with pytest.raises(UserError, match=rf"scheme\.bits: {bits} ") as caught:
        recipe(method, bits=bits)
    assert caught.value.hint


@pytest.mark.parametrize("group_size", [48, 64, 128, 100])
def test_a_group_that_does_not_divide_names_one_that_does(
    group_size: int, tiny: Callable[..., Path], place: Path
) -> None:
    planned = pipeline.plan(recipe("rtn", group_size=group_size), model=tiny("llama"), output=place / "out")
    assert planned.problems
    with untouched(place):
        error = refused(
            UserError,
            recipe("rtn", group_size=group_size),
            tiny("llama"),
            place / "out",
            f"group size {group_size} does",
        )
    assert error.message.startswith(planned.problems[0])
    assert error.hint == planned.hint
    offered = re.search(r"--group-size (\d+)", error.hint)
    assert offered is not None
    artifact = pipeline.run(
        recipe("rtn", group_size=int(offered[1])), model=tiny("llama"), output=place / "out"
    ).artifact
    assert artifact.scheme == f"w4a16-g{offered[1]}"


def test_172_takes_no_group_beside_64(shared: Path, place: Path) -> None:
    model = shared / "models" / "stories260K"
    wanted = recipe("rtn", group_size=64)
    with untouched(place):
        error = refused(UserError, wanted, model, place / "out", "group size 64 does not divide the width 172")
    misfits = {
        linear.name for linear in pipeline.plan(wanted, model=model, output=place / "out").linears if linear.reason
    }
    assert misfits == {f"model.layers.{block}.mlp.down_proj" for block in range(5)}
    assert "--group-size channel" in error.hint
    assert "--ignore" in error.hint
    assert pipeline.run(recipe("rtn", group_size="channel"), model=model, output=place / "a").computed_blocks == 5
    ignoring = recipe("rtn", group_size=64, ignore=["*.down_proj"])
    assert pipeline.run(ignoring, model=model, output=place / "b").computed_blocks == 5


@pytest.mark.parametrize("pattern", ["model.layers.9.*", "re:.*expert", "re:("])
def test_an_ignore_pattern_that_means_nothing(pattern: str, tiny: Callable[..., Path], place: Path) -> None:
    with untouched(place):
        error = refused(UserError, recipe("rtn", ignore=[pattern]), tiny("llama"), place / "out", "ignore pattern")
    assert "--group-size" not in error.hint


def test_half_of_what_engines_fuse_cannot_be_ignored(tiny: Callable[..., Path], place: Path) -> None:
    with untouched(place):
        error = refused(UserError, recipe("rtn", ignore=["*.up_proj"]), tiny("llama"), place / "out", "as one matrix")
        assert "mlp.gate_proj" in error.hint
        refused(UserError, recipe("rtn", ignore=["*_proj"]), tiny("llama"), place / "out", "every linear is ignored")


def test_a_model_without_tokenizer(tiny: Callable[..., Path], text: Path, tmp_path: Path, place: Path) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    for file in model.glob("tokenizer*"):
        file.unlink()
    with untouched(tmp_path):
        refused(UserError, recipe("gptq", text), model, place / "out", "no tokenizer")
    assert pipeline.run(recipe("rtn"), model=model, output=place / "out").computed_blocks == 2


@pytest.mark.parametrize("method", METHODS)
def test_bad_places(method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, place: Path) -> None:
    wanted, model = recipe(method, text), tiny("llama")
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "model.safetensors").write_text("mine too")
    other = pipeline.run(recipe("rtn", bits=8), model=model, output=place / "other").artifact
    with untouched(tmp_path):
        refused(UserError, wanted, model, place / "file", "is a file")
        refused(UserError, wanted, model, place / "file" / "out", "which is a file")
        refused(UserError, wanted, model, place / "full", "already holds something else")
        refused(UserError, wanted, model, other.path, "already holds an artifact of another recipe or source")
        refused(UserError, wanted, model, model, "is the artifact or model itself")
    result = pipeline.run(wanted, model=model, output=other.path, restart=True)
    assert result.artifact.artifact_id != other.artifact_id


def test_two_writers(tiny: Callable[..., Path], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny("llama"), []

    def intrude(label: str) -> None:
        if label == "before append to journal.jsonl" and len(seen) < 2:
            seen.append(label)
            with untouched(place):
                refused(UserError, recipe("rtn"), model, place / "out", "is being written by pid")
                refused(UserError, recipe("rtn", bits=3), model, place / "out", "is being written by pid")

    monkeypatch.setattr(durable, "step", intrude)
    assert pipeline.run(recipe("rtn"), model=model, output=place / "out").computed_blocks == 2
    assert len(seen) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk(size): a file system of that size, mounted for the test; the second call makes the same one larger."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def mount(size: str) -> Path:
        again = ["-o", f"remount,size={size}"] if mounted.is_mount() else ["-o", f"size={size}"]
        done = subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(mounted)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        return mounted

    yield mount
    gc.collect()  # mapped tensors of finished runs keep the file system busy
    if mounted.is_mount():
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("kilobytes", [8, 120, 200, 280, 340, 400])
def test_a_full_disk(
    kilobytes: int, tiny: Callable[..., Path], text: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    model, wanted = tiny("llama"), recipe("gptq", text)
    disk = small_disk(f"{kilobytes}k")
    (disk / "notes.txt").write_text("do not lose me")
    output = disk / "out"
    with untouched(disk, model, staged=output):
        error = refused(WorkError, wanted, model, output, "the disk is full")
    assert "free space" in error.hint
    small_disk("8m")
    result = pipeline.run(wanted, model=model, output=output)
    assert result.resumed_blocks + result.computed_blocks == 2
    if kilobytes >= 400:
        assert result.resumed_blocks > 0
    whole = pipeline.run(wanted, model=model, output=tmp_path / "whole").artifact
    assert result.artifact.artifact_id == whole.artifact_id
    assert sorted(path.name for path in disk.iterdir()) == ["notes.txt", "out"]


@pytest.mark.parametrize("carry", [pipeline.plan, pipeline.run])
def test_what_the_block_loop_does_not_do(carry: Carry, tiny: Callable[..., Path], place: Path) -> None:
    wanted = recipe("rtn")
    twice = wanted.model_copy(update={"stages": [*wanted.stages, *wanted.stages]})
    with untouched(place):
        refused(UserError, twice, tiny("llama"), place / "out", "2 stages", carry)
        with pytest.raises(UserError, match="cuda"):
            carry(wanted, model=tiny("llama"), output=place / "out", device="cuda")
