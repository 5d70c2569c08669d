"""Operators, each with its reference in plain PyTorch."""
