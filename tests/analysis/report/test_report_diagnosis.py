"""Is it broken, and what to change."""

import math

import pytest

from trl_sgpo.analysis.report.diagnosis import RunFacts, advice, answer


def drift(length_start, length_end, accuracy_start, accuracy_end):
    return {
        "has_judge": True,
        "n_updates": 50,
        "n_groups": 320,
        "length_start": length_start,
        "length_end": length_end,
        "accuracy_start": accuracy_start,
        "accuracy_end": accuracy_end,
    }


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (RunFacts(), "Unknown: there are no groups"),
        (RunFacts(n_groups=9, group_size=1, teaching=0.0), "Unknown: there are no groups"),
        (RunFacts(n_groups=9, group_size=8, teaching=0.0), "Nothing is learnt: none of the 9 logged groups"),
        (RunFacts(n_groups=9, group_size=8, teaching=0.1), "Not broken, but starved: 10 %"),
        (RunFacts(n_groups=9, group_size=8, teaching=0.9), "Not broken: 90 %"),
        (RunFacts(teaching=0.9), "Not broken: 90 % of the groups, by the log, teach"),
        (
            RunFacts(n_groups=9, group_size=8, teaching=0.9, loss=1e-8, grad_norm=0.4, still=0.25),
            "Mean |loss| 1.0e-08, mean grad_norm 0.400 (exactly 0 at 25 % of the log entries).",
        ),
    ],
)
def test_answer(facts, words):
    assert words in answer(facts)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"unjudged": 0.9}, "failed and were not judged: a step-wise judge"),
        ({"unjudged": 0.2, "has_judge": True}, "judge_until"),
        ({"tied": 0.5}, "unit='characters'"),
        ({"tied": 0.5, "rts": 0.1}, "unit='characters'"),
        ({"tied": 0.5, "rts": 0.0}, "the judge finds no right step in any completion"),
        ({"abstained": 0.2}, "judge_reason"),
        ({"solved": 0.6}, "harder data"),
        ({"other_rewards": 0.3}, "learns format"),
        ({"clipped": 0.5}, "max_completion_length"),
        ({"distinct": 1.1, "teaching": 0.2}, "temperature"),
        ({"rts_gap_start": 0.0, "rts_gap_end": 0.3}, "pads with small right steps"),
        (
            drift(40, 60, 0.1, 0.1),
            "Completions grew (40 → 60 tokens), and accuracy did not rise (10.0 %",
        ),
        (
            drift(45, 35, 0.026, 0.007),
            "shorter (45 → 35 tokens), and accuracy fell (2.6 % → 0.7 %)",
        ),
        ({"group_size": 1}, "num_generations must be 2"),
    ],
)
def test_advice(facts, words):
    (said,) = advice(RunFacts(**{"n_groups": 10, "group_size": 8, **facts}))
    assert words in said


@pytest.mark.parametrize(
    "facts",
    [
        drift(45, 35, 0.1, 0.08),
        drift(45, 35, 0.0, 0.0),
        {**drift(45, 35, 0.1, 0.0), "n_updates": 49},
        {**drift(45, 35, 0.1, 0.0), "n_groups": 319},
        {**drift(45, 35, 0.1, 0.0), "has_judge": False},
        drift(45, 35, 0.1, 0.2),
        drift(45, 42, 0.1, 0.0),
        drift(40, 60, 0.1, 0.2),
        drift(40, 50, 0.1, 0.1),
        drift(45, 35, math.nan, math.nan),
        drift(math.nan, math.nan, 0.2, 0.1),
    ],
)
def test_lengths_that_need_no_word(facts):
    assert advice(RunFacts(group_size=8, **facts)) == []


def test_nothing_to_say():
    assert (
        advice(
            RunFacts(n_groups=10, group_size=8, teaching=0.8, mixed=0.8, solved=0.1, unjudged=0.1, clipped=math.nan)
        )
        == []
    )
