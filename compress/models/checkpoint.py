"""A Hugging Face model directory, read lazily: opening it reads headers only, and a tensor is mapped when asked for.

Each `read` maps its own bytes privately, so what a caller writes into a tensor never reaches the file or another
reader, and untouched pages stay page cache, not anonymous memory. Nothing is unpickled or imported.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import IntegrityError, UserError
from compress.models.hub import local_directory
from compress.models.safetensors_header import TensorInfo, read_header

if TYPE_CHECKING:
    from compress.progress import Progress

CONFIG = "config.json"
MANIFEST = "compress_manifest.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "spiece.model",
    "sentencepiece.*",
    "tekken.json",
)
"""Files that decide how text becomes token ids."""

AUX_FILES = (*TOKENIZER_FILES, "generation_config.json", "chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files an artifact carries over unchanged: tokenizer, generation defaults, templates and licence texts."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HASH_CHUNK = 1 << 20


class Checkpoint:
    """A model directory: `path`, its `config` (config.json as it is) and `index` (name -> TensorInfo, sorted)."""

    def __init__(self, path: Path, config: dict[str, Any], index: dict[str, TensorInfo]) -> None:
        self.path = path
        self.config = config
        self.index = index
        self._sha256: dict[str, str] = {}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Opens a directory (or a hub id such as `org/name`, downloaded first) and checks every shard's header.

        Raises UserError for what is no model directory or holds no safetensors weights, IntegrityError for a
        truncated or damaged shard and for a tensor that the index names and no shard holds.
        """
        directory = local_directory(path)
        config = _read_config(directory)
        return cls(directory, config, _read_index(directory))

    @property
    def is_artifact(self) -> bool:
        """Whether this directory was written by compress."""
        return (self.path / MANIFEST).exists()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.index.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped: page cache until written to; writes stay private to the returned tensor.

        Raises KeyError for a name that is not in `index`.
        """
        info = self.index[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        lead = info.offset % mmap.ALLOCATIONGRANULARITY
        with (self.path / info.shard).open("rb") as file:
            view = mmap.mmap(file.fileno(), lead + info.nbytes, access=mmap.ACCESS_COPY, offset=info.offset - lead)
        if info.offset % info.dtype.itemsize == 0:
            return torch.frombuffer(view, dtype=info.dtype, offset=lead, count=info.nbytes // info.dtype.itemsize).view(
                info.shape
            )
        aligned = torch.frombuffer(view, dtype=torch.uint8, offset=lead, count=info.nbytes).clone()
        return aligned.view(info.dtype).view(info.shape)

    def read_rows(self, name: str, rows: torch.Tensor | slice) -> torch.Tensor:
        """Some rows of a tensor, in memory that is their own size."""
        return self.read(name)[rows]

    @property
    def source_index(self) -> Mapping[str, TensorInfo]:
        """What the files hold; `index` unless this is a view of a model that is changed as it is read."""
        return self.index

    def changes(self, name: str) -> bool:
        """Whether `read` gives another tensor than the files hold."""
        return False

    def origin(self, name: str) -> str:
        """The stored tensor that this one is made from."""
        return name

    def sha256(self, name: str) -> str:
        """SHA-256 of the tensor's bytes as stored, in bounded memory; computed once."""
        if name not in self._sha256:
            info = self.index[name]
            self._sha256[name] = _hash_range(self.path / info.shard, info.offset, info.nbytes)
        return self._sha256[name]

    def digest(self, progress: Progress | None = None) -> str:
        """The model's hash: over each tensor's name, dtype, shape and SHA-256 in name order, and config.json."""
        if progress is not None:
            progress.begin("hash", len(self.index))
        total = hashlib.sha256()
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for info, sha256 in zip(self.index.values(), pool.map(self.sha256, self.index), strict=True):
                total.update(canonical_json([info.name, str(info.dtype), list(info.shape), sha256]))
                if progress is not None:
                    progress.advance(info.name)
        total.update(canonical_json(self.config))
        if progress is not None:
            progress.end()
        return total.hexdigest()

    def tokenizer_digest(self) -> str:
        """SHA-256 over the names and contents of the tokenizer's files."""
        total = hashlib.sha256()
        for file in self._matching(TOKENIZER_FILES):
            total.update(canonical_json([file.name, _hash_range(file, 0, file.stat().st_size)]))
        return total.hexdigest()

    def aux_files(self) -> list[Path]:
        """The files beside weights and config that an artifact of this model carries over."""
        return self._matching(AUX_FILES)

    def _matching(self, patterns: tuple[str, ...]) -> list[Path]:
        files = (file for file in self.path.iterdir() if file.is_file())
        return sorted(file for file in files if any(fnmatch.fnmatchcase(file.name, p) for p in patterns))


def canonical_json(value: Any) -> bytes:
    """The value's JSON with sorted keys and no spaces, ended by a newline: the form that is hashed."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if (directory / MANIFEST).is_file():  # we wrote it, so it was whole once
        hint = f"see `compress verify {directory}`; make or fetch the artifact again"
        return _json_object(path, IntegrityError, hint)
    if not path.is_file():
        raise UserError(
            f"{directory} is not a model directory: it holds no {CONFIG}",
            "give a directory in Hugging Face form: config.json, safetensors weights and a tokenizer",
        )
    return _json_object(path, UserError, "restore config.json from the model's source")


def _read_index(directory: Path) -> dict[str, TensorInfo]:
    if (directory / SINGLE).is_file():
        tensors = read_header(directory / SINGLE)
    elif (directory / INDEX).is_file():
        tensors = _read_shards(directory)
    else:
        raise _no_weights(directory)
    return dict(sorted(tensors.items()))


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    hint = "the download is incomplete or the index belongs to another model: fetch the directory again"
    weight_map = _json_object(directory / INDEX, IntegrityError, hint).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise IntegrityError(f"{directory / INDEX} has no weight_map from tensor names to file names", hint)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise IntegrityError(f"{INDEX} names the shard {shard}, which {directory} does not hold", hint)
        for name, info in read_header(directory / shard).items():
            if name in tensors:
                raise IntegrityError(f"tensor {name!r} is in both {tensors[name].shard} and {shard}", hint)
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise IntegrityError(f"{INDEX} places tensor {name!r} in {shard}, which does not hold it", hint)
    return tensors


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value


def _no_weights(directory: Path) -> UserError:
    names = sorted(file.name for file in directory.iterdir())
    pickles = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _PICKLES)]
    if pickles:
        return UserError(
            f"{directory} holds its weights as a pickle ({pickles[0]}), which compress does not load",
            "convert it where you trust it: load it with transformers and save_pretrained writes safetensors",
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = f"only {', '.join(others[:3])}" if others else "none"
    return UserError(
        f"{directory} holds no {SINGLE} and no {INDEX} (weights found: {found})",
        "give a full model in Hugging Face form; merge an adapter into its base model first",
    )


def _json_object(path: Path, error: Callable[[str, str], Exception], hint: str) -> dict[str, Any]:
    """The JSON object in a file, or `error` saying that it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} is not readable JSON: {cause}", hint) from cause
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object", hint)
    return value


def _hash_range(path: Path, offset: int, nbytes: int) -> str:
    """SHA-256 of `nbytes` bytes of a file from `offset`; raises IntegrityError where the file ends before that."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_HASH_CHUNK, max(nbytes, 1))))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while nbytes:
            count = file.readinto(buffer[: min(nbytes, len(buffer))])
            if not count:
                raise IntegrityError(f"{path} was cut short while it was read", "do not write to a model while it runs")
            digest.update(buffer[:count])
            nbytes -= count
    return digest.hexdigest()
