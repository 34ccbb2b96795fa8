"""Kernels for low-bit products: imports jax (and numpy), never qat."""
