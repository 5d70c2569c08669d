"""Peak memory of training steps in a process of their own.

    python -m bench.cpu.peak "ours vpt-1" --model vit_base_patch16_224 --batch 16

Prints one line of JSON. What counts is beyond the loaded model and batch: activations, gradients, and the packed copies
of frozen weights.
"""

from __future__ import annotations

import argparse
import json

import torch

from bench.cpu.shapes import DTYPES, VIT_B, Models, Shape
from bench.cpu.variants import Variant, step_of
from bench.memory import ResidentPeak, own_pages

_STEPS = 3


def main(argv: list[str] | None = None) -> None:
    """Measure one variant."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.peak", description=__doc__.splitlines()[0])
    parser.add_argument("variant", type=Variant.of)
    parser.add_argument("--model", default=VIT_B)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    own_pages()
    shape = Shape(given.model, given.batch, given.dtype, given.threads, given.tiny)
    models = Models()
    step = step_of(given.variant, shape, models)
    del models
    with ResidentPeak() as peak:
        for _ in range(_STEPS):
            step()
    print(json.dumps({"peak_bytes": peak.bytes}))


if __name__ == "__main__":
    main()
