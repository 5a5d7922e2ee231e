"""Errors that are planted in worked solutions: every kind by hand, and all of them on many problems."""

import json
import random
import sys

import pytest

from recipes.judge.plant_errors import PLANTS, SHARES, main, make_rows, plant, read_solution, row, text_of
from trl_sgpo.judge_evaluation.data import read_rows
from trl_sgpo.judges import ArithmeticJudge, JudgeItem


PENS = (
    "A shop has 48 red pens, and 17 fewer blue pens. A pen costs $3. What do all pens cost?",
    "There are 48-17 = <<48-17=31>>31 blue pens.\n"
    "So there are 48 + 31 = <<48+31=79>>79 pens.\n"
    "They cost 79 x $3 = $<<79*3=237>>237.\n"
    "#### 237",
)


def planted(problem, answer, kind):
    """All that can be planted: the label, the text, and whether the answer is still right."""
    solution = read_solution(problem, answer)
    found = set()
    for wrong in filter(None, PLANTS[kind](solution, random.Random(0))):
        made = row("x", solution, kind, wrong)
        assert "".join(made["steps"]) == text_of(wrong)
        found.add((made["label"], "".join(made["steps"]), made["final_answer_correct"]))
    return found


def test_a_number():
    found = planted(*PENS, "number")
    right = text_of(read_solution(*PENS))
    assert (1, right.replace("= 79", "= 97"), True) in found  # two digits have changed places
    assert (0, right.replace("48-17", "43-17"), True) in found
    for label, text, still_right in found:
        assert sum(a != b for a, b in zip(text.split(), right.split(), strict=True)) == 1
        assert text.splitlines()[label] != right.splitlines()[label]
        assert still_right


def test_a_result_that_is_carried_on():
    found = planted(*PENS, "result")
    assert (
        0,
        "There are 48-17 = 13 blue pens.\nSo there are 48 + 13 = 61 pens.\nThey cost 61 x $3 = $183.\n#### 183",
        False,
    ) in found
    assert {label for label, _, _ in found} == {0, 1, 2}


def test_an_operand_that_is_carried_on():
    found = planted(*PENS, "operand")
    assert (
        0,
        "There are 48-3 = 45 blue pens.\nSo there are 48 + 45 = 93 pens.\nThey cost 93 x $3 = $279.\n#### 279",
        False,
    ) in found
    assert (
        2,
        "There are 48-17 = 31 blue pens.\nSo there are 48 + 31 = 79 pens.\nThey cost 31 x $3 = $93.\n#### 93",
        False,
    ) in found


def test_an_operation_that_is_carried_on():
    text = "There are 48{}17 = {} blue pens.\nSo there are 48 {} {} = {} pens.\nThey cost {} {} $3 = ${}.\n#### {}"
    assert planted(*PENS, "operator") == {
        (0, text.format("+", 65, "+", 65, 113, 113, "x", 339, 339), False),  # 48/17 is no count
        (1, text.format("-", 31, "-", 31, 17, 17, "x", 51, 51), False),
        (1, text.format("-", 31, "*", 31, 1488, 1488, "x", 4464, 4464), False),
        (2, text.format("-", 31, "+", 31, 79, 79, "+", 82, 82), False),
    }


def test_a_line_that_is_left_out():
    blue, all_pens = "There are 48-17 = 31 blue pens.", "So there are 48 + {0} = {1} pens."
    cost = "They cost {0} x $3 = ${1}.\n#### {1}"
    assert planted(*PENS, "left_out") == {
        (0, "\n".join([all_pens.format(48, 96), cost.format(96, 288)]), False),
        (0, "\n".join([all_pens.format(17, 65), cost.format(65, 195)]), False),
        (1, "\n".join([blue, cost.format(48, 144)]), False),
        (1, "\n".join([blue, cost.format(31, 93)]), False),
    }


def test_a_solution_that_is_unfinished():
    assert planted(*PENS, "unfinished") == {
        (1, "There are 48-17 = 31 blue pens.\nSo there are 48 + 31 = 79 pens.\n#### 79", False)
    }


def test_lines_that_are_swapped():
    blue, all_pens, cost = text_of(read_solution(*PENS)).splitlines()[:3]
    assert planted(*PENS, "swapped") == {
        (0, "\n".join([all_pens, blue, cost, "#### 237"]), True),
        (1, "\n".join([blue, cost, all_pens, "#### 237"]), True),
    }


