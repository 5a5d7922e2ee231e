"""Which completions belong together, and what became of each group."""

import numpy as np
import pytest

from trl_sgpo.analysis.report.completions import VERDICTS, Rows
from trl_sgpo.analysis.report.logged_groups import infer_group_size, make_groups, split_groups


def rows_of(outcome_PG, advantage_PG=None, judge_PG=None, rts_PG=None, verdict_PG=None, other_PG=None):
    outcome = np.asarray(outcome_PG, dtype=float)
    nan = np.full(outcome.size, np.nan)

    def column(values):
        return nan if values is None else np.asarray(values, dtype=float).ravel()

    rewards = {"accuracy": outcome.ravel()}
    if other_PG is not None:
        rewards["format"] = column(other_PG)
    verdicts = np.zeros(outcome.size, dtype=np.int8)
    if verdict_PG is not None:
        verdicts = np.array([VERDICTS.index(v) for v in np.ravel(verdict_PG)], dtype=np.int8)
    n_groups, size = outcome.shape
    return Rows(
        step=np.repeat(np.arange(n_groups), size),
        file=np.zeros(outcome.size, dtype=int),
        prompt=np.repeat(np.arange(n_groups), size),
        rewards=rewards,
        advantage=column(advantage_PG),
        judge=column(judge_PG),
        rts=column(rts_PG),
        verdict=verdicts,
        answer=np.arange(outcome.size),
        length=np.full(outcome.size, 10.0),
        has_judge=judge_PG is not None,
        has_advantage=advantage_PG is not None,
    )


def kinds_of(rows, size, **settings):
    groups = make_groups(rows, size, "accuracy", **settings)
    names = ("solved", "mixed", "rescued", "other_rewards", "tied", "abstained", "unjudged", "unscored")
    return [names[k] for k in groups.kind], groups


def runs(*lengths, files=None):
    file = np.repeat(files if files is not None else np.zeros(len(lengths), dtype=int), lengths)
    return file, np.repeat(np.arange(len(lengths)), lengths)


def test_group_size_is_that_of_the_runs_of_equal_prompts():
    file, prompt = runs(4, 4, 4)
    assert infer_group_size(file, prompt, np.zeros(12)) == (4, "")


def test_a_prompt_drawn_twice_in_a_row_is_two_groups():
    file, prompt = runs(8, 4, 4)
    assert infer_group_size(file, prompt, np.zeros(16)) == (4, "")
    assert split_groups(file, prompt, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_prompt_drawn_twice_apart_is_two_groups_too():
    file, prompt = np.zeros(12, dtype=int), np.repeat([5, 6, 5], 4)
    assert infer_group_size(file, prompt, np.zeros(12)) == (4, "")
    assert len(split_groups(file, prompt, 4)) == 3


def test_every_prompt_alone_is_a_group_size_of_one():
    file, prompt = runs(*[1] * 20)
    assert infer_group_size(file, prompt, np.zeros(20)) == (1, "")


def test_the_rest_of_an_evaluation_does_not_spoil_the_group_size():
    # 38 groups of 4, and one file in which an evaluation with one completion per prompt left 3 rows of a group behind
    file, prompt = runs(*[4] * 38, 3, 1, 1, 1, 1, 1, files=[*[0] * 38, *[1] * 6])
    assert infer_group_size(file, prompt, np.zeros(len(file)))[0] == 4


def test_rows_of_a_cut_group_are_left_out_at_the_right_end():
    # The first group of a file lost its first rows, the last one of a file its last rows
    file, prompt = runs(2, 4, 3, files=[0, 0, 0])
    assert split_groups(file, prompt, 4).tolist() == [[2, 3, 4, 5]]
    file, prompt = runs(6, 4, files=[0, 0])
    assert split_groups(file, prompt, 4).tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]


def test_a_dataset_of_one_prompt_is_split_by_its_advantages():
    rng = np.random.default_rng(0)
    reward = rng.random((6 * 3, 4))
    advantage = ((reward - reward.mean(1, keepdims=True)) / reward.std(1, keepdims=True)).ravel()
    file, prompt = np.repeat(np.arange(6), 12), np.zeros(72, dtype=int)
    size, guess = infer_group_size(file, prompt, advantage)
    assert size == 4
    assert "--group-size" in guess
    size, guess = infer_group_size(file, prompt, np.zeros(72))  # no group teaches: nothing to tell them apart by
    assert size == 12
    assert "too few advantages" in guess


def test_one_group_per_file_is_no_guess():
    outcome = np.array([[1.0, 0, 0, 0]] * 8)
    advantage = (outcome - outcome.mean(1, keepdims=True)).ravel()
    file = np.repeat(np.arange(8), 4)
    assert infer_group_size(file, file * 0, advantage) == (4, "")


def test_prefix_credit_rescues_where_somebody_has_a_right_step():
    # The judge has no part in the rewards there, and equal scores teach
    rows = rows_of([[0, 0]] * 2, [[0.4, 0.4], [0.7, -0.7]], rts_PG=[[0.5, 0.5], [0, 0]], other_PG=[[0, 0], [1, 0]])
    assert kinds_of(rows, 2, treatment="prefix")[0] == ["rescued", "other_rewards"]


def test_kinds_without_a_judge():
    outcome = [[1, 1], [1, 0], [0, 0], [0, 0], [np.nan, 0]]
    advantage = [[0, 0], [0.7, -0.7], [0, 1e-6], [0.7, -0.7], [0, 0]]
    kinds, groups = kinds_of(rows_of(outcome, advantage), 2)
    # The fourth fails and yet teaches: another reward does that. A rounding residue teaches nothing.
    assert kinds == ["solved", "mixed", "unjudged", "other_rewards", "unscored"]
    assert groups.live.tolist() == [False, True, False, True, False]
    assert groups.live_length.tolist() == [0, 20, 0, 20, 0]


def test_kinds_with_a_judge():
    nan = np.nan
    outcome = np.zeros((6, 2))
    judge = [[0.1, 0.9], [nan, nan], [nan, nan], [nan, nan], [nan, nan], [nan, nan]]
    rts = [[0.2, 0.8], [0.2, 0.2], [nan, nan], [nan, nan], [nan, 0.4], [nan, nan]]
    verdict = [["error"] * 2, ["error"] * 2, ["abstain"] * 2, ["", ""], ["abstain", "error"], ["no_error"] * 2]
    advantage = [[-0.7, 0.7], *[[0, 0]] * 5]
    kinds, _ = kinds_of(rows_of(outcome, advantage, judge, rts, verdict), 2)
    assert kinds == ["rescued", "tied", "abstained", "unjudged", "abstained", "abstained"]


def test_without_advantages_rewards_tell_what_teaches():
    kinds, groups = kinds_of(rows_of([[1, 1], [1, 0], [0, 0], [0, 0]], other_PG=[[1, 1], [1, 1], [1, 1], [0, 1]]), 2)
    assert kinds == ["solved", "mixed", "unjudged", "other_rewards"]
    assert groups.live.tolist() == [False, True, False, True]


@pytest.mark.parametrize("size", [1, 3])
def test_rows_that_fit_no_group(size):
    groups = make_groups(rows_of(np.zeros((2, 2))), size, "accuracy")
    assert groups.n_left_out == (0 if size == 1 else 4)
