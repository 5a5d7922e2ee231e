"""
A judge that remembers: [`CachedJudge`] keeps the verdicts of another judge in an SQLite file.

Why a file and no server: several processes of one machine may use it, and a process that is killed while it writes
leaves it whole. Why no cache package: the verdicts are JSON, so reading a file of someone else runs no code. Left out:
expiry and a size limit. Delete the file to start again.
"""

import hashlib
import inspect
import json
import logging
import os
import re
import sqlite3
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict, ask, checked_verdict, identity
from trl_sgpo.judges.callable import CallableJudge, columns_for
from trl_sgpo.judges.combinators import Combinator
from trl_sgpo.judges.log_once import LogOnce
from trl_sgpo.judges.stepwise import as_judge


logger = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_SECONDS = 10.0  # that a process waits for the others to finish writing
CHUNK = 500  # keys per query, because SQLite's own limit on variables was 999 before version 3.32
VERSION = 2  # part of every key: raise it if the same key gets another meaning

# Held by whoever uses a connection, so that none is in use when the process forks
_lock = threading.RLock()
_open_judges: "weakref.WeakSet[CachedJudge]" = weakref.WeakSet()
_inherited: list[sqlite3.Connection] = []


class CachedJudge(StepJudge):
    """
    Judge that asks another one only about what it has not judged yet, in this run or in any other with the same file.

    A verdict belongs to the judge's identity and to all that the judge is given: problem, steps, reference,
    `known_wrong` and context, and for a plain function the columns that it reads. Abstentions are not kept, so a
    server that was down is asked again. A completion that comes twice in a batch is asked about once. If the cache
    cannot be read or written, the judge is asked directly, and one warning says why. The training goes on.

    Several processes of one machine may share the file. Several *machines* must not share it on a network disk: give
    each its own file. The file holds hashes and verdicts with their `reason`, which may quote the completion.

    Args:
        judge ([`StepJudge`] or `Callable`):
            The judge to ask, or a plain function (see [`CallableJudge`]). To cache samples of a judge, put the cache
            around the [`MajorityVote`], not inside it. The row is no part of the key: do not cache a judge of your own
            that reads more of `item.row` than follows from the problem.
        path (`str` or `os.PathLike`):
            The file, created if there is none. Its folder has to exist.
        key (`str`, *optional*):
            The judge's identity. Defaults to its attribute `cache_key`, if it has one, else to its name. Give another
            one if the judge changes but its name does not: another prompt, temperature, or body of a function.

    Attributes:
        hits, misses (`int`): Completions, in this process, about which the judge was not asked, and was asked.

    Raises:
        TypeError: If `judge` is neither a judge nor a function, or `path` or `key` is of a wrong type.
        ValueError: If `key` is empty.

    Example:

    ```python
    >>> judge = CachedJudge(OpenAIJudge("my-model"), "verdicts.sqlite", key="my-model, prompt 2")  # doctest: +SKIP
    ```
    """

    def __init__(
        self, judge: StepJudge | Callable[..., Any], path: str | os.PathLike[str], key: str | None = None
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path={path!r} is not a path. Give the cache's file, for instance 'verdicts.sqlite'.")
        if key is not None and not isinstance(key, str):
            raise TypeError(f"key={key!r} is not a string. It is what the judge is known by, for instance 'prompt 2'.")
        if key == "":
            raise ValueError("key='' is empty, so all judges would share it. Leave it out to use the judge's name.")
        self.wrapped = as_judge(judge)
        self.path = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self.hits = 0
        self.misses = 0
        functions = _functions(self.wrapped)
        nameless = [function.name for function in functions if not _has_own_name(function)]
        if nameless and key is None:
            warnings.warn(
                f"A cache knows a function by its name, and {nameless[0]!r} is not one that only this function can "
                "have: another one would be given its verdicts. Define it with `def` at the top of a module, or give "
                "`CachedJudge` a `key` and change it whenever the function changes.",
                UserWarning,
                stacklevel=2,
            )
        self._identity = identity(self.wrapped) if key is None else key
        self._columns = _columns(functions)
        self._connection: sqlite3.Connection | None = None
        self._pid = os.getpid()
        self._damaged = False
        self._log_once = LogOnce(logger)
        _open_judges.add(self)
        self._use("opened", lambda connection: None)  # so that a wrong path is reported before any training

    @property
    def name(self) -> str:
        return f"CachedJudge({self.wrapped.name})"

    @property
    def cache_key(self) -> str:
        """The identity of the judge inside."""
        return self._identity

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        keys = [self._key(item) for item in items]
        stored = self._use("read", lambda connection: _read(connection, {key for key in keys if key is not None}))
        # What has no key is asked about by itself, so its index stands for it
        marks: list[bytes | int] = [i if key is None else key for i, key in enumerate(keys)]
        known = dict(stored or {})
        to_ask: dict[bytes | int, JudgeItem] = {}
        for mark, item in zip(marks, items, strict=True):
            if mark not in known:
                to_ask.setdefault(mark, item)
        self.misses += len(to_ask)
        self.hits += len(items) - len(to_ask)
        if to_ask:
            answers = ask(
                self.wrapped,
                list(to_ask.values()),
                lambda judge: self._log_once.failed(f"The judge {judge.name} raised an exception"),
            )
            known.update(zip(to_ask, answers, strict=True))
            texts = [(mark, _written(answer)) for mark, answer in zip(to_ask, answers, strict=True)]
            rows = [(mark, text) for mark, text in texts if isinstance(mark, bytes) and text is not None]
            if rows and stored is not None:  # after a failed read another wait for the same file would be one too many
                self._use("written", lambda connection: _write(connection, rows))
        return [known[mark] for mark in marks]

    def close(self) -> None:
        """Closes the file. It opens again when the judge is asked again."""
        with _lock:
            connection, self._connection = self._connection, None
            if connection is None:
                return
            if self._pid != os.getpid():
                _inherited.append(connection)  # SQLite forbids even closing what was opened before a fork
                return
            with suppress(sqlite3.Error):
                connection.close()

    def __enter__(self) -> "CachedJudge":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self.close()

    def _key(self, item: JudgeItem) -> bytes | None:
        """The key of an item; `None` if the item cannot be written as JSON."""
        try:
            parts: dict[str, Any] = {
                "version": VERSION,
                "judge": self._identity,
                "problem": item.problem,
                "steps": list(item.steps),
                "reference": item.reference,
                "known_wrong": bool(item.known_wrong),
                "context": sorted((int(i), text) for i, text in item.context.items()),
            }
            if self._columns != ():
                parts["row"] = columns_for(item.row, self._columns)
            text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
        except Exception as error:
            self._log_once(
                "key",
                "A completion cannot be cached, because it or its row cannot be written as JSON "
                f"({type(error).__name__}: {error}). The judge is asked directly about such completions.",
            )
            return None
        return hashlib.sha256(text.encode()).digest()

    def _use(self, verb: str, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """The result of `work` on the open cache. If the cache fails: `None`, and the first time a warning."""
        if self._damaged:
            return None
        with _lock:
            try:
                if self._connection is not None and self._pid != os.getpid():
                    self.close()  # a fork that Python does not know of
                if self._connection is None:
                    self._pid = os.getpid()
                    self._connection = _opened(self.path)
                return work(self._connection)
            except (sqlite3.Error, OSError) as error:
                self.close()
                self._report(verb, error)
                return None
            except BaseException:  # an interrupt: leave no transaction open
                self.close()
                raise

    def _report(self, verb: str, error: Exception) -> None:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            self._damaged = True
            self._log_once(
                "damaged",
                f"The cache {self.path} is damaged or no cache ({error}). It is left alone, and the judge is asked "
                f"directly. To cache again, delete it together with {self.path}-wal and {self.path}-shm, or give "
                "`CachedJudge` another path, and start again.",
            )
            return
        self._log_once(
            "failed",
            f"The cache {self.path} cannot be {verb} ({type(error).__name__}: {error}). The judge is asked directly. "
            "The cache is tried again with every batch, and further failures are not shown. Check that the path is a "
            "file in an existing folder, that both can be written, that the disk has room, and that no other process "
            f"holds the file for more than {BUSY_SECONDS:g} s.",
        )


def _opened(path: str) -> sqlite3.Connection:
    # Transactions are opened by hand: the module's own would take the write lock too late to wait for it
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        with suppress(sqlite3.OperationalError):  # some disks cannot; or another process is switching at this moment
            connection.execute("PRAGMA journal_mode=WAL")
        if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
            connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the last verdicts, not the file
        # A file that cannot be written can still be read, if it has its table
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'verdicts'").fetchone():
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY NOT NULL, verdict TEXT NOT NULL)"
                )
    except BaseException:
        connection.close()
        raise
    return connection


