"""Problems with a final answer, from files as they are found."""

import json
import os
from pathlib import Path

import pytest
from toys import write_rows

from trl_sgpo.evaluation.scoring import Score, score
from trl_sgpo.evaluation.sets import KNOWN_SETS, Benchmark, gold_text, parse_benchmark, read_set, sample_problems


ROOT = Path(__file__).parents[2]


def read(path, **kwargs):
    return read_set(parse_benchmark(str(path), 0), **kwargs)


@pytest.mark.parametrize(
    ("written", "name", "source", "n"),
    [
        ("gsm8k", "gsm8k", "gsm8k", 0),
        ("gsm8k@4", "gsm8k", "gsm8k", 4),
        ("gsm8k@0", "gsm8k", "gsm8k", 0),
        ("mine=data/a.b.jsonl@16", "mine", "data/a.b.jsonl", 16),
        ("data/a.b.jsonl", "a.b", "data/a.b.jsonl", 0),
        ("owner/some-set@2", "some-set", "owner/some-set", 2),
        ("dir/x=1/set.json", "set", "dir/x=1/set.json", 0),
        ("me@home.json", "me@home", "me@home.json", 0),
    ],
)
def test_how_a_benchmark_is_written(written, name, source, n):
    assert parse_benchmark(written, 0) == Benchmark(name, source, n)
    assert parse_benchmark(written, 3).n == (n if written.rpartition("@")[2].isdecimal() else 3)


def test_columns_and_forms(tmp_path, gsm8k_path):
    problems, known = read(gsm8k_path)
    assert [problem.gold for problem in problems[:2]] == [r"\boxed{10}", r"\boxed{23}"]
    assert problems[3].text.startswith("Tom has 8 bags")
    assert (known["problems"], known["name"]) == (8, "gsm8k.jsonl")
    message = [{"role": "user", "content": "2 + 3?"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": message, "solution": r"So \boxed{5}."}]))
    [only], _ = read(tmp_path / "rows.json")
    assert (only.index, only.text, only.gold) == (0, "2 + 3?", r"So \boxed{5}.")


def test_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = {"question": ["a", "b"], "final_answer": [["$2$", "$3$"], [r"$\frac{1}{2}$"]]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "set.parquet")
    problems, known = read(tmp_path / "set.parquet")
    assert [problem.gold for problem in problems] == [r"\boxed{2, 3}", r"\boxed{\frac{1}{2}}"]
    assert known["split"] == "train"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1,000 + 1\n#### 1,001", "1001"),
        ("#### -3", "-3"),
        (27.0, "27"),
        (0.5, "0.5"),
        ("(1,100)", "(1,100)"),  # no thousands point, but a point of the plane
        ("['$x$', '$y$']", "x, y"),
        ("$a$ and $b$", "$a$ and $b$"),
    ],
)
def test_gold_text(answer, gold):
    assert gold_text(answer) == f"\\boxed{{{gold}}}"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "a", "answer": "1"}, {"problem": "b", "answer": " "}], "line 2: answer is empty"),
        ([{"problem": "a"}], r"line 1: there is no answer, only the fields \['problem'\]"),
        ([{"answer": "1"}], "line 1: there is no problem"),
        ([7], "line 1: it is int, not an object"),
        ([], "holds no problem"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read(write_rows(tmp_path / "rows.jsonl", rows))


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"sets: gone='gone.jsonl' does not exist"):
        read("gone.jsonl")


def test_a_larger_limit_keeps_the_problems_of_a_smaller_one(gsm8k_path):
    problems, _ = read(gsm8k_path)
    drawn = [[p.index for p in sample_problems(problems, limit, seed=1)] for limit in (2, 5, None)]
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2])
    assert all(indices == sorted(indices) for indices in drawn)
    assert drawn[1] != [p.index for p in sample_problems(problems, 5, seed=2)]


def test_scores():
    golds = [r"\boxed{\frac{1}{2}}"] * 5
    texts = [r"So \boxed{0.5}", "The final answer is $\\frac{2}{4}$.", r"\boxed{2}", "So it is $0.5$.", ""]
    right, wrong, silent = Score(True, True), Score(False, True), Score(False, False)
    assert score(texts, golds) == [right, right, wrong, silent, silent]
    assert score([r"\boxed{1}"], [""]) == [None]
    shorthand = r"\boxed{\frac43}"  # right in a set, wrong in a completion
    assert score([r"\boxed{\frac{4}{3}}", shorthand], [shorthand] * 2) == [right, wrong]


def test_real_sets():
    """Every gold answer is one that math-verify can parse. It refuses eight shorthands of MATH-500, such as `\\frac43`."""
    folder = os.environ.get("TRL_SGPO_MATH_DATA")
    if not folder:
        pytest.skip("TRL_SGPO_MATH_DATA does not name a folder with gsm8k/test.jsonl and math500/test.jsonl")
    for name, n, refused in (("gsm8k", 1319, 0), ("math500", 500, 8)):
        problems, known = read(Path(folder) / name / "test.jsonl")
        assert known["problems"] == n
        golds = [problem.gold for problem in problems]
        own = score(golds, golds)
        assert None not in own
        assert sum(not one.correct for one in own) == refused


def test_the_short_names_are_in_the_help():
    from trl_sgpo.scripts import evaluate

    assert ", ".join(KNOWN_SETS) in evaluate.__doc__
    assert f"({', '.join(KNOWN_SETS)})" in evaluate.EvaluateArguments.__dataclass_fields__["sets"].metadata["help"]
