"""Pretraining of language models with extremely low-bit weights, in JAX."""