def _read(connection: sqlite3.Connection, keys: Iterable[bytes]) -> dict[bytes | int, Verdict]:
    wanted = list(keys)
    found: dict[bytes | int, Verdict] = {}
    for start in range(0, len(wanted), CHUNK):
        chunk = wanted[start : start + CHUNK]
        query = f"SELECT key, verdict FROM verdicts WHERE key IN ({','.join('?' * len(chunk))})"
        for key, text in connection.execute(query, chunk):
            with suppress(TypeError, ValueError):  # a row that holds no verdict: the judge is asked
                status, first_error, n_steps, confidence, reason, checked = json.loads(text)
                verdict = checked_verdict(Verdict(status, first_error, n_steps, confidence, reason, checked), n_steps)
                if verdict.status != "abstain":
                    found[key] = verdict
    return found


def _write(connection: sqlite3.Connection, rows: Sequence[tuple[bytes, str]]) -> None:
    with connection:  # commits, or rolls back
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", rows)


def _written(verdict: Verdict) -> str | None:
    """The verdict as JSON; `None` for one that is not kept."""
    if verdict.status == "abstain":
        return None
    try:
        confidence = None if verdict.confidence is None else float(verdict.confidence)
    except (TypeError, ValueError):
        return None
    checked = None if verdict.checked is None else list(verdict.checked)
    return json.dumps([verdict.status, verdict.first_error, verdict.n_steps, confidence, verdict.reason, checked])


