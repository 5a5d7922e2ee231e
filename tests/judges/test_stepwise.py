import json
import math
import re
from functools import partial

import numpy as np
import pytest
from conftest import first_long_word
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo import CallableJudge, StepJudge, StepwiseJudge, Verdict


PROMPT = "What is 2 + 2?"
FOUR_STEPS = "First look.\n\nThen think.\n\nThen add.\n\nIt is 5 then, as we all know."


def judge_of(*verdicts):
    class Fixed(StepJudge):
        items = ()

        def judge(self, items):
            self.items = items
            return list(verdicts)

    return Fixed()


async def a_coroutine(prompt):
    return prompt


def score(judge, completion=FOUR_STEPS, prompt=PROMPT, row=None, known_wrong=True, **kwargs):
    return StepwiseJudge(judge, **kwargs).score([prompt], [completion], [row or {}], known_wrong)[0]


class TestScore:
    def test_first_wrong_step(self):
        scored = score(judge_of(Verdict.error(2, reason="5 is not 4")))
        assert (scored.status, scored.first_error, scored.n_steps) == ("error", 2, 4)
        assert scored.rts_steps == 0.5
        assert scored.rts_characters == pytest.approx(FOUR_STEPS.index("Then add") / len(FOUR_STEPS))
        assert (scored.reason, scored.called) == ("5 is not 4", True)

    def test_what_was_not_checked_is_neither_right_nor_a_step(self):
        text = "One.\nTwo is two.\nThree.\nFour.\nFive."
        judge = StepwiseJudge(lambda problem, steps: Verdict.error(3, checked=[0, 2]))
        (score,) = judge.score(["p"], [text], [{}])
        assert (score.first_error, score.n_steps, score.unchecked, score.n_right) == (3, 5, {1}, 2)
        assert (score.rts_steps, judge.size(score)) == (2 / 4, 4)
        assert score.cut.steps == ("One.\n", "Three.\n", "Four.\n", "Five.")
        by_characters = StepwiseJudge(judge.judge, unit="characters")
        assert by_characters.size(score) == len("One.\nThree.\nFour.\nFive.")
        assert score.rts_characters == len("One.\nThree.\n") / by_characters.size(score)
        everything = StepwiseJudge(lambda problem, steps: Verdict.error(3)).score(["p"], [text], [{}])[0]
        assert (everything.unchecked, everything.rts_steps) == (frozenset(), 3 / 5)

    def test_numpy_integers_are_integers(self):
        assert score(judge_of(Verdict.error(np.int64(1)))).first_error == 1

    def test_no_error(self):
        verdict = judge_of(Verdict.no_error())
        assert score(verdict).rts_steps is None  # known wrong: the judge has missed the error
        assert score(verdict, no_error="last_step").rts_steps == 0.75
        assert score(verdict, no_error="last_step").status == "no_error"
        assert score(verdict, known_wrong=False).rts_steps == 1.0

    @pytest.mark.parametrize("completion", ["", "  \n ", [{"role": "assistant", "content": ""}], []])
    def test_empty_completions_need_no_judge(self, completion):
        def never(problem, steps):
            raise AssertionError

        scored = score(never, completion)
        assert (scored.rts_steps, scored.rts_characters, scored.called) == (0.0, 0.0, False)

    def test_what_the_judge_is_given(self):
        judge = judge_of(Verdict.abstain(""))
        prompt = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
        ]
        row = {"prompt": prompt, "answer": 4, "level": 1}
        score(judge, [{"role": "assistant", "content": FOUR_STEPS}], prompt, row, reference_column="answer")
        (item,) = judge.items
        assert item.problem == PROMPT
        assert item.reference == "4"
        assert item.row == {"answer": 4, "level": 1}
        assert "".join(item.steps) == FOUR_STEPS
        assert item.known_wrong

    @pytest.mark.parametrize("value", ["", " \n", math.nan, np.float32("nan"), None, [], [""], [None], np.array([])])
    def test_an_empty_value_is_no_reference(self, value):
        judge = judge_of(Verdict.abstain(""))
        score(judge, row={"solution": value})
        assert judge.items[0].reference is None

    @pytest.mark.parametrize("value", [0, 0.0, False, "0", "42", "nan", np.int64(0), [0]])
    def test_zero_is_a_reference(self, value):
        judge = judge_of(Verdict.abstain(""))
        score(judge, row={"solution": value})
        assert judge.items[0].reference == str(value)

    def test_a_named_reference_column_that_is_in_no_row_is_warned_of_once(self, caplog):
        judge = StepwiseJudge(judge_of(Verdict.abstain("")), reference_column="anwser")
        for _ in range(2):
            judge.score([PROMPT], [FOUR_STEPS], [{"answer": 4}])
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "reference_column='anwser' is in no row" in record.message
        assert "['answer']. Name one of them, or add the column" in record.message

    def test_a_reference_column_that_is_in_some_row_is_no_reason_to_warn(self, caplog):
        judge = StepwiseJudge(judge_of(Verdict.abstain(""), Verdict.abstain("")), reference_column="answer")
        judge.score([PROMPT] * 2, [FOUR_STEPS] * 2, [{}, {"answer": None}])
        score(judge_of(Verdict.abstain("")))  # nothing is named: a run without references
        assert caplog.text == ""

    def test_what_the_problem_is_can_be_said(self):
        prompt = [
            {"role": "system", "content": "A passage."},
            {"role": "user", "content": "What is 12 * 12?"},
            {"role": "assistant", "content": "124"},
            {"role": "user", "content": "Check that again."},
        ]
        judge = judge_of(Verdict.abstain(""))
        score(judge, prompt=prompt)
        assert judge.items[0].problem == "Check that again."
        score(judge, prompt=prompt, problem=lambda prompt: "\n".join(message["content"] for message in prompt))
        assert judge.items[0].problem == "A passage.\nWhat is 12 * 12?\n124\nCheck that again."
        score(judge, prompt="A string", problem=str.upper)
        assert judge.items[0].problem == "A STRING"

    @pytest.mark.parametrize(
        ("problem", "reason"),
        [
            (lambda prompt: prompt["text"], "TypeError: string indices"),
            (lambda prompt: [prompt], r"TypeError: `problem` returned \['What is 2 \+ 2\?'\], but the judge needs"),
            (lambda prompt: None, "TypeError: `problem` returned None"),
        ],
    )
    def test_a_problem_that_fails_is_an_abstention(self, problem, reason, caplog):
        scored = score(judge_of(), problem=problem)
        assert (scored.status, scored.called) == ("abstain", False)
        assert re.match(reason, scored.reason)
        assert "Traceback" in caplog.text

    def test_thinking(self):
        text = "<think>Let me see.\n\nHm, 2 and 2.</think>Add them.\n\nThat gives 5."
        judge = judge_of(Verdict.error(1))
        score(judge, text)
        assert judge.items[0].steps == ("Add them.\n\n", "That gives 5.")
        score(judge, text, include_thinking=True)
        assert len(judge.items[0].steps) > 2

    def test_a_text_in_which_the_segmenter_finds_no_step_is_an_abstention(self):
        scored = score(judge_of(), "A long answer without any head.", segmenter=lambda text: [])
        assert (scored.status, scored.reason, scored.called) == ("abstain", "the segmenter found no step", False)
        assert scored.rts_steps is None

    def test_a_segmenter_that_fails_later_is_an_abstention(self, caplog):
        def segmenter(text):
            if "Then add" in text:
                raise IndexError("lost")
            return [(0, len(text))]

        scored = score(judge_of(), segmenter=segmenter)
        assert (scored.status, scored.reason, scored.called) == ("abstain", "IndexError: lost", False)
        assert "Traceback" in caplog.text

    def test_a_segmenter_that_cannot_read_the_probe_is_accepted(self):
        def lines_of_json(text):
            json.loads(text)
            return [(0, len(text))]

        assert score(judge_of(Verdict.error(0)), '{"a": 1}', segmenter=lines_of_json).n_steps == 1

    def test_order_is_kept_around_gaps(self):
        judge = StepwiseJudge(judge_of(Verdict.error(0), Verdict.error(1)))
        scores = judge.score([PROMPT] * 4, ["", FOUR_STEPS, "", FOUR_STEPS], [{}] * 4)
        assert [s.first_error for s in scores] == [None, 0, None, 1]

    @given(st.integers(1, 12), st.data())
    @settings(max_examples=100, deadline=None)
    def test_known_wrong_scores_lie_below_one(self, n_lines, data):
        first_error = data.draw(st.integers(0, n_lines - 1))
        lines = data.draw(st.lists(st.text("ab ", min_size=1), min_size=n_lines, max_size=n_lines))
        text = "\n".join("x" + line for line in lines)

        def by_line(text):
            ends = [i + 1 for i, x in enumerate(text) if x == "\n"] + [len(text)]
            return list(zip([0, *ends[:-1]], ends, strict=True))

        scored = score(judge_of(Verdict.error(first_error)), text, segmenter=by_line)
        assert 0 <= scored.rts_steps < 1
        assert 0 <= scored.rts_characters < 1
        assert scored.rts_steps == first_error / n_lines


