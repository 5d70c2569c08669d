"""Figures of the rows of a results.csv: each function takes rows and gives a matplotlib figure, or None for nothing."""
