"""
Tests of `trl_sgpo.steps`: worked examples of every rule, properties on arbitrary text, time on hostile text, and plain
loops that the short formulas must equal.
"""

import ast
import doctest
import json
import math
import re
import sys
import time
from dataclasses import FrozenInstanceError
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo import steps
from trl_sgpo.steps import (
    CutCompletion,
    Turn,
    check_spans,
    completion_to_text,
    completion_turns,
    cut_completion,
    judged_regions,
    rts_by_characters,
    rts_by_steps,
    segment,
)


PROPERTY = settings(max_examples=200, deadline=None)

FENCE = "```python\na = 1\n\n## no heading\nb = 2\n```"
DISPLAY = "\\[\nx = 1\n\ny = 2\n\\]"
DOLLARS = "$$\nx = 1\ny = 2\n$$"
ENVIRONMENT = "\\begin{align*}\n\\begin{aligned}\na\n\nb\n\\end{aligned}\n\nc\n\\end{align*}"
TABLE = "| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |"

# fmt: off
FRAGMENTS = [
    "\n", "\n\n", " ", "\t", "\r\n", "  \n", "x", "Then we add 3. ", "So x = 3.14, e.g. Eq. 5. ", "It is 5! ",
    "What? ", "Step 1: ", "Step 2: ", "**Step 3** ", "### Step 4: go\n", "1. ", "2. ", "3) ", "## Solution\n",
    "#### 42", "---", "```", "```\n", "~~~\n", "$$", "$", "\\[", "\\]", "\\\\[2pt]", "\\begin{align}", "\\end{align}",
    "\\begin{cases}", "\\end{cases}", "\\boxed{4}", "| a | b |\n", "|---|---|\n", "|", "The answer is 4.",
    "<reasoning>\n", "</step>\n", "<answer>", "</s>", "\\begin{itemize}", "\\end{itemize}", "\\item ", "Wait. ",
    "we have:\n", "- item\n", "...", "<think>", "</think>", "。", "é", "\u2028", "\x1c", "\ud800", "🙂", "\0",
]
# fmt: on
arbitrary_text = st.text(max_size=300)
markdown_text = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)
any_text = st.one_of(arbitrary_text, markdown_text)


def pieces(text: str, **limits: int) -> list[str]:
    return [text[start:end] for start, end in segment(text, **limits)]


