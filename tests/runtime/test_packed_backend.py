"""Models that the native engine does not define: packed linears in transformers give what decoded weights give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import IntegrityError, UserError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import LinearSpec
from compress.runtime import loading, transformers_backend
from compress.runtime.packed_backend import NativeLinear, PackedRuntime
from compress.runtime.protocol import SamplingParams
from compress.types import InputScheme, IntScheme
from compress.workflows.kernel_parity import kernel_record
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens

DENSE = {  # what has no packed linear, by module name
    "gpt2": {"lm_head"},
    "opt": {"model.decoder.project_out", "model.decoder.project_in", "lm_head"},
    "gpt_neox": {"lm_head"},
    "deepseek_v3": {"model.layers.1.mlp.experts", "model.layers.1.mlp.gate", "lm_head"},
}


@pytest.mark.parametrize("model_type", DENSE)
def test_answers_are_those_of_decoded_weights(model_type: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny(model_type), tmp_path, fitting(4, 32, False))
    runtime, reference = loading.load(packed, device="cpu"), transformers_backend.load(packed, device="cpu")
    assert isinstance(runtime, PackedRuntime)
    tokens = tiny_tokens(2, 20)
    torch.testing.assert_close(runtime.score(tokens), reference.score(tokens), rtol=1e-4, atol=2e-5)
    params = SamplingParams(max_tokens=12, ignore_end=True)
    found, wanted = (r.generate(tokens.tolist(), params) for r in (runtime, reference))
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    assert runtime.parameters() == reference.parameters()
    uses, decoded = ({use.name: use for use in r.layers()} for r in (runtime, reference))
    assert uses.keys() == decoded.keys()
    assert {name for name, use in uses.items() if use.kernel == "dense"} == DENSE[model_type]
    assert all(3 * uses[name].held_bytes < decoded[name].held_bytes for name in uses.keys() - DENSE[model_type])
    held = sum(p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in runtime.model.parameters()}.values())
    assert held <= sum(p.nbytes for p in runtime.model.parameters())  # no dense weight is left behind a view
    record = kernel_record(packed)
    assert (record.backend, len(record.products)) == ("transformers+native", 1)
    assert record.products[0].error < 1e-5


def test_eight_bit_products_are_others(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny("gpt_neox"), tmp_path, fitting(4, 32))
    exact, rounded = (loading.load(packed, device="cpu", kernel=kernel) for kernel in ("cpu", "cpu-int8"))
    assert {use.kernel.split(" ", 1)[1] for use in rounded.layers() if " " in use.kernel} == {"int4 x int8"}
    tokens = tiny_tokens(1, 20)
    change = (rounded.score(tokens) - exact.score(tokens)).abs().max()
    assert 1e-4 < change < 0.1 * exact.score(tokens).std()


def test_inputs_are_rounded_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    scheme = IntScheme(8, None, inputs=InputScheme("int", "token"))
    packed, _ = write_packed(tiny("gpt_neox"), tmp_path, lambda _: scheme)
    runtime, tokens = loading.load(packed, device="cpu"), tiny_tokens(1, 20)
    wanted = transformers_backend.load(packed, device="cpu").score(tokens)
    error = (runtime.score(tokens) - wanted).square().mean().sqrt()
    assert error < 0.02 * wanted.std()  # a sum's last bit may round an input of a later layer the other way
    assert not any(m._forward_pre_hooks for m in runtime.model.modules() if isinstance(m, NativeLinear))  # type: ignore[attr-defined]


def test_what_no_kernel_takes_is_decoded_and_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def mixed(spec: LinearSpec) -> IntScheme:
        return IntScheme(4, 16 if spec.name.endswith("dense_h_to_4h") else 32)

    packed, _ = write_packed(tiny("gpt_neox"), tmp_path, mixed)
    decision = loading.decide(Checkpoint.open(packed), "cpu")
    assert decision.backend == "transformers+native"
    assert "2 are decoded: gpt_neox.layers.0.mlp.dense_h_to_4h: groups of 16" in decision.reason
    uses = {use.name: use.kernel for use in loading.load(packed, device="cpu").layers()}
    assert {name for name, kernel in uses.items() if kernel == "dense"} == {
        *(f"gpt_neox.layers.{i}.mlp.dense_h_to_4h" for i in range(2)),
        "lm_head",
    }


def test_damage_is_an_error(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny("gpt_neox"), tmp_path, fitting(4, 32))
    file = packed / "model.safetensors"
    whole = load_file(file)
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight_packed"
    for damaged in ({k: v for k, v in whole.items() if k != name}, {**whole, name: whole[name][1:]}):
        save_file(damaged, file, {"format": "pt"})
        with pytest.raises(IntegrityError):
            loading.load(packed, device="cpu")


def test_other_arithmetic_is_dense(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny("opt"), tmp_path, fitting(4, 32))
    assert loading.load(packed, device="cpu", dtype="bfloat16").name == "transformers"
    assert loading.load(packed, device="cpu", kernel="reference").name == "transformers"
    with pytest.raises(UserError, match="int8 key-value cache needs the engine"):
        loading.load(packed, device="cpu", kv_cache="int8")
