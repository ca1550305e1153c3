"""Train a small language model of Llama architecture from a text: how the packaged model is made.

    python scripts/train_packaged_model.py --text tales_train.txt.xz --tokenizer DIR --output MODEL_DIR \
        --validation tales_calib.txt --held-out tales_test.txt --layers 8 --ffn 640 --minutes 8

Muon on the matrices of the blocks, AdamW on the embedding and the norms; warm-up, plateau, linear warm-down to zero.
Windows are BOS and consecutive tokens; each pass over the text starts at another offset and in another order. A run
that was stopped goes on from its last checkpoint. `--validation` is watched during training; `--held-out` is scored
once, at the end, on the weights as saved. `--smoke` trains a toy in seconds. The last line of stdout is a JSON report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from muon import Muon
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from training_data import Windows, leading_windows, read_tokens
from transformers import AutoConfig, AutoModelForCausalLM

REPORT_TOKENS = 32_768
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SMOKE = {"hidden": 64, "ffn": 128, "layers": 2, "context": 64, "steps": 40, "batch": 8, "minutes": None}
NOT_SETTINGS = ("output", "checkpoint", "held_out", "save_every")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    files = parser.add_argument_group("files")
    files.add_argument("--text", type=Path, required=True, help="training text, UTF-8, plain or .xz")
    files.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json and its config")
    files.add_argument("--output", type=Path, required=True, help="model directory to write")
    files.add_argument("--validation", type=Path, help="text whose loss is watched during training")
    files.add_argument("--held-out", type=Path, help="text scored once, at the end")
    files.add_argument("--checkpoint", type=Path, help="state of an unfinished run (default: beside the output)")
    shape = parser.add_argument_group("shape")
    shape.add_argument("--family", choices=FAMILIES, default="llama", help="the packaged model is a llama")
    for name, value in (("hidden", 256), ("ffn", 640), ("layers", 8), ("heads", 4), ("kv-heads", 2), ("context", 512)):
        shape.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=4000)
    training.add_argument("--minutes", type=float, help="stop after this long instead; the schedule follows the clock")
    training.add_argument("--batch", type=int, default=64, help="windows per step")
    training.add_argument("--matrix-lr", type=float, default=0.02, help="Muon")
    training.add_argument("--other-lr", type=float, default=0.004, help="AdamW: embedding and norms")
    training.add_argument("--weight-decay", type=float, default=0.1)
    training.add_argument("--warm-down", type=float, default=0.6, help="share of the run in which the rate falls to 0")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--compile", action="store_true", help="torch.compile (worth it from some minutes on)")
    training.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    training.add_argument("--smoke", action="store_true", help="a toy model on a piece of the text, in seconds")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    arguments.checkpoint = arguments.checkpoint or arguments.output.with_name(arguments.output.name + ".training.pt")
    return arguments


def make_model(arguments: argparse.Namespace, bos: int, vocabulary: int) -> Any:
    """A fresh model of the asked shape with a tied embedding."""
    torch.manual_seed(arguments.seed)
    config = AutoConfig.for_model(
        arguments.family,
        vocab_size=vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        max_position_embeddings=arguments.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=bos,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # So that the residual stream starts at the same size at any depth.
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * arguments.layers))
    return model


def loss_of(model: Any, windows: Tensor, device: str, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats over every token after BOS; windows (n, 1 + context)."""
    windows = windows.to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda") and model.training):
        logits = model(input_ids=windows[:, :-1]).logits
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def loss_on(model: Any, windows: Tensor, device: str) -> float:
    """Nats per token over windows (n, 1 + context), in evaluation mode."""
    training = model.training
    model.eval()
    total = sum(loss_of(model, chunk, device, "sum").item() for chunk in windows.split(16))
    model.train(training)
    return total / windows[:, 1:].numel()


def learning_rate(progress: float, warm_down: float) -> float:
    """Factor of the peak rate: 2% warm-up, plateau, linear fall to zero over the last `warm_down` of the run."""
    return min(progress / 0.02, 1.0, (1.0 - progress) / warm_down)


