"""The native back end against transformers on the decoded weights; what stays with transformers, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from benchmarks.outlier_twin import make_twin
from compress.errors import UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.runtime import loading, transformers_backend
from compress.runtime.continuations import Continuation
from compress.runtime.input_choice import MOST_LOST
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.native_families import NATIVE_FAMILIES
from compress.runtime.protocol import SamplingParams
from compress.types import IntScheme
from tests.runtime.native import GREEDY, native, windows
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens

NATIVE = tuple(NATIVE_FAMILIES)


@pytest.mark.parametrize("model_type", NATIVE)
def test_plain_models_are_those_of_transformers(model_type: str, tiny: Callable[..., Path]) -> None:
    path, tokens = tiny(model_type), tiny_tokens(3, 40)
    ours, theirs = native(path), transformers_backend.load(path, device="cpu")
    assert torch.allclose(ours.score(tokens), theirs.score(tokens), atol=2e-5, rtol=1e-4)
    prompts = tiny_tokens(2, 9).tolist()
    found, expected = ours.generate(prompts, GREEDY), theirs.generate(prompts, GREEDY)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert ours.parameters() == theirs.parameters()
    assert ours.tokenizer_digest() == theirs.tokenizer_digest()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, True), (4, 32, False), (3, None, False), (2, 32, True), (8, None, True)]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "phi3", "qwen3_moe"])
def test_packed_models_are_those_of_their_decoded_weights(
    model_type: str, bits: int, group: int | None, symmetric: bool, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, dense = write_packed(tiny(model_type), tmp_path, fitting(bits, group, symmetric))
    tokens = tiny_tokens(2, 40)
    runtime = native(packed)
    assert {layer.kernel.split()[1] for layer in runtime.layers()} >= {f"int{bits}"}
    expected = transformers_backend.load(dense, device="cpu").score(tokens)
    assert torch.allclose(runtime.score(tokens), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(runtime.score(tokens), native(dense).score(tokens))  # the very same weights, sum for sum


def test_layers_of_several_schemes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, dense = write_packed(
        tiny("qwen3"),
        tmp_path,
        lambda spec: None if "o_proj" in spec.name else IntScheme(5 if "up" in spec.name else 3, None, False),
    )
    tokens = tiny_tokens(2, 30)
    expected = transformers_backend.load(dense, device="cpu").score(tokens)
    assert torch.allclose(native(packed).score(tokens), expected, atol=2e-5, rtol=1e-4)
    assert torch.isfinite(native(packed, "cpu-int8").score(tokens)).all()


def test_inputs_are_rounded_by_default_only_where_that_costs_little(
    four_bits: tuple[Path, Path], tmp_path: Path
) -> None:
    """Answers are then those of rounded inputs, scores of exact products."""
    packed, dense = four_bits
    auto, exact, plain = native(packed, "auto"), native(packed), native(dense, "auto")
    assert 0 < (auto.rounding_loss or 0) < MOST_LOST
    assert auto.kernel.endswith("-int8")
    assert plain.rounding_loss is None
    assert plain.kernel == exact.kernel
    rows = windows(auto)
    assert torch.equal(auto.score(rows), exact.score(rows))
    probed = SamplingParams(max_tokens=2, logprobs=1)
    (rounded,), (wanted,) = (model.generate(rows[:1].tolist(), probed) for model in (auto, exact))
    assert rounded.logprobs != wanted.logprobs
    twin = tmp_path / "twin"
    make_twin(dense, twin, channels=0.2, factor=300)  # too many to be set apart
    bad = native(write_packed(twin, tmp_path / "packed", fitting(4, 128))[0], "auto")
    assert (bad.rounding_loss or 0) > MOST_LOST
    assert bad.kernel == exact.kernel


def test_what_a_family_does_not_offer_stays_with_transformers(tiny: Callable[..., Path]) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for path, reason in (
        (tiny("llama", rope_parameters=rope), "dynamic"),
        (tiny("gemma2", hidden_activation="gelu"), "activation"),
    ):
        decision = loading.decide(Checkpoint.open(path), "cpu")
        assert decision.backend == "transformers"
        assert reason in decision.reason


def test_continuations_are_scored_like_plain_sequences(tiny: Callable[..., Path]) -> None:
    runtime = native(tiny("mistral"))
    ids = tiny_tokens(8, 24).tolist()
    requests = [
        *(Continuation((*ids[0][:10], *ids[k][: 2 + k]), 10) for k in range(1, 5)),
        *(Continuation(tuple(ids[k]), k) for k in (5, 6)),
        Continuation((*ids[0][:10], *ids[1][:2], 7, 8), 3),
    ]
    batches = runtime.plan_continuations(requests)
    assert any(batch.branches for batch in batches)
    found = {}
    for batch in batches:
        found.update(zip(batch.requests, runtime.score_continuations(batch), strict=True))
    for index, request in enumerate(requests):
        logits = runtime.score(torch.tensor([request.token_ids[:-1]]))[0, request.start - 1 :].double()
        targets = torch.tensor(request.token_ids[request.start :])
        total = float(logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).sum())
        assert found[index].total == pytest.approx(total, rel=1e-6)
        assert found[index].greedy is bool((logits.argmax(-1) == targets).all())


def test_the_library_object(packaged_model: Path, tales: NativeRuntime) -> None:
    llm = compress.LLM(packaged_model)
    params = compress.SamplingParams(max_tokens=6)
    (answer,) = llm.generate("The king", params)
    assert llm.generate([[0, 5, 6], "The king"], params)[1].token_ids == answer.token_ids
    assert "".join(llm.stream("The king", params)) == answer.text
    ((first, *rest), single) = llm.score(["The king said", [0, 9]])
    ids = torch.tensor([[0, *llm.runtime.encode("The king said")]])
    expected = tales.score(ids)[0].double().log_softmax(-1)
    assert first == pytest.approx(float(expected[0, ids[0, 1]]))
    assert (len(rest), len(single)) == (ids.shape[1] - 2, 1)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "deepseek_v3"])
def test_other_architectures_stay_with_transformers(model_type: str, tiny: Callable[..., Path]) -> None:
    path = tiny(model_type)
    assert loading.load(path, device="cpu").name == "transformers"
    assert model_type in loading.decide(Checkpoint.open(path), "cpu").reason
    with pytest.raises(UserError, match="native engine does not run"):
        loading.load(path, device="cpu", kernel="cpu")


def test_groups_that_no_kernel_takes_stay_with_transformers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny("llama"), tmp_path, fitting(4, 16))
    decision = loading.decide(Checkpoint.open(packed), "cpu")
    assert (decision.backend, "groups of 16" in decision.reason) == ("transformers", True)
    assert loading.load(packed, device="cpu").name == "transformers"


def test_choices_that_the_engine_does_not_offer(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    assert loading.load(path, device="cpu", dtype="bfloat16").name == "transformers"
    assert loading.load(path, device="cpu", kernel="reference").name == "transformers"
    for words in ({"kernel": "warp"}, {"kernel": "cpu", "dtype": "bfloat16"}, {"device": "tpu"}):
        with pytest.raises(UserError):
            loading.load(path, **{"device": "cpu", **words})


def test_weights_that_are_not_finite_are_told(tiny: Callable[..., Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("llama"), tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] = torch.nan
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    runtime = native(copy)
    with pytest.raises(WorkError, match="not finite"):
        runtime.generate([[1, 2, 3]], GREEDY)
    with pytest.raises(WorkError, match="not finite"):
        runtime.score_continuations(runtime.plan_continuations([Continuation((1, 2, 3), 1)])[0])
    assert runtime.model.pages.free == runtime.model.pages.count


def test_steps_that_do_not_fit_are_refused(tales: NativeRuntime) -> None:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    good: dict[str, Any] = {
        "tokens": ints(1, 2),
        "positions": ints(0, 1),
        "sequences": ints(0, 0),
        "tables": ints(0).reshape(1, 1),
        "contexts": ints(0),
        "rows": ints(1),
        "logits": torch.empty(1, tales.vocab_size),
        "eight_bit": False,
        "threads": 1,
    }
    decoder = tales.model._decoder
    decoder.step(**good)
    for name, value in (
        ("tokens", ints(1, tales.vocab_size)),
        ("tokens", ints(1, -1)),
        ("tokens", ints()),
        ("positions", ints(0, 32)),
        ("positions", ints(-1, 0)),
        ("sequences", ints(0, 1)),
        ("tables", ints(10**6).reshape(1, 1)),
        ("tables", ints(-1).reshape(1, 1)),
        ("contexts", ints(1)),
        ("contexts", ints(-1)),
        ("contexts", ints(0, 0)),
        ("rows", ints(2)),
        ("logits", torch.empty(2, tales.vocab_size)),
        ("threads", 0),
    ):
        with pytest.raises((TypeError, ValueError)):
            decoder.step(**{**good, name: value})
