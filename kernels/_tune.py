"""Launch choices that are measured once, where that is asked for, and kept.

Every kernel has a table that chooses by class of shapes, and beside it a list of candidates: neighbours of the table's
choice that the chip can run. Under `FASTPEFT_AUTOTUNE=1`, or inside `tuning()`, the first launch for a new key runs the
table's choice and the candidates on the arguments at hand, leaves out those that fail or whose results differ by more
than rounding, times the others on the device, and keeps the fastest in a file (`_choices.py`). Later launches, and
later processes without the variable, use what the file holds. With `FASTPEFT_AUTOTUNE=0`, and under
`torch.use_deterministic_algorithms(True)`, the tables alone decide.

A choice may change the order in which sums are added, so results are the same bits in every run with the same file, and
in every run without one. Nothing is measured while the current stream is being captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastpeft.kernels import _choices
from fastpeft.kernels._launch import recorder

VARIABLE = "FASTPEFT_AUTOTUNE"
# A candidate has to be faster than the table's choice by more than times of the same kernel differ.
_GAIN = 0.02
_TURNS = 7

Choice = TypeVar("Choice")
Result = TypeVar("Result")
Run = Callable[[], Any]
# Median seconds of each of some functions, measured in turns.
Timer = Callable[[Sequence[Run]], list[float]]


class _Known(NamedTuple):
    """What is known of a key: its choice and entry in the file, None where there is none, and who measured it."""

    choice: Any = None
    entry: dict[str, Any] | None = None
    here: bool = False


@dataclasses.dataclass
class _Request:
    """One `tuning` block; `tables` asks for the tables alone, `again` for measuring what the file holds."""

    found: dict[str, dict[str, Any]]
    tables: bool
    again: bool
    timer: Timer | None


# Of the process and not of a context: a backward pass runs in threads of autograd's own.
_requests: list[_Request] = []
_known: dict[tuple, _Known] = {}
_files: dict[tuple, _choices.Entries] = {}
_digests: dict[Any, str] = {}
_lock = threading.RLock()


@contextlib.contextmanager
def tuning(
    enabled: bool = True, *, again: bool = False, timer: Timer | None = None
) -> Iterator[dict[str, dict[str, Any]]]:
    """Measure launch choices that are not known yet, in all threads; the environment variable has no say inside.

    Args:
        enabled: False lets the tables alone decide.
        again: measure what the file holds, too; what this process has measured stays.
        timer: median seconds of each of some functions; None for CUDA events, which a GPU has alone.

    Yields:
        The measured choice of each key that was launched, as in the file: "choice", "table", "seconds" and
        "table_seconds" among others.
    """
    request = _Request({}, not enabled, again, timer)
    _requests.append(request)
    try:
        yield request.found
    finally:
        _requests.remove(request)


def forget() -> None:
    """Drop what this process knows, so that files are read again."""
    with _lock:
        _known.clear()
        _files.clear()


def rounded(count: int) -> int:
    """The class of a size: the next number of three binary digits and zeros behind them."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def tuned(
    kernel: Any,
    device: torch.device,
    key: Mapping[str, object],
    table: Choice,
    candidates: Callable[[], Sequence[Choice]],
    run: Callable[..., Result],
    changed: Sequence[Tensor] = (),
) -> Result:
    """Run a launcher with the choice for its arguments, which is measured first where that is asked for.

    Args:
        kernel: the `triton.jit` function that is launched.
        device: of its tensors.
        key: class of the arguments: everything that candidates and their speed depend on, sizes of batches `rounded`.
        table: the choice of the kernel's table, a named tuple or a dataclass of integers.
        candidates: gives others that the chip can run.
        run: called as `run(choice, *changed)`; launches, and returns the tensors that it has written, None for those
            that there are not. Whatever it is given besides `changed` it leaves alone or overwrites.
        changed: tensors that it changes in place; measured on copies.

    Returns:
        What `run` returns.
    """
    recording = recorder()
    if recording is not None:
        for choice in candidates() if recording.candidates else ():
            run(choice, *changed)
        return run(table, *changed)
    request = _requests[-1] if _requests else None
    mode = os.environ.get(VARIABLE) if request is None else "0" if request.tables else "1"
    if mode == "0" or (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    ):
        return run(table, *changed)
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
    place = (name, device, *key.values())
    measures, again = mode == "1", request is not None and request.again
    known = _known.get(place)
    if not _settled(known, measures, again):
        with _lock:
            known = _known.get(place)
            if not _settled(known, measures, again):
                chip, label, source = _choices.chip_of(device), _label(name, key), _digest(kernel)
                legal = [table, *(choice for choice in dict.fromkeys(candidates()) if choice != table)]
                known = _Known() if again else _held(chip, label, source, legal)
                timer = (request and request.timer) or (_Events(device) if device.type == "cuda" else None)
                # What is captured has the table's choice; what comes later may be measured.
                if measures and known.choice is None and timer is not None and not capturing(device):
                    choice, entry = _measure(legal, run, changed, timer) if len(legal) > 1 else (table, None)
                    known = _Known(choice, entry and {**entry, "source": source}, here=True)
                    if entry is not None:
                        _choices.save(chip, label, known.entry)
                _known[place] = known
    if request is not None and known.entry is not None:
        request.found[_label(name, key)] = known.entry
    return run(table if known.choice is None else known.choice, *changed)


