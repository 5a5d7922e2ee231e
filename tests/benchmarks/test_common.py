"""Where records come from and how they are written, and that what is recorded is written so."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks.common import provenance, record_all, write_results


RECORDS = sorted(Path(__file__).parents[2].glob("benchmarks/**/results.json"))


def test_a_record_has_a_line_per_entry(tmp_path):
    record = {"commit": "abc", "runs": [{"seed": 0, "curve": [1, 2]}, {"seed": 1, "curve": []}], "sizes": [4, 8]}
    write_results(tmp_path / "new" / "results.json", record)
    assert (tmp_path / "new" / "results.json").read_text() == (
        "{\n"
        ' "commit": "abc",\n'
        ' "runs": [\n'
        '  {"seed": 0, "curve": [1, 2]},\n'
        '  {"seed": 1, "curve": []}\n'
        " ],\n"
        ' "sizes": [4, 8]\n'
        "}\n"
    )


def test_what_json_does_not_know_is_null(tmp_path):
    write_results(tmp_path / "results.json", {"judges": {1: {"f1": float("nan"), "ends": (0.5, float("inf"))}}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"judges": {"1": {"f1": None, "ends": [0.5, None]}}}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_the_records_are_written_so(path, tmp_path):
    write_results(tmp_path / "results.json", json.loads(path.read_text()))
    assert path.read_text() == (tmp_path / "results.json").read_text()


def test_provenance():
    found = provenance(("trl", "torch"), threads=1)
    assert set(found["versions"]) == {"trl", "torch"}
    assert found["hardware"].endswith("CPU, 1 thread")
    assert found["commit"]


def job(name):
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "stopped":
        return None
    if name == "exits":
        raise SystemExit("no tuned rate")
    if name == "long":
        time.sleep(600)
    if isinstance(name, Path):
        name.write_text(str(os.getpid()))
        time.sleep(600)
    return {"key": name, "error": "it broke"} if name == "broken" else {"key": name}


def wait_until(is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


class TestJobs:
    def test_one_that_breaks_or_is_killed_does_not_lose_the_others(self, capfd):
        kept = []
        failed = record_all(
            job,
            ["one", "killed", "broken", "exits", "stopped", "two"],
            lambda r: kept.append(r["key"]) or "",
            workers=1,
        )
        assert (kept, failed) == (["one", "two"], 3)
        shown = capfd.readouterr()
        assert "FAILED broken: it broke" in shown.out + shown.err
        assert "FAILED killed: its process was killed" in shown.out + shown.err
        assert "FAILED exits: SystemExit('no tuned rate')" in shown.out + shown.err

    def test_a_record_that_cannot_be_kept_ends_all(self):
        def keep(record):
            raise OSError("no space left")

        with pytest.raises(OSError, match="no space"):
            record_all(job, ["one", "long"], keep, workers=2)
        assert not multiprocessing.active_children()

    @pytest.mark.parametrize("signal_sent", [signal.SIGKILL, signal.SIGTERM])
    def test_a_process_ends_with_the_command_that_started_it(self, tmp_path, signal_sent):
        command = multiprocessing.get_context("spawn").Process(
            target=record_all, args=(job, [tmp_path / "pid"], str, 1), daemon=False
        )
        command.start()
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        os.kill(command.pid, signal_sent)
        command.join()
        status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
        wait_until(lambda: not status.exists() or "State:\tZ" in status.read_text())
