"""The native engine against transformers on the decoded weights, and against itself in other orders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import pipeline
from compress.errors import CompressError, UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.runtime import loading, transformers_backend
from compress.runtime.continuations import Continuation
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.native_model import Chunk
from compress.runtime.pages import PagePool
from compress.runtime.protocol import SamplingParams
from compress.schemes import FIXED_SCHEMES
from compress.types import InputScheme, IntScheme
from tests.pipeline import harness
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens

NATIVE = ("llama", "mistral", "qwen2", "qwen3")
GREEDY = SamplingParams(max_tokens=24, ignore_end=True)


def native(path: Path, kernel: str = "auto") -> NativeRuntime:
    runtime = loading.load(path, device="cpu", kernel=kernel)
    assert isinstance(runtime, NativeRuntime)
    return runtime


def divergence(found: Tensor, expected: Tensor) -> float:
    """Mean KL in nats to the expected predictions."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def tales(packaged_model: Path) -> NativeRuntime:
    return native(packaged_model)


@pytest.fixture(scope="module")
def four_bits(packaged_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The packaged model in 4 bits, and the same with its weights decoded."""
    return write_packed(packaged_model, tmp_path_factory.mktemp("tales"), fitting(4, 128))


def windows(runtime: NativeRuntime, count: int = 2, length: int = 100) -> Tensor:
    ids = runtime.encode((Path(__file__).parents[2] / "README.md").read_text())
    return torch.tensor(ids[: count * length]).reshape(count, length)


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
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
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


def test_the_packaged_model_in_both_ways(four_bits: tuple[Path, Path]) -> None:
    packed, dense = four_bits
    theirs = transformers_backend.load(dense, device="cpu")
    exact, eight = native(packed), native(packed, "cpu-int8")
    tokens = windows(exact)
    expected = theirs.score(tokens)
    assert divergence(exact.score(tokens), expected) < 1e-8
    assert 1e-8 < divergence(eight.score(tokens), expected) < 2e-3
    prompts = ["Once upon a time there was a king", "The dragon said", "In a forest"]
    ours = [answer.text for answer in exact.generate(prompts, SamplingParams(max_tokens=48))]
    assert ours == [answer.text for answer in theirs.generate(prompts, SamplingParams(max_tokens=48))]


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8"])
def test_no_bit_depends_on_how_tokens_are_grouped(kernel: str, four_bits: tuple[Path, Path]) -> None:
    """Batched equals alone, in parts equals whole, and many threads equal one."""
    model = native(four_bits[0], kernel).model
    rows = windows(native(four_bits[0]), 3, 70).tolist()
    with model.pages.lend(70) as pages:
        whole = [model.sequence(row, 0, pages, range(70)) for row in rows]
        for size in (1, 3, 32, 69):
            parts = [
                model.sequence(rows[0][at : at + size], at, pages, range(len(rows[0][at : at + size])))
                for at in range(0, 70, size)
            ]
            assert torch.equal(torch.cat(parts), whole[0])
    tables = [model.pages.take(70) for _ in rows]
    together = model.step([Chunk(row, 0, pages, range(70)) for row, pages in zip(rows, tables, strict=True)])
    assert torch.equal(together, torch.cat(whole))
    torch.set_num_threads(3)
    assert torch.equal(model.step([Chunk(rows[1], 0, tables[1], range(70))]), whole[1])
    for table in tables:
        model.pages.give_back(table)
    assert model.pages.free == model.pages.count


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


def test_a_stream_is_the_answer_in_pieces(tales: NativeRuntime) -> None:
    for params in (SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, stop=("king",), temperature=1.0)):
        (answer,) = tales.generate(["Once upon a time"], params)
        pieces = list(tales.stream("Once upon a time", params))
        assert "".join(pieces) == answer.text
        assert len(pieces) > 1
    assert tales.model.pages.free == tales.model.pages.count


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


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "gpt2", "mixtral"])
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


@pytest.mark.parametrize("name", FIXED_SCHEMES)
def test_schemes_that_round_inputs_stay_with_transformers(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("llama", hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4)
    wanted = harness.recipe("rtn", harness.write_text(tmp_path / "text.txt"), scheme=name)
    path = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact.path
    decision = loading.decide(Checkpoint.open(path), "cpu")
    assert (decision.backend, decision.shape) == ("transformers", None)
    assert decision.reason.startswith(f"{name} rounds what enters its linears")
    assert loading.load(path, device="cpu").name == "transformers"
    for kernel in ("cpu", "cpu-int8"):
        with pytest.raises(UserError, match=f"native engine does not run.*{name}"):
            loading.load(path, device="cpu", kernel=kernel)


def test_one_linear_that_rounds_its_inputs_is_enough(tiny: Callable[..., Path], tmp_path: Path) -> None:
    both = IntScheme(8, None, inputs=InputScheme("int", "token"))
    packed, dense = write_packed(
        tiny("llama"), tmp_path, lambda spec: both if spec.name.endswith("1.mlp.down_proj") else IntScheme(4, 32)
    )
    assert loading.decide(Checkpoint.open(packed), "cpu").reason.startswith("W8A8 rounds")
    tokens = tiny_tokens(2, 20)
    found, weights_alone = (loading.load(path, device="cpu").score(tokens) for path in (packed, dense))
    assert torch.equal(found, transformers_backend.load(packed, device="cpu").score(tokens))
    assert 1e-9 < divergence(found, weights_alone) < 1e-2


def test_choices_that_the_engine_does_not_offer(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")
    assert loading.load(path, device="cpu", dtype="bfloat16").name == "transformers"
    assert loading.load(path, device="cpu", kernel="reference").name == "transformers"
    for words in ({"kernel": "warp"}, {"kernel": "cpu", "dtype": "bfloat16"}, {"device": "tpu"}):
        with pytest.raises(UserError):
            loading.load(path, **{"device": "cpu", **words})


def _remove(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def damage(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        del tensors[name]

    return damage


def _shorten(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, _: tensors.update({name: tensors[name][:-1].clone()})


def _lie(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_shape"] = torch.tensor([2**40, 2**40])


def _other_bits(_: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3


@pytest.mark.parametrize(
    "damage",
    [
        _remove("model.layers.1.mlp.up_proj.weight_scale"),
        _remove("model.norm.weight"),
        _shorten("model.layers.0.self_attn.q_proj.weight_packed"),
        _shorten("model.layers.0.self_attn.q_proj.weight_scale"),
        _shorten("model.embed_tokens.weight"),
        _lie,
        _other_bits,
    ],
)
def test_damaged_artifacts_are_refused(
    damage: Callable[[dict[str, Tensor], dict[str, Any]], None], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, _ = write_packed(tiny("llama"), tmp_path, fitting(4, 32))
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    tensors, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError):
        loading.load(copy, device="cpu")


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
        ("rows", ints(2)),
        ("logits", torch.empty(2, tales.vocab_size)),
        ("threads", 0),
    ):
        with pytest.raises((TypeError, ValueError)):
            decoder.step(**{**good, name: value})


def test_pages_are_lent_once_and_come_back() -> None:
    pool = PagePool(4, 32)
    first = pool.take(33)
    assert (first, pool.free) == ([0, 1], 2)
    with pytest.raises(WorkError, match="64 tokens free"):
        pool.take(65)
    with pool.lend(64) as pages:
        assert not set(pages) & set(first)
    pool.give_back(first)
    assert pool.free == 4
    with pytest.raises(ValueError, match="not lent"):
        pool.give_back(first)
