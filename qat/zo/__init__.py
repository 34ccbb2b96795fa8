"""Gradients from forward passes alone: functions on pytrees, no flax."""
