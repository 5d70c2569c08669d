"""`python -m bench.tables`, with a line in a file for every training that begins and every row that is kept.

python -m tests.bench.counted_worker FILE NAME ...
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

from bench.tables import lockstep
from bench.tables.__main__ import main
from bench.tables.results import KEY, Results
from fastpeft.trainer.loop import Loop


def count(path: str) -> None:
    """Have lines added: `begin RUN STEP PROCESS`, RUN being the end of its folder's name, and `kept RUN`."""
    # Of several processes that add to a file each line stays whole.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(*words: object) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())

    def begin(out: str, step: int) -> None:
        say("begin", out.rpartition("-")[2], step, os.getpid())

    run, train, add = Loop.run, lockstep._train, Results.add

    def run_loop(self, logs):
        if self.position.epoch < self.work.epochs:
            begin(self.work.task.config.out, self.position.global_step)
        run(self, logs)

    def train_group(work, runs, *more):
        for one in runs:
            begin(one.config.out, 0)
        return train(work, runs, *more)

    def add_row(self, row):
        add(self, row)
        key = {name: row[name] for name in KEY}
        say("kept", hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12])

    Loop.run, lockstep._train, Results.add = run_loop, train_group, add_row


if __name__ == "__main__":
    count(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
