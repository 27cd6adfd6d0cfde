"""Kernels that run a whole diffusion reverse sampler, forward and backward, as one operation."""