# ---------------------------------------------------------------------------------------------------------------------
# segment: worked examples. The pieces are given; the text is their concatenation.
# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = {
    # What is cut, from the most explicit to the finest
    "empty": [],
    "white_space": [" \n\n\t "],
    "one_word": ["42"],
    "step_heads": ["We go on.\n\nSo:\n\n", "Step 1: Add.\n\nGet 3.\n", "Step 2: Double.\n\n", "Step 3: Stop."],
    "decorated_step_heads": [
        "### Step 1: Add\nGet 3.\n\nYes.\n",
        "**Step 2** Double\n\nGet 6.\n",
        "__Step 3:__ Stop.",
    ],
    "step_heads_need_a_stop": ["Step 1 shows that.\n\n", "Step 2 shows this.\nStep 3 too.\n\n", "End."],
    "number_heads": ["1. Add.\n   More.\n", "2. Double.\n", "3. Stop."],
    "parenthesis_heads": ["Plan.\n", "1) Add.\n", "2) Double.\n", "10) Stop."],
    "bold_number_heads": ["**1. Add**\n1. a\n2. b\n", "**2. Double**\n1. c\n2. d"],
    "inner_list_is_deeper": ["1. Add:\n   1. a\n   2. b\n", "2. Double."],
    "inner_list_looks_different": ["1. Add.\n1) a\n2) b\n", "2. Double."],
    "headings": ["## Setup\nLet x.\n\nLet y.\n", "### Sum\nAdd.\n\nAdd more."],
    "headings_between_steps": ["### Step 1: a\nA.\n", "### Step 2: b\nB.\n#### Check\nC.\n", "## End\nD."],
    "counting_again_after_a_heading": ["## A\n1. a\n", "2. b\n", "## B\n1. c\n", "2. d"],
    "heads_must_rise": ["2. Double.\n1. Add.\n\n", "Stop."],
    "a_year_is_no_head": ["1. Add.\n", "2. Then came\n2024. A year.\n", "3. Stop."],
    "one_head_is_none": ["Step 1: Add.\n\n", "Double."],
    "few_items_among_paragraphs": ["We solve\n\n", "1. x = 1\n2. y = 2\n\n", "So.\n\n", "Then.\n\n", "End."],
    "blank_lines": ["Add.\nMore.\n\n", "Double.\n \t\n\n", "Stop.\n"],
    "windows_line_ends": ["Add.\r\nMore.\r\n\r\n", "Double.\r\n"],
    "leading_white_space": ["\n\n  Add.\n\n", "Double."],
    "lines": ["Add 3.\n", "  Double 6. So.\n", "Stop."],
    "sentences": ["Add 3. ", "Double it! ", "Is it 6?  ", "Yes."],
    "sentences_end_behind_quotes_and_maths": [
        'He said "no." ',
        "So $x = 3.$  ",
        "Thus \\(y.\\) ",
        "**Done.** ",
        "Yes.",
    ],
    "chinese_sentences": ["我们计算。", "得到答案！", "完成"],
    # What a sentence keeps
    "decimals": ["Pi is 3.14 or 3.1416. ", "It is .5 of 2.0 or so."],
    "abbreviations": [
        "Use e.g. This, i.e. That, etc. And vs. Them, approx. Five. ",
        "Mr. A met Dr. B in the U.S. In May.",
    ],
    "abbreviations_before_numbers": ["See Fig. 3 and Eq. (2) or No. 5. ", "I say no. ", "Then yes."],
    "lower_case_goes_on": ["It is 2 in. long and 3 in. wide. ", "Yes."],
    "enumerations": ["1. Add it. ", "2. Double it. ", "(a) Stop. ", "B. Go."],
    "ellipses": ["Well... Then 1, 2, ..., 9. . . So it goes on. ", "End."],
    "factorials": ["So 5! \\cdot 4! (2) is large. ", "Done! ", "Yes."],
    # What is never cut
    "fence": ["Code:\n\n" + FENCE + "\n\n", "Done."],
    "tilde_fence": ["Code.\n\n", "~~~\na\n\n```\n\nb\n~~~~\n\n", "Done."],
    "unclosed_fence_reaches_to_the_end": ["Code.\n\n", "```\na\n\nb\n\n~~~\n\nc"],
    "fence_ends_at_a_line_of_its_own": ["Code.\n\n", "```\na\n\n``` b\n\nc\n```\n\n", "Done."],
    "inline_code_is_no_fence": ["```a``` is code\n\n", "Done."],
    "display": ["First.\n\n", DISPLAY + "\n\n", "Done."],
    "dollars": ["First.\n", DOLLARS + "\n", "Done."],
    "environment": ["First.\n\n", ENVIRONMENT + "\n\n", "Done."],
    "table": ["First.\n", TABLE + "\n", "Done.\n", "|x| = 3\n", "|y| = 4"],
    "heads_inside_blocks_do_not_count": ["First.\n\n", "```\n1. a\n2. b\n3. c\n```\n\n", "Last."],
    "unclosed_display_protects_nothing": ["So \\[ a.\n\n", "B \\begin{align} c.\n\n", "D $$ e.\n\n", "F."],
    "unclosed_display_before_a_closed_one": ["So \\[ a.\n\n", "B \\[x\\] c.\n\n", "D \\] e.\n\n", "F."],
    "stray_dollars": ["It costs $$ a.\n\n", "B.\n\n", "C.\n\n", "$$x$$ is it.\n\n", "D."],
    "escaped_delimiters": ["So \\\\[2pt] a.\n\n", "B \\\\] and \\$$ c.\n\n", "D \\$$ e."],
    "a_proof_is_prose": ["\\begin{proof}\nAdd.\n\n", "Double.\n\n", "Stop.\n\\end{proof}"],
    # What joins a neighbour
    "crumbs": ["---\n\nAdd.\n\n***\n\n", "Double.\n\n:\n\n---\n"],
    "only_crumbs": ["---\n\n***\n\n:"],
    "heading_alone": ["## Solution\n\nAdd.\n\n", "**Next**\n\nDouble."],
    "bare_only_head": ["Step 1\n\nAdd.\n\n", "Double."],
    "bare_step_head": ["Step 1:\n\nAdd.\n\n", "**Step 2:**\n\nDouble."],
    "titled_step_heads_stand_alone": ["### Step 1: 1 + 1 = 2\n", "### Step 2: 2 + 2 = 4\n", "### Step 3: 4 + 4 = 8"],
    "heading_that_announces_nothing": ["Add.\n\n", "Double.\n\n## The end"],
    "lead_in": ["So we have:\n\n\\[ x = 1 \\]\n\n", "Therefore,\n\nit is 2.\n\n", "So we *have:*\n\nDone."],
    "lead_in_before_a_head": ["Step by step:\n\n", "1. Add.\n", "2. Double."],
    "display_that_ends_a_sentence": ["Add.\n", "Then\n$$x = 1$$\n", "$$y = 2$$\n", "It is\n", "so."],
    "gsm8k_answer": ["3 + 3 = 6\n", "6 * 2 = 12\n#### 12"],
    "boxed_answer": ["Add.\n\n", "Double.\n\n$$\\boxed{\\frac{1}{2}}$$\n"],
    "answer_phrases": [
        "Add.\n\n",
        "Double.\n\nAnswer: 4\n\n**Final Answer**\n\n4\n\nSo, the final answer is $\\boxed{4}$.\n",
    ],
    "answer_only": ["Answer: 4\n\n\\boxed{4}"],
    "answer_is_not_an_end": ["The answer is 4.\n\n", "But wait: it is 5."],
    "answer_with_its_reason": ["Add.\n\n", "The answer follows from adding."],
    "long_answer": ["Add.\n\n", "The answer is 4 because " + "we add and " * 20 + "stop."],
    # Tags on lines of their own are no steps
    "tags_around_reasoning_and_answer": [
        "<reasoning>\nWe add 3 and 4.\n",
        "That is 8.\n</reasoning>\n<answer>\n8\n</answer>\n",
    ],
    "tags_among_blank_lines": [
        "<reasoning>\n\nAdd.\n\n",
        "Double.\n\n</reasoning>\n\n<answer>\n\n8\n\n</answer>",
    ],
    "tags_inline": ["<reasoning>Add. ", "Double.</reasoning><answer>8</answer>"],
    "an_opening_tag_begins_a_step": ["Add.\n", "<check>\nDouble.\n</check>\n", "Stop."],
    "tags_of_other_forms": [
        "<start_working_out>\nAdd.\n",
        '<part n="2">\nDouble.\n<br/>\n</part>\n',
        "Stop.\n<end_working_out>\n<SOLUTION>\n8\n</SOLUTION>",
    ],
    "a_closing_and_an_opening_tag_on_one_line": ["Add.\n", "Double.\n</reasoning><answer>\n8\n</answer>"],
    "end_of_text_tags": ["Add.\n", "Double.\n</s>\n<|im_end|>\n<|endoftext|>"],
    "tags_in_brackets": ["[INST]\nAdd.\n", "Double.\n[/INST]"],
    "step_tags": ["<step>\nAdd.\nGet 4.\n</step>\n", "<step>\nDouble.\nGet 8.\n</step>\n<answer>8</answer>"],
    "numbered_step_tags": [
        '<step n="1">\nAdd.\n\nGet 4.\n</step>\n',
        "<step 2>Double.</step>",
        "<step_3>Stop.</step_3>",
    ],
    "environments_of_prose_are_tags": ["\\begin{proof}\n\nAdd.\n\n", "Double.\n\n\\end{proof}"],
    "an_answer_of_several_lines_in_tags": ["Add.\n", "Double.\n<answer>\nx = 3\ny = 4\n</answer>"],
    "all_in_answer_tags": ["<answer>\nAdd.\n", "Double.\n</answer>"],
    "comparisons_and_vectors_are_no_tags": ["a < b\n", "<a, b>\n", "<5>\n", "b > a"],
    # Lists in LaTeX
    "latex_items": [
        "\\begin{enumerate}\n\\item Add.\n",
        "\\item Double.\n",
        "\\item Stop.\n\\end{enumerate}",
    ],
    "latex_items_in_a_text": [
        "We add first.\n\\begin{itemize}\n  ",
        "\\item Add.\n\n  ",
        "\\item[b] Double.\n\\end{itemize}\n",
        "So we stop here.",
    ],
    "latex_items_on_one_line": ["\\begin{description} \\item[a] Add. ", "\\item[b] Double. \\end{description} "],
    "latex_list_inside_an_item": [
        "\\begin{enumerate}\n\\item Add.\n\\begin{itemize}\n\\item a\n\\item b\n\\end{itemize}\n",
        "\\item Double.\n\\[\nx\n\\]\n\\end{enumerate}",
    ],
    "latex_list_that_is_cut_off": ["\\begin{enumerate}\n\\item Add.\n", "\\item Double.\n", "\\item So"],
    "few_latex_items_among_paragraphs": [
        "We solve.\n\n",
        "\\begin{enumerate}\n\\item x = 1\n\n\\item y = 2\n\\end{enumerate}\n\n",
        "So.\n\n",
        "Then.\n\n",
        "End.",
    ],
    "latex_items_in_code": [
        "Code.\n\n",
        "```\n\\begin{itemize}\n\\item a\n\\item b\n\\item c\n\\end{itemize}\n```\n\n",
        "Done.",
    ],
    # A solution that goes back
    "steps_that_start_over": [
        "Step 1: a\n",
        "Step 2: b\n",
        "Step 3: c\nThis is wrong. Let me start over.\n",
        "Step 1: a\n",
        "Step 2: b\n",
        "Step 3: d\n",
        "Step 4: e",
    ],
    "items_that_start_over": ["1. a\n", "2. b\n\nWait, that is wrong.\n\n", "1. a\n", "2. c\n", "3. d"],
    "a_step_that_is_corrected": ["Step 1: a\n", "Step 2: b\n", "Step 2: c\n", "Step 3: d"],
    "steps_for_each_choice": [
        "**Step 1:** a\n",
        "**Step 2:** b\n\n",
        "**Step 1:** c\n",
        "**Step 2:** d\n",
    ],
    "an_inner_list_does_not_start_over": ["1. Add.\n", "2. Double:\n1. a\n2. b\n", "3. Stop."],
    "inner_steps_look_different": ["### Step 1: Add\n", "### Step 2: Double\nStep 1: a\n", "### Step 3: Stop"],
    "answer_level_goes_on_to_the_next": ["Add. ", "Double.\n\n#### 4"],
}


