"""The operators as torch.library knows them, for code that traces instead of running: torch.compile, export.

Each is a forward and a backward operator with its schema, what it gives on fake tensors, and its derivative. The
implementation is chosen when they run, as everywhere; the reference's derivative is autograd's. Eager code does not
come through here, where a call costs more than some of the kernels.
"""

from fastpeft.ops.registered.adapter import adapter
from fastpeft.ops.registered.layer_norm import add_layer_norm
from fastpeft.ops.registered.lora_linear import lora_linear
from fastpeft.ops.registered.mlp import mlp
from fastpeft.ops.registered.prompt_attention import prompt_attention

__all__ = ["adapter", "add_layer_norm", "lora_linear", "mlp", "prompt_attention"]
