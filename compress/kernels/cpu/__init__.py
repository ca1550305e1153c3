"""The C++ kernels, compiled once per instruction set and chosen at run time: portable, AVX2, AVX-512, VNNI, bfloat16.

`_native` takes contiguous arrays on the CPU of exactly the documented dtypes and shapes and raises TypeError or
ValueError otherwise. `COMPRESS_ISA=portable|avx2|avx512|avx512vnni|avx512bf16` forces an instruction set.
"""
