"""Scoring and generating through transformers, against transformers itself, and everything that is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import content
from compress.errors import CompressError, IntegrityError, UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.runtime.protocol import Runtime, SamplingParams
from compress.runtime.transformers_backend import TransformersRuntime, load
from tests.tiny_models import FAMILIES, POSITIONS, VOCABULARY, tiny_tokens


@pytest.fixture(scope="module")
def tales() -> TransformersRuntime:
    return load(content.default_model(), device="cpu")


@pytest.fixture
def copy(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_are_those_of_transformers(model_type: str, tiny: Callable[..., Path]) -> None:
    path, tokens = tiny(model_type), tiny_tokens(3, 20)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits
    runtime: Runtime = load(path, device="cpu")
    logits = runtime.score(tokens)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


def test_what_a_runtime_says_of_itself(tales: TransformersRuntime) -> None:
    assert (tales.name, tales.device, tales.dtype, tales.kernel) == ("transformers", "cpu", "float32", "dense")
    assert (tales.context_length, tales.vocab_size, tales.prefix_id) == (512, 4096, 0)
    stored = Checkpoint.open(content.default_model()).index.values()
    assert tales.parameters() == sum(math.prod(info.shape) for info in stored)


def test_bfloat16_gives_float32_logits(tiny: Callable[..., Path]) -> None:
    runtime = load(tiny("llama"), device="cpu", dtype="bfloat16")
    assert runtime.model.dtype == torch.bfloat16
    assert runtime.score(tiny_tokens(1, 8)).dtype == torch.float32


def test_encode_adds_nothing_and_decode_inverts(tales: TransformersRuntime) -> None:
    text = '"Dear me," said the dragon.\nSo it went.'
    ids = tales.encode(text)
    assert tales.prefix_id not in ids
    assert tales.decode(ids) == text


def greedy_oracle(runtime: TransformersRuntime, prompt: str, count: int) -> list[int]:
    """Greedy tokens, the whole sequence computed again for each."""
    ids = [runtime.prefix_id, *runtime.encode(prompt)]
    start = len(ids)
    for _ in range(count):
        ids.append(int(runtime.score(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "mixtral", "deepseek_v3"])
def test_greedy_with_cache_equals_without(model_type: str, tiny: Callable[..., Path]) -> None:
    runtime = load(tiny(model_type), device="cpu")
    expected = greedy_oracle(runtime, "a tale", 12)
    answer = runtime.generate(["a tale"], SamplingParams(max_tokens=12, ignore_end=True))[0]
    assert list(answer.token_ids) == expected


def test_greedy_text_continues_the_prompt(tales: TransformersRuntime) -> None:
    prompts = ["Once upon a time", "The king said"]
    both = tales.generate(prompts, SamplingParams(max_tokens=8))
    for prompt, answer in zip(prompts, both, strict=True):
        assert answer.token_ids == tales.generate([prompt], SamplingParams(max_tokens=8))[0].token_ids
        assert list(answer.token_ids) == greedy_oracle(tales, prompt, 8)
        assert answer.text == tales.decode(answer.token_ids)
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens == 1 + len(tales.encode(prompt))
        assert answer.seconds == answer.prefill_seconds + answer.decode_seconds > 0


def test_a_tokenizer_that_drops_leading_spaces_keeps_them(shared: Path) -> None:
    runtime = load(shared / "models" / "stories260K", device="cpu")
    answer = runtime.generate(["Once upon a"], SamplingParams(max_tokens=3))[0]
    assert answer.text.startswith(" ")
    assert not runtime.decode(answer.token_ids).startswith(" ")


def test_sampling_is_seeded_and_private(tales: TransformersRuntime) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
    state = torch.random.get_rng_state()
    first = tales.generate(["Once"] * 2, params)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    again = tales.generate(["Once"] * 2, params)
    assert [a.token_ids for a in first] == [a.token_ids for a in again]
    assert first[0].token_ids != first[1].token_ids
    other = tales.generate(["Once"], SamplingParams(max_tokens=12, temperature=1.0, seed=6))
    assert other[0].token_ids != first[0].token_ids


def test_an_end_token_stops(copy: Path) -> None:
    free = load(copy, device="cpu").generate(["x"], SamplingParams(max_tokens=6, ignore_end=True))[0]
    stop = free.token_ids[3]
    at = free.token_ids.index(stop)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    runtime = load(copy, device="cpu")
    answer = runtime.generate(["x"], SamplingParams(max_tokens=6))[0]
    assert answer.finish_reason == "stop"
    assert answer.token_ids == free.token_ids[:at]
    assert runtime.generate(["x"], SamplingParams(max_tokens=6, ignore_end=True))[0].token_ids == free.token_ids


def test_the_context_ends_an_answer(tiny: Callable[..., Path]) -> None:
    runtime = load(tiny("llama"), device="cpu")
    answer = runtime.generate(["y" * 60], SamplingParams(max_tokens=50, ignore_end=True))[0]
    assert answer.finish_reason == "context"
    assert len(answer.token_ids) == POSITIONS - 61
    with pytest.raises(UserError, match="context 64"):
        runtime.generate(["y" * 63], SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    "tokens",
    [
        tiny_tokens(1, POSITIONS + 1),
        torch.tensor([[VOCABULARY]]),
        torch.tensor([[-1]]),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1, 0, dtype=torch.int64),
    ],
)
def test_token_ids_out_of_range_are_refused(tokens: torch.Tensor, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError):
        load(tiny("llama"), device="cpu").score(tokens)


def test_nan_weights_stop_generation(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(WorkError, match="not finite"):
        load(copy, device="cpu").generate(["x"], SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "1 missing keys"),
        (lambda t: t.update({"model.layers.0.mlp.left_proj.weight": torch.zeros(2)}), "1 unexpected keys"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}), "1 mismatched keys"),
    ],
)
def test_every_key_is_accounted_for(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, copy: Path
) -> None:
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=words):
        load(copy, device="cpu")


def test_a_truncated_shard_is_refused(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(IntegrityError):
        load(copy, device="cpu")


@pytest.mark.parametrize("model_type", ["no_such_model", "vit", None])
def test_models_that_are_no_language_models_are_refused(model_type: str | None, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = model_type
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError) as caught:
        load(copy, device="cpu")
    assert isinstance(caught.value, UserError)


def test_a_directory_without_tokenizer_is_refused(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load(copy, device="cpu")


def test_a_broken_generation_config_is_refused(copy: Path) -> None:
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config"):
        load(copy, device="cpu")


def test_nothing_is_executed_from_a_model_directory(copy: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    (copy / "trap.py").write_text(f"open({str(trap)!r}, 'w')\nclass C: ...\n")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.C"}
    (copy / "config.json").write_text(json.dumps(config))
    load(copy, device="cpu")
    config["model_type"] = "mine"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load(copy, device="cpu")
    assert not trap.exists()


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "cuda:99"}, {"dtype": "int3"}, {"kernel": "triton"}])
def test_unknown_options_are_refused(options: dict[str, str], tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError) as caught:
        load(tiny("llama"), **{"device": "cpu", **options})
    assert next(iter(options.values())).split(":")[0] in caught.value.message


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        load(tmp_path / "nowhere", device="cpu")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 64 bytes"),
    ],
)
def test_running_out_of_memory_is_told_as_such(
    error: Exception, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    runtime = load(tiny("llama"), device="cpu")
    monkeypatch.setattr(runtime.model, "forward", fail)
    with pytest.raises(WorkError, match="out of memory while scoring"):
        runtime.score(tiny_tokens(1, 4))
    with pytest.raises(WorkError, match="out of memory while generating"):
        runtime.generate(["x"], SamplingParams(max_tokens=2))
    monkeypatch.setattr(type(runtime.model), "from_pretrained", fail)
    with pytest.raises(WorkError, match="out of memory while loading"):
        load(tiny("llama"), device="cpu")


def test_other_failures_of_the_model_are_not_disguised(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    runtime = load(tiny("llama"), device="cpu")
    monkeypatch.setattr(runtime.model, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        runtime.score(tiny_tokens(1, 4))


def test_loading_is_silent(tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny("llama"), device="cpu").generate(["x"], SamplingParams(max_tokens=2))
    assert capfd.readouterr() == ("", "")


def test_float8_checkpoints_go_through_transformers(copy: Path) -> None:
    tensors, dense = load_file(copy / "model.safetensors"), load_file(copy / "model.safetensors")
    linears = [name for name in tensors if name.endswith("proj.weight")]
    for name in linears:
        scale = tensors[name].abs().amax(1, keepdim=True) / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
        dense[name] = tensors[name].float() * scale
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (copy / "config.json").write_text(json.dumps(config))
    state = load(copy, device="cpu").model.state_dict()
    assert linears
    for name in linears:
        torch.testing.assert_close(state[name], dense[name])
    config["quantization_config"]["config_groups"]["group_1"] = {"targets": ["re:.*q_proj"], "weights": weights}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="mixes several"):
        load(copy, device="cpu")
