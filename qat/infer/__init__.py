"""Inference: loading a run, and generating text from it."""