@pytest.mark.parametrize("expected", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_segment_examples(expected):
    assert pieces("".join(expected)) == expected


def test_steps_are_merged_to_the_cap_on_their_number():
    text = "aaaa\nb\nc\ndddd\neeee"
    assert pieces(text, max_steps=5) == ["aaaa\n", "b\n", "c\n", "dddd\n", "eeee"]
    assert pieces(text, max_steps=4) == ["aaaa\n", "b\nc\n", "dddd\n", "eeee"]
    assert pieces(text, max_steps=3) == ["aaaa\nb\n", "c\ndddd\n", "eeee"]
    assert pieces(text, max_steps=1) == [text]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (23, ["One two.\n", "Three four. Five six. ", "Seven.\n", "Eight"]),  # sentences, for the line is too long
        (12, ["One two.\n", "Three four. ", "Five six. ", "Seven.\n", "Eight"]),
        (9, ["One two.\n", "Three ", "four. ", "Five six. ", "Seven.\n", "Eight"]),  # words
        (4, ["One ", "two.\n", "Thre", "e ", "four", ". ", "Five ", "six. ", "Seve", "n.\n", "Eigh", "t"]),  # anywhere
    ],
)
def test_long_steps_are_cut_at_the_best_place(limit, expected):
    text = "One two.\nThree four. Five six. Seven.\nEight"
    assert pieces(text, max_step_chars=limit) == expected


def test_long_blocks_stay_whole():
    text = "Look at this code now\n" + FENCE + "\nand " + DOLLARS + " so it is\n"
    expected = ["Look at ", "this code ", "now\n", FENCE + "\n", "and ", DOLLARS + " ", "so it is\n"]
    assert pieces(text, max_step_chars=10) == expected


def test_cap_on_number_wins_over_cap_on_size():
    assert len(segment("word " * 1000, max_steps=3, max_step_chars=10)) == 3


