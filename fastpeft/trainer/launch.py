"""Ranks and devices: what a process has to arrange before the first collective."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the others.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        local_rank: Its number on this machine.
        device: What it computes on.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


def find_ranks() -> Ranks:
    """Read the launcher's variables; a plain `python` run is rank 0 of 1."""
    rank, world, local = (int(os.environ.get(key, default)) for key, default in _LAUNCHER_VARIABLES)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(rank, world, local, device)


_LAUNCHER_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def start(ranks: Ranks) -> None:
    """Choose DeepSpeed's accelerator, quieten it, divide the cores, and connect the ranks; once a process."""
    if torch.distributed.is_initialized():
        return
    on_cpu = ranks.device.type == "cpu"
    if on_cpu:
        # DeepSpeed's own detection ends at the same answer, after a warning that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            local_world = int(os.environ.get("LOCAL_SIZE", ranks.world))
            torch.set_num_threads(max(1, cores() // local_world))
    else:
        torch.cuda.set_device(ranks.device)
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed = _import_deepspeed(on_cpu)
    backend = "gloo" if on_cpu else "nccl"
    if ranks.world == 1:
        # One process needs no rendezvous, so that several runs on a machine do not compete for a port.
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _import_deepspeed(on_cpu: bool) -> ModuleType:
    with _silence():
        import deepspeed
        from deepspeed.utils import logger

        if on_cpu:
            # The shared-memory all-reduce would be compiled for half a minute on first use, to save microseconds on
            # the few tensors that are trained here.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what is written to the error stream, by child processes too.

    While it is imported DeepSpeed probes with the system's compiler which of its extensions could be built, and the
    compiler complains of libraries that no run needs.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def stop() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier(ranks: Ranks) -> None:
    """Wait for the other ranks."""
    if ranks.world > 1:
        torch.distributed.barrier()


def die_with_launcher() -> None:
    """End this process when the `deepspeed` command that started it is gone, however it went.

    The command starts a second launcher, which starts the ranks. Killed with SIGKILL it can tell neither, and ranks
    left behind would go on writing to a folder that a restarted run takes over.
    """
    if not sys.platform.startswith("linux") or "CROSS_RANK" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if not os.path.exists(f"/proc/{parent}") or os.getppid() != parent:
        os._exit(1)
    command = _parent_of(parent)
    if command is not None and "deepspeed" in _command_line(command):
        threading.Thread(target=_watch, args=(parent, command), name="watch-launcher", daemon=True).start()


def _watch(parent: int, command: int) -> None:
    while _parent_of(parent) == command:
        time.sleep(0.5)
    os.kill(parent, signal.SIGKILL)
    os._exit(1)


def _parent_of(process: int) -> int | None:
    try:
        with open(f"/proc/{process}/stat") as file:
            # The name in parentheses may hold spaces; state and parent follow it.
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command_line(process: int) -> str:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return file.read().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""
