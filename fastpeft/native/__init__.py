"""The native CPU library's functions on tensors: no autograd, no choices. csrc/cpu says how each works."""
