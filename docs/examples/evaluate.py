"""Score an artifact against the model it was made from, on the same tokens, with intervals."""

import compress
from compress.evaluation.records import write_record

artifact = compress.quantize(method="gptq", bits=4, samples=16, seq_len=128, output="tales-w4", eval_tokens=4096)
record = compress.evaluate(artifact.path, baseline=compress.default_model(), max_tokens=8192)
summary = record.text().summary

for name in ("perplexity_baseline", "perplexity", "perplexity_ratio", "kl_mean", "top1_agreement"):
    measure = getattr(summary, name)
    print(f"{name:20} {measure.estimate:.4f}  [{measure.low:.4f}, {measure.high:.4f}]")

# The record keeps sums per document or block of tokens, so a gate can decide on it without either model.
write_record(record, "eval.json")