class Training:
    """A model in training with all that a checkpoint has to hold."""

    def __init__(self, arguments: argparse.Namespace, model: Any, windows: Windows) -> None:
        self.arguments, self.windows = arguments, windows
        self.model = model.to(arguments.device).train()
        self.forward: Any = torch.compile(self.model) if arguments.compile else self.model
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        chosen = {id(p) for p in matrices}
        self.others = [p for p in model.parameters() if id(p) not in chosen]
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, weight_decay=arguments.weight_decay), arguments.matrix_lr),
            (torch.optim.AdamW(self.others, betas=(0.9, 0.95), weight_decay=0.0), arguments.other_lr),
        ]
        self.settings = {k: str(v) for k, v in sorted(vars(arguments).items()) if k not in NOT_SETTINGS}
        self.step, self.first_loss = 0, math.nan
        self.started = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the run that is done, by the clock where --minutes is given."""
        if self.arguments.minutes is None:
            return self.step / self.arguments.steps
        return (time.monotonic() - self.started) / (60 * self.arguments.minutes)

    def save(self) -> None:
        """Write the checkpoint beside its path and rename it into place."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
            "settings": self.settings,
            "step": self.step,
            "elapsed": time.monotonic() - self.started,
            "first_loss": self.first_loss,
        }
        path = self.arguments.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def resume(self) -> bool:
        """Go on from the checkpoint where one exists. SystemExit when it belongs to a run with other settings."""
        path = self.arguments.checkpoint
        if not path.exists():
            return False
        saved = torch.load(path, map_location=self.arguments.device, weights_only=True)
        if saved["settings"] != self.settings:
            raise SystemExit(f"error: {path} is of a run with other settings\nhint: remove it to start anew")
        self.model.load_state_dict(saved["model"])
        for (optimiser, _), state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.first_loss = saved["step"], saved["first_loss"]
        self.started = time.monotonic() - saved["elapsed"]
        return True

    def advance(self) -> Tensor:
        """One optimiser step; returns the loss before it (a scalar on the device)."""
        factor = learning_rate(max(self.progress, 1e-4), self.arguments.warm_down)
        for optimiser, peak in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = peak * factor
        size = self.arguments.batch
        loss = loss_of(self.forward, self.windows.batch(self.step * size, size), self.arguments.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        self.step += 1
        return loss.detach()

    def run(self, watch: Tensor | None) -> dict[str, Any]:
        """Train to the end and return the run's figures; `watch` windows are scored every 500 steps."""
        resumed_at, saved_at, loss = self.step, time.monotonic(), torch.tensor(math.nan)
        while self.progress < 1:
            loss = self.advance()
            if self.step == 1 or self.step % 50 == 0:
                if not math.isfinite(loss):
                    raise SystemExit(f"error: loss {loss} at step {self.step}\nhint: lower --matrix-lr or --other-lr")
                self.first_loss = loss.item() if self.step == 1 else self.first_loss
            if self.step % 500 == 0:
                seen = "" if watch is None else f", validation {loss_on(self.model, watch, self.arguments.device):.4f}"
                print(f"step {self.step}: {self.progress:.1%}, loss {loss:.4f}{seen}", file=sys.stderr, flush=True)
            if time.monotonic() - saved_at > self.arguments.save_every:
                self.save()
                saved_at = time.monotonic()
        windows = self.step * self.arguments.batch
        return {
            "steps": self.step,
            "resumed_at_step": resumed_at,
            "tokens": windows * self.arguments.context,
            "passes_over_the_text": round(windows / self.windows.count, 2),
            "seconds": round(time.monotonic() - self.started, 1),
            "first_loss": round(self.first_loss, 4),
            "last_loss": round(loss.item(), 4),
        }


def write_model(model: Any, tokenizer_dir: Path, output: Path) -> None:
    """The model in bfloat16 with its tokenizer, complete or not at all."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to("cpu", torch.bfloat16).save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer_dir / name).exists():
            shutil.copyfile(tokenizer_dir / name, partial / name)
    partial.replace(output)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.output.exists():
        raise SystemExit(f"error: {arguments.output} exists\nhint: remove it or choose another --output")
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    bos_token = json.loads((arguments.tokenizer / "tokenizer_config.json").read_text())["bos_token"]
    bos = tokenizer.token_to_id(bos_token)
    if bos is None:
        raise SystemExit(f"error: the tokenizer has no token {bos_token!r}\nhint: correct bos_token in its config")
    reports = {
        name: leading_windows(read_tokens(path, arguments.tokenizer), bos, arguments.context, REPORT_TOKENS)
        for name, path in (("validation", arguments.validation), ("held_out", arguments.held_out))
        if path
    }
    ids = read_tokens(arguments.text, arguments.tokenizer, 400_000 if arguments.smoke else None)
    model = make_model(arguments, bos, tokenizer.get_vocab_size())
    training = Training(arguments, model, Windows(ids, bos, arguments.context, arguments.seed))
    print(f"{len(ids)} tokens" + (f", resumed at step {training.step}" if training.resume() else ""), file=sys.stderr)
    report = training.run(reports.get("validation"))

    # What is reported is what is saved: weights rounded to bfloat16, computed with in float32.
    model.to(torch.bfloat16).float().eval()
    for name, windows in reports.items():
        loss = loss_on(model, windows, arguments.device)
        report[f"{name}_loss"], report[f"{name}_perplexity"] = round(loss, 4), round(math.exp(loss), 3)
    write_model(model, arguments.tokenizer, arguments.output)
    arguments.checkpoint.unlink(missing_ok=True)
    weights = (arguments.output / "model.safetensors").read_bytes()
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["bytes"], report["sha256"] = len(weights), hashlib.sha256(weights).hexdigest()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