def _functions(judge: StepJudge) -> list[CallableJudge]:
    """The plain functions inside a judge."""
    if isinstance(judge, CallableJudge):
        return [judge]
    if isinstance(judge, CachedJudge):
        return _functions(judge.wrapped)
    members = judge.judges if isinstance(judge, Combinator) else []
    return [function for member in members for function in _functions(member)]


def _has_own_name(judge: CallableJudge) -> bool:
    """Whether it is a function at the top of a module: no lambda, partial, method, or function made by another."""
    return (inspect.isfunction(judge.function) or inspect.isbuiltin(judge.function)) and "<" not in judge.name


def _columns(functions: Sequence[CallableJudge]) -> tuple[str, ...] | None:
    """The columns that any of the functions reads; `None` for all of them."""
    if any(function.column_names is None for function in functions):
        return None
    return tuple(sorted({name for function in functions for name in function.column_names or ()}))


def _plain(value: Any) -> Any:
    """For what JSON does not know: arrays as lists (their `str` leaves out the middle), the rest as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    text = str(value)
    if re.search(r"\b0x[0-9A-Fa-f]{4,}", text):
        # An address may be that of another object tomorrow, and says nothing of what the object holds
        raise TypeError(f"{type(value).__name__} has no text that tells two of them apart")
    return text


def _before_fork() -> None:
    # SQLite keeps the locks of a file per process, and a child that inherits its notes on them believes that it holds
    # what only the parent holds, even on a connection of its own. So nothing is open while a process forks.
    _lock.acquire()
    for judge in list(_open_judges):
        judge.close()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_before_fork, after_in_parent=_lock.release, after_in_child=_lock.release)
