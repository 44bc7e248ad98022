"""Answers of a model on disk, for lm-evaluation-harness's CachingLM: whole batches at a time, safe against a kill."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CachingLM


class AnswerFile:
    """{hash of a request: answer} in a SQLite file. What `commit` has written survives the process.

    In place of the harness's SqliteDict, which takes a transaction and a walk through the stack for every answer: more
    time than a small model takes to give it.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path)
        self._connection.execute("create table if not exists answers (request text primary key, answer text)")
        rows = self._connection.execute("select request, answer from answers")
        self._answers = {request: json.loads(answer) for request, answer in rows}
        self._new: dict[str, Any] = {}

    def __contains__(self, request: str) -> bool:
        return request in self._answers

    def __getitem__(self, request: str) -> Any:
        return self._answers[request]

    def __setitem__(self, request: str, answer: Any) -> None:
        if request not in self._answers:
            self._answers[request] = self._new[request] = answer

    def __len__(self) -> int:
        return len(self._answers)

    def commit(self) -> None:
        """Write what is new; on return it is on disk."""
        with self._connection:
            rows = ((request, json.dumps(answer)) for request, answer in self._new.items())
            self._connection.executemany("insert or replace into answers values (?, ?)", rows)
        self._new.clear()


class AnsweringLM(CachingLM):
    """The harness's caching model over an AnswerFile."""

    def __init__(self, lm: LM, path: Path):
        self.lm, self.cache_db, self.dbdict = lm, str(path), AnswerFile(path)
        lm.set_cache_hook(self.get_cache_hook())
