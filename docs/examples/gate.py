"""Decide by a policy whether an artifact may be released."""

import compress

artifact = compress.quantize(method="gptq", bits=4, samples=16, seq_len=128, output="tales-w4", eval_tokens=4096)
verdict = compress.gate(artifact.path)  # its own scores, the packaged policy

for result in verdict.gates:
    print(f"{result.verdict:12} {result.id}: {result.message}")
print(verdict.verdict)
