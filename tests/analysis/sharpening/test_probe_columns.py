"""Columns of the probe set whose names are those of a reward function's arguments, and columns that a judge needs."""

import pytest
from conftest import first_long_word, words_as_steps

from trl_sgpo import StepwiseJudge
from trl_sgpo.analysis import SharpeningCallback
from trl_sgpo.tasks.rewrite_chain import make_dataset


ROWS = list(make_dataset(3, 2, seed=9))


@pytest.fixture
def seen():
    return []


@pytest.fixture
def make_probe(make_trainer, tmp_path, seen):
    """A trainer with a probe on rows that have other columns too; what the outcome reward is given is kept in `seen`."""

    def outcome(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        log_extra("name", ["x"] * len(completions))
        log_metric("name", 1.0)
        seen.append((trainer_state, completion_ids, columns))
        return [1.0] * len(completions)

    def make(columns=(), judge=False):
        trainer = make_trainer([outcome], max_steps=1)
        rows = [{**row, **dict.fromkeys(columns, "x")} for row in ROWS]
        trainer.add_callback(SharpeningCallback(trainer, rows, 2, judge=judge, cache_dir=tmp_path / "cache"))
        return trainer

    return make


@pytest.mark.parametrize("column", ["prompts", "completions"])
def test_a_column_that_no_reward_function_can_be_given_is_named_before_training(make_probe, column):
    with pytest.raises(ValueError, match=f"prompts has a column '{column}'.* Rename the column or remove it"):
        make_probe([column])


@pytest.mark.parametrize("column", ["completion", "completion_ids", "trainer_state", "log_extra", "log_metric"])
def test_a_column_that_trl_leaves_out_or_replaces_does_so_in_a_probe(make_probe, seen, caplog, column):
    trainer = make_probe([column, "level"])
    trainer.train()
    assert "A probe of SharpeningCallback failed" not in caplog.text
    assert any("sharpening/pass@1" in entry for entry in trainer.state.log_history)
    in_probes = [given for given in seen if "level" in given[2]]
    assert in_probes
    for state, ids, columns in in_probes:
        assert state is trainer.state
        assert all(isinstance(row, list) for row in ids)
        assert column not in columns


def test_a_judge_needs_a_column_that_the_probe_set_lacks(make_probe):
    with pytest.raises(ValueError, match=r"has to be given the column 'level'\. What prompts has for a judge is \["):
        make_probe(judge=lambda problem, steps, level: 0)
    make_probe(["level"], judge=lambda problem, steps, level: 0)
    make_probe(judge=StepwiseJudge(first_long_word, segmenter=words_as_steps))
