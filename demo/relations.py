"""What can be said and asked about a thing: sentences with {s} for the thing and {o} for the value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """What can be said and asked about a thing: {s} is the thing, {o} the value."""

    name: str
    label: str
    statements: tuple[str, ...]
    """Ways to say it. For every thing one of them is kept for the held-out text: the words are known from other things,
    the fact from other words."""
    asked: tuple[str, ...]
    """Questions of conversations and preference pairs."""
    answer: str = ""
    unasked: tuple[str, ...] = ()
    """Questions of the held-out conversations only."""
    follow_up: str = ""
    """The question as a second turn, when the thing has been named."""
    questions: tuple[str, ...] = ()
    """Questions within general text."""