class TestRewardFunction:
    def test_judges_every_row(self):
        judge = StepwiseJudge(judge_of(Verdict.error(2), Verdict.no_error(), Verdict.abstain("?")))
        rewards = judge(
            prompts=[PROMPT] * 3,
            completions=[FOUR_STEPS] * 3,
            completion_ids=[[1]] * 3,
            solution=["4"] * 3,
            trainer_state=object(),
            log_extra=lambda *args: None,
        )
        assert rewards[:2] == pytest.approx([0.5, 1 / (1 + math.exp(-5))])
        assert rewards[2] is None
        assert judge.judge.items[0].reference == "4"
        assert not judge.judge.items[0].known_wrong

    def test_unit(self):
        by_steps, by_characters = (
            StepwiseJudge(judge_of(Verdict.error(3)), transform="identity", unit=unit)([PROMPT], [FOUR_STEPS])[0]
            for unit in ("steps", "characters")
        )
        assert by_steps == 0.75
        assert by_characters == pytest.approx(FOUR_STEPS.index("It is") / len(FOUR_STEPS))

    def test_a_function_becomes_a_judge(self):
        assert isinstance(StepwiseJudge(lambda problem, steps: None).judge, CallableJudge)


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"judge": 3}, TypeError, "judge=3 is neither a `StepJudge` nor a function"),
            ({"judge": CallableJudge}, TypeError, "judge=CallableJudge is a class, not a judge"),
            ({"judge": StepwiseJudge(first_long_word)}, TypeError, "judge is a `StepwiseJudge` already"),
            ({"beta": -1.0}, ValueError, "beta=-1.0 must be a finite number of at least 0"),
            ({"beta": math.nan}, ValueError, "beta=nan must be a finite number"),
            ({"gamma": math.inf}, ValueError, "gamma=inf must be a finite number"),
            ({"unit": "tokens"}, ValueError, r"unit='tokens' is unknown: it must be one of \['steps', 'characters'\]"),
            ({"transform": "step"}, ValueError, r"transform='step' is unknown"),
            ({"no_error": "zero"}, ValueError, r"no_error='zero' is unknown"),
            ({"problem": "last"}, TypeError, "problem='last' is no plain function from a prompt"),
            ({"problem": partial(a_coroutine)}, TypeError, "problem=functools.partial.* is no plain function"),
            ({"problem": a_coroutine}, TypeError, "problem=<function a_coroutine .* is no plain function"),
            ({"reference_column": 5}, TypeError, "reference_column=5 is no name of a column"),
            ({"segmenter": 5}, TypeError, "segmenter=5 is not callable"),
            ({"segmenter": lambda text: [(0, 10), (5, 20)]}, ValueError, r"`segmenter` returned \(5, 20\).*overlap"),
            ({"segmenter": lambda text: [(10, 20), (0, 10)]}, ValueError, r"`segmenter` returned \(0, 10\).*go back"),
            ({"segmenter": lambda text: [(0, 10**6)]}, ValueError, "reaches outside the text"),
            ({"segmenter": lambda text: text.split()}, TypeError, "which is not two integers"),
        ],
    )
    def test_bad_arguments(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            StepwiseJudge(**{"judge": first_long_word, **kwargs})

    @pytest.mark.parametrize("gamma", [-0.5, 10.0])
    def test_gamma_outside_the_range_of_rts(self, gamma):
        with pytest.warns(UserWarning, match=f"gamma={gamma} lies outside"):
            StepwiseJudge(first_long_word, gamma=gamma)