def test_a_right_solution():
    solution = read_solution(*PENS)
    assert row("x", solution, "none") == {
        "id": "x-none",
        "source": "planted",
        "subset": "none",
        "problem": PENS[0],
        "steps": [
            "There are 48-17 = 31 blue pens.\n",
            "So there are 48 + 31 = 79 pens.\n",
            "They cost 79 x $3 = $237.\n#### 237",  # the answer belongs to the last step, as in a policy's completion
        ],
        "label": -1,
        "final_answer_correct": True,
    }


def test_lines_that_do_not_need_each_other_are_not_swapped():
    answer = "Ann has 13+5 = <<13+5=18>>18.\nBen has 29-3 = <<29-3=26>>26.\nBoth have 18+26 = <<18+26=44>>44.\n#### 44"
    (found,) = planted("Ann has 13 and gets 5, Ben has 29 and loses 3. And both?", answer, "swapped")
    assert found[0] == 1
    assert found[1].startswith("Ann has 13+5 = 18.\nBoth have 18+26 = 44.\nBen has")


@pytest.mark.parametrize("kind", ["result", "operand", "operator", "left_out", "swapped"])
@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        # 31 is a result and a number of the problem: nobody can tell which one the second line takes
        ("48 less 17, and 31 more?", "48-17 = <<48-17=31>>31\n31+31 = <<31+31=62>>62\n#### 62"),
        ("Five and thirteen, and eighteen, 18 more?", "5+13 = <<5+13=18>>18\n18+18 = <<18+18=36>>36\n#### 36"),
        ("Nine and seven, and sixteen more?", "9+7 = <<9+7=16>>16\n16+16 = <<16+16=32>>32\n#### 32"),
        # A dozen need not be the sum
        ("9 and 3 for a dozen days?", "9+3 = <<9+3=12>>12\n12*12 = <<12*12=144>>144\n#### 144"),
        # Two results are equal
        ("?", "48-17 = <<48-17=31>>31\n62/2 = <<62/2=31>>31\n31+31 = <<31+31=62>>62\n#### 62"),
    ],
)
def test_a_number_that_may_come_from_elsewhere_is_not_carried_on(problem, answer, kind):
    assert all(label == len(text.splitlines()) - 2 for label, text, _ in planted(problem, answer, kind))


@pytest.mark.parametrize("kind", ["operand", "operator", "left_out"])
def test_a_line_without_a_mark_is_not_carried_on(kind):
    """It would be a second wrong step: `45*2 = 62`. So the first line, which it depends on, gets no error."""
    lines = "There are 48-17 = <<48-17=31>>31 pens.", "They cost 31*2 = 62.", "31+48 = <<31+48=79>>79.", "#### 79"
    solution = read_solution("48 pens less 17, at $2, and 48 more?", "\n".join(lines))
    assert any(wrong and wrong.lines[1] != solution.lines[1] for wrong in PLANTS[kind](solution, random.Random(0)))
    for seed in range(20):
        wrong = plant(solution, kind, random.Random(seed))
        if kind == "left_out":
            assert wrong is None
        else:
            assert row("x", solution, kind, wrong)["label"] == 2


def test_the_answer_of_an_unfinished_solution_is_the_last_result():
    answer = "5*3 = <<5*3=15>>15 pens.\nSo 15-8 = 7 are left.\n7*2 = <<7*2=14>>14.\n#### 14"
    assert not planted("5 boxes of 3 pens less 8, twice?", answer, "unfinished")
    assert planted("5 boxes of 3 pens less 8, twice?", answer.replace("= 7", "= <<15-8=7>>7"), "unfinished")


def test_a_comma_after_a_number_stays():
    answer = "If there are 13+8 = <<13+8=21>>21, 21, not 13, are fed: 21*60 = <<21*60=1260>>1,260.\n#### 1260"
    texts = {text for _, text, _ in planted("13 cats, 8 more, 60 fish?", answer, "result")}
    assert "If there are 13+8 = 12, 12, not 13, are fed: 12*60 = 720.\n#### 720" in texts


