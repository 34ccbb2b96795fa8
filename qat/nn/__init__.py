"""The transformer, in flax.linen."""
