"""What a quantisation would make and cost, before it is made. Writes nothing."""

import compress

plan = compress.plan(method="gptq", bits=3)

print(f"{plan.model}: {len(plan.linears)} linears at {plan.bits_per_weight:.3f} bits per weight")
print(f"{plan.source_bytes / 1e6:.1f} MB -> {plan.output_bytes / 1e6:.1f} MB, about {plan.seconds_estimate:.0f} s")
print(f"would go to {plan.output}")

# What would make the run fail is listed, not raised: no multiple of 100 fits these widths.
for problem in compress.plan(method="rtn", group_size=100).problems:
    print("problem:", problem)
