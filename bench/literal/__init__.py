"""Literal tuning methods: what the papers' equations say, with nothing shared, skipped or fused.

Tests and benchmarks compare the library with these modules, so they are written to be read, not to be fast: prompts are
concatenated and every row runs through every block, `W x` and `B A x` are two products, an adapter is a module of its
own. Nothing here uses the library's engine; a method is recognised by its `name` and read by its fields.
"""

from bench.literal.build import apply
from bench.literal.freezing import HEADS, NEW_TENSORS
from bench.literal.vit import token_states

__all__ = ["HEADS", "NEW_TENSORS", "apply", "token_states"]
