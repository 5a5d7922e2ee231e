"""From a completion to its answer."""

import time

import pytest

from trl_sgpo.analysis.report.answers import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{7} and not 8", "7"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{never closed", "never closed"),
        ("3 + 4 = 7\n#### 1,234", "1234"),
        ("#### \\$18", "\\$18"),
        ("first 5, then 1,234.50 apples", "1234.5"),
        ("x = -3/4", "-3/4"),
        ("no digits\nthe last line. \n\n", "the last line"),
        ("b c d [V] ; d c b ; c d b", "c d b"),
        ("", None),
        ("   \n ", None),
        ("7" * 300, ("7" * 200)),
    ],
)
def test_default(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\boxed{3,5}", "\\boxed{35}"),  # a pair
        ("\\boxed{0,1}", "\\boxed{01}"),
        ("\\boxed{1,10,100}", "\\boxed{110100}"),
        ("\\boxed{12,34}", "\\boxed{1234}"),
        ("It is 1 1/4.", "It is 2 1/4."),
        ("\\boxed{1.5/20}", "\\boxed{1.5/2}"),
        ("so -5", "so 5"),
    ],
)
def test_different_answers_stay_different(one, other):
    assert extract_answer(one) != extract_answer(other)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{115,000}", "115000"),
        ("\\boxed{1,234,567}", "1234567"),
        ("it is 1{,}234", "1234"),
        ("it is 12\\,500", "12500"),
        ("1.000.000", "1000000"),
        ("it costs 2.345.678 in all", "2345678"),
        ("so it is \u22125", "-5"),
        ("so it is \uff0d5", "-5"),
        ("\\boxed{x \u2212 1}", "x - 1"),
        ("pages 3-5", "5"),
        ("pages 3\u20135", "5"),
        ("(2)-3", "3"),
        ("#### Step 1: Add\n3 + 4 = 7\n#### Step 2: Conclude\nThe answer is 7.", "7"),
        ("#### 2. Conclude\nThe answer is 7.", "7"),
        ("#### Conclusion\nThe answer is 7.", "7"),
        ("#### 42\nLet me check this again.", "42"),
        ("#### **42**", "42"),
        ("**73**", "73"),
        ("#### +5", "5"),
        ("\\boxed{7}. The form is \\boxed{}.", "7"),
        ("\\fbox{7} and 8", "7"),
        ("\\boxed 7 and 8", "7"),
        ("#### 9\n####", "9"),
        ("7.00", "7"),
    ],
)
def test_answers_as_people_write_them(text, answer):
    assert extract_answer(text) == answer


def test_a_number_at_the_begin_of_a_long_text_is_found():
    assert extract_answer("42 " + "word " * 1000) == "42"
    assert extract_answer("the sum 123456 " + "w" * 253) == "123456"  # cut by the tail that is looked at first


def test_long_texts_are_quick():
    texts = ["word " * 2000 + f"so {i}" for i in range(1000)]
    start = time.perf_counter()
    assert [extract_answer(text) for text in texts] == [str(i) for i in range(1000)]
    assert time.perf_counter() - start < 1
    start = time.perf_counter()
    for slow in (
        "1," * 100_000,
        "1" * 100_000,
        "1 " * 100_000,
        "\\boxed{}" * 20_000,
        "####\n" * 200_000,
        "-" * 100_000,
    ):
        extract_answer(slow)
    assert time.perf_counter() - start < 2
