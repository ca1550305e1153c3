"""The release gate's parts: kinds of gate, what they measure, and how measures become a verdict. Free of torch.

The verb is `compress.evaluation.gate.gate`; policies are in `compress.evaluation.policy`, verdicts in
`compress.evaluation.verdict`.
"""
