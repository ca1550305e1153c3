"""The rules of an output and of the work beside it: who may write, what is resumed, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.artifact import durable
from compress.artifact.canonical import sha256_file
from compress.artifact.journal import Journal
from compress.artifact.lock import LockedError, is_locked
from compress.artifact.output import existing
from compress.artifact.reader import Artifact
from compress.artifact.staging import Staging
from compress.artifact.verify import verify
from compress.errors import CompressError, IntegrityError, UserError, WorkError
from tests.artifact import producer

Produce = Callable[..., producer.Outcome]


class Stop(Exception):
    """Ends a run of the fake pipeline."""


def stop_after(block: int) -> Callable[[int], None]:
    """A `made` that ends the run once `block` is committed."""

    def made(done: int) -> None:
        if done == block:
            raise Stop

    return made


def interrupted(produce: Produce, output: Path, block: int = 2, **options: Any) -> Path:
    """Leave a run unfinished after `block`; returns its staging directory."""
    with pytest.raises(Stop):
        produce(output, made=stop_after(block), **options)
    return output.parent / f".{output.name}.partial"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# The output path


@pytest.mark.parametrize("call", ["existing", "Staging"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_file_is_no_output(tmp_path: Path, call: str, restart: bool) -> None:
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "out"):
        with pytest.raises(UserError, match="file"):
            {"existing": existing, "Staging": Staging}[call](path, producer.identity(), restart=restart)
    assert tree(tmp_path) == {"file": b"precious"}


def test_the_current_directory_and_what_holds_it_are_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path("."), tmp_path):
        with pytest.raises(UserError, match="current directory"):
            Staging(path, producer.identity(), restart=True)


def test_a_mount_point_is_no_output() -> None:
    with pytest.raises(UserError, match="mount point"):
        existing("/", producer.identity())


def test_missing_parents_are_made_and_taken_back_if_nothing_came_of_it(tmp_path: Path, produce: Produce) -> None:
    output = tmp_path / "a" / "b" / "out"
    with Staging(output, producer.identity()):
        assert output.parent.is_dir()
    assert list(tmp_path.iterdir()) == []
    assert produce(output).artifact.path == output


def test_an_empty_directory_is_a_free_output(tmp_path: Path, produce: Produce) -> None:
    (tmp_path / "out").mkdir()
    assert verify(produce(tmp_path / "out").artifact.path).ok


def test_an_output_given_through_a_link_is_the_directory_it_names(tmp_path: Path, produce: Produce) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert produce(tmp_path / "link").artifact.path == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()


def test_a_finished_output_of_the_same_run_is_complete(tmp_path: Path, produce: Produce) -> None:
    made = produce(tmp_path / "out")
    before = tree(tmp_path)
    found = existing(tmp_path / "out", producer.identity(environment={"compress": "9"}))
    assert found is not None
    assert found.artifact_id == made.artifact.artifact_id
    again = produce(tmp_path / "out")
    assert (again.already, again.computed) == (True, [])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("other", [{"recipe_hash": "1" * 64}, {"source": "1" * 64}, {"calibration": "1" * 64}])
def test_an_artifact_of_another_run_is_not_replaced(finished: Path, produce: Produce, other: dict[str, str]) -> None:
    before = tree(finished.parent)
    with pytest.raises(UserError, match="already holds an artifact of another recipe or source") as raised:
        produce(finished, who=producer.identity(**other))
    assert "--restart" in raised.value.hint
    assert tree(finished.parent) == before


@pytest.mark.parametrize("what", ["a directory of somebody's", "an artifact with a damaged manifest"])
def test_something_else_is_not_replaced(finished: Path, tmp_path: Path, produce: Produce, what: str) -> None:
    if what == "a directory of somebody's":
        finished = tmp_path / "theirs"
        finished.mkdir()
        (finished / "notes.txt").write_text("precious")
    else:
        manifest = finished / "compress_manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:-30])
    before = tree(finished.parent)
    with pytest.raises(UserError, match="already holds something else"):
        produce(finished)
    assert tree(finished.parent) == before


def test_a_finished_output_with_a_file_cut_short_is_not_called_complete(finished: Path, produce: Produce) -> None:
    shard = finished / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=shard.name):
        produce(finished)
    assert verify(produce(finished, restart=True).artifact.path).ok


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(WorkError, match="cannot write in"):
        existing(tmp_path / "closed" / "out", producer.identity())


# Restart


def test_restart_replaces_an_artifact_and_leaves_nothing_beside(finished: Path, produce: Produce) -> None:
    outcome = produce(finished, who=producer.identity(recipe_hash="1" * 64), restart=True)
    assert outcome.computed == list(range(producer.BLOCKS))
    assert Artifact.open(finished).manifest.recipe_hash == "1" * 64
    assert [entry.name for entry in finished.parent.iterdir()] == [finished.name]


def test_restart_keeps_what_is_not_the_artifacts(finished: Path, produce: Produce) -> None:
    (finished / "my notes.txt").write_text("precious")
    produce(finished, who=producer.identity(recipe_hash="1" * 64), restart=True)
    assert (finished.parent / "tiny.replaced-1" / "my notes.txt").read_text() == "precious"
    assert verify(finished).ok


def test_the_old_one_stays_until_the_new_one_is_whole(finished: Path, produce: Produce) -> None:
    who = producer.identity(recipe_hash="1" * 64)
    before = tree(finished)
    interrupted(produce, finished, who=who, restart=True)
    assert tree(finished) == before
    assert produce(finished, who=who, restart=True).computed == [3, 4], "a killed restart resumes too"
    assert Artifact.open(finished).manifest.recipe_hash == "1" * 64


def test_restart_begins_an_unfinished_run_anew(tmp_path: Path, produce: Produce) -> None:
    interrupted(produce, tmp_path / "out")
    assert produce(tmp_path / "out", restart=True).computed == list(range(producer.BLOCKS))


# Resume


@pytest.mark.parametrize("block", range(producer.BLOCKS))
def test_an_interrupted_run_goes_on(tmp_path: Path, produce: Produce, finished: Path, block: int) -> None:
    interrupted(produce, tmp_path / "out", block)
    assert not (tmp_path / "out").exists()
    outcome = produce(tmp_path / "out")
    assert outcome.computed == list(range(block + 1, producer.BLOCKS))
    assert [sha256_file(f) for f in outcome.artifact.weight_files] == [
        sha256_file(f) for f in Artifact.open(finished).weight_files
    ]
    assert outcome.artifact.artifact_id == Artifact.open(finished).artifact_id
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"recipe_hash": "1" * 64}, "recipe hash"),
        ({"source": "1" * 64}, "source"),
        ({"environment": {"compress": "0.2.0"}}, "environment"),
    ],
)
def test_an_unfinished_run_of_another_identity_is_not_touched(
    tmp_path: Path, produce: Produce, other: dict[str, Any], named: str
) -> None:
    interrupted(produce, tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"another {named}") as raised:
        produce(tmp_path / "out", who=producer.identity(**other))
    assert "--restart" in raised.value.hint
    assert tree(tmp_path) == before
    assert produce(tmp_path / "out", who=producer.identity(**other), restart=True).computed == [0, 1, 2, 3, 4]


def test_a_directory_in_the_way_that_no_run_made_is_not_removed(tmp_path: Path, produce: Produce) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "notes.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(UserError, match=r"notes\.txt"):
            produce(tmp_path / "out", restart=restart)
    assert tree(tmp_path) == {".out.partial/notes.txt": b"precious"}


def test_a_run_that_committed_nothing_leaves_nothing(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", producer.identity()) as staging:
        staging.write_part("outer", {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_state_is_kept(tmp_path: Path, produce: Produce) -> None:
    staged = interrupted(produce, tmp_path / "out", 3)
    assert [file.name for file in (staged / "state").iterdir()] == ["block-00003.safetensors"]
    assert len(list((staged / "parts").iterdir())) == 5


@pytest.mark.parametrize(
    ("damage", "computed"),
    [
        ("parts/block-00002.safetensors", [0, 1, 2, 3, 4]),  # the states before it are gone: from the start
        ("parts/outer.safetensors", [0, 1, 2, 3, 4]),
        ("state/block-00003.safetensors", [0, 1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("how", ["gone", "flipped", "cut"])
def test_a_damaged_file_invalidates_what_rests_on_it(
    tmp_path: Path, produce: Produce, finished: Path, damage: str, computed: list[int], how: str
) -> None:
    file = interrupted(produce, tmp_path / "out", 3) / damage
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-1])
    else:
        data[-3] ^= 16
        file.write_bytes(data)
    outcome = produce(tmp_path / "out")
    assert outcome.computed == computed
    assert outcome.artifact.artifact_id == Artifact.open(finished).artifact_id


def test_a_part_damaged_during_the_run_is_not_published(
    tmp_path: Path, produce: Produce, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(block: int) -> None:
        if block == 4:
            file = tmp_path / ".out.partial" / "parts" / "block-00001.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)

    with pytest.raises(IntegrityError, match="block-00001"):
        produce(tmp_path / "out", made=damage)
    assert not (tmp_path / "out").exists()
    assert produce(tmp_path / "out").computed == [0, 1, 2, 3, 4]


def test_states_and_parts_that_no_entry_names_are_removed(tmp_path: Path, produce: Produce) -> None:
    staged = interrupted(produce, tmp_path / "out")
    for folder in ("parts", "state"):
        (staged / folder / "stray.safetensors").write_bytes(b"half")
    with Staging(tmp_path / "out", producer.identity()) as staging:
        assert not list(staged.glob("*/stray*"))
        assert len(staging.journal()) == 4


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {
        "hidden": torch.randn(2, 3, dtype=torch.float32),
        "half": torch.randn(5).to(torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "strided": torch.arange(12).reshape(3, 4).T,
        "eight": torch.randn(3).to(torch.float8_e4m3fn),
    }
    with Staging(tmp_path / "out", producer.identity()) as staging:
        record = staging.write_state("start", tensors)
        loaded = staging.read_state(record)
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert torch.equal(loaded[name].float(), tensor.float())
        loaded["hidden"].zero_()  # a private mapping: the file stays
        assert torch.equal(staging.read_state(record)["hidden"], tensors["hidden"])


# The journal


def test_any_tear_or_damage_leaves_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number in range(3):
        journal.append({"number": number, "text": "é" * 5})
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert len(Journal(path).entries) == sum(end <= cut for end in ends)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        expected = sum(end <= position for end in ends)
        assert [entry["number"] for entry in Journal(path).entries] == list(range(expected)), position
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    assert len(Journal(path).entries) == 1, "a lost line ends it"


def test_appending_after_a_tear_starts_a_fresh_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append({"n": 0})
    journal.append({"n": 1})
    path.write_bytes(path.read_bytes()[:-5])
    journal = Journal(path)
    journal.keep(len(journal.entries))
    journal.append({"n": 2})
    assert [entry["n"] for entry in Journal(path).entries] == [0, 2]


def test_a_torn_journal_line_costs_one_block(
    tmp_path: Path, produce: Produce, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 0

    def tear(path: Path, line: bytes) -> None:
        nonlocal lines
        lines += 1
        with path.open("ab") as file:
            file.write(line + b"\n" if lines < 5 else line[: len(line) // 2])
        if lines == 5:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(durable, "append_line", tear)
        with pytest.raises(Stop):
            produce(tmp_path / "out")
    outcome = produce(tmp_path / "out")
    assert outcome.computed == [3, 4]
    assert outcome.artifact.artifact_id == Artifact.open(finished).artifact_id


def test_nan_cannot_enter_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"loss": float("nan")})
    assert Journal(tmp_path / "journal.jsonl").entries == []


# Two writers


def test_a_second_writer_is_refused_by_pid(tmp_path: Path, produce: Produce) -> None:
    with Staging(tmp_path / "out", producer.identity()):
        before = tree(tmp_path)
        for restart in (False, True):
            with pytest.raises(LockedError, match=f"pid {os.getpid()}") as raised:
                Staging(tmp_path / "out", producer.identity(), restart=restart)
            assert isinstance(raised.value, UserError)
        assert tree(tmp_path) == before
    assert produce(tmp_path / "out").computed == [0, 1, 2, 3, 4]


def test_a_killed_writer_does_not_block(tmp_path: Path, produce: Produce) -> None:
    program = textwrap.dedent(
        f"""
        import os
        from compress.artifact.lock import FileLock
        from pathlib import Path
        lock = FileLock(Path({str(tmp_path / ".out.lock")!r}), Path("out"))
        print(os.getpid(), flush=True)
        input()
        """
    )
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    assert is_locked(tmp_path / ".out.lock")
    with pytest.raises(LockedError, match=f"pid {pid}"):
        produce(tmp_path / "out")
    child.kill()
    child.communicate()
    assert (tmp_path / ".out.lock").exists()
    assert not is_locked(tmp_path / ".out.lock")
    assert produce(tmp_path / "out").computed == [0, 1, 2, 3, 4]
    assert not (tmp_path / ".out.lock").exists()


def test_something_that_appears_during_the_run_is_not_overwritten(tmp_path: Path, produce: Produce) -> None:
    def intrude(block: int) -> None:
        if block == 4:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes.txt").write_text("precious")

    with pytest.raises(UserError, match="appeared at output"):
        produce(tmp_path / "out", made=intrude)
    assert tree(tmp_path / "out") == {"notes.txt": b"precious"}
    (tmp_path / "out").rename(tmp_path / "moved")
    assert produce(tmp_path / "out").computed == []


# A disk that refuses


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """small_disk(bytes): a tmpfs of that size; called again it changes the size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def size(nbytes: int) -> Path:
        nonlocal mounted
        options = f"size={nbytes}" + (",remount" if mounted else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted = True
        return folder

    yield size
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("pages", [1, 4, 9, 17, 24])
def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(
    small_disk: Callable[[int], Path], produce: Produce, finished: Path, pages: int
) -> None:
    page = os.sysconf("SC_PAGESIZE")
    output = small_disk(pages * page) / "out"
    with pytest.raises(WorkError, match="the disk is full") as raised:
        produce(output)
    assert "run the same command again" in raised.value.hint
    assert not output.exists()
    journal = output.parent / ".out.partial" / "journal.jsonl"
    committed = max(0, len(Journal(journal).entries) - 1) if journal.exists() else 0
    small_disk(1 << 20)
    outcome = produce(output)
    assert len(outcome.computed) == producer.BLOCKS - committed
    assert outcome.artifact.artifact_id == Artifact.open(finished).artifact_id
    assert verify(output).ok


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "input/output error"),
        (errno.EFBIG, "larger than allowed"),
        (errno.ENODEV, os.strerror(errno.ENODEV)),
    ],
)
@pytest.mark.parametrize("nth", [1, 12, 30, 46])
def test_every_refusal_of_the_disk_is_told_and_survived(
    tmp_path: Path, produce: Produce, monkeypatch: pytest.MonkeyPatch, code: int, words: str, nth: int
) -> None:
    calls = 0

    def refuse(handle: int, fsync: Callable[[int], None] = os.fsync) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(code, os.strerror(code))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(WorkError, match=words) as raised:
            produce(tmp_path / "out")
    assert str(tmp_path) in raised.value.message
    assert raised.value.hint
    assert verify(produce(tmp_path / "out").artifact.path).ok
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_when_attaching_changes_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.artifact.attach import attach_eval

    before = tree(finished)
    for nth in range(1, 4):
        calls = 0

        def refuse(handle: int, nth: int = nth) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(WorkError, match="the disk is full"):
                attach_eval(finished, {"summary": {}})
        assert tree(finished) == before


