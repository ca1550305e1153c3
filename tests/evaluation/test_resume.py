"""Where finished answers are kept, and when they are cleared away."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import WorkError
from compress.evaluation.resume import cache_home, keeping
from compress.progress import NullProgress


class Warned(NullProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_home() == tmp_path / "cache"
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "compress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_home() == tmp_path / "me" / ".cache" / "compress"


def test_our_own_place_is_found_again_and_removed_in_the_end(home: Path) -> None:
    def killed() -> Path:
        with keeping(None, {"a": 1}) as place:
            assert place is not None
            (place / "texts").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    (first,) = (path for path in (home / "eval").iterdir() if path.is_dir())
    with keeping(None, {"a": 2}) as other:
        assert other is not None
        assert list(other.iterdir()) == []
    with keeping(None, {"a": 1}) as second:
        assert second == first
        assert (first / "texts").is_dir()
    assert list((home / "eval").iterdir()) == []


def test_a_refused_command_leaves_nothing(home: Path) -> None:
    with pytest.raises(WorkError), keeping(None, {}):
        raise WorkError("refused", "hint")
    assert list((home / "eval").iterdir()) == []


def test_a_named_place_is_made_and_kept(tmp_path: Path) -> None:
    for _ in range(2):
        with keeping(tmp_path / "deep" / "place", {}) as found:
            assert found == tmp_path / "deep" / "place"
            (found / "file").write_text("x")
    assert (tmp_path / "deep" / "place" / "file").is_file()
    with pytest.raises(WorkError, match="cannot create"), keeping(tmp_path / "deep" / "place" / "file", {}):
        pass


def test_two_of_the_same_do_not_share(home: Path) -> None:
    progress = Warned()
    with keeping(None, {}) as first:
        assert first is not None
        with keeping(None, {}, progress) as second:
            assert second is None
        assert first.is_dir()
    assert "it starts over" in progress.said[0]


def test_a_home_that_cannot_be_written_costs_only_a_warning(home: Path) -> None:
    home.write_text("a file")
    progress = Warned()
    with keeping(None, {}, progress) as found:
        assert found is None
    assert "if this is interrupted, it starts over" in progress.said[0]
