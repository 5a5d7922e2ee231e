"""When completions of failed groups grow longer or shorter and not better, one warning says so."""

import pytest

from trl_sgpo.length_alarm import COMPLETIONS, FALL, GROWTH, ROUNDS, SHRINKAGE, LengthAlarm


N = 64  # completions of failed groups in each round


def rung(rounds, n=N):
    """The 0-based rounds in which the alarm rings."""
    alarm = LengthAlarm()
    return [i for i, (length, accuracy) in enumerate(rounds) if alarm.add(n, length, accuracy)]


def test_small_rounds_are_more():
    rounds = [(100, 0.1)] * (COMPLETIONS // 8) + [(131, 0.1)] * 100
    assert rung(rounds, n=8)[0] == 2 * COMPLETIONS // 8 - 1


def test_a_window_is_the_last_rounds_only():
    rounds = [(100, 0.1)] * ROUNDS + [(200, 0.1)] * ROUNDS + [(100, 0.1)] * 100
    ends = 2 * ROUNDS + round(0.7 * ROUNDS)  # three long rounds among ten are a mean of 130
    assert rung(rounds) == list(range(2 * ROUNDS - 1, ends))


def test_rings_when_ten_rounds_are_a_third_longer():
    assert rung([(100, 0.1)] * ROUNDS + [(131, 0.1)] * ROUNDS) == [2 * ROUNDS - 1]


def test_is_silent_before_two_windows_are_full():
    assert rung([(100, 0.1)] * ROUNDS + [(1000, 0.1)] * (ROUNDS - 1)) == []


def test_is_silent_below_its_growth():
    assert rung([(100, 0.1)] * ROUNDS + [(100 * GROWTH - 1, 0.1)] * 100) == []


def test_is_silent_while_accuracy_rises():
    assert rung([(100, 0.1)] * ROUNDS + [(200, 0.2)] * 100) == []


def test_rings_when_accuracy_falls_back():
    rounds = [(100, 0.1)] * ROUNDS + [(200, 0.2)] * 40 + [(200, 0.05)] * 40
    first = rung(rounds)[0]
    last = [accuracy for _, accuracy in rounds[first - ROUNDS + 1 : first + 1]]
    assert sum(last) / ROUNDS <= 0.1 < sum(accuracy for _, accuracy in rounds[first - ROUNDS : first]) / ROUNDS


def test_a_slow_drift_is_measured_against_the_beginning():
    rounds = [(100 + i, 0.1) for i in range(120)]
    first = rung(rounds)[0]
    mean = sum(length for length, _ in rounds[first - ROUNDS + 1 : first + 1]) / ROUNDS
    assert mean - 1 < GROWTH * sum(length for length, _ in rounds[:ROUNDS]) / ROUNDS <= mean


def test_rings_when_they_are_shorter_and_worse():
    assert rung([(100, 0.1)] * ROUNDS + [(89, 0.06)] * ROUNDS) == [2 * ROUNDS - 1]


@pytest.mark.parametrize(("length", "accuracy"), [(100 * SHRINKAGE + 1, 0.0), (50, 0.1 * FALL + 0.001), (50, 0.2)])
def test_is_silent_when_they_are_hardly_shorter_or_no_worse(length, accuracy):
    assert rung([(100, 0.1)] * ROUNDS + [(length, accuracy)] * 100) == []


@pytest.mark.parametrize(
    ("before", "now", "kind", "words"),
    [
        ((100, 0.25), (150, 0.125), "longer", ["from 100 to 150 tokens", "0.250, now 0.125", "judge_until"]),
        (
            (45, 0.025),
            (35, 0.005),
            "shorter",
            ["shorter, from 45 to 35 tokens", "fallen (0.025, now 0.005)", "failed_groups='prefix'"],
        ),
    ],
)
def test_says_what_it_saw(before, now, kind, words):
    alarm = LengthAlarm()
    said, text = [alarm.add(N, *round) for round in [before] * ROUNDS + [now] * ROUNDS][-1]
    assert said == kind
    for some in words:
        assert some in text
