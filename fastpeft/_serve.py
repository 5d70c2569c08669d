"""How a command ends: with what it made, or with one line that says why not."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from fastpeft.errors import FastPEFTError

# What an interruption leaves behind.
GOES_ON = "the same command goes on from here"
NOTHING = "nothing was written"
# As a shell reports a tool that the signal for a broken pipe has ended: 128 + 13.
UNREAD = 141


def serve(request: Callable[[], int | None], interrupted: str = NOTHING) -> int:
    """Serve a request.

    Args:
        request: does it all; None for 0, or the status of one that was served and found something wrong.
        interrupted: what its interruption leaves behind, in words.

    Returns:
        The request's own status, 2 for one that cannot be served, 130 for one that was interrupted, or 141, without a
        word, for one whose output nobody reads to its end, such as `head`.
    """
    try:
        status = request()
        # What is still in the buffer would otherwise fail when the process ends, where nobody can catch it.
        sys.stdout.flush()
    except FastPEFTError as error:
        return _ended(error, 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return UNREAD
        where = f"{error.filename}: " if error.filename else ""
        return _ended(f"{where}{error.strerror or error}", 2)
    except KeyboardInterrupt:
        return _ended(f"interrupted; {interrupted}", 130)
    return status or 0


def _ended(why: object, status: int) -> int:
    try:
        print(f"error: {' '.join(str(why).split())}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        pass
    _unread()
    return status


def _unread() -> bool:
    """Whether nobody reads what this process writes; what it has yet to write then goes nowhere."""
    found = [stream for stream in (sys.stdout, sys.stderr) if _closed(stream)]
    for stream in found:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    return bool(found)


def _closed(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has gone."""
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except BrokenPipeError:
        return True
    except (OSError, AttributeError):  # a stream without a file, a system without poll
        return False
    # Without a buffer nothing is left that flushing could fail on.
    return any(event & select.POLLERR for _, event in poll.poll(0))
