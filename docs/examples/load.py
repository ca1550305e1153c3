"""Load an artifact (or any model), generate with it, and get its logits."""

import torch

import compress
from compress.runtime.protocol import SamplingParams

artifact = compress.quantize(method="gptq", bits=4, samples=16, seq_len=128, output="tales-w4", eval_tokens=4096)
model = compress.load(artifact.path)

(answer,) = model.generate(["Once upon a time"], SamplingParams(max_tokens=32, temperature=0.8, seed=7))
print(answer.text)

tokens = torch.tensor([[model.prefix_id, *model.encode("The king was old.")]])
logits = model.score(tokens)  # (1, tokens, vocabulary) float32
print(f"{tuple(logits.shape)}: {model.name}, {model.kernel} {model.dtype} on {model.device}")
