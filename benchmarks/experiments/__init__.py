"""Kernels for sm_90 that may one day replace those of triton_kernels, and the one run on a GPU that decides. None has been timed yet."""
