"""Transformers' models with linears packed in Triton kernels give what decoded weights give; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.runtime import loading, transformers_backend, triton_backend
from compress.runtime.protocol import SamplingParams
from compress.types import InputScheme, IntScheme
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels import gpu_linear


def eight_bit(_: Any) -> IntScheme:
    return IntScheme(8, None, inputs=InputScheme("int", "token"))


@pytest.fixture(scope="module")
def packed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tiny("llama"), tmp_path_factory.mktemp("four"), fitting(4, 32, False))[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_scores_are_those_of_decoded_weights(
    model_type: str, packed: Path, tiny: Callable[..., Path], tmp_path: Path, device: str
) -> None:
    if model_type == "gpt2":  # its linears are Conv1D, which stays dense
        packed, _ = write_packed(tiny("gpt2"), tmp_path, fitting(4, 32))
        with pytest.raises(UserError, match="another form"):
            loading.load(packed, device=device, kernel="triton")
        return
    runtime = triton_backend.load(packed, device, "float32")
    reference = transformers_backend.load(packed, device=device, dtype="float32")
    assert (runtime.name, runtime.kernel) == ("transformers+triton", "triton")
    tokens = tiny_tokens(1, 7)
    torch.testing.assert_close(runtime.score(tokens), reference.score(tokens), rtol=1e-3, atol=1e-3)
    assert runtime.parameters() == reference.parameters()
    uses = {use.name: use for use in runtime.layers()}
    assert sum(use.kernel == "triton w4a16-g32-asym" for use in uses.values()) == 14
    dense = {use.name: use for use in reference.layers()}
    assert uses.keys() == dense.keys()
    assert all(3 * use.held_bytes < dense[name].held_bytes for name, use in uses.items() if "triton" in use.kernel)


def test_answers_are_those_of_decoded_weights(packed: Path, device: str) -> None:
    params = SamplingParams(max_tokens=3, ignore_end=True)
    found, wanted = (
        back_end.load(packed, device, "float32").generate(["ab"], params)[0].token_ids
        for back_end in (triton_backend, transformers_backend)
    )
    assert found == wanted


def test_rounded_inputs_are_rounded_once(tiny: Callable[..., Path], tmp_path: Path, device: str) -> None:
    packed, _ = write_packed(tiny("qwen2"), tmp_path, eight_bit)  # type: ignore[arg-type]
    runtime = triton_backend.load(packed, device, "float32")
    assert {use.kernel for use in runtime.layers() if "triton" in use.kernel} == {"triton w8a8"}
    tokens = tiny_tokens(1, 5)
    wanted = transformers_backend.load(packed, device=device, dtype="float32").score(tokens)
    error = (runtime.score(tokens) - wanted).square().mean().sqrt()
    assert error < 0.02 * wanted.std()  # a sum in another order may round an input of a later layer the other way


def test_a_wrong_kernel_is_found_at_load(packed: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_linear.multiply
    monkeypatch.setattr(gpu_linear, "multiply", lambda *given: 1.05 * right(*given))
    with pytest.raises(WorkError, match="differs from that of the decoded weight"):
        triton_backend.load(packed, device)


def test_what_cannot_run_is_refused(
    packed: Path, tiny: Callable[..., Path], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"not among .* no quantised linears"):
        loading.load(tiny("gpt2"), device=device, kernel="triton")
    with pytest.raises(UserError, match="no quantised linears"):
        triton_backend.load(tiny("llama"), device)
    monkeypatch.setattr(transformers_backend, "chosen_device", lambda _: torch.device("cuda"))
    with pytest.raises(UserError, match="the native engine does not run"):
        loading.load(packed, kernel="cpu")
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="on a CPU only with TRITON_INTERPRET=1"):
        loading.load(packed, device="cpu", kernel="triton")


def test_a_gpu_gets_the_engine_where_it_knows_the_model(
    packed: Path, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _ = write_packed(tiny("gpt_neox"), tmp_path, fitting(4, 32))
    assert loading.decide(Checkpoint.open(packed), "cpu").backend == "native"
    monkeypatch.setattr(transformers_backend, "chosen_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(triton_backend.available, "obstacle", lambda _: None)
    assert loading.decide(Checkpoint.open(packed)).backend == "gpu"
    decision = loading.decide(Checkpoint.open(other))
    assert decision.backend == "transformers+triton"
    assert "gpt_neox are not among" in decision.reason
    assert loading.decide(Checkpoint.open(tiny("gpt_neox"))).backend == "transformers"
    monkeypatch.setattr(triton_backend.available, "obstacle", lambda _: "triton is not installed")
    decision = loading.decide(Checkpoint.open(packed))
    assert decision.backend == "transformers"
    assert "triton is not installed" in decision.reason
