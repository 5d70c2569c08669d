"""Operators for any CPU, in fp32 and bf16: csrc/cpu/vector, compiled for several instruction sets."""
