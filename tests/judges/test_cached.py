import hashlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from functools import partial

import numpy as np
import pytest

from trl_sgpo import CallableJudge, JudgeItem, StepJudge, StepwiseJudge, Verdict
from trl_sgpo.judges import cached as cached_module
from trl_sgpo.judges.cached import CachedJudge
from trl_sgpo.judges.combinators import Fallback, MajorityVote


class Counting(StepJudge):
    """Finds the error that the problem names, and keeps the problems it was asked about."""

    def __init__(self, answer=None):
        self.asked = []
        self.answer = answer or self.by_number

    def judge(self, items):
        self.asked += [item.problem for item in items]
        return [self.answer(item) for item in items]

    @staticmethod
    def by_number(item):
        number = int(item.problem)
        if number % 5 == 4:
            return Verdict.no_error(len(item.steps), 0.25, "all right")
        return Verdict.error(number % 3, len(item.steps), number / 7, f"step \u00fc\ud800 '\"; {number}")


def items_of(n, start=0):
    return [JudgeItem(str(i), ("a", "b", "c")) for i in range(start, start + n)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "verdicts.sqlite"


def integrity(path):
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA integrity_check").fetchall()
    finally:
        connection.close()


def n_rows(path):
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0]
    finally:
        connection.close()


class TestCache:
    def test_a_second_run_asks_nobody(self, path):
        items = items_of(1200)  # more than one query's worth
        first, second = Counting(), Counting()
        with CachedJudge(first, path) as judge:
            verdicts = judge.judge(items)
            assert (judge.hits, judge.misses) == (0, 1200)
        assert verdicts == first.judge(items)
        with CachedJudge(second, path) as judge:
            assert judge.judge(items) == verdicts
            assert (judge.hits, judge.misses) == (1200, 0)
        assert second.asked == []
        # Nothing is left beside the file
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_only_what_is_new_is_asked_and_the_order_is_kept(self, path):
        judge = CachedJudge(inner := Counting(), path)
        judge.judge(items_of(3, start=2))
        inner.asked.clear()
        verdicts = judge.judge(items_of(7)[::-1])
        assert inner.asked == ["6", "5", "1", "0"]
        assert verdicts == [Counting.by_number(item) for item in items_of(7)[::-1]]
        assert (judge.hits, judge.misses) == (3, 3 + 4)

    def test_duplicates_are_asked_once(self, path):
        judge = CachedJudge(inner := Counting(), path)
        items = items_of(2) * 3
        assert judge.judge(items) == [Counting.by_number(item) for item in items]
        assert inner.asked == ["0", "1"]
        assert (judge.hits, judge.misses) == (4, 2)

    def test_abstentions_are_asked_again(self, path):
        answers = iter([Verdict.abstain("down"), Verdict.error(1), Verdict.error(2)])
        judge = CachedJudge(Counting(lambda item: next(answers)), path)
        statuses = [judge.judge(items_of(1))[0].status for _ in range(3)]
        assert statuses == ["abstain", "error", "error"]
        assert (judge.hits, judge.misses, n_rows(path)) == (1, 2, 1)

    def test_what_makes_no_sense_is_not_kept(self, path):
        nonsense = [Verdict.error(3), Verdict("perhaps"), 1, Verdict.error(0, n_steps=8)]
        judge = CachedJudge(Counting(lambda item: nonsense[int(item.problem)]), path)
        assert {verdict.status for verdict in judge.judge(items_of(4))} == {"abstain"}
        assert n_rows(path) == 0

    def test_numbers_of_numpy_come_back_as_numbers(self, path):
        answer = Verdict.error(np.int64(1), 3, np.float32(0.5))
        judge = CachedJudge(Counting(lambda item: answer), path)
        assert judge.judge(items_of(1)) == judge.judge(items_of(1)) == [Verdict.error(1, 3, 0.5)]
        assert judge.hits == 1

    def test_which_steps_were_checked_is_kept(self, path):
        answers = [Verdict.error(2, 3, checked=np.array([1, 0])), Verdict.no_error(3, checked=[])]
        judge = CachedJudge(Counting(lambda item: answers[int(item.problem)]), path)
        expected = [Verdict.error(2, 3, checked=(0, 1)), Verdict.no_error(3, checked=())]
        assert judge.judge(items_of(2)) == judge.judge(items_of(2)) == expected
        assert judge.hits == 2

    def test_a_confidence_that_is_no_number_is_passed_on_and_not_kept(self, path):
        judge = CachedJudge(Counting(lambda item: Verdict.error(1, 3, "high")), path)
        assert judge.judge(items_of(1))[0].confidence == "high"
        assert n_rows(path) == 0

    def test_a_judge_that_raises_does_not_cost_the_hits(self, path, caplog):
        def fail(item):
            raise RuntimeError("down")

        CachedJudge(Counting(), path).judge(items_of(2))
        judge = CachedJudge(Counting(fail), path)
        for _ in range(2):
            verdicts = judge.judge(items_of(3))
            assert verdicts[:2] == [Counting.by_number(item) for item in items_of(2)]
            assert verdicts[2] == Verdict.abstain("RuntimeError: down")
        assert caplog.text.count("Traceback") == 1

    def test_in_the_reward_function(self, path):
        reward = StepwiseJudge(CachedJudge(lambda problem, steps: 1, path, key="one"), transform="identity")
        for _ in range(2):
            assert reward(prompts=["What is 2 + 2?"], completions=["First add the numbers.\n\nIt is 5."]) == [0.5]
        assert (reward.judge.hits, reward.judge.misses) == (1, 1)

    def test_it_opens_again_after_close(self, path):
        judge = CachedJudge(Counting(), path)
        judge.judge(items_of(1))
        judge.close()
        judge.close()
        judge.judge(items_of(1))
        assert (judge.hits, judge.misses) == (1, 1)

    def test_the_path_does_not_follow_the_working_directory(self, path, monkeypatch):
        monkeypatch.chdir(path.parent)
        judge = CachedJudge(Counting(), path.name)
        judge.close()
        monkeypatch.chdir("/")
        judge.judge(items_of(1))
        assert n_rows(path) == 1

    def test_threads(self, path):
        judge = CachedJudge(Counting(), path)
        wrong = []

        def work(start):
            for i in range(20):
                items = items_of(10, start=start + 5 * i)
                if judge.judge(items) != [Counting.by_number(item) for item in items]:
                    wrong.append(start)

        threads = [threading.Thread(target=work, args=(start,)) for start in (0, 0, 50, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (wrong, n_rows(path)) == ([], 205)


class TestKey:
    ITEM = JudgeItem("What is 2 + 2?", ("Add.", "It is 5."))

    @pytest.mark.parametrize(
        "other",
        [
            JudgeItem("What is 2 + 3?", ("Add.", "It is 5.")),
            JudgeItem("What is 2 + 2?", ("Add.It is 5.",)),
            JudgeItem("What is 2 + 2?", ("Add", ".It is 5.")),
            JudgeItem("What is 2 + 2?", ("Add.", "It is 5."), reference="4"),
            JudgeItem("What is 2 + 2?", ("Add.", "It is 5."), reference=""),
            JudgeItem("What is 2 + 2?", ("Add.", "It is 5."), known_wrong=False),
            JudgeItem("What is 2 + 2?", ("Add.", "It is 5."), context={1: "4"}),
            JudgeItem("What is 2 + 2?", ("Add.", "It is 5."), context={0: "4"}),
        ],
    )
    def test_everything_a_judge_is_given_is_part_of_it(self, path, other):
        judge = CachedJudge(Counting(lambda item: Verdict.error(0)), path)
        judge.judge([self.ITEM, other])
        assert (judge.hits, judge.misses) == (0, 2)
        judge.judge([other, self.ITEM])
        assert (judge.hits, judge.misses) == (2, 2)

    def test_it_is_the_same_in_every_release(self, path):
        CachedJudge(Counting(lambda item: Verdict.error(0)), path, key="K").judge([self.ITEM])
        text = (
            '{"context":[],"judge":"K","known_wrong":true,"problem":"What is 2 + 2?","reference":null,'
            '"steps":["Add.","It is 5."],"version":2}'
        )
        rows = sqlite3.connect(path).execute("SELECT * FROM verdicts").fetchall()
        assert rows == [(hashlib.sha256(text.encode()).digest(), '["error", 0, 2, null, "", null]')]

    def test_the_row_is_no_part_of_it(self, path):
        judge = CachedJudge(Counting(lambda item: Verdict.error(0)), path)
        judge.judge([JudgeItem("p", ("a",), row={"id": i}) for i in range(3)])
        assert judge.misses == 1

    def test_the_columns_a_function_reads_are(self, path):
        def by_level(problem, steps, level=0):
            return level

        judges = [
            CallableJudge(by_level),
            MajorityVote([by_level]),
            Fallback([Counting(lambda item: Verdict.abstain("")), by_level]),
        ]
        for i, inner in enumerate(judges):
            judge = CachedJudge(inner, path, key=str(i))
            items = [JudgeItem("p", ("a", "b"), row={"level": level, "id": n}) for n, level in enumerate([0, 1, 1])]
            assert [verdict.first_error for verdict in judge.judge(items)] == [0, 1, 1]
            assert judge.misses == 2  # the column `id` is not read

    def test_all_columns_of_a_function_that_takes_any(self, path):
        def by_any(problem, steps, **row):
            return int(row["array"][5000])

        judge = CachedJudge(by_any, path, key="by_any")
        arrays = np.zeros((2, 9999), dtype=int)
        arrays[1, 5000] = 1  # in the middle, which the text of a long array leaves out
        items = [JudgeItem("p", ("a", "b"), row={"array": array, "day": {1, 2}}) for array in arrays]
        for _ in range(2):
            assert [verdict.first_error for verdict in judge.judge(items)] == [0, 1]
        assert (judge.hits, judge.misses) == (2, 2)

    @pytest.mark.parametrize("column", [object(), {"mixed": {1: 0, "a": 0}}])
    def test_what_cannot_be_written_down_is_asked_directly(self, path, caplog, column):
        calls = []
        judge = CachedJudge(lambda problem, steps, **row: calls.append(1), path, key="any")
        for _ in range(2):
            judge.judge([JudgeItem("p", ("a",), row={"image": column})] * 2 + [JudgeItem("p", ("a",))])
        assert len(calls) == 2 + 1 + 2
        assert caplog.text.count("A completion cannot be cached") == 1

    def test_the_identity_of_the_judge(self, path):
        class Versioned(Counting):
            cache_key = "prompt 2"

        class Numbered(Counting):
            cache_key = 2

        assert CachedJudge(Counting(), path).cache_key == "Counting"
        assert CachedJudge(Versioned(), path).cache_key == "prompt 2"
        assert CachedJudge(Numbered(), path).cache_key == "Numbered"
        assert CachedJudge(Versioned(), path, key="prompt 3").cache_key == "prompt 3"
        assert CachedJudge(CachedJudge(Versioned(), path), path).cache_key == "prompt 2"
        assert CachedJudge(MajorityVote([Versioned()] * 4), path).cache_key.startswith("MajorityVote(4 x prompt 2)")
        for key in ("a", "b"):
            judge = CachedJudge(Counting(), path, key=key)
            judge.judge(items_of(1))
            assert judge.misses == 1
        assert judge.name == "CachedJudge(Counting)"

    def test_a_function_without_a_name_of_its_own(self, path):
        def local(problem, steps):
            return 0

        class Own:
            def method(self, problem, steps):
                return 0

        for function in (lambda problem, steps: 0, partial(module_level), local, Own().method):
            with pytest.warns(
                UserWarning, match="A cache knows a function by its name, and .* give `CachedJudge` a `key`"
            ):
                CachedJudge(function, path)
        with pytest.warns(UserWarning, match="A cache knows a function by its name"):
            CachedJudge(MajorityVote([local]), path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            CachedJudge(local, path, key="local 1")
            CachedJudge(module_level, path)

    def test_no_text_but_the_reason_is_stored(self, path):
        item = JudgeItem("SECRET-problem", ("SECRET-step",), reference="SECRET-reference")
        with CachedJudge(Counting(lambda item: Verdict.error(0, reason="why")), path, key="SECRET-identity") as judge:
            judge.judge([item])
        content = path.read_bytes()
        assert b"why" in content
        assert b"SECRET" not in content


def module_level(problem, steps):
    return 0


class TestACacheThatFails:
    def check(self, path, caplog, message, n=3):
        """Every batch is judged, directly, and one warning says what is wrong."""
        judge = CachedJudge(inner := Counting(), path)
        for _ in range(n):
            assert judge.judge(items_of(2)) == [Counting.by_number(item) for item in items_of(2)]
        assert inner.asked == ["0", "1"] * n
        assert len(caplog.records) == 1
        assert str(path) in caplog.text
        assert message in caplog.text
        return judge

    def test_a_folder(self, tmp_path, caplog):
        self.check(tmp_path, caplog, "cannot be opened (OperationalError: unable to open database file)")

    def test_a_missing_folder(self, tmp_path, caplog):
        self.check(tmp_path / "no" / "file", caplog, "Check that the path is a file in an existing folder")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("content", [b"these are my notes, not a database " * 200, os.urandom(9000)])
    def test_another_file(self, path, caplog, content):
        path.write_bytes(content)
        self.check(path, caplog, f"delete it together with {path}-wal and {path}-shm, or give `CachedJudge` another")
        assert path.read_bytes() == content

    def test_a_damaged_cache(self, path, caplog):
        with CachedJudge(Counting(), path) as judge:
            judge.judge(items_of(400))
        content = bytearray(path.read_bytes())
        content[4096:] = b"\x55" * (len(content) - 4096)  # all but the first page
        path.write_bytes(content)
        self.check(path, caplog, "is damaged or no cache (database disk image is malformed)")

    def test_a_damaged_row_is_a_miss(self, path):
        verdicts = (
            '["error", 9, 3, null, "", null]',
            '["error", 1, null, null, "", null]',
            '["error", 1, 3, null, "", [7]]',
        )
        damaged = ("", "{", "[]", "7", '["error", 1, 3, null, ""]', '{"status": "error"}', *verdicts)
        judge = CachedJudge(inner := Counting(), path)
        judge.judge(items_of(len(damaged)))
        with sqlite3.connect(path) as connection:
            for i, text in enumerate(damaged):
                connection.execute("UPDATE verdicts SET verdict = ? WHERE rowid = ?", (text, i + 1))
        inner.asked.clear()
        assert judge.judge(items_of(len(damaged))) == [Counting.by_number(item) for item in items_of(len(damaged))]
        assert len(inner.asked) == len(damaged)

    def test_another_programs_database(self, path, caplog):
        sqlite3.connect(path).execute("CREATE TABLE verdicts (name)")
        self.check(path, caplog, "no such column: key")

    def test_a_locked_file_is_waited_for_and_then_left(self, path, caplog, monkeypatch):
        monkeypatch.setattr(cached_module, "BUSY_SECONDS", 0.2)
        CachedJudge(Counting(), path).judge(items_of(1))
        waits = []
        connect = sqlite3.connect

        def recorded(*args, **kwargs):
            waits.append(kwargs["timeout"])
            return connect(*args, **kwargs)

        monkeypatch.setattr(cached_module.sqlite3, "connect", recorded)
        other = connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        judge = CachedJudge(inner := Counting(), path)
        for _ in range(2):  # reading goes on
            assert judge.judge(items_of(2)) == [Counting.by_number(item) for item in items_of(2)]
        assert waits == [0.2, 0.2]  # what SQLite waits for the other, which still holds the file
        assert inner.asked == ["1", "1"]
        assert len(caplog.records) == 1
        assert "cannot be written (OperationalError: database is locked)" in caplog.text
        other.execute("ROLLBACK")
        judge.judge(items_of(2))
        judge.judge(items_of(2))
        assert inner.asked == ["1", "1", "1"]

    def test_a_full_disk(self, path, caplog):
        with CachedJudge(Counting(), path) as judge:
            judge.judge(items_of(10))
        judge = CachedJudge(Counting(), path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
        try:
            assert judge.judge(items_of(400)) == [Counting.by_number(item) for item in items_of(400)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(caplog.records) == 1
        assert "cannot be written" in caplog.text
        assert judge.hits == 10
        judge.judge(items_of(400))  # there is room again
        judge.judge(items_of(400))
        assert judge.hits == 10 + 10 + 400
        judge.close()
        assert integrity(path) == [("ok",)]

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anything")
    def test_a_read_only_file_can_still_be_read(self, path, caplog):
        with CachedJudge(Counting(), path) as judge:
            judge.judge(items_of(2))
        path.chmod(0o400)
        judge = CachedJudge(Counting(), path)
        assert judge.judge(items_of(3)) == [Counting.by_number(item) for item in items_of(3)]
        assert judge.hits == 2
        assert "cannot be written" in caplog.text

    def test_an_interrupt_leaves_no_transaction_open(self, path, monkeypatch):
        def interrupted(connection, rows):
            connection.execute("BEGIN IMMEDIATE")
            raise KeyboardInterrupt

        judge = CachedJudge(Counting(), path)
        with monkeypatch.context() as patch:
            patch.setattr(cached_module, "_write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                judge.judge(items_of(1))
        CachedJudge(Counting(), path).judge(items_of(1))
        assert n_rows(path) == 1

    def test_bad_arguments(self, path):
        with pytest.raises(TypeError, match="judge=Counting is a class, not a judge: give an instance"):
            CachedJudge(Counting, path)
        with pytest.raises(TypeError, match="judge=7 is neither a `StepJudge` nor a function"):
            CachedJudge(7, path)
        with pytest.raises(TypeError, match=r"path=None is not a path\. Give the cache's file"):
            CachedJudge(Counting(), None)
        with pytest.raises(TypeError, match="key=2 is not a string"):
            CachedJudge(Counting(), path, key=2)
        with pytest.raises(ValueError, match="key='' is empty, so all judges would share it"):
            CachedJudge(Counting(), path, key="")


# Judges batches of random items for ever, and prints the items of every batch that is done
WRITER = """
import json, random, sys
from trl_sgpo import JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.cached import CachedJudge

class Writer(StepJudge):
    def judge(self, items):
        return [Verdict.error(int(i.problem) % 3, 3, int(i.problem) / 7, i.problem * 40) for i in items]

print("ready", flush=True)
sys.stdin.readline()
judge = CachedJudge(Writer(), sys.argv[1])
generator = random.Random(sys.argv[2])
for batch in range(int(sys.argv[3])):
    numbers = generator.choices(range(200_000), k=300)
    judge.judge([JudgeItem(str(n), ("a", "b", "c")) for n in numbers])
    print(json.dumps(numbers), flush=True)
"""


class Writer(StepJudge):
    def judge(self, items):
        return [Verdict.error(int(i.problem) % 3, 3, int(i.problem) / 7, i.problem * 40) for i in items]


class TestProcesses:
    def test_two_at_once_of_which_one_is_killed(self, path):
        arguments = [sys.executable, "-c", WRITER, str(path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        victim = subprocess.Popen([*arguments, "victim", "1000000"], **pipes)
        other = subprocess.Popen([*arguments, "other", "60"], **pipes)
        try:
            for process in (victim, other):
                assert process.stdout.readline() == "ready\n"
            for process in (victim, other):  # both open the new file at the same moment
                process.stdin.write("go\n")
                process.stdin.flush()
            reported = [victim.stdout.readline() for _ in range(20)]
            time.sleep(0.005)  # into the middle of a batch
            os.kill(victim.pid, signal.SIGKILL)
            rest, victim_errors = victim.communicate(timeout=20)
            more, errors = other.communicate(timeout=20)
        finally:
            for process in (victim, other):
                process.kill()
                process.wait()
        assert (victim.returncode, other.returncode) == (-signal.SIGKILL, 0)
        assert (victim_errors, errors) == ("", "")  # no warning either
        lines = [*reported, *rest.splitlines(keepends=True), *more.splitlines(keepends=True)]
        numbers = {number for line in lines if line.endswith("\n") for number in json.loads(line)}
        assert len(numbers) > 20 * 250

        assert integrity(path) == [("ok",)]
        judge = CachedJudge(Counting(), path, key="Writer")
        items = [JudgeItem(str(number), ("a", "b", "c")) for number in sorted(numbers)]
        assert judge.judge(items) == Writer().judge(items)
        assert judge.misses == 0  # nothing that was reported as done is lost
        # Whatever else was stored is right too
        everything = [json.loads(text) for (text,) in sqlite3.connect(path).execute("SELECT verdict FROM verdicts")]
        assert len(everything) >= len(numbers)
        for status, first_error, n_steps, confidence, reason, _ in everything:
            number = round(confidence * 7)
            assert (status, first_error, n_steps, reason) == ("error", number % 3, 3, str(number) * 40)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_killed_with_half_a_batch_on_the_disk(self, path, monkeypatch):
        def half(connection, rows):
            connection.execute("PRAGMA cache_size=1")  # so that pages reach the disk before the commit
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", rows[: len(rows) // 2])
            os.write(writing, b"x")
            time.sleep(30)

        with CachedJudge(Counting(), path) as judge:
            judge.judge(items_of(20))
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                cached_module._write = half
                CachedJudge(Counting(), path).judge(items_of(2000))
            finally:
                os._exit(1)
        os.read(reading, 1)
        written = path.with_name(path.name + "-wal").stat().st_size
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(reading)
        os.close(writing)
        assert written > 50_000
        # The lock is free, and the half batch is gone: a judge that does not wait can write
        monkeypatch.setattr(cached_module, "BUSY_SECONDS", 0.0)
        with CachedJudge(inner := Counting(), path) as judge:
            assert judge.judge(items_of(2000)) == [Counting.by_number(item) for item in items_of(2000)]
            assert (judge.hits, len(inner.asked)) == (20, 1980)
        assert integrity(path) == [("ok",)]
        assert n_rows(path) == 2000

    def test_a_fork_that_python_does_not_know_of(self, path):
        judge = CachedJudge(inner := Counting(), path)
        judge.judge(items_of(2))
        inherited, judge._pid = judge._connection, -1  # what the child of such a fork would find
        judge.judge(items_of(2))
        assert inner.asked == ["0", "1"]
        assert judge._connection is not inherited
        assert inherited.execute("SELECT 1").fetchone() == (1,)  # left alone, not even closed

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_fork(self, path):
        judge = CachedJudge(inner := Counting(), path)
        judge.judge(items_of(5))
        assert judge._connection is not None
        children = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = 2 if judge._connection is not None else 0  # SQLite's state is not carried over
                    for i in range(10):
                        items = items_of(10, start=100 * rank + 5 * i)
                        if judge.judge(items) != [Counting.by_number(item) for item in items]:
                            code = 3
                    if rank == 0 and (judge.hits, judge.misses) != (5 + 9 * 5, 5 + 5 + 9 * 5):
                        code = 4
                finally:
                    os._exit(code)
            children.append(pid)
        for i in range(10):
            items = items_of(10, start=200 + 5 * i)
            assert judge.judge(items) == [Counting.by_number(item) for item in items]
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
        inner.asked.clear()
        judge.judge(items_of(55) + items_of(55, start=100) + items_of(55, start=200))
        assert inner.asked == []
        judge.close()
        assert integrity(path) == [("ok",)]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_fork_while_another_thread_writes(self, path):
        judge = CachedJudge(Counting(), path)
        stop = threading.Event()

        def work():
            start = 0
            while not stop.is_set():
                judge.judge(items_of(20, start=start))
                start += 20

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(10):
                time.sleep(0.01)
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        signal.alarm(10)  # a lock that nobody can release any more would show as a hang
                        items = items_of(3, start=1_000_000)
                        code = 0 if judge.judge(items) == [Counting.by_number(item) for item in items] else 2
                    finally:
                        os._exit(code)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            stop.set()
            thread.join()
        judge.close()
        assert integrity(path) == [("ok",)]
