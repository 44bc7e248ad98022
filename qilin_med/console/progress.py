"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_REDRAWS = 10.0, 0.5
_PROCESS = os.getpid()
_under_way: "list[_Meter]" = []  # from the outermost to the innermost, which is shown
_lock = threading.Lock()


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields a function that counts work done: `advance(n)`, in `unit`s out of `total`; "B" counts bytes. `done`: where it
    begins. `advance(n, note)` adds a note to what is shown; with `now` it is shown at once.

    Work without a total (one long call into a library) shows the time it has taken. In a log, nothing is shown of work that
    takes less than ten seconds. Of nested work, the innermost is shown. Only the first rank shows anything; forked workers
    and background threads, whose work is part of what is shown, do not.
    """
    in_background = threading.current_thread() is not threading.main_thread()
    if os.environ.get("LOCAL_RANK", "0") != "0" or os.getpid() != _PROCESS or in_background:
        yield lambda n, note="", now=False: None
        return
    meter, is_over = _Meter(label, total, unit, done), threading.Event()

    def advance(n: int, note: str = "", now: bool = False) -> None:
        with _lock:
            meter.done += n
            meter.note = note
            if now:
                meter.show()

    def keep_showing() -> None:
        while not is_over.wait(SECONDS_BETWEEN_REDRAWS if meter.bar is not None else SECONDS_BETWEEN_LINES):
            with _lock:
                if _under_way:
                    _under_way[-1].show()

    # A thread of the outermost work shows them all, since a library that works for a minute reports nothing meanwhile.
    thread = None if _under_way else threading.Thread(target=keep_showing, daemon=True)
    with _lock:
        _under_way.append(meter)
    if thread:
        thread.start()
    try:
        yield advance
    finally:
        with _lock:
            _under_way.remove(meter)
            if meter.bar is not None:  # a bar without a total has no truth value
                meter.bar.close()
        if thread:
            is_over.set()
            thread.join()


class Tally:
    """What forked workers count while their parent shows it: bytes and CPU seconds, and the peak of a process's memory."""

    def __init__(self) -> None:
        self._values = get_context("fork").Array("d", 3)

    def add(self, size: float = 0, cpu_seconds: float = 0, peak_bytes: float = 0) -> None:
        with self._values.get_lock():
            self._values[0] += size
            self._values[1] += cpu_seconds
            self._values[2] = max(self._values[2], peak_bytes)

    def read(self) -> tuple[float, float, float]:
        """(bytes, CPU seconds, peak bytes) since `clear`."""
        return tuple(self._values)

    def clear(self) -> None:
        self._values[:] = [0, 0, 0]


tally = Tally()


def counted(items: Iterable[Item], advance: Callable[[int], None]) -> Iterator[Item]:
    """Yields the items, and counts each as it is taken."""
    for item in items:
        advance(1)
        yield item


class _Meter:
    def __init__(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.note, self.start = "", time.monotonic()
        self.stream, self.bar = sys.stdout, None  # what a library prints may be caught in the meantime
        if sys.stderr.isatty():
            from tqdm import tqdm  # reads on import whether stages have turned off the libraries' bars

            # Hence "disable"; and the position, because a nested bar takes the line of the outer one.
            self.bar = tqdm(
                desc=label, total=total, unit=unit and f" {unit}", unit_scale=unit == "B", leave=False, dynamic_ncols=True,
                disable=False, position=0, initial=done,
            )  # fmt: skip

    def show(self) -> None:
        if self.bar is not None:
            self.bar.n = self.done
            self.bar.set_postfix_str(self.note)
            return
        elapsed = time.monotonic() - self.start
        line = f"{self.label}: {clock(elapsed)} so far"
        if self.done > self.first:
            done, total = (f"{n / 1e6:,.0f}" if self.unit == "B" else f"{n:,}" for n in (self.done, self.total or 0))
            of = f" of {total}" if self.total else ""
            line = f"{self.label}: {done}{of} {'MB' if self.unit == 'B' else self.unit}".rstrip()
            if self.unit == "B":
                line += f", {(self.done - self.first) / 1e6 / elapsed:,.1f} MB/s"
            line += self.note and f", {self.note}"
            if self.total:
                line += f", {clock(elapsed * (self.total - self.done) / (self.done - self.first))} left"
        print(line, file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 0:07, 12:30, 3:05:00."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
