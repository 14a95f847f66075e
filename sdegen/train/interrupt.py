"""Borrowed settings of the process, given back at the end: signals, threads, the global random state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["cpu_threads", "own_randomness", "stoppable"]


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or termination signal into an event, so that a step is never cut in two.

    A second one acts at once, as it always does. Outside the main thread signals cannot be caught, and the event never
    comes.

    Yields:
        The event that is set when somebody wants to stop.
    """
    stop, before = threading.Event(), {}

    def ask(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on ``count`` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Give the global random state back as it was: dropout knows no other generator, so training seeds that one."""
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(devices):
        yield
