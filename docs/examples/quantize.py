"""Quantise the packaged model (give a directory or hub id for another) and look at what came out."""

import compress

# Little calibration, so that the example takes seconds; leave `samples` and `seq_len` out for real work.
# The same call again finds the finished artifact and returns it; a killed one resumes.
artifact = compress.quantize(method="gptq", bits=4, samples=16, seq_len=128, output="tales-w4", eval_tokens=4096)

sizes = artifact.manifest.sizes
print(f"{artifact.path}: {sizes.bytes / 1e6:.2f} MB, {sizes.bits_per_weight} bits per weight")

scores = artifact.eval()["texts"][0]["summary"]
print(f"perplexity {scores['perplexity_baseline']['estimate']:.2f} -> {scores['perplexity']['estimate']:.2f}")
print(f"KL per token {scores['kl_mean']['estimate']:.4f} nats")

worst = max(artifact.layers(), key=lambda layer: layer["output_error"])
print(f"largest output error: {worst['name']}, {worst['output_error']:.1e}")
