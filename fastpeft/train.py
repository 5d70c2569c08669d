"""The training command: `deepspeed fastpeft/train.py --config FILE [key=value ...]`.

It also runs as `python fastpeft/train.py` and `python -m fastpeft.train`, installed or from a bare checkout.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

if __name__ == "__main__" and not __package__:
    # Run as a script, Python puts this file's folder first on the path, where `data`, `config` or `metrics` would
    # shadow other packages. The folder above it is the one that holds the library.
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or os.getcwd()) != _here]
    sys.path.insert(0, os.path.dirname(_here))

# Seconds that a rank other than the first waits before it tells an error, and those between two ranks of a machine.
_PATIENCE, _TURN = 5.0, 2.0

# What gloo says of a rank that is gone, in an error of no class of its own.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a run that failed, 2 for one that could not begin."""
    parser = argparse.ArgumentParser(prog="fastpeft.train", description="Fine-tune a vision transformer.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("--fresh", action="store_true", help="discard what the output folder holds and start over")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    options = parser.parse_intermixed_args(arguments)
    first = os.environ.get("RANK", "0") == "0"

    try:
        from fastpeft.trainer import launch, session
        from fastpeft.trainer.report import Reporter
    except ModuleNotFoundError as error:
        return _fail(_not_installed(error), 2)
    from fastpeft.config import ConfigError, load_config
    from fastpeft.errors import FastPEFTError
    from fastpeft.trainer.folder import FolderBusyError

    launch.die_with_launcher()
    try:
        config = load_config(options.config, options.overrides)
        session.run(config, options.config, options.fresh, Reporter(first), launch.find_ranks())
    except (ConfigError, FolderBusyError) as error:
        return _fail(str(error), 2)
    except FastPEFTError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastpeft"):
            raise
        return _fail(_not_installed(error), 2)
    except OSError as error:
        return _fail(f"{error}; the same command continues from the last checkpoint", 1)
    except RuntimeError as error:
        if not any(words in str(error) for words in _GONE):
            raise
        return _fail("another rank has ended; the same command continues from the last checkpoint", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues from the last checkpoint", 130)
    return 0


def _not_installed(error: ModuleNotFoundError) -> str:
    return f"{error.name} is not installed; pip install 'fastpeft[train]'"


def _fail(message: str, code: int) -> int:
    """Tell why the run ends, in a line; what ends all ranks is told once, by the first."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # When a rank has left, the launcher ends the others. Whoever is still there after the wait has an error that
        # the first rank knows nothing of.
        try:
            time.sleep(_PATIENCE + _TURN * int(os.environ.get("LOCAL_RANK", "0")))
        except KeyboardInterrupt:
            # An interruption reaches a rank from the terminal and from the launcher.
            if code == 130:
                return code
        message = f"rank {rank}: {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _leave(code: int) -> None:
    """Exit, closing the connection between ranks unless another one has failed and waits for nobody."""
    if code == 0:
        from fastpeft.trainer import launch

        launch.stop()
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
