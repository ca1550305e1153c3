"""Make a trained mixture of experts from a small dense Llama: sparse upcycling with a part of every expert begun anew.

    python scripts/upcycle_mixture.py --parent MODEL_DIR --text tales_train.txt.xz --output MIXTURE_DIR

A Mixtral whose experts all start as the parent's feed-forward network (arXiv:2212.05055), which alone would leave them
copies of each other. So each loses neurons of its own, drawn without overlap as far as they go round, which start from
random rows and write nothing yet (after Drop-Upcycling, arXiv:2502.19261, which draws the columns that write, too).
Routers start at random. Then plain cross-entropy and transformers' own load-balancing loss, AdamW, a short rise and a
linear fall of the rate. The last line of stdout is a JSON report; `--validation` is scored on the weights as saved.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_packaged_model import loss_on, write_model
from training_data import Windows, encoded, leading_windows, read_pieces, read_tokens
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

REPORT_TOKENS = 16_384
CHARACTERS_PER_TOKEN = 4
ROUTER_STD = 0.1
RISE = 0.05
BETAS = (0.9, 0.95)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parent", type=Path, required=True, help="directory of a dense Llama")
    parser.add_argument("--text", type=Path, required=True, help="training text, UTF-8, plain or .xz")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--validation", type=Path, help="text scored once, at the end")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--chosen", type=int, default=2, help="experts of a token")
    parser.add_argument("--dropped", type=float, default=0.25, help="share of neurons that each expert starts anew")
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--batch", type=int, default=4, help="windows of the model's context per step")
    parser.add_argument("--rate", type=float, default=8e-4, help="AdamW's, of experts and routers")
    parser.add_argument("--rate-shared", type=float, default=1e-4, help="of all that the parent's tokens shared before")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@torch.no_grad()
def upcycled(parent: Any, experts: int, chosen: int, dropped: float, balance: float) -> Any:
    """The mixture before it is trained, float32; draws from torch's generator."""
    config = parent.config
    kept = {name: getattr(config, name) for name in SHARED if hasattr(config, name)}
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **kept, num_local_experts=experts, num_experts_per_tok=chosen, router_aux_loss_coef=balance,
            sliding_window=None,
        )
    )  # fmt: skip
    shared = {name: tensor for name, tensor in parent.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(shared, strict=False)
    for theirs, ours in zip(parent.model.layers, mixture.model.layers, strict=True):
        gate, up, down = (getattr(theirs.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        neurons, anew = gate.shape[0], round(dropped * gate.shape[0])
        order = torch.randperm(neurons)
        for number in range(experts):
            lost = order[(torch.arange(anew) + number * anew) % neurons]
            rows = [weight.clone() for weight in (gate, up)]
            for weight in rows:
                weight[lost] = torch.randn(anew, weight.shape[1]) * weight.std()
            ours.mlp.experts.gate_up_proj[number] = torch.cat(rows)
            ours.mlp.experts.down_proj[number] = down
            ours.mlp.experts.down_proj[number][:, lost] = 0.0
        torch.nn.init.normal_(ours.mlp.gate.weight, std=ROUTER_STD)
    return mixture


def excerpts(text: Path, characters: int) -> list[str]:
    """The beginnings of all pieces of a text (its books), as long as each other, of so many characters together."""
    pieces = read_pieces(text)
    return [piece[: characters // len(pieces) + 1] for piece in pieces]


SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id", "rope_parameters",
)  # fmt: skip


def train(model: Any, windows: Windows, arguments: argparse.Namespace) -> dict[str, float]:
    """All steps; returns the mean losses of the first and last tenth, the router's loss, and the processor seconds."""
    sparse = [parameter for name, parameter in model.named_parameters() if ".mlp." in name]
    dense = [parameter for name, parameter in model.named_parameters() if ".mlp." not in name]
    groups = [{"params": sparse, "peak": arguments.rate}, {"params": dense, "peak": arguments.rate_shared}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    model.train()
    losses: list[float] = []
    balances: list[float] = []
    began = time.process_time()
    for step in range(arguments.steps):
        progress = step / arguments.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min((progress + 1 / arguments.steps) / RISE, (1 - progress) / (1 - RISE), 1.0)
        ids = windows.batch(step * arguments.batch, arguments.batch)
        loss, balance = _losses(model, ids)
        optimizer.zero_grad(set_to_none=True)
        (loss + arguments.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        balances.append(balance.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"error: loss {losses[-1]} at step {step}\nhint: lower --rate and --rate-shared")
        if (step + 1) % 20 == 0:
            recent = sum(losses[-20:]) / 20
            print(f"step {step + 1}: loss {recent:.4f}, balance {balances[-1]:.3f}", file=sys.stderr, flush=True)
    tenth = max(1, arguments.steps // 10)
    return {
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "balance": sum(balances[-tenth:]) / tenth,
        "processor_seconds": time.process_time() - began,
    }


def _losses(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over every token after BOS, and how uneven the load is (the number chosen where it is even)."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
    return cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten()), output.aux_loss


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.output.exists():
        raise SystemExit(f"error: {arguments.output} exists\nhint: remove it or choose another --output")
    torch.manual_seed(arguments.seed)
    parent: Any = AutoModelForCausalLM.from_pretrained(arguments.parent, dtype=torch.float32)
    config = parent.config
    bos, context = int(config.bos_token_id), int(config.max_position_embeddings)
    validation = None
    if arguments.validation is not None:
        ids = read_tokens(arguments.validation, arguments.parent, 6 * REPORT_TOKENS)
        validation = leading_windows(ids, bos, context, REPORT_TOKENS)
    model = upcycled(parent, arguments.experts, arguments.chosen, arguments.dropped, arguments.balance)
    needed = 1.2 * CHARACTERS_PER_TOKEN * arguments.steps * arguments.batch * context
    windows = Windows(encoded(excerpts(arguments.text, int(needed)), arguments.parent), bos, context, arguments.seed)
    report: dict[str, Any] = {"steps": arguments.steps, "tokens": arguments.steps * arguments.batch * context}
    if validation is not None:
        report["parent_perplexity"] = math.exp(loss_on(parent, validation, "cpu"))
        report["untrained_perplexity"] = math.exp(loss_on(model, validation, "cpu"))
    report |= train(model, windows, arguments)
    model.to(torch.bfloat16).float().eval()
    if validation is not None:
        report["perplexity"] = math.exp(loss_on(model, validation, "cpu"))
    write_model(model, arguments.parent, arguments.output)
    report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
