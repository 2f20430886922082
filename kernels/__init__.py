"""Triton kernels, one file an op. Each launcher serves its op on CUDA; nothing here is imported until one is called."""
