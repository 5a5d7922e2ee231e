"""A judge is tried on one completion, as a user does it before a run."""

import json

import pytest

from trl_sgpo import CallableJudge, StepwiseJudge, Verdict
from trl_sgpo.judges import ArithmeticJudge, CachedJudge, EarliestError, JudgeItem, OpenAIJudge
from trl_sgpo.scripts import judge


RIGHT_THEN_WRONG = "First 2 * 3 = 6.\nThen 6 + 4 = 11.\nSo 11 - 1 = 10."


def run(capsys, *argv):
    code = judge.main([*map(str, argv)])
    return code, capsys.readouterr().out


def test_a_verdict(capsys):
    code, out = run(capsys, "--judge", "arithmetic", "--problem", "What is it?", "--completion", RIGHT_THEN_WRONG)
    assert code == 0
    assert "   1  ok     First 2 * 3 = 6." in out
    assert "   2  WRONG  Then 6 + 4 = 11." in out
    assert "   3  -      So 11 - 1 = 10." in out
    assert "Verdict: step 2 is the first wrong one" in out
    assert "RTS: 0.333 by steps, 0.347 by characters" in out
    assert "Reward: 0.159 (of the RTS by steps; beta=10, gamma=0.5)" in out
    assert '"problem": "What is it?"' in out


def test_a_step_that_was_not_checked(capsys):
    argv = ("--judge", "arithmetic", "--problem", "p", "--completion", "We add.\n2 + 2 = 4.\n4 + 4 = 9.")
    out = run(capsys, *argv)[1]
    assert "   1  ?      We add." in out
    assert "   2  ok     2 + 2 = 4." in out
    assert "RTS: 0.500 by steps" in out


def test_an_abstention(capsys):
    code, out = run(capsys, "--judge", "arithmetic", "--problem", "p", "--completion", "One.\nTwo.", "--hide_request")
    assert code == 1
    assert "Verdict: the judge abstains" in out
    assert "   1  ?      One." in out
    assert "RTS: none" in out
    assert "Asked of" not in out


def test_an_empty_completion_is_not_asked_about(capsys):
    code, out = run(capsys, "--judge", "arithmetic", "--problem", "p", "--completion", " ")
    assert code == 0
    assert "0 steps" in out
    assert "Verdict: the completion is empty" in out


def test_a_right_completion(capsys, monkeypatch, tmp_path):
    (tmp_path / "own_judges.py").write_text("def nothing(problem, steps):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    argv = ("--judge", "own_judges.nothing", "--problem", "p", "--completion", "2 + 2 = 4.\nDone with it.")
    code, out = run(capsys, *argv, "--maybe_right")
    assert code == 0
    assert "Verdict: no error" in out
    assert "RTS: 1.000" in out
    assert "ok     2 + 2 = 4." in out
    assert run(capsys, *argv)[0] == 0  # known to be wrong: the verdict is still "no error"


def test_what_was_not_checked_is_not_called_right(capsys):
    argv = ("--judge", "arithmetic", "--problem", "p", "--completion", "We add.\n2 + 2 = 4.", "--maybe_right")
    out = run(capsys, *argv)[1]
    assert "   1  ?      We add." in out
    assert "   2  ok     2 + 2 = 4." in out


def test_texts_from_files_and_the_judge_of_a_training_run(capsys, tmp_path):
    (tmp_path / "problem.txt").write_text("What is it?", encoding="utf-8-sig")
    (tmp_path / "completion.txt").write_text(RIGHT_THEN_WRONG)
    config = tmp_path / "sgpo.yaml"
    config.write_text("learning_rate: 1.0e-5\njudge: arithmetic\nstepwise_judge_args: {unit: characters}\n")
    paths = [f"@{tmp_path / name}.txt" for name in ("problem", "completion")]
    code, out = run(capsys, "--config", config, "--problem", paths[0], "--completion", paths[1])
    assert code == 0
    assert "of the RTS by characters" in out
    with pytest.raises(ValueError, match=r"problem='@none.txt' names the file none.txt, which does not exist"):
        judge.main(["--judge", "arithmetic", "--problem", "@none.txt", "--completion", "c"])


def test_the_other_columns_of_the_row(capsys, tmp_path, monkeypatch):
    (tmp_path / "row_judges.py").write_text(
        "def by_unit(problem, steps, unit):\n    return 0 if unit == 'm' else None\n"
    )
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"unit": "m", "solution": "10"})
    _, out = run(capsys, "--judge", "row_judges.by_unit", "--problem", "p", "--completion", "It is 5.", "--row", row)
    assert "step 1 is the first wrong one" in out
    assert '"reference": "10"' in out


def test_a_column_that_the_judge_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "needy_judges.py").write_text("def by_unit(problem, steps, unit):\n    return 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"has to be given the column 'unit'. What --row has for a judge is \[\]"):
        judge.main(["--judge", "needy_judges.by_unit", "--problem", "p", "--completion", "c"])


def test_the_standard_input_is_one_text():
    with pytest.raises(ValueError, match="problem and completion are both -"):
        judge.main(["--judge", "arithmetic", "--problem", "-", "--completion", "-"])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="judge is not given"):
        judge.main(["--problem", "p", "--completion", "c"])
    with pytest.raises(ValueError, match="unknown arguments: --judg_args"):
        judge.main(["--judge", "arithmetic", "--problem", "p", "--completion", "c", "--judg_args", "{}"])


class TestRequests:
    item = JudgeItem("p?", ("one", "two"))

    def test_the_messages_to_a_model(self):
        (one,) = judge.requests(OpenAIJudge("m", "http://localhost:1/v1"), self.item)
        assert one[0] == "OpenAIJudge(m)"
        assert one[1].startswith("[system]\nYou check solutions step by step.")
        assert "first_error_step" in one[1]

    def test_judges_inside_judges(self, tmp_path):
        judges = EarliestError(
            [ArithmeticJudge(), CachedJudge(OpenAIJudge("m", "http://localhost:1/v1"), tmp_path / "c")]
        )
        assert [name for name, _ in judge.requests(judges, self.item)] == ["ArithmeticJudge", "OpenAIJudge(m)"]


def test_the_judge_is_left_as_it_was():
    inner = CallableJudge(lambda problem, steps: Verdict.error(0))
    stepwise = StepwiseJudge(inner)
    score, item = judge.ask_one(stepwise, "p", "a\nb", {}, known_wrong=True)
    assert (score.first_error, item.steps) == (0, ("a\n", "b"))
    assert stepwise.judge is inner
