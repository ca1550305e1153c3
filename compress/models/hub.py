"""From what the user typed as MODEL to a local directory: a path as it is, a hub id through a download."""

from __future__ import annotations

import re
from pathlib import Path

from compress.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
_UNWANTED = ("*/*", "consolidated*")
"""Subdirectories and the original authors' own weight files repeat the weights in other forms."""


def local_directory(model: str | Path) -> Path:
    """The directory of `model`; a string of the form org/name that is no path is downloaded from the hub.

    Only configuration, tokenizer and safetensors files are fetched. Raises UserError where there is no such
    directory, or the hub cannot be reached or refuses.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model} is a file, not a model directory", "give the directory that holds its config.json")
    if isinstance(model, str) and HUB_ID.fullmatch(model):
        return _download(model)
    raise UserError(f"there is no model directory {model}", "give an existing directory, or a hub id such as org/name")


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{model} is no local directory and could not be fetched from the hub: {_first_line(error)}",
            "check the name and the network, or give the path of a downloaded model directory",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