@pytest.mark.parametrize("name", ["max_steps", "max_step_chars"])
@pytest.mark.parametrize("value", [0, -3])
def test_caps_must_be_positive(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` is {value}, .*pass an integer of 1 or more"):
        segment("text", **{name: value})


# ---------------------------------------------------------------------------------------------------------------------
# segment: properties
# ---------------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(any_text, st.integers(1, 70), st.integers(1, 400))
def test_spans_tile_the_text(text, max_steps, max_step_chars):
    spans = segment(text, max_steps=max_steps, max_step_chars=max_step_chars)
    assert "".join(text[start:end] for start, end in spans) == text
    assert check_spans(text, spans) == spans  # ordered, disjoint, not empty
    assert len(spans) <= max_steps
    if not text.strip():
        assert len(spans) == bool(text)


@PROPERTY
@given(st.text(alphabet="ab1. \n#*:,!-", max_size=300), st.integers(1, 50))
def test_steps_without_blocks_respect_the_cap_on_size(text, limit):
    assert all(
        len(piece.strip()) <= limit or piece.strip() == ""
        for piece in pieces(text, max_steps=10_000, max_step_chars=limit)
    )


@PROPERTY
@given(any_text)
def test_every_step_has_content(text):
    found = pieces(text)
    assert len(found) <= 1 or all(re.search(r"[^\W_]", piece) for piece in found)
    assert len(found) <= 1 or not any(re.fullmatch(r"\s*</?\w+>\s*", piece) for piece in found)


@PROPERTY
@given(
    st.lists(st.sampled_from(["Add 3. Then 4.", "So:", "1. a", "2. b", "## C", "---", "| d"]), max_size=6),
    st.sampled_from([FENCE, DISPLAY, DOLLARS, ENVIRONMENT, TABLE]),
    st.lists(st.sampled_from(["Add 3. Then 4.", "So:", "3. a", "4. b", "## C", "---", "#### 7"]), max_size=6),
    st.sampled_from(["\n", "\n\n"]),
    st.integers(1, 300),
)
def test_blocks_are_never_cut(before, block, after, separator, limit):
    start = len("".join(part + separator for part in before))
    text = separator.join([*before, block, *after])
    assert text[start:].startswith(block)
    spans = segment(text, max_step_chars=limit)
    assert any(left <= start and start + len(block) <= right for left, right in spans)


@PROPERTY
@given(st.lists(st.integers(1, 9), min_size=2, max_size=9), st.integers(1, 9))
def test_merging_keeps_the_longest_step_as_short_as_possible(lengths, max_steps):
    text = "".join("a" * length + ".\n" for length in lengths)
    n_lines = len(lengths)

    def longest(cuts: tuple[int, ...]) -> int:
        return max(sum(length + 2 for length in lengths[i:j]) for i, j in pairwise([0, *cuts, n_lines]))

    ways = (cuts for n in range(min(max_steps, n_lines)) for cuts in combinations(range(1, n_lines), n))
    assert max(map(len, pieces(text, max_steps=max_steps))) == min(map(longest, ways))


# ---------------------------------------------------------------------------------------------------------------------
# segment: time
# ---------------------------------------------------------------------------------------------------------------------

# fmt: off
HOSTILE = [
    "\n", " ", " \t\n", "a", "a\n", "a\n\n", "  a\n  ", "1.", "1. ", "1.\n", ". A", "Ab. ", '."" ', "e.g. A ", "... A",
    "!", "。", "-", "---\n", "|", "|\n", "|-|\n", "|a|\n|-|\n\n", "```", "```\n", "~~~\n", "$$", "$$\n\n", "\\", "\\[",
    "\\]", "\\begin{", "\\begin{a}", "\\begin{a}\\begin{b}\\end{a}", "\\boxed{", "\\boxed{4}\n", "#", "## a\n", "*",
    "<", "<a ", "<a>", "<a>\n", "</a>\n", "<|a|>\n", "<step>", "<step>\n", "<answer>", "<answer></answer>", "[THINK]\n",
    "<|channel|>", "<|channel|>commentary ", "assistantfinal", "<think", "</think_a>",
    "\\item ", "\\begin{itemize}", "\\begin{itemize}\\item a\\end{itemize}", "1. a\nWait. ", "Step 1: a\nStep 2: b\n",
    "**a**\n", "_", "Step 1: a\n", "Step 1: ", "a:\n", "The answer is 4.\n", "<think>", "</think>", "(a. B ",
]
# fmt: on


def seconds(function, *args, **kwargs) -> float:
    """CPU time of a call: other processes of the machine do not count."""
    start = time.process_time()
    function(*args, **kwargs)
    return time.process_time() - start


def check_linear(measure, n_chars: int, most: float = math.inf) -> None:
    """Eight times the text takes eight times as long, up to a factor of 2.5, and at most so many seconds."""
    for _ in range(3):  # other processes, or a collection of garbage, slow it down for a moment, but not three times
        short, long = measure(n_chars), measure(8 * n_chars)
        if long < most and long <= 2.5 * 8 * max(short, 0.01):
            return
    pytest.fail(f"{short:.3f} s for {n_chars} characters and {long:.3f} s for eight times as many")


@pytest.mark.parametrize("unit", HOSTILE, ids=repr)
def test_time_is_linear(unit):
    check_linear(lambda n: seconds(cut_completion, "x " + unit * (n // len(unit))), 125_000, most=1)


@pytest.mark.parametrize(
    "unit",
    ["f", "f(", "f ", "f({}) ", '{"name": "f", "arguments": {', "call:f", "<tool_call>", ")", "{", "<|", "g(1) "],
)
def test_time_is_linear_with_many_calls(unit):
    """The calls of a message are as many as the text has room for."""

    def measure(n_chars: int) -> float:
        calls = [call("f" if i % 2 else f"g{i}", {"x": i, "y": unit}) for i in range(n_chars // 50)]
        decoded = unit * (n_chars // len(unit))
        return seconds(
            cut_completion, [assistant(content="So it is.", tool_calls=calls)], decoded=decoded + "So it is."
        )

    check_linear(measure, 10_000)


@pytest.mark.parametrize("unit", ["a", "a ", "a\n", "Ab. ", "$$\n\n", " "])
def test_time_is_linear_with_small_steps(unit):
    text = unit * (100_000 // len(unit))
    assert seconds(segment, text, max_steps=1000, max_step_chars=20) < 2


# ---------------------------------------------------------------------------------------------------------------------
# check_spans
# ---------------------------------------------------------------------------------------------------------------------


def test_check_spans_returns_tuples_of_ints():
    class Position:
        def __index__(self):
            return 2

    assert check_spans("abcdef", [[0, Position()], (3, 6)]) == [(0, 2), (3, 6)]
    assert check_spans("", ()) == []


@pytest.mark.parametrize(
    ("spans", "error", "reason"),
    [
        (None, TypeError, "returned None, which is not a sequence of spans"),
        ("ab", TypeError, "returned 'ab', which is not a sequence of spans"),
        ({(0, 1)}, TypeError, r"returned \{\(0, 1\)\}, which is not a sequence of spans"),
        ([0, 3], TypeError, "returned 0 as span 0, which is not two integers"),
        ([(0, 1), (1, 2, 3)], TypeError, r"returned \(1, 2, 3\) as span 1, which is not two integers"),
        ([(0, 1.0)], TypeError, r"returned \(0, 1.0\) as span 0, which is not two integers"),
        ([(False, True)], TypeError, r"returned \(False, True\) as span 0, which is not two integers"),
        (["ab"], TypeError, "returned 'ab' as span 0, which is not two integers"),
        ([(0, 2), (2, 2)], ValueError, r"returned \(2, 2\) as span 1 of a text of 6 characters, but it is empty"),
        ([(3, 1)], ValueError, r"returned \(3, 1\) as span 0 .* but it is empty or reversed"),
        ([(-1, 1)], ValueError, r"returned \(-1, 1\) as span 0 .* but it reaches outside the text"),
        ([(0, 7)], ValueError, r"returned \(0, 7\) as span 0 .* but it reaches outside the text"),
        ([(0, 3), (2, 4)], ValueError, r"returned \(2, 4\) as span 1 after \(0, 3\), but steps neither overlap nor"),
        ([(3, 4), (0, 2)], ValueError, r"returned \(0, 2\) as span 1 after \(3, 4\), but steps neither overlap nor"),
    ],
)
def test_check_spans_names_what_is_wrong(spans, error, reason):
    with pytest.raises(error, match=rf"`splitter` {reason}.*Return the steps in order as a list of \(start, end\)"):
        check_spans("abcdef", spans, name="splitter")
    with pytest.raises(error, match="`segmenter`"):
        check_spans("abcdef", spans)


# ---------------------------------------------------------------------------------------------------------------------
# Completion -> text
# ---------------------------------------------------------------------------------------------------------------------


def assistant(**fields) -> dict:
    return {"role": "assistant", **fields}


def call(name: str, arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (assistant(content="Hi"), "Hi"),
        (assistant(content=""), ""),
        (assistant(content=None), ""),
        (assistant(), ""),
        (assistant(content=42), "42"),
        ({"content": "no role"}, "no role"),
        (assistant(content=[{"type": "text", "text": "a"}, {"type": "image"}, "b", {"text": "c"}, None]), "abc"),
        (assistant(content=[{"type": "image", "text": "caption"}, {"type": "text", "text": None}]), ""),
        (assistant(content={"type": "text", "text": "a"}), "a"),
        (assistant(content="4", reasoning_content="2 + 2"), "<think>\n2 + 2\n</think>\n\n4"),
        (assistant(content="4", reasoning="2 + 2"), "<think>\n2 + 2\n</think>\n\n4"),
        (assistant(content="4", thinking="2 + 2"), "<think>\n2 + 2\n</think>\n\n4"),
        (assistant(content="4", reasoning_content="", thinking="2 + 2"), "<think>\n2 + 2\n</think>\n\n4"),
        (assistant(content="4", reasoning_content=None, thinking=" \n"), "4"),
        (assistant(content=None, thinking="Hm."), "<think>\nHm.\n</think>\n\n"),
        (assistant(content="Look", tool_calls=[call("f", {"x": 1}), call("g", {})]), 'Look\nf({"x": 1})\ng({})'),
        (assistant(content="Look\n", tool_calls=[call("f", '{"x":1}')]), 'Look\nf({"x":1})'),
        (assistant(tool_calls=[{"name": "f", "arguments": {"x": "é"}}]), 'f({"x": "é"})'),
        (assistant(tool_calls=[call("f", None), {"function": "odd"}, "odd"]), "f({})\n({})\nodd"),
        (assistant(tool_calls=call("f", {"x": Path("a")})), 'f({"x": "a"})'),
        (assistant(tool_calls=[call("f", {(1, 2): 3})]), "f({(1, 2): 3})"),
        (assistant(content="Look", tool_calls=None), "Look"),
        (assistant(tool_calls=[call("f", {})], thinking="Hm."), "<think>\nHm.\n</think>\n\nf({})"),
    ],
)
def test_text_of_a_policy_turn(message, text):
    assert completion_turns([message]) == [Turn(text, by_policy=True)]
    assert completion_to_text([message]) == text


@pytest.mark.parametrize("role", ["tool", "user", "system", "ipython", "environment"])
def test_other_roles_are_not_the_policys(role):
    turns = completion_turns([assistant(content="a"), {"role": role, "content": [{"type": "text", "text": "b"}]}])
    assert turns == [Turn("a", by_policy=True), Turn("b", by_policy=False)]


def test_string_is_one_policy_turn():
    assert completion_turns("") == [Turn("", by_policy=True)]
    assert completion_turns("a\n") == [Turn("a\n", by_policy=True)]
    assert completion_turns([]) == []
    assert completion_to_text("a\n") == "a\n"
    assert completion_to_text([]) == ""


def test_policy_turns_are_joined_without_tool_results():
    completion = [
        assistant(content="I look."),
        {"role": "tool", "content": "result"},
        assistant(content=""),
        assistant(content="It is 4."),
    ]
    assert completion_to_text(completion) == "I look.\n\nIt is 4."


@pytest.mark.parametrize("completion", [None, 3, {"role": "assistant", "content": "a"}, ["a"], ({"content": "a"},)])
def test_completion_of_another_type(completion):
    with pytest.raises(TypeError, match=r'`completion` is .*\[\{"role": "assistant", "content": "\.\.\."\}\]'):
        completion_turns(completion)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)
message_fields = st.sampled_from(["role", "content", "reasoning_content", "thinking", "tool_calls", "name"])


@PROPERTY
@given(st.lists(st.dictionaries(message_fields, json_values), max_size=3), any_text)
def test_odd_messages_never_raise(completion, decoded):
    turns = completion_turns(completion)
    assert len(turns) == len(completion)
    assert completion_to_text(completion) == cut_completion(completion).text
    assert len(cut_completion(completion, decoded=decoded).turns) == len(cut_completion(completion).turns)


# ---------------------------------------------------------------------------------------------------------------------
# judged_regions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "regions"),
    [
        ("", []),
        (" \n", []),
        ("It is 4.", ["It is 4."]),
        ("<think>Hm.</think>\n\nIt is 4.", ["\n\nIt is 4."]),
        ("<thinking>Hm.</thinking>It is 4.", ["It is 4."]),
        ("Hm.</think>It is 4.", ["It is 4."]),
        ("<think>a</think>b<think>c</think>d", ["b", "d"]),
        ("<think>Hm.</think> \n", ["Hm."]),
        ("Hm.</think>\n", ["Hm."]),
        ("<think>Hm.", ["Hm."]),
        ("<think>I open <think> again", ["I open <think> again"]),
        ("<think>I open <think> again</think>", ["I open <think> again"]),
        ("<think>a</think>b<think>c</think>", ["b"]),
        ("<think>a</think><think> </think>", ["a"]),
        ("It is 4.<think>", ["It is 4."]),
        ("It is 4.<think></think>", ["It is 4."]),
        ("<think>\n\n</think>\n", []),
        # The marks of other families
        ("<Think>Hm.</Think>It is 4.", ["It is 4."]),
        ("<thought>Hm.</thought>It is 4.", ["It is 4."]),
        ("<seed:think>Hm.</seed:think>It is 4.", ["It is 4."]),
        ("[THINK]Hm.[/THINK]It is 4.", ["It is 4."]),
        ("Hm.[/THINK]It is 4.", ["It is 4."]),
        ("[THINK]Hm.", ["Hm."]),
        ("◁think▷Hm.◁/think▷It is 4.", ["It is 4."]),
        ("<|START_THINKING|>Hm.<|END_THINKING|>It is 4.", ["It is 4."]),
        ("<|begin_of_thought|>Hm.<|end_of_thought|>It is 4.", ["It is 4."]),
        ("<|inner_prefix|>Hm.<|inner_suffix|>It is 4.", ["It is 4."]),
        ("<|channel>thought\nHm.<channel|>It is 4.", ["It is 4."]),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.",
            ["It is 4."],
        ),
        ("<|channel|>analysis<|message|>Hm.", ["Hm."]),
        # Channels that have lost their special tokens, and sentences
        ("analysisWe add.\n\nHm.assistantfinalIt is 4.", ["It is 4."]),
        ("analysisHm.assistantanalysisSo.assistantcommentaryf(1)assistantfinalIt is 4.", ["It is 4."]),
        ("analysisHm.assistantfinal", ["Hm."]),
        ("Here is my thought process: Hm. Here is my response: It is 4.", [" It is 4."]),
        # What is no mark
        ("analysis of it: 4. The assistant is final.", ["analysis of it: 4. The assistant is final."]),
        ("So analysisHm.assistantfinalIt is 4.", ["So analysisHm.assistantfinalIt is 4."]),
        ("It is 4. Here is my response: 4.", ["It is 4. Here is my response: 4."]),
        ("<reasoning>Hm.</reasoning>It is 4.", ["<reasoning>Hm.</reasoning>It is 4."]),
        ("<no_think>Hm.</no_think>It is 4.", ["<no_think>Hm.</no_think>It is 4."]),
        ("I think <b>4</b> is a thoughtful </rethink> of it.", ["I think <b>4</b> is a thoughtful </rethink> of it."]),
        ("<think> ", []),
    ],
)
def test_judged_regions(text, regions):
    assert [text[start:end] for start, end in judged_regions(text)] == regions
    assert judged_regions(text, include_thinking=True) == ([(0, len(text))] if text.strip() else [])


@pytest.mark.parametrize(
    ("text", "regions"),
    [
        ("2+2=5.\n\nSo 15.\n\n<think>1+1=2.\n\n2+2=4.", ["2+2=5.\n\nSo 15.\n\n"]),
        ("2+2=5.\nSo 15.\n<think>1+1=2. 2+2=4.</think>", ["2+2=5.\nSo 15.\n"]),
        ("2+2=5. So 15. <think>1+1=2.</think> True.", ["2+2=5. So 15. ", " True."]),
        ("<think>w</think>\n3*4=13.\n\n13+1=14.\n<think>ok. fine.</think>", ["\n3*4=13.\n\n13+1=14.\n"]),
        ("<think>w</think>2+2=5.</think>2+2=4.", ["2+2=5.", "2+2=4."]),
        (
            "<thought>a</thought><act>b</act><thought>c</thought><answer>3</answer>",
            ["<act>b</act>", "<answer>3</answer>"],
        ),
    ],
)
def test_a_mark_of_thinking_hides_nothing_that_was_written_before_it(text, regions):
    assert [text[start:end] for start, end in judged_regions(text)] == regions


@PROPERTY
@given(markdown_text)
def test_regions_hold_no_thinking_beside_an_answer(text):
    regions = judged_regions(text)
    assert all(0 <= start < end <= len(text) and text[start:end].strip() for start, end in regions)
    assert all(left[1] <= right[0] for left, right in pairwise(regions))
    answer = text.rpartition("</think>")[2]
    if "</think>" in text and answer.strip() and "<think>" not in answer:
        assert text[slice(*regions[-1])] == answer
    if "think>" not in text and "</thought>" not in text and text.strip():
        assert regions == [(0, len(text))]


# ---------------------------------------------------------------------------------------------------------------------
# cut_completion
# ---------------------------------------------------------------------------------------------------------------------


def test_cut_of_a_string():
    cut = cut_completion("<think>Hm.\n\nSo.</think>Add.\n\nDouble.")
    assert cut.text == "<think>Hm.\n\nSo.</think>Add.\n\nDouble."
    assert cut.steps == ("Add.\n\n", "Double.")
    assert cut.context == {}
    cut = cut_completion("<think>Hm.\n\nSo.</think>Add.\n\nDouble.", include_thinking=True)
    assert cut.steps == ("<think>Hm.\n\n", "So.</think>Add.\n\n", "Double.")


@pytest.mark.parametrize("form", [str, lambda text: [assistant(content=text)]], ids=["string", "message"])
@pytest.mark.parametrize(
    ("decoded", "steps"),
    [
        ("<think>Hm.\n\nSo.</think>Add.\n\nDouble.", ("Add.\n\n", "Double.")),
        ("Hm.\n\nSo.</think>\n\nAdd.\n\nDouble.", ("\n\nAdd.\n\n", "Double.")),  # the other mark is in the prompt
        ("<think>Hm.\n\nSo.", ("Hm.\n\n", "So.")),
        ("Add.\n\nDouble.", ("Add.\n\n", "Double.")),
        ("<|channel|>final<|message|>Add. Double.", ("Add. ", "Double.")),
        ("<|channel>thought\nHm.\n<channel|>Add. Double.", ("Add. ", "Double.")),
    ],
)
def test_marks_that_the_text_has_lost_are_found_in_what_the_ids_decode_to(decoded, steps, form):
    text = re.sub(r"</?think>|<[|]?(?:channel|message)[|]?>", "", decoded)
    assert cut_completion(form(text), decoded=decoded).steps == steps
    assert cut_completion(form(text), decoded=decoded, include_thinking=True).text == decoded


@pytest.mark.parametrize(
    "decoded", [None, "", "<think>Hm.</think>Another text.", "Another text.", "<think>Add.Double.</think>."]
)
def test_what_the_ids_decode_to_is_no_other_text(decoded):
    assert cut_completion("Add.\n\nDouble.", decoded=decoded).steps == ("Add.\n\n", "Double.")


def test_calls_stand_where_the_policy_wrote_them():
    shown = 'f({"x": 1})'
    turn = assistant(content="So f it is.", tool_calls=[call("f", {"x": 1})])
    written = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    (after,) = completion_turns([turn], f"So f it is.\n{written}")
    (before,) = completion_turns([turn], f"{written}\nSo f it is.")
    assert (after.text, before.text) == (f"So f it is.\n{shown}", f"{shown}\nSo f it is.")
    for turn in (before, after):
        assert [turn.text[slice(*span)] for span in turn.written] == ["So f it is."]
        assert [turn.text[slice(*call.span)] for call in turn.calls] == [shown]
    completion = [before_turn := assistant(content="Hm.", tool_calls=[call("f", {"x": 2})])]
    completion += [{"role": "tool", "content": "4"}, assistant(content="So.", tool_calls=[call("f", {"x": 3})])]
    decoded = "call:f{x:2}Hm.<tool>4</tool>So.call:f{x:3}"
    assert [turn.text for turn in completion_turns(completion, decoded)] == [
        'f({"x": 2})\nHm.',
        "4",
        'So.\nf({"x": 3})',
    ]
    assert completion_turns(completion)[0].text == 'Hm.\nf({"x": 2})'
    # A tool result that is repeated is not the turn
    completion = [assistant(tool_calls=[call("g", {})]), {"role": "tool", "content": "So."}]
    completion += [assistant(content="So.", tool_calls=[call("f", {"x": 3})])]
    assert completion_turns(completion, "call:g{}<tool>So.</tool>call:f{x:3}So.")[-1].text == 'f({"x": 3})\nSo.'
    assert completion_turns([before_turn], "Something else.")[0].text == 'Hm.\nf({"x": 2})'


def test_cut_of_several_turns():
    completion = [
        {"role": "tool", "content": "before"},
        assistant(content="I look.\n\nI call.", tool_calls=[call("f", {})]),
        {"role": "tool", "content": "first"},
        {"role": "tool", "content": " \n"},
        {"role": "tool", "content": "second"},
        assistant(content=" "),
        assistant(thinking="Hm.", content="Add.\n\nStop."),
        {"role": "tool", "content": "after"},
    ]
    cut = cut_completion(completion)
    assert cut.text == completion_to_text(completion)
    assert cut.steps == ("I look.\n\n", "I call.\nf({})", "\n\nAdd.\n\n", "Stop.")
    assert cut.context == {0: "before", 2: "first\n\nsecond"}
    rest = cut.without({1})
    assert (rest.steps, rest.context, rest.text) == (
        (cut.steps[0], *cut.steps[2:]),
        {0: "before", 1: "first\n\nsecond"},
        cut.text,
    )
    assert cut.without(range(3)).context == {}


def test_no_step_crosses_a_turn():
    # In one text the fence, never closed, would reach to the end.
    cut = cut_completion(
        [assistant(content="Look:\n```\na"), {"role": "tool", "content": "1"}, assistant(content="Add. Stop.")]
    )
    assert cut.steps == ("Look:\n```\na", "Add. ", "Stop.")
    assert cut.context == {1: "1"}


