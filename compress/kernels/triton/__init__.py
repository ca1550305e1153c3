"""The Triton kernels, for NVIDIA GPUs from compute capability 8.0 on. Importing this package does not import triton.

A kernel is compiled at its first launch, which takes seconds, and kept on disk by triton; arguments that change from
call to call, as the number of tokens does, make no new one. Nothing is chosen by trying at run time: blocks and splits
come from `configs.json`. With `TRITON_INTERPRET=1` the same kernels run on the CPU, far too slowly for anything but
checking their numbers.
"""
