"""What `python -m bench.device` can prove and measure, one module a part.

A part offers `rows(settings)`, which yields keys with what to run for each, and `table(rows)`, which lays out results.
"""
