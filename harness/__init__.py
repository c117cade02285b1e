"""Measuring: configuration, weights, the runner, instruments, statistics and result tables."""