def test_counts_stay_counts_and_money_stays_money():
    problem = "73 pens in 36 boxes less one?"
    answer = "There are 73-1 = <<73-1=72>>72.\nA box has 72/36 = <<72/36=2>>2.\n#### 2"
    for kind in ("result", "operand", "operator"):
        for _, text, _ in planted(problem, answer, kind):
            assert not set("-.") & set(text.splitlines()[-1])
    money = "It costs 2*$1,450.50 = $<<2*1450.50=2901.00>>2,901.00.\n#### 2901.00"
    assert (0, "It costs 2+$1,450.50 = $1,452.50.\n#### 1452.50", False) not in planted("?", money, "operator")
    money = money.replace("1,450.50", "1450.50")
    assert (0, "It costs 2+$1450.50 = $1,452.50.\n#### 1452.50", False) in planted("?", money, "operator")


def test_the_label_of_a_solution_on_one_line():
    answer = "She has 13+8 = <<13+8=21>>21 cats. They eat 21*6 = <<21*6=126>>126 fish.\n#### 126"
    found = planted("13 cats and 8 more eat 6 fish each?", answer, "operator")
    assert (1, "She has 13+8 = 21 cats. They eat 21+6 = 27 fish.\n#### 27", False) in found
    assert {label for label, _, _ in found} == {0, 1}


@pytest.mark.parametrize(
    "answer",
    [
        "There are 31.\n#### 31",  # no mark
        "48-17 = <<48-17=32>>32\n#### 32",  # not true
        "48-17 = <<48-17=31>>31\n#### 62",  # the answer is not the last result
        "48-17 = <<48-17=31>>31",
        "48-17 = <<x-17=31>>31\n#### 31",
        "48-17 = <<48-=31>>31\n#### 31",
        "48-17 = <<48/0=31>>31\n#### 31",
        "2**5 = <<2**5=32>>32\n#### 32",  # a power
        "48-17 = 30\n30+1 = <<30+1=31>>31\n#### 31",  # an equation without a mark is not true
    ],
)
def test_solutions_that_cannot_be_read(answer):
    assert read_solution("?", answer) is None


def chain(rng):
    """A problem whose lines need each other."""
    x = rng.randint(200, 900)
    words, lines = [f"Start with {x}."], []
    for _ in range(rng.randint(2, 5)):
        operator, y = rng.choice("+-*"), rng.randint(13, 99)
        new = {"+": x + y, "-": x - y, "*": x * y}[operator]
        words.append(f"Then {operator} {y}.")
        lines.append(f"That is {x}{operator}{y} = <<{x}{operator}{y}={new}>>{new}.")
        x = new
    return {"question": " ".join(words), "answer": "\n".join([*lines, f"#### {x}"])}


def test_many_problems():
    """The shares hold, the same seed gives the same rows, and what is left of the arithmetic is right."""
    rng = random.Random(0)
    data = [chain(rng) for _ in range(160)]
    data = [one for one in data if "-" not in one["answer"].split("####")[1]]
    rows = make_rows(data, 140, seed=3)
    assert rows == make_rows(data, 140, seed=3)
    assert len({made["problem"] for made in rows}) == 140
    for kind, share in SHARES.items():
        assert sum(made["subset"] == kind for made in rows) == 140 * share / sum(SHARES.values())
    verdicts = ArithmeticJudge().judge([JudgeItem(made["problem"], tuple(made["steps"])) for made in rows])
    for made, verdict in zip(rows, verdicts, strict=True):
        seen = made["subset"] in ("number", "result")
        assert verdict.first_error == (made["label"] if seen else None), made
        assert made["final_answer_correct"] == (made["subset"] in ("number", "swapped", "none"))
        assert (made["label"] == -1) == (made["subset"] == "none")


def test_the_command(tmp_path, monkeypatch, capsys):
    data, output = tmp_path / "solutions.jsonl", tmp_path / "new" / "planted.jsonl"
    data.write_text("".join(json.dumps({"question": PENS[0], "answer": PENS[1]}) + "\n" for _ in range(9)))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["plant_errors.py", "--data", str(data), "--output", str(output), *arguments])
        main()

    call("--kinds", "swapped", "none", "--rows", "5")
    assert "5 of 9 solutions. none 4, swapped 1" in capsys.readouterr().out
    rows, _ = read_rows([str(output)])
    assert sorted(one.subset for one in rows) == ["planted/none"] * 4 + ["planted/swapped"]
    data.write_text(json.dumps({"question": "?", "answer": "It is 3.\n#### 3"}))
    with pytest.raises(SystemExit, match="They need calculator marks"):
        call()
    data.write_text(json.dumps({"problem": "?", "answer": "3"}))
    with pytest.raises(SystemExit, match="fields `question` and `answer`"):
        call()
