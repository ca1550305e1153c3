"""The native module's edges: it refuses every bad argument instead of reading past an array, and obeys COMPRESS_ISA."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress.kernels.cpu
from compress.errors import UserError
from compress.kernels import dispatch
from compress.kernels.cpu import _native


def gptq() -> dict[str, Any]:
    return {
        "weight": torch.zeros(3, 16),
        "upper": torch.eye(16),
        "scale": torch.ones(3, 2),
        "zero_point": torch.zeros(3, 2),
        "group_of_column": torch.arange(16, dtype=torch.int32) // 8,
        "qmin": -8,
        "qmax": 7,
        "codes": torch.zeros(3, 16, dtype=torch.int8),
        "loss": torch.zeros(3),
        "threads": 1,
    }


def descent() -> dict[str, Any]:
    arguments = gptq()
    arguments["gradient"], arguments["hessian"] = arguments.pop("weight"), arguments.pop("upper")
    del arguments["loss"]
    return {**arguments, "sweeps": 2}


def rounding() -> dict[str, Any]:
    return {
        "weight": torch.zeros(3, 16),
        "scales": torch.ones(2, 16),
        "shares": torch.ones(2),
        "importance": torch.ones(2, 16),
        "group_size": 8,
        "bits": 4,
        "symmetric": True,
        "loss": torch.zeros(2),
        "threads": 1,
    }


def search() -> dict[str, Any]:
    return {
        "weight": torch.zeros(3, 16),
        "importance": torch.ones(2, 8, 8),
        "shares": torch.ones(2),
        "offsets": torch.ones(2),
        "group_size": 8,
        "bits": 4,
        "symmetric": True,
        "scale_type": "bfloat16",
        "share": torch.zeros(3, 2),
        "sign": torch.zeros(3, 2),
        "threads": 1,
    }


CALLS = {
    "gptq_quantize": (_native.gptq_quantize, gptq),
    "coordinate_descent": (_native.coordinate_descent, descent),
    "rounding_loss": (_native.rounding_loss, rounding),
    "search_range": (_native.search_range, search),
}
ARRAYS = [
    (call, name)
    for call, (_, make) in CALLS.items()
    for name, value in make().items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("call", CALLS)
def test_good_arguments_pass(call: str) -> None:
    function, make = CALLS[call]
    function(**make())


@pytest.mark.parametrize(("call", "name"), ARRAYS)
def test_wrong_dtype(call: str, name: str) -> None:
    function, make = CALLS[call]
    arguments = make()
    arguments[name] = arguments[name].to(torch.int64)
    with pytest.raises(TypeError, match=name):
        function(**arguments)


WRONG_SHAPES = [
    (call, name, change)
    for call, name in ARRAYS
    for change in ("row more", "row less", "column more", "flat", "empty")
    # any number of rows, of shares and of offsets is right: nothing else has as many
    if (call, name) != ("rounding_loss", "weight") or "row" not in change
    if name != "shares" or change in ("flat", "empty")
    if name != "offsets" or change == "flat"
]


@pytest.mark.parametrize(("call", "name", "change"), WRONG_SHAPES)
def test_wrong_shape(call: str, name: str, change: str) -> None:
    function, make = CALLS[call]
    arguments = make()
    array = arguments[name]
    shape = list(array.shape)
    if change == "flat":
        shape = [1, *shape] if array.dim() == 1 else [array.numel()]
    elif change == "empty":
        shape[0] = 0
    elif change == "column more":
        shape[-1] += 1
    else:
        shape[0] += 1 if change == "row more" else -1
    arguments[name] = torch.zeros(shape, dtype=array.dtype)
    with pytest.raises(ValueError, match="must be"):
        function(**arguments)


@pytest.mark.parametrize(("call", "name"), ARRAYS)
def test_not_contiguous(call: str, name: str) -> None:
    function, make = CALLS[call]
    arguments = make()
    array = arguments[name]
    arguments[name] = array.repeat_interleave(2, dim=-1)[..., ::2]
    if array.shape[-1] == 1:
        pytest.skip("a single column is always contiguous")
    with pytest.raises(ValueError, match=f"{name} must be contiguous"):
        function(**arguments)


@pytest.mark.parametrize(
    ("call", "changes", "words"),
    [
        ("gptq_quantize", {"qmin": 8}, "qmin"),
        ("gptq_quantize", {"qmax": 128}, "qmax"),
        ("gptq_quantize", {"threads": 0}, "threads"),
        ("gptq_quantize", {"group_of_column": torch.full((16,), 2, dtype=torch.int32)}, "group_of_column"),
        ("gptq_quantize", {"group_of_column": torch.full((16,), -1, dtype=torch.int32)}, "group_of_column"),
        ("gptq_quantize", {"zero_point": torch.full((3, 2), 0.5)}, "zero_point"),
        ("gptq_quantize", {"zero_point": torch.full((3, 2), float("nan"))}, "zero_point"),
        ("gptq_quantize", {"zero_point": torch.full((3, 2), 1e9)}, "zero_point"),
        ("coordinate_descent", {"sweeps": -1}, "sweeps"),
        ("coordinate_descent", {"group_of_column": torch.full((16,), 2, dtype=torch.int32)}, "group_of_column"),
        ("rounding_loss", {"group_size": 5}, "group_size"),
        ("rounding_loss", {"bits": 9}, "bits"),
        ("rounding_loss", {"threads": 0}, "threads"),
        ("search_range", {"group_size": 5}, "group_size"),
        ("search_range", {"bits": 1}, "bits"),
        ("search_range", {"scale_type": "float64"}, "scale_type"),
        ("search_range", {"threads": 0}, "threads"),
    ],
)
def test_wrong_value(call: str, changes: dict[str, Any], words: str) -> None:
    function, make = CALLS[call]
    with pytest.raises(ValueError, match=words):
        function(**{**make(), **changes})


@pytest.mark.parametrize("value", [None, "weight", [[1.0]]])
def test_not_an_array(value: object) -> None:
    with pytest.raises(TypeError):
        _native.gptq_quantize(**{**gptq(), "weight": value})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("gptq_quantize", "codes"),
        ("gptq_quantize", "loss"),
        ("coordinate_descent", "gradient"),
        ("coordinate_descent", "codes"),
        ("rounding_loss", "loss"),
        ("search_range", "share"),
        ("search_range", "sign"),
    ],
)
def test_results_are_not_written_to_read_only_memory(call: str, name: str) -> None:
    function, make = CALLS[call]
    arguments = make()
    array = arguments[name].numpy()
    array.flags.writeable = False
    with pytest.raises(TypeError):
        function(**{**arguments, name: array})


def test_numpy_arrays_are_as_good_as_tensors() -> None:
    of_torch = gptq()
    of_torch["weight"] = torch.arange(48.0).reshape(3, 16) - 20
    of_numpy = {
        name: value.numpy().copy() if isinstance(value, torch.Tensor) else value for name, value in of_torch.items()
    }
    _native.gptq_quantize(**of_torch)
    _native.gptq_quantize(**of_numpy)
    assert of_numpy["codes"].any()
    assert (of_numpy["codes"] == of_torch["codes"].numpy()).all()


def test_other_threads_run_meanwhile() -> None:
    """The GIL is dropped: a Python thread makes progress during one long call."""
    n = 1024
    columns = torch.zeros(n, dtype=torch.int32)
    arguments = (torch.randn(n, n), torch.eye(n), torch.ones(n, 1), torch.zeros(n, 1), columns, -8, 7)
    codes, loss = torch.empty(n, n, dtype=torch.int8), torch.empty(n)
    running, ticks, seen = True, 0, 0

    def tick() -> None:
        nonlocal ticks
        while running:
            ticks += 1

    counter = threading.Thread(target=tick)
    counter.start()
    try:
        for _ in range(50):
            before = ticks
            _native.gptq_quantize(*arguments, codes, loss, 1)
            seen = max(seen, ticks - before)
            if seen > 1000:
                break
    finally:
        running = False
        counter.join()
    assert seen > 1000


def isa_of_a_new_process(value: str) -> subprocess.CompletedProcess[str]:
    code = "from compress.kernels.cpu import _native; print(_native.isa())"
    environment = {**os.environ, "COMPRESS_ISA": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_environment_forces_an_instruction_set(isa: str) -> None:
    assert isa_of_a_new_process(isa).stdout.strip() == isa


def test_empty_environment_means_the_best() -> None:
    assert isa_of_a_new_process("").stdout.strip() == _native.available_isas()[-1]


def test_unknown_instruction_set_is_an_error() -> None:
    result = isa_of_a_new_process("sse9")
    assert result.returncode != 0
    assert "'sse9' is not available here; available: portable" in result.stderr
    with pytest.raises(ValueError, match="sse9"):
        _native.set_isa("sse9")


def test_dispatch_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("instruction set 'sse9' is not available here; available: portable")

    monkeypatch.setattr(_native, "isa", refuse)
    with pytest.raises(UserError, match="COMPRESS_ISA"):
        dispatch.choose("packed_linear", "cpu")


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_dispatch_gives_a_reason(operation: str) -> None:
    assert dispatch.choose(operation, "cpu").name == f"native-{_native.isa()}"
    on_gpu = dispatch.choose(operation, "cuda")
    assert on_gpu.name in ("batched", "reference")
    assert "cuda" in on_gpu.reason.lower()
    with pytest.raises(ValueError, match="unknown operation"):
        dispatch.choose("gemv_int4", "cpu")


def test_stub_lists_what_the_module_has() -> None:
    stub = Path(compress.kernels.cpu.__file__).with_name("_native.pyi")
    body = ast.parse(stub.read_text()).body
    declared = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    functions: set[str] = {name for name, value in vars(_native).items() if isinstance(value, Callable)}  # type: ignore[arg-type]
    assert declared == {name for name in functions if not name.startswith("_")}
