"""What a judge is trained on and calibrated on, and the arguments that say so."""

import pytest
from solutions_to_learn import PROBLEMS, solution, write_solutions
from toys import write_rows

from trl_sgpo.judge_evaluation.data import Row
from trl_sgpo.judge_training.arguments import JudgeTrainArguments
from trl_sgpo.judge_training.data import ask_in_batches, read_data, same_problem


@pytest.fixture
def data(tmp_path):
    return write_solutions(tmp_path / "train.jsonl")


class TestData:
    def test_problems_of_the_dev_part_are_not_trained_on(self, data):
        found = read_data(JudgeTrainArguments(data=[str(data)], dev_share=0.25))
        problems = [{same_problem(row.problem) for row in part} for part in (found.train, found.dev)]
        assert not problems[0] & problems[1]
        assert len(found.dev) == 9
        assert len(found.train) == 27
        assert found.excluded == 0

    def test_evaluation_problems_are_left_out(self, data, tmp_path):
        exclude = write_rows(
            tmp_path / "test.jsonl",
            [
                {"problem": "A  a [R] [V]=", "steps": ["x"], "label": 0},  # as it is spelt there
                {"problem": "b b [R] [V] =", "steps": ["x"], "label": -1},
            ],
        )
        found = read_data(JudgeTrainArguments(data=[str(data)], exclude=[str(exclude)]))
        assert found.excluded == 2
        assert not {"a a r v", "b b r v"} & {same_problem(row.problem) for row in [*found.train, *found.dev]}

    def test_dev_data_of_its_own(self, data, tmp_path):
        dev = write_rows(tmp_path / "dev.jsonl", [solution(p, 1) for p in PROBLEMS[:4]])
        found = read_data(JudgeTrainArguments(data=[str(data)], dev_data=[str(dev)]))
        assert [len(found.train), len(found.dev), found.excluded] == [32, 4, 4]

    def test_both_forms_of_a_row(self, tmp_path):
        path = write_rows(
            tmp_path / "both.jsonl",
            [
                {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
                {"problem": "q", "steps": ["a", "b"], "label": 1},
                {"problem": "r", "steps": ["a", "b"], "label": -1},
            ],
        )
        found = read_data(JudgeTrainArguments(data=[str(path)], dev_share=0.3))
        assert sorted(row.label for row in [*found.train, *found.dev]) == [-1, 1, 1]

    def test_errors_say_where_and_what(self, tmp_path, data):
        bad = write_rows(
            tmp_path / "bad.jsonl", [solution("p", 0), {"prompt": "q", "completions": "abc", "labels": [True]}]
        )
        with pytest.raises(ValueError, match=r"bad.jsonl, line 2: completions='abc' must be a list of strings"):
            read_data(JudgeTrainArguments(data=[str(bad)]))
        with pytest.raises(ValueError, match="leaves nothing to train on: 36 rows were read, 36 of them"):
            read_data(JudgeTrainArguments(data=[str(data)], exclude=[str(data)]))
        right = write_rows(tmp_path / "right.jsonl", [solution(p, -1) for p in PROBLEMS])
        with pytest.raises(ValueError, match="has no solution with an error"):
            read_data(JudgeTrainArguments(data=[str(right)]))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"data": ["Qwen/ProcessBench"]}, "is a set that judges are evaluated on"),
            ({"kind": "regressive"}, "kind='regressive' is unknown"),
            ({"bootstrap": "some"}, "bootstrap='some' is unknown"),
            ({"dev_share": 1.0}, "dev_share=1.0 must lie strictly between"),
            ({"samples": 0}, "samples=0 must be at least 1"),
            ({"sampling_temperature": 0.0}, "sampling_temperature=0.0 must be positive"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            JudgeTrainArguments(**{"data": ["x"], **arguments})


def test_a_bar_shows_how_many_are_judged(capsys):
    rows = [Row(str(i), "f", "s", f"p{i}", ("a",), 0, None, None, {}) for i in range(5)]
    batches = []

    def judge(items):
        batches.append(len(items))
        return [item.problem for item in items]

    assert ask_in_batches(judge, rows, batch_size=2) == ["p0", "p1", "p2", "p3", "p4"]
    assert batches == [2, 2, 1]
    assert "judging the dev data: 100%" in capsys.readouterr().err
