"""A small stand-in for the pipeline: five blocks of real packed tensors, whose activations depend on all before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.artifact.canonical import sha256_bytes, sha256_json
from compress.artifact.layers import LayerRecord
from compress.artifact.ledger import LedgerEntry
from compress.artifact.manifest import CalibrationRecord, Fallback, Parent
from compress.artifact.output import Identity
from compress.artifact.publish import Contents
from compress.artifact.reader import Artifact
from compress.artifact.staging import Staging
from compress.artifact.tensorfile import tensor_bytes
from compress.formats.int_packed import pack
from compress.types import IntScheme, QuantizedTensor

BLOCKS = 5
WIDTH = 32
SCHEME = IntScheme(bits=4, group_size=16)
CALIBRATION = CalibrationRecord(name="tales", sha256="c" * 64, samples=4, seq_len=8, seed=0)


def recipe(bits: int = 4, damp: float = 0.01) -> dict[str, Any]:
    """A resolved recipe as plain data."""
    return {
        "version": 1,
        "model": "somewhere/tiny",
        "seed": 0,
        "stages": [
            {
                "kind": "quantize",
                "method": {"kind": "gptq", "damp_frac": damp},
                "scheme": {"bits": bits, "group_size": 16, "symmetric": True},
                "ignore": [],
            }
        ],
    }


def identity(**changed: Any) -> Identity:
    """The identity of the fake run, some of it changed."""
    fields: dict[str, Any] = {
        "recipe_hash": sha256_json(recipe()),
        "source": "5" * 64,
        "calibration": CALIBRATION.sha256,
        "environment": {"compress": "0.1.0"},
    }
    return Identity(**{**fields, **changed})


@functools.cache
def source() -> dict[str, torch.Tensor]:
    """The tensors of the source model."""
    generator = torch.Generator().manual_seed(7)
    tensors = {"model.embed_tokens.weight": torch.randn(20, WIDTH, generator=generator).to(torch.bfloat16)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.rotary.inv_freq"] = torch.arange(4.0)
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}"
        for linear in ("q_proj", "o_proj"):
            weight = torch.randn(WIDTH, WIDTH, generator=generator)
            tensors[f"{prefix}.{linear}.weight"] = weight.to(torch.bfloat16)
        tensors[f"{prefix}.norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        tensors[f"{prefix}.flag"] = torch.tensor(block % 2 == 0)
    return tensors


def sha(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return sha256_bytes(tensor_bytes(tensor))


def quantise(weight: torch.Tensor, scheme: IntScheme = SCHEME) -> dict[str, torch.Tensor]:
    """Round to nearest, packed as compressed-tensors stores it."""
    out, width = weight.shape
    groups = weight.float().reshape(out, scheme.groups(width), -1)
    scale = (groups.abs().amax(-1, keepdim=True) / -scheme.qmin).to(torch.bfloat16)
    codes = (groups / scale.float()).round().clamp(scheme.qmin, scheme.qmax).to(torch.int8).reshape(out, width)
    return pack(QuantizedTensor(codes, scale.squeeze(-1), None, scheme))


def entry(action: Any, name: str, record: dict[str, Any], into: list[str]) -> dict[str, Any]:
    """A ledger entry as plain data."""
    outputs = {output: record["tensors"][output]["sha256"] for output in into}
    return LedgerEntry.of(action, sha(source()[name]), outputs).model_dump()


def outer(staging: Staging) -> None:
    """Commit what lies outside the blocks."""
    embed = source()["model.embed_tokens.weight"]
    record = staging.write_part("outer", {"model.embed_tokens.weight": embed})
    into = ["model.embed_tokens.weight"]
    ledger = {
        "model.embed_tokens.weight": entry("kept", "model.embed_tokens.weight", record, into),
        "lm_head.weight": entry("tied", "lm_head.weight", record, into),
        "model.rotary.inv_freq": entry("dropped", "model.rotary.inv_freq", record, []),
    }
    staging.commit({"block": None, "part": record, "state": None, "ledger": ledger, "layers": []})


def run_block(staging: Staging, block: int, hidden: torch.Tensor) -> torch.Tensor:
    """Quantise and commit one block; its scale offset depends on the activations, so a wrong resume shows."""
    prefix = f"model.layers.{block}"
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    into: dict[str, list[str]] = {}
    for linear in ("q_proj", "o_proj"):
        weight = source()[f"{prefix}.{linear}.weight"].float() * (1 + hidden.std() / 100)
        packed = {f"{prefix}.{linear}.{name}": value for name, value in quantise(weight).items()}
        into[f"{prefix}.{linear}.weight"] = sorted(packed)
        tensors |= packed
        layers.append(
            LayerRecord(
                name=f"{prefix}.{linear}",
                block=block,
                method="gptq",
                scheme=SCHEME.label,
                bits_per_weight=SCHEME.bits_per_weight(WIDTH),
                output_error=0.001 * (block + 1),
                weight_sqnr_db=20.0,
            ).model_dump()
        )
        hidden = torch.tanh(hidden @ weight.T)
    for name in ("norm.weight", "flag"):
        tensors[f"{prefix}.{name}"] = source()[f"{prefix}.{name}"]
        into[f"{prefix}.{name}"] = [f"{prefix}.{name}"]
    record = staging.write_part(f"block-{block:05d}", tensors)
    state = staging.write_state(f"block-{block:05d}", {"hidden": hidden})
    ledger = {name: entry("quantized" if len(to) > 1 else "kept", name, record, to) for name, to in into.items()}
    staging.commit({"block": block, "part": record, "state": state, "ledger": ledger, "layers": layers})
    return hidden


@dataclass
class Outcome:
    """What a run of the fake pipeline did."""

    artifact: Artifact
    computed: list[int]
    already: bool = False


def run(
    output: Path,
    tokenizer: Path,
    *,
    restart: bool = False,
    who: Identity | None = None,
    max_shard_bytes: int = 5000,
    made: Callable[[int], None] = lambda block: None,
    **contents: Any,
) -> Outcome:
    """Make the artifact, or go on where an earlier attempt ended; `made` is called for every block computed."""
    with Staging(output, who or identity(), restart=restart) as staging:
        if (done := staging.completed()) is not None:
            return Outcome(done, [], already=True)
        entries = staging.journal()
        if not entries:
            outer(staging)
        blocks = [e["block"] for e in entries if e["block"] is not None]
        if blocks:
            hidden = staging.read_state(entries[-1]["state"])["hidden"].clone()
        else:
            hidden = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
        computed = []
        for block in range(len(blocks), BLOCKS):
            hidden = run_block(staging, block, hidden)
            made(block)
            computed.append(block)
        artifact = staging.publish(finish(staging, tokenizer, **contents), max_shard_bytes=max_shard_bytes)
        return Outcome(artifact, computed)


def finish(staging: Staging, tokenizer: Path, **changed: Any) -> Contents:
    """The contents to publish, from the journal."""
    ledger: dict[str, LedgerEntry] = {}
    layers: list[LayerRecord] = []
    for done in staging.journal():
        ledger |= {name: LedgerEntry(**value) for name, value in done["ledger"].items()}
        layers += [LayerRecord(**layer) for layer in done["layers"]]
    fields: dict[str, Any] = {
        "config": {"model_type": "llama", "hidden_size": WIDTH},
        "aux_files": [tokenizer],
        "recipe": recipe(),
        "recipe_hash": staging.identity.recipe_hash,
        "recipe_yaml": "version: 1\nseed: 0\n",
        "parents": [Parent(kind="model", name="tiny", digest=staging.identity.source, stage="quantize", bytes=100_000)],
        "source_shapes": {name: tuple(tensor.shape) for name, tensor in source().items()},
        "ledger": ledger,
        "layers": layers,
        "created_with": "compress 0.1.0",
        "fallbacks": [
            Fallback(name="model.layers.0.q_proj", action="damping raised to 0.1", reason="Hessian not definite")
        ],
        "calibration": CALIBRATION,
        "environment": {"torch": "2"},
    }
    return Contents(**{**fields, **changed})