def test_turn_of_thinking_and_tool_calls():
    cut = cut_completion([assistant(thinking="Hm. So.", tool_calls=[call("f", {})]), assistant(thinking="Hm. So.")])
    assert [step.strip() for step in cut.steps] == ["f({})", "Hm.", "So."]


@pytest.mark.parametrize(
    "completion", ["", " \n", "<think>\n</think>\n", [], [assistant()], [{"role": "tool", "content": "a"}]]
)
def test_blank_completion_has_no_steps(completion):
    cut = cut_completion(completion, segmenter=lambda text: pytest.fail("there is nothing to cut"))
    assert cut == CutCompletion(completion_to_text(completion), (), {}, blank=True)
    assert cut.steps == ()


def test_a_text_without_steps_is_not_blank():
    cut = cut_completion("<think>Hm.</think>It is 4.", segmenter=lambda text: [])
    assert (cut.steps, cut.blank) == ((), False)


def test_segmenter_can_be_replaced():
    def halves(text: str) -> list[list[int]]:
        return [[0, len(text) // 2], [len(text) // 2, len(text)]]

    cut = cut_completion([assistant(content="abcd"), assistant(content="<think>x</think>efgh")], halves)
    assert cut.steps == ("ab", "cd", "ef", "gh")
    assert cut.spans == ((0, 2), (2, 4), (22, 24), (24, 26))


def test_spans_of_a_segmenter_are_checked():
    with pytest.raises(ValueError, match=r"`segmenter` returned \(0, 5\) as span 0 of a text of 4 characters"):
        cut_completion("abcd", lambda text: [(0, len(text) + 1)])
    with pytest.raises(TypeError, match="`segmenter` returned None"):
        cut_completion("abcd", lambda text: None)


def test_records_are_frozen():
    with pytest.raises(FrozenInstanceError):
        cut_completion("a").text = "b"
    with pytest.raises(FrozenInstanceError):
        completion_turns("a")[0].text = "b"


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(["assistant", "tool"]), any_text), max_size=5), st.booleans())
def test_steps_tile_the_regions_of_the_turns(messages, include_thinking):
    completion = [{"role": role, "content": text} for role, text in messages]
    cut = cut_completion(completion, include_thinking=include_thinking)
    assert check_spans(cut.text, cut.spans) == list(cut.spans)

    # The same, turn by turn, in plain words.
    steps, context, waiting = [], {}, []
    for role, text in messages:
        if role == "tool":
            waiting.append(text)
            continue
        regions = judged_regions(text, include_thinking=include_thinking)
        found = [piece for start, end in regions for piece in pieces(text[start:end])]
        assert "".join(found) == "".join(text[start:end] for start, end in regions)
        if found:
            results = [text for text in waiting if text.strip()]
            if results:
                context[len(steps)] = "\n\n".join(results)
            waiting = []
        steps += found
    assert (cut.text, cut.steps, cut.context) == (completion_to_text(completion), tuple(steps), context)


