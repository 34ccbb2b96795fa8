"""Quantizers and the quantized dot: pure functions on arrays, no flax."""
