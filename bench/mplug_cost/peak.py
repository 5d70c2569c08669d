"""Peak memory of training steps of mPLUG in a process of their own.

    python -m bench.mplug_cost.peak ours --task vqa --images cached --method lora

Prints one line of JSON. What counts is beyond the loaded model and batch: activations, gradients, the optimizer's
state, and the packed copies of frozen weights.
"""

from __future__ import annotations

import argparse
import json

import torch

from bench.memory import ResidentPeak, own_pages
from bench.mplug_cost.cases import DTYPES, IMAGES, METHODS, TASKS, WHO, Case
from bench.mplug_cost.steps import step_of

_STEPS = 3


def main(argv: list[str] | None = None) -> None:
    """Measure one implementation."""
    parser = argparse.ArgumentParser(prog="python -m bench.mplug_cost.peak", description=__doc__.splitlines()[0])
    parser.add_argument("who", choices=WHO)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--images", choices=IMAGES, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(argv)
    torch.set_num_threads(1 if given.tiny else given.threads)
    own_pages()
    case = Case(given.task, given.images, given.method, given.batch, given.dtype, given.threads, given.tiny)
    step = step_of(case, given.who)
    with ResidentPeak() as peak:
        for _ in range(_STEPS):
            step()
    print(json.dumps({"peak_bytes": peak.bytes}))


if __name__ == "__main__":
    main()
