"""Open an artifact without loading the model: manifest, recipe, ledger; and verify every byte of it."""

import compress
from compress.artifact.verify import verify

made = compress.quantize(method="gptq", bits=4, samples=16, seq_len=128, output="tales-w4", eval_tokens=4096)
artifact = compress.Artifact.open(made.path)

print(artifact.artifact_id)
print(artifact.recipe_text)  # `compress run` with it makes the same bytes again

actions: dict[str, int] = {}
for entry in artifact.manifest.ledger.values():
    actions[entry.action] = actions.get(entry.action, 0) + 1
print("what became of the source's tensors:", actions)

report = verify(artifact.path)
print("sound" if report.ok else report.problems)
