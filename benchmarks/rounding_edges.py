"""How far schemes that round inputs let the native engine be from transformers, and why: an ulp turns codes on an edge.

    compress quantize --method rtn --scheme W8A8 --no-eval --output build/tales-w8a8
    python -m benchmarks.rounding_edges build/tales-w8a8

KL in nats per token on the beginning of the shipped text: of the engine to transformers (both float32); of transformers
to itself with every input of a linear moved by up to one ulp; of both to transformers in float64; and how far one
linear's outputs are from transformers' where its inputs are equal bit for bit.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.content import calibration_dir
from compress.kernels import packed_linear
from compress.runtime import loading, transformers_backend

TOKENS, WINDOW = 2_000, 100


def divergence(expected: Tensor, found: Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def moved(generator: torch.Generator, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs times one of 1 - 2^-23, 1, 1 + 2^-23."""
    steps = torch.randint(-1, 2, args[0].shape, generator=generator)
    return (args[0] * (1 + steps * 2.0**-23), *args[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact")
    path = parser.parse_args().artifact
    torch.set_num_threads(1)
    reference: Any = transformers_backend.load(path, device="cpu")
    engine: Any = loading.load(path, device="cpu", kernel="cpu")
    text = (calibration_dir() / "tales.txt").read_text(encoding="utf-8")[: 10 * TOKENS]
    tokens = torch.tensor(reference.encode(text)[:TOKENS]).reshape(-1, WINDOW)

    def predictions(runtime: Any) -> Tensor:
        return runtime.score(tokens).double().log_softmax(-1)

    linears = {
        name: module
        for name, module in reference.model.named_modules()
        if isinstance(module, nn.Linear) and name in engine.model.linears and name != "lm_head"
    }
    plain, native = predictions(reference), predictions(engine)
    print(f"engine to transformers: {divergence(plain, native):.1e}")
    generator = torch.Generator().manual_seed(0)
    hooks = [m.register_forward_pre_hook(partial(moved, generator), prepend=True) for m in linears.values()]
    print(f"transformers to itself, inputs of linears moved by an ulp: {divergence(plain, predictions(reference)):.1e}")
    for hook in hooks:
        hook.remove()

    furthest = 0.0
    for name, module in linears.items():
        x = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(1))
        wanted = module(x)
        parts = [packed_linear.multiply(part, x, threads=1) for part in engine.model.linears[name]]
        furthest = max(furthest, float((torch.cat(parts, 1) - wanted).abs().max() / wanted.square().mean().sqrt()))
    print(f"one linear, inputs equal in every bit: at most {furthest:.1e} of the outputs' root mean square")
    reference.model.double()
    exact = predictions(reference)
    print(f"transformers in float64 to transformers: {divergence(exact, plain):.1e}, to the engine:", end=" ")
    print(f"{divergence(exact, native):.1e}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
