"""What counts as a hub id, and what a user is told when the hub cannot help. No network is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from compress.errors import UserError
from compress.models.hub import local_directory


def test_an_existing_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _refuse)
    assert local_directory("org/name") == Path("org/name")


def test_a_hub_id_is_downloaded_without_pickles_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_directory("org/some-model_1.5b") == tmp_path
    assert asked["repo"] == "org/some-model_1.5b"
    assert not any(pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for pattern in asked["allow_patterns"])


def test_without_a_network_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _refuse)
    with pytest.raises(UserError, match="org/name is no local directory") as caught:
        local_directory("org/name")
    assert "network" in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("model", ["nothing", "./org/name", "/org/name", "a/b/c", "org/", "../org/name"])
def test_other_paths_never_reach_the_hub(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _refuse)
    with pytest.raises(UserError, match="no model directory"):
        local_directory(model)


def _refuse(*_: Any, **__: Any) -> str:
    raise LocalEntryNotFoundError("the hub cannot be reached\nand a second line")
