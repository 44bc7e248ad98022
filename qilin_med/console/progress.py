"""Long work says how far it is: a bar on a terminal, elsewhere a line every ten seconds."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REDRAWS = 0.5
_PROCESS = os.getpid()
_under_way: "list[_Bar | _Lines]" = []  # from the outermost to the innermost, which alone is shown
_lock = threading.Lock()


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Yields a function that counts work done: `advance(n)`, in `unit`s out of `total`; "B" counts bytes.

    Work without a total (one long call into a library) shows the time it has taken. Nothing is shown of work that ends
    within ten seconds in a log. Of work within work, the inner is shown. Of several ranks only the first speaks; workers
    forked from this process and threads in the background, behind what is shown anyway, say nothing.
    """
    in_background = threading.current_thread() is not threading.main_thread()
    if os.environ.get("RANK", "0") != "0" or os.getpid() != _PROCESS or in_background:
        yield lambda n: None
        return
    meter = _Bar(label, total, unit) if sys.stderr.isatty() else _Lines(label, total, unit)

    def advance(n: int) -> None:
        with _lock:
            meter.done += n

    with _lock:
        _under_way.append(meter)
    with contextlib.nullcontext() if len(_under_way) > 1 else _kept_showing(meter.seconds):
        try:
            yield advance
        finally:
            with _lock:
                _under_way.remove(meter)
                meter.close()


def counted(items: Iterable[Item], advance: Callable[[int], None]) -> Iterator[Item]:
    """The items as they are taken, each counted."""
    for item in items:
        advance(1)
        yield item


@contextmanager
def _kept_showing(seconds: float) -> Iterator[None]:
    """In a thread of its own, since a library that works for a minute does not come back to say so."""
    over = threading.Event()

    def keep_showing() -> None:
        while not over.wait(seconds):
            with _lock:
                if _under_way:
                    _under_way[-1].show()

    thread = threading.Thread(target=keep_showing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Bar:
    def __init__(self, label: str, total: int | None, unit: str) -> None:
        from tqdm import (
            tqdm,  # which reads when it is imported whether libraries' bars are off (training.quiet_libraries)
        )

        self.seconds, self.done = _SECONDS_BETWEEN_REDRAWS, 0
        # "disable" is said because stages turn libraries' own bars off by an environment variable; the position,
        # because a bar within another one takes its line.
        self.bar = tqdm(
            desc=label, total=total, unit=unit and f" {unit}", unit_scale=unit == "B", leave=False, dynamic_ncols=True,
            disable=False, position=0,
        )  # fmt: skip
        self.close = self.bar.close

    def show(self) -> None:
        self.bar.n = self.done
        self.bar.refresh()


class _Lines:
    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.seconds = SECONDS_BETWEEN_LINES
        self.label, self.total, self.unit = label, total, unit
        self.done, self.start = 0, time.monotonic()
        self.stream = sys.stdout  # what a library prints may be caught in the meantime

    def show(self) -> None:
        elapsed = time.monotonic() - self.start
        line = f"{self.label}: {clock(elapsed)} so far"
        if self.done:
            line = f"{self.label}: {self._amount()}"
            if self.total:
                line += f", {clock(elapsed * (self.total - self.done) / self.done)} left"
        print(line, file=self.stream, flush=True)

    def _amount(self) -> str:
        of = f" of {self._number(self.total)}" if self.total else ""
        return f"{self._number(self.done)}{of} {'MB' if self.unit == 'B' else self.unit}".rstrip()

    def _number(self, n: int) -> str:
        return f"{n / 1e6:,.0f}" if self.unit == "B" else f"{n:,}"

    def close(self) -> None:
        pass


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 0:07, 12:30, 3:05:00."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