# ---------------------------------------------------------------------------------------------------------------------
# RTS
# ---------------------------------------------------------------------------------------------------------------------

step_lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 10**6)), min_size=1, max_size=30)


def spans_of(gaps_and_lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    spans, position = [], 0
    for gap, length in gaps_and_lengths:
        spans.append((position + gap, position + gap + length))
        position += gap + length
    return spans


def test_rts_of_the_paper():
    assert rts_by_steps(3, 5) == 3 / 5
    assert rts_by_steps(0, 5) == 0.0
    assert rts_by_characters(3, [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50)]) == 3 / 5
    assert rts_by_characters(1, [(0, 1), (5, 8)]) == 1 / 4  # the gap is no step


def test_rts_without_steps_is_zero():
    assert rts_by_steps(0, 0) == 0.0
    assert rts_by_characters(0, []) == 0.0


@pytest.mark.parametrize(("first_error", "n_steps"), [(5, 5), (-1, 5), (1, 0), (-1, 0), (0, -1)])
def test_rts_of_a_step_that_does_not_exist(first_error, n_steps):
    message = rf"`first_error` is {first_error}, but there are {n_steps} steps: .*counted from 0"
    with pytest.raises(ValueError, match=message):
        rts_by_steps(first_error, n_steps)
    if n_steps >= 0:
        with pytest.raises(ValueError, match=message):
            rts_by_characters(first_error, [(i, i + 1) for i in range(n_steps)])


