"""When completions of failed groups grow longer or shorter and not better, one warning says so."""

import pytest

from trl_sgpo.length_alarm import COMPLETIONS, FALL, GROWTH, SHRINKAGE, LengthAlarm
from trl_sgpo.length_alarm import ROUNDS as WINDOW


N = 64  # completions of failed groups in each round


def rung(rounds, n=N):
    """The 0-based rounds in which the alarm rings."""
    alarm = LengthAlarm()
    return [i for i, (length, accuracy) in enumerate(rounds) if alarm.add(n, length, accuracy)]


def test_small_rounds_are_more():
    rounds = [(100, 0.1)] * (COMPLETIONS // 8) + [(131, 0.1)] * 100
    assert rung(rounds, n=8)[0] == 2 * COMPLETIONS // 8 - 1


def test_a_window_is_the_last_rounds_only():
    rounds = [(100, 0.1)] * WINDOW + [(200, 0.1)] * WINDOW + [(100, 0.1)] * 100
    ends = 2 * WINDOW + round(0.7 * WINDOW)  # three long rounds among ten are a mean of 130
    assert rung(rounds) == list(range(2 * WINDOW - 1, ends))


def test_rings_when_ten_rounds_are_a_third_longer():
    assert rung([(100, 0.1)] * WINDOW + [(131, 0.1)] * WINDOW) == [2 * WINDOW - 1]


def test_is_silent_before_two_windows_are_full():
    assert rung([(100, 0.1)] * WINDOW + [(1000, 0.1)] * (WINDOW - 1)) == []


def test_is_silent_below_its_growth():
    assert rung([(100, 0.1)] * WINDOW + [(100 * GROWTH - 1, 0.1)] * 100) == []


def test_is_silent_while_accuracy_rises():
    assert rung([(100, 0.1)] * WINDOW + [(200, 0.2)] * 100) == []


def test_rings_when_accuracy_falls_back():
    rounds = [(100, 0.1)] * WINDOW + [(200, 0.2)] * 40 + [(200, 0.05)] * 40
    first = rung(rounds)[0]
    last = [accuracy for _, accuracy in rounds[first - WINDOW + 1 : first + 1]]
    assert sum(last) / WINDOW <= 0.1 < sum(accuracy for _, accuracy in rounds[first - WINDOW : first]) / WINDOW


def test_a_slow_drift_is_measured_against_the_beginning():
    rounds = [(100 + i, 0.1) for i in range(120)]
    first = rung(rounds)[0]
    mean = sum(length for length, _ in rounds[first - WINDOW + 1 : first + 1]) / WINDOW
    assert mean - 1 < GROWTH * sum(length for length, _ in rounds[:WINDOW]) / WINDOW <= mean


def test_rings_when_they_are_shorter_and_worse():
    assert rung([(100, 0.1)] * WINDOW + [(89, 0.06)] * WINDOW) == [2 * WINDOW - 1]


@pytest.mark.parametrize(("length", "accuracy"), [(100 * SHRINKAGE + 1, 0.0), (50, 0.1 * FALL + 0.001), (50, 0.2)])
def test_is_silent_when_they_are_hardly_shorter_or_no_worse(length, accuracy):
    assert rung([(100, 0.1)] * WINDOW + [(length, accuracy)] * 100) == []


def test_says_that_they_are_shorter():
    alarm = LengthAlarm()
    said = [alarm.add(N, *round) for round in [(45, 0.025)] * WINDOW + [(35, 0.005)] * WINDOW][-1]
    kind, text = said
    assert kind == "shorter"
    assert "shorter, from 45 to 35 tokens" in text
    assert "fallen (0.025, now 0.005)" in text
    assert "failed_groups='prefix'" in text


def test_says_what_it_saw():
    alarm = LengthAlarm()
    said = [alarm.add(N, *round) for round in [(100, 0.25)] * WINDOW + [(150, 0.125)] * WINDOW][-1]
    kind, text = said
    assert kind == "longer"
    assert "from 100 to 150 tokens" in text
    assert "0.250, now 0.125" in text
    assert "judge_until" in text
