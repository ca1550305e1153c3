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
from benchmarks.outlier_twin import make_twin
from compress import pipeline
from compress.errors import CompressError, IntegrityError, UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import LinearSpec
from compress.runtime import loading, transformers_backend
from compress.runtime.continuations import Continuation
from compress.runtime.engine import Engine
from compress.runtime.input_choice import MOST_LOST
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.native_families import NATIVE_FAMILIES
from compress.runtime.paged_model import Chunk
from compress.runtime.pages import PagePool
from compress.runtime.protocol import Generation, SamplingParams
from compress.schemes import FIXED_SCHEMES
from compress.types import InputScheme, IntScheme
from tests.pipeline import harness
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens

NATIVE = tuple(NATIVE_FAMILIES)
GREEDY = SamplingParams(max_tokens=24, ignore_end=True)


def native(path: Path, kernel: str = "cpu") -> NativeRuntime:
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


def test_answers_of_the_packaged_model(four_bits: tuple[Path, Path]) -> None:
    packed, dense = four_bits
    theirs, exact = transformers_backend.load(dense, device="cpu"), native(packed)
    prompts = ["Once upon a time there was a king", "The dragon said", "In a forest"]
    ours = [answer.text for answer in exact.generate(prompts, SamplingParams(max_tokens=48))]
    assert ours == [answer.text for answer in theirs.generate(prompts, SamplingParams(max_tokens=48))]


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


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3", "mixtral"])
def test_families_of_several_schemes_do_not_depend_on_company(
    model_type: str, kernel: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers and experts of several widths and groups: right, and the same bits alone, together and in parts."""

    def choose(spec: LinearSpec) -> IntScheme | None:
        if spec.name.endswith("1.self_attn.o_proj"):
            return None
        fused = spec.name.endswith(("qkv_proj", "gate_up_proj"))
        coarse = spec.expert in (1, 3) or (spec.block == 1 and not fused)
        return IntScheme(8, None) if coarse else IntScheme(4, 32)

    packed, dense = write_packed(tiny(model_type), tmp_path, choose)
    runtime = native(packed, kernel)
    model, tokens = runtime.model, tiny_tokens(3, 45)
    if kernel == "cpu":
        expected = transformers_backend.load(dense, device="cpu").score(tokens)
        assert torch.allclose(runtime.score(tokens), expected, atol=2e-5, rtol=1e-4)
    tables = [model.pages.take(45) for _ in range(3)]
    rows = tokens.tolist()
    whole = [model.step([Chunk(row, 0, pages, range(45))]) for row, pages in zip(rows, tables, strict=True)]
    together = model.step([Chunk(row, 0, pages, range(45)) for row, pages in zip(rows, tables, strict=True)])
    assert torch.equal(together, torch.cat(whole))
    parts = [
        model.step([Chunk(rows[0][at : at + 7], at, tables[0], range(len(rows[0][at : at + 7])))])
        for at in range(0, 45, 7)
    ]
    assert torch.equal(torch.cat(parts), whole[0])
    prompts, params = [row[:40] for row in rows], SamplingParams(max_tokens=8, ignore_end=True, logprobs=2)
    cached = loading.load(packed, kernel=kernel, prefix_cache=True)
    cold, hit = cached.generate(prompts, params), cached.generate(prompts, params)
    assert {answer.cached_tokens for answer in hit} == {32}
    assert (
        tokens_and_logprobs(hit) == tokens_and_logprobs(cold) == tokens_and_logprobs(runtime.generate(prompts, params))
    )


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


def fixed(name: str, tiny: Callable[..., Path], tmp_path: Path, model_type: str = "llama", **settings: Any) -> Path:
    """A tiny model in one of the schemes that a name says all of, as the pipeline makes it."""
    source = tiny(model_type, hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4)
    method = "ternary" if name == "W2A8" else "rtn"
    wanted = harness.recipe(method, harness.write_text(tmp_path / "text.txt"), scheme=name, **settings)
    return pipeline.run(wanted, model=source, output=tmp_path / f"{model_type}-{name}").artifact.path


KINDS = {name: name.lower() for name in ("FP8", "NVFP4", "MXFP4", "MXFP8", "NF4")} | {"W8A8": "int8", "W2A8": "int2"}


@pytest.mark.parametrize("name", FIXED_SCHEMES)
def test_schemes_that_a_name_says_all_of(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = fixed(name, tiny, tmp_path, "mistral" if name == "W2A8" else "llama")  # bitnet knows no biases
    runtime, tokens = native(path), tiny_tokens(2, 20)
    expected, found = transformers_backend.load(path, device="cpu").score(tokens), runtime.score(tokens)
    (kind,) = (kernel for prefix, kernel in KINDS.items() if name.startswith(prefix))
    weights, _, *rounded = next(use.kernel for use in runtime.layers() if "up_proj" in use.name).split()[1:]
    assert weights == kind
    assert (len(rounded) == 3) == (FIXED_SCHEMES[name].inputs is not None)
    if FIXED_SCHEMES[name].inputs is None:
        assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)
    else:  # a sum's last bit may turn a code that lies on an edge
        assert divergence(found, expected) < 2e-3
        assert (found - expected).abs().amax(-1).min() < 1e-4
    answers = [[answer.token_ids for answer in runtime.generate(tokens.tolist(), GREEDY)]]
    answers += [[runtime.generate([row], GREEDY)[0].token_ids for row in tokens.tolist()]]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "damaged"),
    [("W8A8", torch.nan), ("FP8_BLOCK", torch.inf), ("FP8_DYNAMIC", 2.0**96), ("NVFP4A16", 0xFF), ("MXFP4A16", 255)],
)
def test_scales_that_are_no_numbers_are_refused(
    name: str, damaged: float, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = fixed(name, tiny, tmp_path)
    tensors = load_file(path / "model.safetensors")
    scale = tensors["model.layers.1.mlp.up_proj.weight_scale"]
    (scale if scale.dtype.itemsize > 1 else scale.view(torch.uint8)).view(-1)[-1] = damaged
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"1.mlp.up_proj.weight_scale holds NaN"):
        loading.load(path, device="cpu", kernel="cpu")


@pytest.mark.parametrize("name", ["FP8_STATIC", "FP8_DYNAMIC", "NVFP4A16"])
def test_modelopt_checkpoints(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = fixed(name, tiny, tmp_path, format="modelopt")
    file = path / "model.safetensors"
    tensors = load_file(file)
    for part, tensor in tensors.items():
        if part.endswith("weight_scale_2"):  # as theirs are: no power of two
            tensors[part] = tensor * 1.37
    save_file(tensors, file, {"format": "pt"})
    tokens = tiny_tokens(2, 20)
    expected, found = transformers_backend.load(path, device="cpu").score(tokens), native(path).score(tokens)
    assert (found - expected).abs().amax(-1).min() < 1e-4
    assert divergence(found, expected) < (1e-9 if name == "NVFP4A16" else 2e-3)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen3_moe", "MXFP8A16"), ("mixtral", "MXFP4A16"), ("phi3", "NVFP4"), ("phi3", "FP8_STATIC")],
)
def test_floats_in_experts_and_stacked_matrices(
    model_type: str, name: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = fixed(name, tiny, tmp_path, model_type)
    runtime, tokens = native(path), tiny_tokens(1, 12)
    whole = runtime.score(tokens)
    assert torch.isfinite(whole).all()
    expected = transformers_backend.load(path, device="cpu").score(tokens)
    assert (whole - expected).abs().amax(-1).min() < 1e-4
    alone = runtime.model
    with alone.pages.lend(12) as pages:
        rows = [alone.sequence([token], at, pages, [0]) for at, token in enumerate(tokens[0].tolist())]
    assert torch.equal(torch.cat(rows), whole[0])


def test_weights_that_are_no_numbers_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = fixed("FP8_DYNAMIC", tiny, tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[5, 9] = 0x7F
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"up_proj.*NaN"):
        native(path)


W8A8 = IntScheme(8, None, inputs=InputScheme("int", "token"))


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@pytest.mark.parametrize("where", ["", "down_proj"])
def test_inputs_are_rounded_as_the_format_says(
    model_type: str, where: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, dense = write_packed(tiny(model_type), tmp_path, lambda spec: W8A8 if where in spec.name else None)
    tokens = tiny_tokens(2, 20)
    expected, weights_alone = (transformers_backend.load(path, device="cpu").score(tokens) for path in (packed, dense))
    exact, eight_bit = (native(packed, kernel) for kernel in ("cpu", "cpu-int8"))
    noise = divergence(weights_alone, expected)
    assert noise > 1e-9
    found = exact.score(tokens)
    assert divergence(found, expected) < 0.2 * noise  # a sum's last bit may turn a code that lies on an edge
    assert (found - expected).abs().amax(-1).min() < 1e-4 * (weights_alone - expected).abs().max() + 1e-5
    assert divergence(eight_bit.score(tokens), expected) < noise
    kernels = {use.kernel for use in eight_bit.layers() if use.name.endswith("down_proj")}
    assert all(kernel.endswith("int8 x int8") for kernel in kernels)


def test_inputs_of_experts_are_rounded_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """transformers keeps experts fused and rounds nothing, so the two kernels, which both round, are compared."""
    packed, dense = write_packed(tiny("qwen3_moe"), tmp_path, lambda spec: W8A8 if "experts" in spec.name else None)
    tokens = tiny_tokens(2, 20)
    ways = [[native(path, kernel).score(tokens) for kernel in ("cpu", "cpu-int8")] for path in (packed, dense)]
    of_head = divergence(ways[1][1], ways[1][0])  # the head alone is in 8 bits there
    assert divergence(ways[0][1], ways[0][0]) < 3 * of_head
    assert divergence(ways[1][0], ways[0][0]) > 1e-6


def test_linears_of_one_input_that_round_it_differently_stay_with_transformers(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, dense = write_packed(
        tiny("llama"), tmp_path, lambda spec: W8A8 if spec.name.endswith("1.mlp.up_proj") else IntScheme(4, 32)
    )
    assert "do not round them alike" in loading.decide(Checkpoint.open(packed), "cpu").reason
    tokens = tiny_tokens(2, 20)
    found, weights_alone = (loading.load(path, device="cpu").score(tokens) for path in (packed, dense))
    assert loading.load(packed, device="cpu").name == "transformers+native"
    expected = transformers_backend.load(packed, device="cpu").score(tokens)
    assert divergence(found, expected) < 0.2 * divergence(weights_alone, expected)
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


PROMPTS = ("Once upon a time", "The king said to his daughter that she", "A", "There was once a poor woman who had")


def tokens_and_logprobs(answers: list[Generation]) -> list[tuple[object, ...]]:
    return [(answer.token_ids, answer.logprobs, answer.finish_reason) for answer in answers]


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_company_chunks_or_cache(
    kernel: str, temperature: float, four_bits: tuple[Path, Path]
) -> None:
    """Bit for bit: batched and alone, in chunks and whole, prefix found and computed, put back and never."""
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3, logprobs=3, min_p=0.01)
    runtime = native(four_bits[0], kernel)
    together = tokens_and_logprobs(runtime.generate(PROMPTS, params))
    for index, answer in enumerate(runtime.answers(PROMPTS, params)):
        (alone,) = runtime._finished([answer])
        assert tokens_and_logprobs([alone.generation()]) == together[index : index + 1]

    cached = loading.load(four_bits[0], kernel=kernel, prefix_cache=True)
    long = [f"{PROMPTS[3]} {PROMPTS[1]} {prompt}" * 3 for prompt in PROMPTS]
    expected = runtime.generate(long, params)
    assert tokens_and_logprobs(cached.generate(long, params)) == tokens_and_logprobs(expected)
    again = cached.generate(long, params)
    assert tokens_and_logprobs(again) == tokens_and_logprobs(expected)
    assert min(answer.cached_tokens for answer in again) >= 32
    assert {answer.cached_tokens for answer in runtime.generate(long[:1], params)} == {0}

    small = native(four_bits[0], kernel)  # chunks of 5 tokens, and room for two of the answers
    pool = PagePool(2 * max(len(runtime.encode(text)) + 31 for text in long) // 32, 32)
    small.engine = Engine(small.model.step, pool, step_tokens=5)
    assert tokens_and_logprobs(small.generate(long, params)) == tokens_and_logprobs(expected)
    assert pool.free == pool.count


def test_several_answers_share_their_prompt(tales: NativeRuntime) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, n=3)
    prompt = " ".join(PROMPTS) * 4
    answers = tales.generate([prompt, "A"], params)
    assert len(answers) == 6
    assert len({answer.token_ids for answer in answers[:3]}) == 3
    shared = answers[0].prompt_tokens // 32 * 32
    assert [answer.cached_tokens for answer in answers[:3]] == [0, shared, shared]
    reference = transformers_backend.load(tales.path, device="cpu").generate([prompt, "A"], params)
    assert [answer.token_ids for answer in reference] == [answer.token_ids for answer in answers]


def test_log_probabilities_agree_with_scores(tales: NativeRuntime) -> None:
    (answer,) = tales.generate([[1, 2, 3]], SamplingParams(max_tokens=8, logprobs=1, temperature=0.7))
    scores = tales.score(torch.tensor([[1, 2, 3, *answer.token_ids]]))[0, 2:-1].double().log_softmax(-1)
    assert answer.logprobs is not None
    assert [entry.logprob for entry in answer.logprobs] == [
        float(row[token]) for row, token in zip(scores, answer.token_ids, strict=True)
    ]


def test_a_stream_goes_on_beside_other_answers(tales: NativeRuntime) -> None:
    params = SamplingParams(max_tokens=20, ignore_end=True)
    (expected,) = tales.generate(["A"], params)
    stream = tales.stream("A", params)
    text = next(stream)
    other = tales.generate([PROMPTS[0]], params)
    assert other[0].token_ids == tales.generate([PROMPTS[0]], params)[0].token_ids
    assert text + "".join(stream) == expected.text
    abandoned = tales.stream("A", params)
    next(abandoned)
    abandoned.close()
    assert not tales.engine.busy
    assert tales.model.pages.free == tales.model.pages.count


@pytest.mark.parametrize(
    ("kv_cache", "most"),
    [("bfloat16", 2e-5), ("fp8", 2e-3), ("int8", 2e-4), ("nvfp4", 8e-2), ("int4", 5e-2), ("int2", 0.5)],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_smaller_caches_are_close_and_as_small_as_said(
    kv_cache: str, most: float, model_type: str, packaged_model: Path, tiny: Callable[..., Path]
) -> None:
    path = packaged_model if model_type == "llama" else tiny(model_type)
    exact, small = native(path), loading.load(path, kernel="cpu", kv_cache=kv_cache)
    assert isinstance(small, NativeRuntime)
    rows = windows(exact) if model_type == "llama" else tiny_tokens(2, 60)
    found = divergence(small.score(rows), exact.score(rows))
    assert 0 < found < most
    shape = small.model.shape
    grid = 32 / shape.head_dim
    channels = 3 / 2 + (-(-shape.head_dim // 16) + -(-shape.head_dim // 32)) * grid / 2
    bits = {"bfloat16": 16, "fp8": 8, "int8": 8 + grid, "nvfp4": 4.5 + grid / 2, "int4": 4 + grid, "int2": channels}[
        kv_cache
    ]
    assert small.model.cache_bytes == shape.layers * 2 * shape.kv_heads * shape.head_dim * bits / 8
    prompts = rows[:, :20].tolist()
    alone = [small.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert [answer.token_ids for answer in small.generate(prompts, GREEDY)] == [answer.token_ids for answer in alone]


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_grids_cover_what_they_keep(kv_cache: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Keys and values far from zero, and constant ones, survive: a bias moves all of them."""
    path = Path(shutil.copytree(tiny("qwen2"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    for name in list(tensors):
        if name.endswith(("k_proj.bias", "v_proj.bias")):
            tensors[name] = tensors[name] + 30.0
        if name.endswith("layers.0.self_attn.v_proj.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    exact, small = native(path), loading.load(path, kernel="cpu", kv_cache=kv_cache)
    tokens = tiny_tokens(2, 50)
    assert divergence(small.score(tokens), exact.score(tokens)) < 1e-2


def test_a_cache_that_cannot_be_is_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="not known"):
        loading.load(tiny("llama"), kv_cache="int3")
    for kernel, model_type in (("reference", "llama"), ("auto", "gpt2")):
        with pytest.raises(UserError, match="needs the engine"):
            loading.load(tiny(model_type), kernel=kernel, kv_cache="int8")