def test_no_error_but_ours_leaves_the_durable_layer(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such"
    for act in (
        lambda: durable.write_bytes(missing, b""),
        lambda: durable.append_line(missing, b""),
        lambda: durable.truncate(missing, 0),
        lambda: durable.rename(missing, tmp_path / "x"),
        lambda: durable.fsync_dir(missing),
        lambda: durable.make_directory(missing),
    ):
        with pytest.raises(CompressError, match="such"):
            act()


def test_exchange_swaps_two_directories(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    if not durable.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert (tmp_path / "a" / "who").read_text() == "b"
    assert (tmp_path / "b" / "who").read_text() == "a"


def test_journal_lines_are_json_with_their_own_hash(tmp_path: Path, produce: Produce) -> None:
    journal = interrupted(produce, tmp_path / "out", 1) / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert [line["entry"]["block"] for line in lines] == [None, 0, 1]
    assert all(len(line["sha256"]) == 64 for line in lines)
    assert [line["previous"] for line in lines] == [None, lines[0]["sha256"], lines[1]["sha256"]]


@pytest.mark.parametrize("output_exists", [True, False])
@pytest.mark.parametrize("with_artifact", [True, False])
def test_somebodys_directory_named_like_a_replaced_artifact_stays(
    tmp_path: Path, produce: Callable[..., producer.Outcome], output_exists: bool, with_artifact: bool
) -> None:
    aside = tmp_path / ".out.old"
    if output_exists:
        produce(tmp_path / "out")
    if with_artifact:
        produce(aside)
    else:
        aside.mkdir()
    (aside / "mine.txt").write_text("mine")
    before = sorted(aside.iterdir())
    produce(tmp_path / "out")
    assert (aside / "mine.txt").read_text() == "mine"
    assert sorted(aside.iterdir()) == before
