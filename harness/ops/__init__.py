"""Single ops timed by themselves, variant against variant: where a fused kernel wins, and where it loses.

`settings` checks what is asked for, `products` makes the work of a model's shapes, `variants` the functions that do it,
`timing` runs them, `study` takes turns and writes, `table` shows the outcome.
"""
