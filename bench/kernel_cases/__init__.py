"""The launches worth looking at on a chip, one module an operator.

Each module has `CASES`, label -> function that calls the operator's launcher on tensors of the `meta` device, in the
shapes and types that training steps of ViT-B/16, ViT-L/16 and ViT-H/14 give it; and
`CANDIDATES`, the labels of those whose candidates for tuning are compiled as well.
"""
