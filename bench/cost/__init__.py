"""The cost table: every row of the VPT paper's Table 12 and every core operator, in time and memory, on this machine.

`bench/test_cost.py` measures it as benchmarks, `bench/check.py` compares two of its runs.
"""
