"""The engine in Triton kernels gives what the native engine gives: alone, together, in chunks, from a prefix."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.scoring_kernel import open_runtime
from compress.runtime import loading, paged_backend
from compress.runtime.protocol import SamplingParams
from compress.schemes import FIXED_SCHEMES
from compress.types import IntScheme
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels import gpu_linear
from compress.kernels.triton import available, experts
from compress.runtime.gpu_backend import GpuRuntime
from compress.runtime.gpu_graphs import DecodeSteps
from compress.runtime.native_families import NATIVE_FAMILIES
from compress.runtime.paged_model import Chunk

SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 64, "num_hidden_layers": 1}
"""Every program of a kernel takes its time in the interpreter."""

QUICK = ("gemma3_text",)  # offset norms, norms of heads and of outputs, windows, two rotations
Open = Callable[..., GpuRuntime]


@pytest.fixture(scope="module")
def packed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tiny("llama", **SMALL), tmp_path_factory.mktemp("four"), fitting(4, 32, False))[0]


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", **SMALL)


@pytest.fixture
def opened(device: str) -> Open:
    def opened(path: Path, dtype: str = "float32", **settings: Any) -> GpuRuntime:
        found = loading.load(path, device=device, dtype=dtype, kernel="triton", cache_tokens=256, **settings)
        assert isinstance(found, GpuRuntime)
        return found

    return opened


@pytest.mark.parametrize(
    "model_type",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NATIVE_FAMILIES],
)
def test_scores_of_every_family_are_the_native_engines(
    model_type: str, tiny: Callable[..., Path], opened: Open, tmp_path: Path
) -> None:
    few = {"num_attention_heads": 2, "num_key_value_heads": 1}
    path, _ = write_packed(tiny(model_type, **few), tmp_path, fitting(4, 32))
    tokens = tiny_tokens(1, 6)
    runtime, native = opened(path), loading.load(path, device="cpu", kernel="cpu")
    torch.testing.assert_close(runtime.score(tokens).cpu(), native.score(tokens), rtol=2e-4, atol=2e-4)
    assert runtime.parameters() == native.parameters()
    uses, theirs = ({use.name: use for use in one.layers()} for one in (runtime, native))
    assert uses.keys() == theirs.keys()
    assert all(use.weights == theirs[name].weights for name, use in uses.items())
    assert {use.kernel for name, use in uses.items() if "proj" in name} <= {"triton w4a16-g32", "triton w4a16"}


def test_answers_are_the_native_engines_alone_together_and_from_a_prefix(plain: Path, opened: Open) -> None:
    prompts = [tiny_tokens(34, seed=1).tolist(), [5], [7, 8, 9]]  # one longer than a page
    params = SamplingParams(max_tokens=2, ignore_end=True)
    native = loading.load(plain, device="cpu", kernel="cpu").generate(prompts, params)
    runtime = opened(plain, prefix_cache=True)
    together = runtime.generate(prompts, params)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in native]
    again = runtime.generate(prompts[:1], params)[0]
    assert (again.token_ids, again.cached_tokens) == (native[0].token_ids, 32)
    assert (runtime.name, runtime.kernel, runtime.deterministic) == ("gpu", "triton", False)


def test_chunks_and_neighbours_do_not_show(plain: Path, opened: Open) -> None:
    model = opened(plain).model
    tokens = tiny_tokens(36, seed=2).tolist()
    with model.pages.lend(36) as own, model.pages.lend(3) as other:
        whole = model.step([Chunk(tokens, 0, own, [34, 35])])
        model.step([Chunk(tokens[:30], 0, own, [])])
        # one token of another sequence goes before a chunk, whatever their order in the step
        mixed = model.step([Chunk(tokens[30:35], 30, own, [4]), Chunk([3], 0, other, [0])])
        last = model.step([Chunk(tokens[35:], 35, own, [0])])
        alone = model.step([Chunk([3], 0, other, [0])])
    torch.testing.assert_close(torch.cat([mixed[:1], last]), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "dtype", "kv_cache"),
    [("llama", "bfloat16", "auto"), ("gemma3_text", "float32", "int8"), ("mixtral", "float32", "auto")],
)
def test_no_bit_depends_on_company_where_that_is_wanted(
    model_type: str, dtype: str, kv_cache: str, tiny: Callable[..., Path], opened: Open, tmp_path: Path
) -> None:
    """Batched equals alone, in chunks equals whole, a found prefix a cold one."""
    sizes = {
        "llama": SMALL,
        "mixtral": {**SMALL, "intermediate_size": 64, "num_local_experts": 3},
        "gemma3_text": {"num_attention_heads": 2, "num_key_value_heads": 1},
    }
    path = write_packed(tiny(model_type, **sizes[model_type]), tmp_path, fitting(4, 32))[0]
    runtime = opened(path, dtype, prefix_cache=True, deterministic=True, kv_cache=kv_cache)
    assert runtime.deterministic
    model, tokens = runtime.model, tiny_tokens(35, seed=2).tolist()
    with model.pages.lend(36) as own, model.pages.lend(64) as other:
        whole = model.step([Chunk(tokens, 0, own, [33, 34])])
        alone = model.step([Chunk([3], 0, other, [0])])
        model.step([Chunk(tokens[:30], 0, own, [])])
        mixed = model.step([Chunk(tokens[30:34], 30, own, [3]), Chunk([3], 0, other, [0])])
        again = [Chunk([3], 0, other[i : i + 1], [0]) for i in range(2)]
        last = model.step([again[0], Chunk(tokens[34:], 34, own, [0]), again[1]])  # three in a step for four
    assert torch.equal(torch.cat([mixed[:1], last[1:2]]), whole)
    assert torch.equal(torch.cat([mixed[1:], last[::2]]), alone.expand(3, -1))
    if dtype == "float32" and kv_cache == "auto":
        wanted = loading.load(path, device="cpu", kernel="cpu").score(torch.tensor([tokens]))[0, 33:]
        torch.testing.assert_close(whole.cpu(), wanted, rtol=2e-4, atol=2e-4)
    params = SamplingParams(max_tokens=2, ignore_end=True, logprobs=1)
    cold, hit = (runtime.generate([tokens, [5]][:count], params)[0] for count in (1, 2))
    assert (cold.cached_tokens, hit.cached_tokens) == (0, 32)
    assert (hit.token_ids, hit.logprobs) == (cold.token_ids, cold.logprobs)


def test_determinism_that_transformers_cannot_give_is_refused(tiny: Callable[..., Path], device: str) -> None:
    with pytest.raises(UserError, match="deterministic products need the engine"):
        loading.load(tiny("gpt2"), device=device, deterministic=True)


def test_scores_that_these_kernels_are_asked_for_are_deterministic(packed: Path, device: str) -> None:
    runtime = open_runtime(packed, device, "float32", "triton")
    assert (runtime.name, runtime.deterministic) == ("gpu", True)
    rows = tiny_tokens(2, 9, seed=4)
    assert torch.equal(runtime.score(rows)[1:], runtime.score(rows[1:]))
    native = open_runtime(packed, "cpu", "auto", "cpu")
    torch.testing.assert_close(runtime.score(rows).cpu(), native.score(rows), rtol=2e-4, atol=2e-4)


def test_places_that_no_sequence_takes_change_nothing(plain: Path, opened: Open) -> None:
    model = opened(plain).model
    with model.pages.lend(96) as pages:  # three sequences in a step for four, one of them in page 0
        alone = [model.step([Chunk([7 + i], 0, [page], [0])]) for i, page in enumerate(pages)]
        kept = model._kept[0].keys[pages[0]].clone()
        chunks = [Chunk([7 + i], 0, [page], [0]) for i, page in enumerate(pages)]
        together = model.step(chunks)
        assert torch.equal(model.step(chunks), together)  # the same step repeats bit for bit
        torch.testing.assert_close(model._kept[0].keys[pages[0]], kept)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "lost"), [("int8", 0.02), ("int4", 0.2), ("fp8", 0.1)])
def test_smaller_caches(
    kind: str, lost: float, tiny: Callable[..., Path], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_backend, "TOKENS", 4)  # FP8 without scales is measured at load
    path = tiny("llama", **{**SMALL, "num_hidden_layers": 2})
    runtime = opened(path, kv_cache=kind, kv_skip="1")
    tokens = tiny_tokens(1, 6)
    wanted = loading.load(path, device="cpu", kernel="cpu").score(tokens)
    error = (runtime.score(tokens).cpu() - wanted).square().mean().sqrt()
    assert 0 < error < lost * wanted.std()
    heads, layers = 16, {"int8": 2 * (16 + 4), "int4": 2 * (8 + 4), "fp8": 2 * 16}
    assert runtime.model.reserved_bytes == (256 + 32) * runtime.model.cache_bytes
    assert runtime.model.cache_bytes == layers[kind] + 2 * 2 * heads  # and bfloat16 where it was skipped


def test_what_a_gpu_does_not_keep_is_refused(plain: Path, device: str) -> None:
    with pytest.raises(UserError, match="no int2 key-value cache here"):
        loading.load(plain, device=device, kernel="triton", kv_cache="int2")


def test_a_wrong_kernel_is_found_at_load(packed: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_linear.multiply
    monkeypatch.setattr(gpu_linear, "multiply", lambda *given: 1.05 * right(*given))
    with pytest.raises(WorkError, match="differs from that of the decoded weight"):
        opened(packed)


def test_a_wrong_dense_kernel_is_found_at_load(plain: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_linear.multiply_dense
    monkeypatch.setattr(gpu_linear, "multiply_dense", lambda *given: 1.05 * right(*given))
    with pytest.raises(WorkError, match="q_proj: the Triton product of 3 tokens differs"):
        opened(plain, deterministic=True)


def test_linears_of_other_schemes_stand_beside_each_other(
    tiny: Callable[..., Path], opened: Open, tmp_path: Path
) -> None:
    """q, k and v in three widths, which no one product takes; the head packed, and tied to the embedding."""

    def choose(spec: Any) -> IntScheme:
        return IntScheme(2 if "q_proj" in spec.name else 8 if "k_proj" in spec.name else 4, 32)

    path, _ = write_packed(tiny("llama", **SMALL), tmp_path, choose, outside=True)
    runtime, native = opened(path), loading.load(path, device="cpu", kernel="cpu")
    tokens = tiny_tokens(1, 3)
    torch.testing.assert_close(runtime.score(tokens).cpu(), native.score(tokens), rtol=2e-4, atol=2e-4)
    uses = {use.name: use for use in runtime.layers()}
    assert uses["lm_head"].aliases == ("model.embed_tokens",)
    assert uses["lm_head"].kernel == "triton w4a16-g32"
    assert uses["model.layers.0.self_attn.q_proj"].kernel == "triton w2a16-g32"


def test_experts_as_one_weight_and_one_by_one(
    tiny: Callable[..., Path], opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("mixtral", **SMALL, intermediate_size=64, num_local_experts=3)
    model = opened(write_packed(path, tmp_path, fitting(4, 32))[0]).model
    with model.pages.lend(64) as pages:
        chunks = [Chunk([7 + i], 0, [page], [0]) for i, page in enumerate(pages)]
        assert model._decode.takes(chunks)
        together = model.step(chunks)
        monkeypatch.setattr(experts, "MOST_ALONE", 0)  # those of one expert in blocks
        torch.testing.assert_close(model.step(chunks), together, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(
            model, "_layers", [replace(one, mlp=replace(one.mlp, grouped=None)) for one in model._layers]
        )
        torch.testing.assert_close(model.step(chunks), together, rtol=1e-4, atol=1e-4)
    assert not opened(path).model._decode.takes(chunks)  # no kernel takes dense experts by their numbers


@pytest.mark.parametrize(("part", "damage"), [("weight_scale", torch.inf), ("weight", torch.nan)])
def test_damaged_weights_are_refused(
    part: str, damage: float, plain: Path, packed: Path, opened: Open, tmp_path: Path
) -> None:
    path = packed
    if part == "weight":
        path = tmp_path / "fp8"
        compress.quantize(plain, "rtn", scheme="FP8_DYNAMIC", output=path, evaluate=False)
    copy = shutil.copytree(path, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    damaged = tensors[f"model.layers.0.mlp.up_proj.{part}"]
    damaged[-1, -1] = damage
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"0.mlp.up_proj.*NaN"):
        opened(copy)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED_SCHEMES)
def test_every_scheme(name: str, tiny: Callable[..., Path], opened: Open, tmp_path: Path) -> None:
    wide = {**SMALL, "hidden_size": 128, "head_dim": 64, "intermediate_size": 128}
    wide |= {"attention_bias": False, "mlp_bias": False} if name == "W2A8" else {}  # which knows no biases
    path, method = tmp_path / name, "ternary" if name == "W2A8" else "rtn"
    compress.quantize(
        tiny("llama", **wide), method, scheme=name, output=path, evaluate=False, samples=4, seq_len=32
    )  # fmt: skip
    runtime, native = opened(path), loading.load(path, device="cpu", kernel="cpu")
    tokens = tiny_tokens(1, 3)
    found, wanted = runtime.score(tokens).cpu(), native.score(tokens)
    # FP8 cores add in about 14 bits, which moves some inputs of the next linear to another code
    coarse = name.startswith("FP8") and available.multiplies_fp8(torch.device(runtime.device))
    assert float((found - wanted).square().mean().sqrt()) < (3e-2 if coarse else 1e-3) * float(wanted.std())
    kernels = {use.kernel for use in runtime.layers() if "proj" in use.name}
    assert kernels == {"decoded float32" if name == "NF4" else f"triton {FIXED_SCHEMES[name].label}"}


@pytest.mark.slow
def test_long_sequences_take_the_long_factors(tiny: Callable[..., Path], opened: Open) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.7 * i for i in range(8)], "original_max_position_embeddings": 4}  # fmt: skip
    path = tiny("phi3", num_attention_heads=6, rope_parameters=rope, original_max_position_embeddings=4)
    runtime, native = opened(path), loading.load(path, device="cpu", kernel="cpu")
    for length in (4, 6):
        tokens = tiny_tokens(1, length)
        torch.testing.assert_close(runtime.score(tokens).cpu(), native.score(tokens), rtol=2e-4, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
def test_recorded_steps_are_those_that_are_called(packed: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=20, ignore_end=True)
    prompts = [[5, 6], [7, 8, 9], tiny_tokens(20, seed=3).tolist()]
    recorded = loading.load(packed, device="cuda", dtype="float32", kv_cache=kind)
    answers = recorded.generate(prompts, params)
    monkeypatch.setattr(DecodeSteps, "takes", lambda self, chunks: False)
    called = loading.load(packed, device="cuda", dtype="float32", kv_cache=kind)
    assert [answer.token_ids for answer in called.generate(prompts, params)] == [a.token_ids for a in answers]
    again = recorded.generate(prompts[:1], params)[0]
    assert again.token_ids == answers[0].token_ids
