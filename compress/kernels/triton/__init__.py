"""The Triton kernels, for NVIDIA GPUs from compute capability 8.0 on. Importing this package does not import triton.

Nothing is chosen by trying at run time: blocks and splits come from `configs.json`. With `TRITON_INTERPRET=1` the same
kernels run on the CPU, far too slowly for anything but checking their numbers.
"""
