r"""
Annotated solutions for `judge_train`, made from worked ones: an error is planted, so the first wrong step is known.

    python recipes/judge/plant_errors.py --output outputs/judge/planted.jsonl
    python recipes/judge/plant_errors.py --data my_solutions.jsonl --rows 2000 --output outputs/judge/planted.jsonl

It reads GSM8K's form: `question`, and `answer` with calculator marks (`48/2 = <<48/2=24>>24`), one step per line and
`#### 24` at the end. The marks say what each line computes, so an error can be carried on through what depends on it.

| kind | what is planted | first wrong step |
|---|---|---|
| number | one number of an equation is another one, nothing else changes | the line of that number |
| result | one result is wrong, and carried on | the line of that result |
| operand | another number is put into an equation, and carried on | the line of that equation |
| operator | another operation is done, and carried on | the line of that equation |
| left_out | a line is left out. What needs its result goes on from a number that the line began with | the line that needs the result |
| unfinished | the last line is left out, and the answer is the result before it | the line with the answer |
| swapped | a line changes places with the one before it, whose result it needs | the first of the two: its number comes from nowhere |
| none | nothing | -1 |

"Carried on" means that later lines and the answer are computed anew, so that they are consistent with the one wrong step.
A place is passed over if a reader could not be sure: the number that is carried on is also a number of the problem or of
another line, a count would become negative or a fraction, the answer stays right, or an equation without a mark would
become false. Two lines that do not need each other are not swapped. A line is not just left out, because then every step
that is left is still true. A solution whose own equations are not all true is not used.

The package's segmenter cuts the whole text, with the line of the answer, as it cuts a policy's completions.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from trl_sgpo.judges import ArithmeticJudge, JudgeItem
from trl_sgpo.loading import read_records
from trl_sgpo.steps import cut_completion


# Rows of each kind, in proportion
SHARES = {
    "number": 1,
    "result": 1,
    "operand": 2,
    "operator": 2,
    "left_out": 2,
    "unfinished": 1,
    "swapped": 1,
    "none": 4,
}

T = TypeVar("T")
Lines = tuple[str, ...]
Span = tuple[int, int]

_MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+")
_TOKEN = re.compile(rf"{_NUMBER.pattern}|[-+*/()]")
_SPELLED = {"*": "[*x×]", "/": "[/÷]"}
_MISTAKEN_FOR = {"+": "-*", "-": "+/", "*": "+/", "/": "*-"}
# Of weeks, hours, per cent and the like: such a number need not be a result, although it is equal to one
_CONSTANTS = frozenset({1, 2, 4, 7, 10, 12, 24, 30, 52, 60, 100, 365, 1000})
_AS_WORD = {"three": 3, "third": 3, "triple": 3, "five": 5, "fifth": 5, "six": 6, "eight": 8, "nine": 9, "eleven": 11}
_AS_WORD |= {"sixth": 6, "eighth": 8, "ninth": 9, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16}
_AS_WORD |= {"seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "forty": 40, "fifty": 50, "seventy": 70}
_AS_WORD |= {"eighty": 80, "ninety": 90}


@dataclass(frozen=True)
class Calculation:
    """
    What a line computes: the tokens of the left side, and the spans of the result and of the tokens in the line's text. If
    the text does not spell out the left side, there are no spans of tokens.
    """

    line: int
    tokens: tuple[str, ...]
    result: Span
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Solution:
    """A worked solution without its marks."""

    problem: str
    lines: Lines
    calculations: tuple[Calculation, ...]
    answer: str


@lru_cache(maxsize=4096)
def number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


@lru_cache(maxsize=1024)
def numbers(text: str) -> set[Fraction]:
    """The numbers of a text, also those in words."""
    words = {Fraction(_AS_WORD[word]) for word in re.findall(r"[a-z]+", text.lower()) if word in _AS_WORD}
    return words | {number(found) for found in _NUMBER.findall(text)}


def is_number(token: str) -> bool:
    return token[-1].isdigit()


def value(tokens: Sequence[str]) -> Fraction | None:
    """
    What the left side of an equation comes to. `None` if it cannot be read. A power is not read: some never end.

    >>> value(["48", "/", "2"])
    Fraction(24, 1)
    """
    if any(pair in ("**", "//") for pair in map("".join, pairwise(tokens))):
        return None
    try:  # the tokens are numbers, operators and brackets: nothing else can be evaluated here
        return Fraction(eval("".join(f"Fraction('{number(t)}')" if is_number(t) else t for t in tokens)))
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None


def written(new: Fraction, old: str) -> str | None:
    """
    A number in the form of the one that it replaces. `None` if it is not positive, or a fraction in the place of a whole
    number, or has more than two decimals.

    >>> written(Fraction(2500), "1,200"), written(Fraction(5, 2), "0.75"), written(Fraction(5, 2), "3")
    ('2,500', '2.50', None)
    """
    if new <= 0 or (new * 100).denominator > 1 or (new.denominator > 1 and "." not in old):
        return None
    text = f"{float(new):{',' if ',' in old else ''}.2f}"
    return text if re.search(r"\.\d\d$", old) else text.rstrip("0").rstrip(".")


def read_solution(problem: str, answer: str) -> Solution | None:
    """
    The solution without marks. `None` if it has no marks, if one of them cannot be read, if a mark or an equation of the
    text is not true, or if the last mark does not give the answer.
    """
    body, mark, final = answer.rpartition("####")
    final = final.strip()
    lines: list[str] = []
    calculations: list[Calculation] = []
    for line in filter(None, map(str.strip, body.splitlines())):
        text, end = "", 0
        for found in _MARK.finditer(line):
            text += line[end : found.start()]
            end = found.end()
            tokens = tuple(_TOKEN.findall(found[1]))
            shown = _NUMBER.match(line, end)
            if shown is None or "".join(tokens) != found[1].replace(" ", "") or value(tokens) != number(shown[0]):
                return None
            result = (len(text), len(text) + len(shown[0]))
            calculations.append(Calculation(len(lines), tokens, result, _spelled_out(text, tokens)))
        lines.append(text + line[end:])
    if not mark or not calculations or _NUMBER.fullmatch(final) is None:
        return None
    solution = Solution(problem, tuple(lines), tuple(calculations), final)
    right = result_of(solution, calculations[-1]) == number(final) and false_equation(solution) is None
    return solution if right else None


def _spelled_out(text: str, tokens: Sequence[str]) -> tuple[Span, ...]:
    """Where the tokens stand at the end of a text that goes on with the result."""
    parts = [f"({_SPELLED.get(token) or re.escape(token)})" for token in tokens]
    found = re.search(r"(?<![\d.,])" + r"[\s$]*".join(parts) + r"[\s$]*=[\s$]*$", text)
    return tuple(found.span(i + 1) for i in range(len(tokens))) if found else ()


def result_of(solution: Solution, calculation: Calculation) -> Fraction:
    return number(solution.lines[calculation.line][slice(*calculation.result)])


def is_clear(solution: Solution, calculation: Calculation) -> bool:
    """Whether a later number that is equal to the result can only be this result."""
    result = result_of(solution, calculation)
    before = [*solution.lines[: calculation.line], solution.lines[calculation.line][: calculation.result[0]]]
    same = [other for other in solution.calculations if result_of(solution, other) == result]
    return len(same) == 1 and result not in {*_CONSTANTS, *numbers(solution.problem), *numbers(" ".join(before))}


def replaced(line: str, edits: Sequence[tuple[Span, str]]) -> str:
    for (start, end), text in sorted(edits, reverse=True):
        line = line[:start] + text + line[end:]
    return line


def carried_on(
    solution: Solution, calculation: Calculation, new: Fraction, edits: Sequence[tuple[Span, str]] = ()
) -> Solution | None:
    """
    The solution with a new result of one calculation, and with all that depends on it computed anew. `edits` are further
    changes of its line. `None` if a reader could not be sure of it, or if the answer stays the same.
    """
    new_values: dict[Fraction, Fraction] = {}
    for later in solution.calculations[solution.calculations.index(calculation) :]:
        known = [str(new_values.get(number(t), t)) if is_number(t) else t for t in later.tokens]
        result, old = new if later is calculation else value(known), result_of(solution, later)
        if result is None:
            return None
        if result != old:
            if not is_clear(solution, later):
                return None
            new_values[old] = result
    lines = list(solution.lines)
    for i in range(calculation.line, len(lines)):
        own = list(edits) if i == calculation.line else []
        for found in _NUMBER.finditer(lines[i]):
            if number(found[0]) in new_values:
                text = written(new_values[number(found[0])], found[0])
                if text is None:
                    return None
                own.append((found.span(), text))
        lines[i] = replaced(lines[i], own)
    new_answer = new_values.get(number(solution.answer))
    answer = new_answer and written(new_answer, solution.answer)
    return replace(solution, lines=tuple(lines), answer=answer) if answer else None


def slips(literal: str) -> list[str]:
    """
    Numbers that look like this one: another digit, or two digits that have changed places.

    >>> slips("12")
    ['10', '11', '13', '14', '17', '21', '22', '32', '62', '92']
    """
    found = set()
    for i, digit in enumerate(literal):
        if digit.isdigit():
            found |= {literal[:i] + str((int(digit) + step) % 10) + literal[i + 1 :] for step in (1, 2, 5, 8, 9)}
            if literal[i + 1 : i + 2].isdigit():
                found.add(literal[:i] + literal[i + 1] + digit + literal[i + 2 :])
    return sorted(one for one in found if one[0] not in "0," and number(one) not in (0, number(literal)))


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(list(items), len(items))


# What is planted. Each yields solutions in random order, and None for a place that is passed over


def plant_number(solution: Solution, rng: random.Random) -> Iterator[Solution | None]:
    for calculation in shuffled(solution.calculations, rng):
        line = solution.lines[calculation.line]
        operands = [span for span in calculation.spans if is_number(line[slice(*span)])]
        for span in shuffled([calculation.result, *operands], rng):
            for text in shuffled(slips(line[slice(*span)]), rng):
                lines = list(solution.lines)
                lines[calculation.line] = replaced(line, [(span, text)])
                yield replace(solution, lines=tuple(lines))


def plant_result(solution: Solution, rng: random.Random) -> Iterator[Solution | None]:
    for calculation in shuffled(solution.calculations, rng):
        for text in shuffled(slips(solution.lines[calculation.line][slice(*calculation.result)]), rng):
            yield carried_on(solution, calculation, number(text))


def _with_token(solution: Solution, calculation: Calculation, i: int, text: str) -> Solution | None:
    tokens = [*calculation.tokens[:i], text, *calculation.tokens[i + 1 :]]
    new = value(tokens)
    return None if new is None else carried_on(solution, calculation, new, [(calculation.spans[i], text)])


def plant_operand(solution: Solution, rng: random.Random) -> Iterator[Solution | None]:
    for calculation in shuffled([c for c in solution.calculations if c.spans], rng):
        before = solution.calculations[: solution.calculations.index(calculation)]
        known = [solution.lines[c.line][slice(*c.result)] for c in before] + _NUMBER.findall(solution.problem)
        for i in shuffled([i for i, token in enumerate(calculation.tokens) if is_number(token)], rng):
            old = calculation.tokens[i]
            # Most often a number that is there, but not the one that is needed
            others = sorted({text for text in known if number(text) not in (0, number(old))})
            for text in [*shuffled(others, rng), *shuffled(slips(old), rng)]:
                yield _with_token(solution, calculation, i, text)


def plant_operator(solution: Solution, rng: random.Random) -> Iterator[Solution | None]:
    for calculation in shuffled([c for c in solution.calculations if c.spans], rng):
        tokens = calculation.tokens
        between = [i for i in range(1, len(tokens)) if tokens[i] in _MISTAKEN_FOR and tokens[i - 1] not in "(+-*/"]
        for i in shuffled(between, rng):
            for text in shuffled(_MISTAKEN_FOR[tokens[i]], rng):
                yield _with_token(solution, calculation, i, text)


def _one_per_line(solution: Solution) -> list[Calculation]:
    lines = Counter(calculation.line for calculation in solution.calculations)
    return [calculation for calculation in solution.calculations if lines[calculation.line] == 1]


def plant_left_out(solution: Solution, rng: random.Random) -> Iterator[Solution | None]:
    for calculation in shuffled(_one_per_line(solution), rng):
        if calculation is not solution.calculations[-1]:
            operands = [t for t in calculation.tokens if is_number(t) and number(t) not in _CONSTANTS]
            for token in shuffled(operands, rng):
                found = carried_on(solution, calculation, number(token))
                before, after = slice(calculation.line), slice(calculation.line + 1, None)
                yield found and replace(found, lines=(*solution.lines[before], "", *found.lines[after]))


def plant_unfinished(solution: Solution, rng: random.Random) -> Iterator[Solution | None]:
    *others, last = solution.calculations
    # Without a mark in the line before, nobody knows what its result is
    if others and others[-1].line + 1 == last.line and last in _one_per_line(solution):
        answer = solution.lines[others[-1].line][slice(*others[-1].result)]
        if number(answer) != number(solution.answer):
            left_out = [""] * (len(solution.lines) - last.line)
            yield replace(solution, lines=(*solution.lines[: last.line], *left_out), answer=answer)


def plant_swapped(solution: Solution, rng: random.Random) -> Iterator[Solution | None]:
    for i in shuffled(range(len(solution.lines) - 1), rng):
        first, second = ([c for c in solution.calculations if c.line == line] for line in (i, i + 1))
        needed = {number(token) for c in second for token in c.tokens if is_number(token)}
        if any(is_clear(solution, c) and result_of(solution, c) in needed for c in first):
            lines = list(solution.lines)
            lines[i : i + 2] = lines[i + 1], lines[i]
            yield replace(solution, lines=tuple(lines))


PLANTS: dict[str, Callable[[Solution, random.Random], Iterator[Solution | None]]] = {
    "number": plant_number,
    "result": plant_result,
    "operand": plant_operand,
    "operator": plant_operator,
    "left_out": plant_left_out,
    "unfinished": plant_unfinished,
    "swapped": plant_swapped,
}
FALSE_EQUATIONS = ("number", "result")  # the kinds whose error is one


def text_of(solution: Solution) -> str:
    return "\n".join([*filter(None, solution.lines), f"#### {solution.answer}"])


def false_equation(solution: Solution) -> int | None:
    """The first step with an equation that is not true, as far as [`ArithmeticJudge`] can tell."""
    item = JudgeItem(solution.problem, tuple(cut_completion(text_of(solution)).steps))
    return ArithmeticJudge().judge([item])[0].first_error


def first_difference(right: Solution, wrong: Solution) -> int:
    """Where the text of a wrong solution ceases to be right, as an index. A line that was left out is empty there."""
    place = 0
    for before, after in zip(right.lines, wrong.lines, strict=True):
        if after and after != before:
            return place + next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
        place += len(after) + 1 if after else 0
    return place  # the answer


def row(name: str, solution: Solution, kind: str, wrong: Solution | None = None) -> dict[str, Any]:
    """A row for `judge_train`. `wrong` is the solution with the error."""
    shown = wrong or solution
    cut = cut_completion(text_of(shown))
    place = -1 if wrong is None else first_difference(solution, wrong)
    return {
        "id": f"{name}-{kind}",
        "source": "planted",
        "subset": kind,
        "problem": solution.problem,
        "steps": list(cut.steps),
        "label": next((i for i, (start, end) in enumerate(cut.spans) if start <= place < end), -1),
        "final_answer_correct": shown.answer == solution.answer,
    }


def plant(solution: Solution, kind: str, rng: random.Random) -> Solution | None:
    """
    The solution with an error of this kind at a random place. `None` if there is no place for it. A place is passed over
    if a false equation is left that is not the error: some lines depend on it without a mark, so they are not computed anew.
    """
    for wrong in PLANTS[kind](solution, rng):
        if wrong is not None:
            expected = row("", solution, kind, wrong)["label"] if kind in FALSE_EQUATIONS else None
            if false_equation(wrong) in (None, expected):
                return wrong
    return None


def make_rows(
    data: Sequence[dict[str, str]], n: int | None = None, shares: dict[str, float] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """
    One row per problem, for `n` problems or all: `question` and `answer` become `problem`, `steps` and `label`. The kind that
    is furthest behind its share comes first, if the solution has a place for it.
    """
    shares = {kind: share for kind, share in (shares or SHARES).items() if share > 0}
    rng = random.Random(seed)
    made: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for i in shuffled(range(len(data)), rng):
        if len(rows) == n:
            break
        solution = read_solution(data[i]["question"], data[i]["answer"])
        if solution is None:
            continue
        for kind in sorted(shares, key=lambda kind: (made[kind] + 1) / shares[kind]):
            wrong = None if kind == "none" else plant(solution, kind, rng)
            if wrong is not None or kind == "none":
                made[kind] += 1
                rows.append(row(str(i), solution, kind, wrong))
                break
    return rows


def read_data(name: str, config: str | None, split: str) -> list[dict[str, str]]:
    """Rows with `question` and `answer`, from a file of JSON lines or from the Hub."""
    rows = [row for _, records in read_records(name, split, "data", config) for _, row in records]
    if not rows or not {"question", "answer"} <= rows[0].keys():
        raise SystemExit(f"data={name!r} has no rows with the fields `question` and `answer`, such as GSM8K's.")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="openai/gsm8k", help="name on the Hub, or a file of JSON lines")
    parser.add_argument("--config", default="main", help="configuration of a dataset on the Hub")
    parser.add_argument("--split", default="train", help="split of a dataset on the Hub")
    parser.add_argument("--rows", type=int, help="at most so many solutions, of as many problems")
    parser.add_argument("--kinds", nargs="+", choices=list(SHARES), default=list(SHARES), help="only these kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/judge/planted.jsonl"), help="file to write")
    args = parser.parse_args()
    data = read_data(args.data, args.config, args.split)
    rows = make_rows(data, args.rows, {kind: SHARES[kind] for kind in args.kinds}, args.seed)
    if not rows:
        raise SystemExit(
            f"data={args.data!r}: no solution can be used. They need calculator marks, such as `48/2 = <<48/2=24>>24`, and "
            "`#### 24` at the end."
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(one) + "\n" for one in rows))
    counts = Counter(one["subset"] for one in rows)
    print(f"{args.output}: {len(rows)} of {len(data)} solutions. " + ", ".join(f"{k} {n}" for k, n in counts.items()))


if __name__ == "__main__":
    main()
