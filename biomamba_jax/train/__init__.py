"""Batches to weights: optimizer, schedule, step, loop, checkpoints and metrics."""
