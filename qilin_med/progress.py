"""Long work says how far it is: a bar on a terminal, elsewhere a line every ten seconds."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REDRAWS = 0.5


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Yields a function that counts work done: `advance(n)`, in `unit`s out of `total`; "B" counts bytes.

    Work without a total (one long call into a library) shows the time it has taken. Nothing is shown of work that ends
    within ten seconds in a log. Of several ranks only the first speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda n: None
        return
    meter = _Bar(label, total, unit) if sys.stderr.isatty() else _Lines(label, total, unit)
    over = threading.Event()

    def keep_showing() -> None:
        # A thread of its own, since a library that works for a minute does not come back to say so.
        while not over.wait(meter.seconds):
            meter.show()

    thread = threading.Thread(target=keep_showing, daemon=True)
    thread.start()
    try:
        yield meter.advance
    finally:
        over.set()
        thread.join()
        meter.close()


class _Bar:
    seconds = _SECONDS_BETWEEN_REDRAWS

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        # "disable" is said because stages turn libraries' own bars off by an environment variable.
        self.bar = tqdm(
            desc=label, total=total, unit=unit and f" {unit}", unit_scale=unit == "B", leave=False, dynamic_ncols=True,
            disable=False,
        )  # fmt: skip
        self.advance, self.show, self.close = self.bar.update, self.bar.refresh, self.bar.close


class _Lines:
    seconds = SECONDS_BETWEEN_LINES

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.start = 0, time.monotonic()

    def advance(self, n: int) -> None:
        self.done += n

    def show(self) -> None:
        elapsed = time.monotonic() - self.start
        line = f"{self.label}: {clock(elapsed)} so far"
        if self.done:
            line = f"{self.label}: {self._amount()}"
            if self.total:
                line += f", {clock(elapsed * (self.total - self.done) / self.done)} left"
        print(line, flush=True)

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
