"""The C++ kernels, compiled once per instruction set (portable, AVX2, AVX-512) and chosen at run time.

`_native` takes contiguous arrays on the CPU of exactly the documented dtypes and shapes and raises TypeError or
ValueError otherwise. `COMPRESS_ISA=portable|avx2|avx512` forces an instruction set.
"""