@PROPERTY
@given(step_lengths)
def test_rts_rises_with_the_first_error_and_stays_below_one(lengths):
    spans = spans_of(lengths)
    for scores in (
        [rts_by_steps(i, len(spans)) for i in range(len(spans))],
        [rts_by_characters(i, spans) for i in range(len(spans))],
    ):
        assert scores[0] == 0.0
        assert all(0.0 <= score < 1.0 for score in scores)
        assert all(lower < higher for lower, higher in pairwise(scores))


@PROPERTY
@given(step_lengths, st.data())
def test_rts_by_characters_equals_a_loop(lengths, data):
    spans = spans_of(lengths)
    first_error = data.draw(st.integers(0, len(spans) - 1))
    right = everything = 0
    for number, (start, end) in enumerate(spans):
        everything += end - start
        if number < first_error:
            right += end - start
    assert rts_by_characters(first_error, spans) == right / everything
    if len({length for _, length in lengths}) == 1:
        assert rts_by_characters(first_error, spans) == pytest.approx(rts_by_steps(first_error, len(spans)))


def test_splitting_a_right_step_raises_only_the_score_by_steps():
    whole, split = [(0, 10), (10, 20)], [(0, 5), (5, 10), (10, 20)]
    assert rts_by_steps(1, len(whole)) < rts_by_steps(2, len(split))
    assert rts_by_characters(1, whole) == rts_by_characters(2, split)


# ---------------------------------------------------------------------------------------------------------------------
# The package itself
# ---------------------------------------------------------------------------------------------------------------------

DOCUMENTED = [
    segment,
    check_spans,
    completion_turns,
    completion_to_text,
    judged_regions,
    cut_completion,
    rts_by_steps,
    rts_by_characters,
]


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__name__)
def test_examples_in_docstrings(documented):
    source = documented.__doc__.replace("```python", "").replace("```", "")  # doctest would take it for output
    test = doctest.DocTestParser().get_doctest(source, vars(steps).copy(), documented.__name__, None, None)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_imports_only_the_standard_library():
    files = sorted(Path(steps.__file__).parent.glob("*.py"))
    assert len(files) == 6
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported = {name for name in imported if not name.startswith("trl_sgpo.steps")}
        assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_tool_arguments_stay_json():
    text = completion_to_text([assistant(tool_calls=[call("f", {"x": [1, "a"], "y": None})])])
    assert json.loads(text.removeprefix("f(").removesuffix(")")) == {"x": [1, "a"], "y": None}