def _settled(known: _Known | None, measures: bool, again: bool) -> bool:
    return known is not None and (not measures or (known.here if again else known.choice is not None))


def _held(chip: _choices.Chip, label: str, source: str, legal: Sequence[Any]) -> _Known:
    """What the file holds for a key, if it is of this source and one of the legal choices."""
    path = str(_choices.path_of(chip))
    if path not in _files:
        _files[path] = _choices.load(chip)
    entry = _files[path].get(label)
    if entry is not None and entry["source"] == source:
        for choice in legal:
            if fields(choice) == entry["choice"]:
                return _Known(choice, entry)
    return _Known(None, None)


def _label(name: str, key: Mapping[str, object]) -> str:
    return " ".join([name, *(f"{word}={str(value).removeprefix('torch.')}" for word, value in key.items())])


def fields(choice: Any) -> dict[str, int]:
    """A choice as the file has it."""
    return dict(choice._asdict()) if hasattr(choice, "_asdict") else dataclasses.asdict(choice)


def capturing(device: torch.device) -> bool:
    """Whether this thread's current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _digest(kernel: Any) -> str:
    """Of the source of a kernel and of all that it calls."""
    if kernel not in _digests:
        sources: dict[str, str] = {}
        _collect(kernel, sources)
        text = "\n".join(source for _, source in sorted(sources.items()))
        _digests[kernel] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return _digests[kernel]


def _collect(kernel: Any, sources: dict[str, str]) -> None:
    function = kernel.fn
    name = f"{function.__module__}.{function.__qualname__}"
    if name in sources:
        return
    sources[name] = inspect.getsource(function)
    for word in function.__code__.co_names:
        called = function.__globals__.get(word)
        if inspect.isfunction(getattr(called, "fn", None)):
            _collect(called, sources)


def _measure(
    legal: Sequence[Choice], run: Callable[..., Any], changed: Sequence[Tensor], timer: Timer
) -> tuple[Choice, dict[str, Any]]:
    """The fastest of the choices whose results agree with the first one's, and its entry."""
    with torch.no_grad():
        expected = _copies(_tensors(run(legal[0], *_copies(changed))))
        right, refused = [legal[0]], []
        for choice in legal[1:]:
            found = []
            try:
                found = _tensors(run(choice, *_copies(changed)))
                agrees = agree(found, expected)
            except Exception:
                # Shared memory or registers that this chip does not have, or a compiler that gives up.
                agrees = False
            (right if agrees else refused).append(choice)
            for tensor in found:
                # What the next one leaves unwritten must not be right by chance.
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        del expected
        scratch = _copies(changed)
        seconds = timer([lambda choice=choice: run(choice, *scratch) for choice in right])
    best = min(range(len(right)), key=seconds.__getitem__)
    if seconds[best] > (1 - _GAIN) * seconds[0]:
        best = 0
    return right[best], {
        "choice": fields(right[best]),
        "seconds": seconds[best],
        "table": fields(right[0]),
        "table_seconds": seconds[0],
        "measured": len(right),
        "refused": [fields(choice) for choice in refused],
    }


def _tensors(found: Any) -> list[Tensor]:
    found = found if isinstance(found, (tuple, list)) else [found]
    return [tensor for tensor in found if tensor is not None]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results differ by no more than rounding, each in the Frobenius norm."""
    # A choice that needs no partial sums may give the results' own format, another one sums in fp32.
    return all(
        _distance(a, b) <= max(_tolerance(a.dtype), _tolerance(b.dtype)) for a, b in zip(found, expected, strict=True)
    )


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        # Sums of many terms in another order; TF32 rounds what passes between two products.
        return 2e-3 if torch.backends.cuda.matmul.allow_tf32 else 1e-4
    # Eight bits of a derivative: one step up or down, here and there.
    return 5e-3 if dtype == torch.uint8 else 2 * torch.finfo(dtype).eps


def _distance(found: Tensor, expected: Tensor) -> float:
    a, b = found.float(), expected.float()
    same = (a == b) | (a.isnan() & b.isnan())
    size = torch.linalg.vector_norm(torch.where(b.isfinite(), b, 0.0))
    off = torch.linalg.vector_norm(torch.where(same, 0.0, a - b))
    distance = float(off / size) if size > 0 else float(off)
    return distance if distance == distance else float("inf")


class _Events:
    """Times by CUDA events, in turns. The cache is overwritten before each call, as it would be inside a step.

    Overwriting takes longer than the CPU needs to queue the call, so that the device does not wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        with torch.cuda.device(self._device):
            cache = getattr(torch.cuda.get_device_properties(self._device), "L2_cache_size", 64 << 20)
            flush = torch.empty(2 * cache, dtype=torch.uint8, device=self._device)
            events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
            # The first turn warms up; all ran once before, when they were compared.
            for turn in range(1 + _TURNS):
                for index in sorted(range(len(runs)), key=lambda i: (i + turn) % len(runs)):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    for _ in range(8):
                        flush.zero_()
                    begin.record()
                    runs[index]()
                    end.record()
                    if turn:
                        events[index].append((begin, end))
            torch.cuda.current_stream(self._device).synchronize()
        return [statistics.median(begin.elapsed_time(end) / 1000 for begin, end in pairs) for pairs in events]
