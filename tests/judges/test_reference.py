import time
from fractions import Fraction

import pytest

from trl_sgpo.judges import ArithmeticJudge, EarliestError, JudgeItem, ReferenceJudge
from trl_sgpo.judges.reference import equations, final_answer, plain_text
from trl_sgpo.loading import load_judge


REFERENCE = (
    "He has 3*4=<<3*4=12>>12 apples.\nHe eats half: 12/2 = $<<12/2=6>>6.\nThen 50% are <<6*0.5=3>>3 left.\n#### 3"
)


BOTH = EarliestError([ArithmeticJudge(), ReferenceJudge()])


def verdict(*steps, reference=REFERENCE, judge=None):
    return (judge or ReferenceJudge()).judge([JudgeItem("...", steps, reference=reference)])[0]


# The text


def test_marks_become_plain_equations_once():
    assert plain_text("48/2 = <<48/2=24>>24 clips") == "48/2 = 24 clips"
    assert plain_text("she pays 2*3=$<<2*3=6>>6") == "she pays 2*3=$6"
    assert plain_text("5 dozen are <<5*12=60>>60 eggs") == "5 dozen are 5*12=60 eggs"
    assert plain_text("Mary is <<35=35>>35 years old") == "Mary is 35 years old"
    assert plain_text("a << b, and 1 >> 0") == "a << b, and 1 >> 0"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", 72),
        ("24+48 = 72\n#### 1,072", 1072),
        ("#### $-3.50", Fraction("-3.5")),
        ("####72 clips", 72),
        ("#### .5", Fraction("0.5")),
        ("72", None),
        ("#### many", None),
        ("####", None),
        ("#### 1\n#### 2", None),  # who answers twice does not answer
        ("#### " + "9" * 5000, 10**30),
    ],
)
def test_the_final_answer_is_the_number_behind_the_only_mark(text, answer):
    found = final_answer(text)
    assert (found and found.value) == answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("So 3 bags x 4 = 12 apples", [(12, True)]),
        ("He pays 2*$3=$6, then $6 + $1,000 = $1,006.", [(6, True), (1006, True)]),
        ("7 times 2 = 14", [(14, True)]),
        ("2*3*4=6*4=24", [(24, True)]),  # the first equality is between two calculations
        ("12 - 2 = 10 apples * 3 = 30", [(30, True)]),
        ("The price is 600+240=$840 a week", [(840, True)]),
        ("4 - 5 = -1", [(-1, True)]),
        ("50% of 80 = 40", [(40, True)]),
        ("x = 5", [(5, False)]),
        ("the total = 45", [(45, False)]),
        ("2x + 5 = 25", [(25, False)]),
        ("L + 11 + 3 = 25", [(25, False)]),
        ("2 * 2S = 4S", []),
        ("1/2 * 1/2 = 1/4", []),
        ("there are 12 apples and 4 bags", []),
        ("5 >= 3 + 1, 3 + 1 <= 5", []),
        ("= = =", []),
    ],
)
def test_equations_are_read_where_they_are_certain(text, found):
    assert [(equation.results[0].value, equation.computed) for equation in equations(text)] == found


def test_reading_takes_time_linear_in_the_text():
    start = time.process_time()
    pieces = ("1+", "= 12 ab ", "=1", "<<", "<<1=1>>", "1", " ", "= 1*((", "1+1=2 ", "1.", ",234", "####", "x ", "é")
    for text in [piece * (40_000 // len(piece)) for piece in pieces]:
        verdict(text + "+1=2")
        verdict("1 =" + text)
        final_answer("####" + text + "x")
    assert time.process_time() - start < 10  # a second or two; quadratic time would be minutes


# The judge


def test_the_reference_itself_is_right():
    steps = plain_text(REFERENCE).splitlines(keepends=True)
    for judge in (ReferenceJudge(), BOTH):
        assert verdict(*steps, judge=judge).status == "no_error"


def test_a_result_that_the_reference_has_not_is_wrong():
    found = verdict("3*4=12", "12 - 4 = 8", "8/2 = 4")
    assert (found.first_error, found.reason) == (1, "8 is no result of the reference")


def test_another_way_to_a_result_of_the_reference_is_right():
    assert verdict("4 + 4 + 4 = 12", "12 - 6 = 6", "6 - 3 = 3\n#### 3").status == "no_error"


def test_the_final_answer_may_be_computed_though_the_reference_only_names_it():
    assert verdict("1 + 1 = 2\n#### 2", reference="Two.\n#### 2").status == "no_error"
    assert verdict("1 + 2 = 3", reference="Two.\n#### 2").first_error == 0


def test_steps_without_a_result_are_not_wrong():
    assert verdict("He has apples.", "There are 99 of them, let x = 7.", "3*4=12", "2x + 5 = 25").status == "no_error"
    assert verdict("He has apples.", "There are 99 of them.").status == "abstain"


def test_a_step_without_a_result_is_not_checked():
    steps = ("He has apples.", "3*4=12", "Let x = 7.", "12/2=6", "12 + 1 = 13", "#### 3")
    assert verdict(*steps).checked == (1, 3)
    assert verdict(*steps[:4], steps[5]).checked == (1, 3, 4)
    assert verdict("12 + 1 = 13", "3*4=12").checked == ()


def test_a_right_step_written_again_is_filler():
    found = verdict("3*4=12", "So 3*4=12", "4*3=12", "12/2=6")
    assert (found.first_error, found.reason) == (1, "12 was computed before")
    twice = "3*4=<<3*4=12>>12\n2*6=<<2*6=12>>12\n12+12=<<12+12=24>>24\n#### 24"
    assert verdict("3*4=12", "2*6=12", "12+12=24", reference=twice).status == "no_error"


def test_a_wrong_final_answer_is_an_error_of_its_step():
    assert verdict("3*4=12", "12/2=6\n#### 6").first_error == 1
    assert verdict("3*4=12", "12/2=6\n#### 3").status == "no_error"


def test_results_agree_up_to_rounding_and_percent():
    thirds = "10/3=<<10/3=3.33>>3.33\n#### 3.33"
    assert verdict("10/3 = 3.3", reference=thirds).status == "no_error"
    assert verdict("10/3 = 3", reference=thirds).first_error == 0
    half = "1/2 = <<1/2=0.5>>0.5\n#### 0.5"
    assert verdict("1 / 2 = 50%", reference=half).status == "no_error"


def test_without_a_reference_the_judge_abstains():
    assert verdict("3*4=12", reference=None).reason == "no reference solution"
    assert verdict("3*4=12", reference="Nothing.").reason == "the reference has no result"


def test_both_judges_together_name_the_earlier_error():
    steps = ("3*4=12", "12/2 = 5", "6*0.5 = 3")
    assert verdict(*steps, judge=BOTH).reason == "12/2 = 5 (is 6)"
    assert verdict("12/2 = 6", "12 + 1 = 13", "2 + 2 = 5", judge=BOTH).first_error == 1


def test_what_is_no_text_is_an_abstention():
    assert verdict("3*4=12", reference=["3*4=12"]).reason == "no reference solution"
    assert verdict("", "=", "####", "#### 1,2,3").status == "abstain"


def test_too_much_text_is_an_abstention():
    assert verdict("3*4=12", "=" * 1_000_000).reason == "more than 60000 characters of arithmetic"
    assert verdict("3*4=12", "a" * 1_000_000).status == "no_error"


def test_it_has_a_short_name():
    assert isinstance(load_judge("reference"), ReferenceJudge)
