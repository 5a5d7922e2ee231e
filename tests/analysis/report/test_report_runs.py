"""Reading a run's folder, whole or broken."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_folders import write_run

from trl_sgpo.analysis.report.logged_groups import KINDS
from trl_sgpo.analysis.report.runs import NoRunError, label_of, read_log, read_run, run_folder


def read(path, **options):
    return read_run(path, "run", "run", **options)


def edit(path, step, change):
    """Rewrites one completions file."""
    file = path / "completions" / f"completions_{step:05d}.parquet"
    change(pd.read_parquet(file)).to_parquet(file)


def said(run):
    return " ".join(run.missing)


def test_a_whole_run(tmp_path):
    run = read(write_run(tmp_path / "run", n_files=6, judge=True))
    assert run.missing == []
    assert (run.outcome, run.rewards, run.has_judge, run.n_files) == ("accuracy_reward", ["accuracy_reward"], True, 6)
    assert (run.groups.size, len(run.groups.step), run.groups.n_left_out) == (8, 24, 0)
    assert [entry["step"] for entry in run.log] == [1, 2, 3, 4, 5, 6]
    assert run.groups.share("rescued").sum() > 0


def test_a_run_with_several_tasks(tmp_path):
    path = write_run(tmp_path / "run", n_files=3, log=False)
    plain = read(path)

    def split(table):
        of_math = (table["prompt"].str[-1].astype(int) % 2).astype(bool)
        table["math"] = table["accuracy_reward"].where(of_math)
        table["code"] = table["accuracy_reward"].where(~of_math)
        return table.drop(columns="accuracy_reward")

    for step in (1, 2, 3):
        edit(path, step, split)
    (path / "sgpo.json").write_text(json.dumps({"outcome_reward": ["code", "math"], "failed_groups": "sgpo"}))
    run = read(path)
    assert run.outcome == "code | math"
    assert run.groups.n_correct.tolist() == plain.groups.n_correct.tolist()
    assert run.groups.kind.tolist() == plain.groups.kind.tolist()


def test_cut_off_and_empty_files_are_left_out(tmp_path):
    path = write_run(tmp_path / "run", n_files=6)
    files = sorted((path / "completions").iterdir())
    files[1].write_bytes(files[1].read_bytes()[:700])
    files[2].write_bytes(b"")
    pq.write_table(pa.table({"step": [4]}), files[3])
    run = read(path)
    assert len(run.groups.step) == 12
    assert "3 of 6 completions files could not be read" in said(run)
    assert "completions_00004.parquet (no column completion and prompt)" in said(run)


def test_nothing_but_broken_files(tmp_path):
    path = write_run(tmp_path / "run", n_files=2)
    for file in (path / "completions").iterdir():
        file.write_bytes(b"PAR1")
    run = read(path)
    assert run.groups is None
    assert "None of the completions files could be read" in said(run)
    assert len(run.log) == 2


def test_several_rewards_need_a_name(tmp_path):
    path = write_run(tmp_path / "run", n_files=3, log=False)
    for step in (1, 2, 3):
        edit(path, step, lambda frame: frame.assign(format_reward=1.0, length_reward=0.5))
    run = read(path)
    assert run.outcome is None
    assert "(accuracy_reward, format_reward, length_reward)" in said(run)
    assert "--outcome" in said(run)
    assert (run.groups.kind == KINDS.index("unscored")).all()
    assert run.groups.live.any()  # what teaches is known all the same
    assert read(path, outcome="accuracy_reward").outcome == "accuracy_reward"
    assert "no reward 'acc'" in said(read(path, outcome="acc"))
    # What the trainer noted beside the run is as good as the option
    (path / "sgpo.json").write_text('{"outcome_reward": "format_reward", "success_threshold": 2.0}')
    run = read(path)
    assert (run.outcome, run.groups.n_correct.sum()) == ("format_reward", 0)


def test_numbers_of_the_users_own_are_no_rewards_if_the_log_names_them(tmp_path):
    path = write_run(tmp_path / "run", n_files=2)
    for step in (1, 2):
        edit(path, step, lambda frame: frame.assign(difficulty=3.0))
    assert read(path).rewards == ["accuracy_reward"]


def test_no_reward_columns(tmp_path):
    path = write_run(tmp_path / "run", n_files=2, log=False)
    for step in (1, 2):
        edit(path, step, lambda frame: frame.drop(columns="accuracy_reward"))
    assert "no column of rewards" in said(read(path))


def test_nan_and_none_rewards(tmp_path):
    path = write_run(tmp_path / "run", n_files=3)
    edit(path, 1, lambda frame: frame.assign(accuracy_reward=np.nan))
    edit(path, 2, lambda frame: frame.assign(accuracy_reward=None))
    run = read(path)
    assert (run.groups.n_scored[:8] == 0).all()
    assert (run.groups.kind[:8] == KINDS.index("unscored")).all()
    edit(path, 3, lambda frame: frame.assign(accuracy_reward=np.nan))
    assert "NaN for every completion" in said(read(path))


def test_columns_that_change_between_versions(tmp_path):
    path = write_run(tmp_path / "run", n_files=4)
    edit(path, 1, lambda frame: frame.drop(columns=["advantage", "step"]))
    edit(path, 2, lambda frame: frame.assign(accuracy_reward=frame["accuracy_reward"].astype(bool)))
    edit(path, 3, lambda frame: frame.assign(stepwise_judge=np.nan, rts=np.nan, verdict=None))
    run = read(path)
    assert (len(run.groups.step), run.has_judge) == (16, True)
    assert sorted(set(run.groups.step)) == [1, 2, 3, 4]


def test_conversations(tmp_path):
    path = write_run(tmp_path / "run", n_files=2)

    def talk(frame):
        return frame.assign(
            prompt=[[{"role": "user", "content": text}] for text in frame["prompt"]],
            completion=[[{"role": "assistant", "content": text}] for text in frame["completion"]],
        )

    plain = read(path).groups
    for step in (1, 2):
        edit(path, step, talk)
    groups = read(path).groups
    assert groups.size == 8
    assert groups.distinct.tolist() == plain.distinct.tolist()
    assert groups.length.tolist() == plain.length.tolist()


def test_a_batch_that_is_logged_again_counts_once(tmp_path):
    path = write_run(tmp_path / "run", n_files=2)
    again = pd.read_parquet(path / "completions" / "completions_00002.parquet").assign(step=3)
    again.to_parquet(path / "completions" / "completions_00003.parquet")
    run = read(path)
    assert len(run.groups.step) == 8
    assert "1 completions files repeat the file before" in said(run)


def test_a_group_size_of_one(tmp_path):
    run = read(write_run(tmp_path / "run", n_files=3, n_groups=8, size=1))
    assert run.groups.size == 1
    assert "G = 1" in said(run)


def test_a_group_size_that_does_not_fit(tmp_path):
    run = read(write_run(tmp_path / "run", n_files=2), group_size=64)
    assert run.groups is None
    assert "--group-size=64 does not fit" in said(run)


def test_an_extractor_that_raises(tmp_path):
    run = read(write_run(tmp_path / "run", n_files=2), extract=lambda text: 1 / 0)
    assert (run.groups.distinct == 1).all()
    assert "raised on 64 completions" in said(run)


def test_the_log_that_reaches_furthest_counts(tmp_path):
    path = write_run(tmp_path / "run", n_files=4)
    (path / "trainer_state.json").unlink()
    for step in (2, 10):
        (path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": s, "loss": 0.0} for s in range(1, step + 1)]}
        (path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert len(read_log(path)[0]) == 10
    # The newest is still being written
    (path / "checkpoint-10" / "trainer_state.json").write_text('{"log_history": [{"st')
    log, notes = read_log(path)
    assert len(log) == 2
    assert "checkpoint-10/trainer_state.json could not be read" in notes[0]


def test_a_log_of_json_lines(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.5}\n{"step": 1, "eval_reward": 9}\n\n{"step": 2, "reward": NaN}\n{"step": 3, "rew'
    )
    log, notes = read_log(path)
    assert [entry["step"] for entry in log] == [1, 2]
    assert "1 lines of metrics.jsonl are cut off" in notes[0]
    assert "log_completions=True" in said(read(path))


def test_the_log_of_an_evaluation_is_not_that_of_training(tmp_path):
    path = write_run(tmp_path / "run", n_files=2)
    state = json.loads((path / "trainer_state.json").read_text())
    state["log_history"] += [{"step": 2, "eval_reward": 1.0, "entropy": 9.0}, {"step": 2, "train_runtime": 1.0}]
    (path / "trainer_state.json").write_text(json.dumps(state))
    assert read(path).log[-1]["entropy"] == 0.5


@pytest.mark.parametrize("make", [None, "empty", "other"])
def test_a_folder_without_a_run(make, tmp_path):
    path = tmp_path / "run"
    if make:
        path.mkdir()
    if make == "other":
        (path / "notes.txt").write_text("x")
        (path / "sharpening").mkdir()
    with pytest.raises(NoRunError, match=r"does not exist\. Looked for the log|is no run\. Looked for the log"):
        read(path)


def test_the_folders_that_stand_for_a_run(tmp_path):
    path = write_run(tmp_path / "sharpening", n_files=1)  # a run may be called so
    assert run_folder(path) == path
    assert run_folder(path / "completions") == path
    assert run_folder(path / "checkpoint-50") == path


@pytest.mark.parametrize(
    ("path", "label"),
    [("a/sgpo-seed1", "sgpo"), ("sgpo/seed_0", "sgpo"), ("grpo", "grpo"), ("x/r-s2", "r"), ("gpt2", "gpt2")],
)
def test_labels(path, label):
    assert label_of(Path(path)) == label
