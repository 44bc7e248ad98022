"""What a dry run finds: problems that would end the run later, and notes. Collected, so that all are seen at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qilin_med.errors import UserError


class Findings:
    """`made_first`: paths that steps before the stages make; what lies below them may be missing."""

    def __init__(self, made_first: Sequence[str] = ()):
        self.problems: list[str] = []
        self._notes: list[str] = []
        self._awaited: set[str] = set()
        self._made_first = [Path(path) for path in made_first]

    @property
    def notes(self) -> list[str]:
        if not self._awaited:
            return self._notes
        made = " and ".join(str(path) for path in self._made_first)
        return [f"made first by this run: {made}; {len(self._awaited)} of the experiment's paths below are not there to be"
                " checked yet", *self._notes]  # fmt: skip

    def problem(self, message: str) -> None:
        if message not in self.problems:  # several stages may share it
            self.problems.append(message)

    def note(self, message: str) -> None:
        if message not in self._notes:
            self._notes.append(message)

    @contextmanager
    def collecting(self, where: str = "", matters: bool = True) -> Iterator[None]:
        """A UserError inside ends the block and becomes a problem, or a note where it does not matter. `where`: the setting
        or file that it is about."""
        try:
            yield
        except UserError as error:
            (self.problem if matters else self.note)(f"{where}: {error}" if where else str(error))

    def is_awaited(self, path: str | Path) -> bool:
        """Whether a path is missing because it will be made first."""
        whole = Path(path).absolute()
        if whole.exists() or not any(whole.is_relative_to(parent.absolute()) for parent in self._made_first):
            return False
        self._awaited.add(str(path))
        return True
