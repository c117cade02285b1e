"""Engines side by side on one GPU: each in processes of its own, taking turns block by block.

`contestants` reads who takes part, `worker` is a contestant's process, `comparison` gives the turns and keeps the
folder, `ratios` has the paired statistics, `table` shows the outcome.
"""
