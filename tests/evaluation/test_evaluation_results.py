"""Numbers of an evaluation against plain loops."""

import itertools
import re

import numpy as np
import pytest
from evaluation_results import made_up

from trl_sgpo.evaluation.card import add_to_card, card_path
from trl_sgpo.evaluation.results import Answers, answers_of, comparison, summary
from trl_sgpo.evaluation.tables import markdown, overview, remarks, tables


CARD = "---\nlicense: mit\n---\n\n# Model\n\nIt was trained.\n\n## Citations\n\nCite.\n"


def answers(correct, tokens=100.0):
    correct = np.array(correct, dtype=bool)
    shape = correct.shape
    return Answers(correct, np.ones(shape, dtype=bool), np.full(shape, tokens), np.zeros(shape, dtype=bool))


def test_summary():
    correct = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    numbers = summary(answers(correct), resamples=50)
    assert numbers["accuracy"].value == pytest.approx(np.mean([0.25, 1, 0, 0.5]))
    assert numbers["accuracy"].low < numbers["accuracy"].value < numbers["accuracy"].high
    assert list(numbers["pass_at_k"]) == ["1", "2", "4"]
    pairs = list(itertools.combinations(range(4), 2))
    naive = np.mean([np.mean([row[i] or row[j] for i, j in pairs]) for row in correct])
    assert numbers["pass_at_k"]["2"].value == pytest.approx(naive)
    assert numbers["pass_at_k"]["1"].value == numbers["accuracy"].value
    assert (numbers["problems"], numbers["samples"], numbers["no_answer"], numbers["tokens"]) == (4, 4, 0, 100)


def test_tokens_that_nobody_counted():
    line = {"correct": [True, False], "found": [True, False], "tokens": [None, 30], "cut": [False, True]}
    numbers = summary(answers_of([line]))
    assert (numbers["tokens"], numbers["no_answer"], numbers["cut"]) == (30, 0.5, 0.5)
    assert np.isnan(summary(answers_of([{**line, "tokens": [None, None]}]))["tokens"])


def test_comparison_is_by_problem():
    """Two models that differ by one problem in ten, and agree on all others, differ less surely than their means suggest."""
    rng = np.random.default_rng(0)
    base = rng.random((200, 1)) < 0.5
    better = base.copy()
    better[np.flatnonzero(~base[:, 0])[:20]] = True
    found = comparison(answers(base), answers(better))
    assert found["difference"].value == pytest.approx(0.1)
    assert (found["better"], found["worse"]) == (20, 0)
    assert found["p"] < 0.001
    assert found["difference"].high - found["difference"].low < 0.1  # unpaired it would be 0.2
    same = comparison(answers(base), answers(base))
    assert (same["difference"].value, same["p"], same["better"]) == (0, 1, 0)


def test_tables_fit_80_columns(capsys, monkeypatch):
    from trl_sgpo import terminal

    results = made_up()
    for _, header, cells, _ in tables(results):
        assert all(len(row) == len(header) for row in cells)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    for title, header, cells, note in tables(results):
        terminal.print_table(title, header, cells, note)
    lines = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.startswith(" sgpo") or line.startswith("sgpo")]
    assert any({"75.0", "+50.0", "0.500"} <= set(row) for row in rows)


def test_overview():
    _, header, cells, _ = overview(made_up())
    assert header == ["benchmark", "base", "sgpo"]
    assert cells[0][0] == "easy greedy"
    assert cells[-1] == ["mean", "12.5", "56.2"]


def test_remarks():
    results = made_up()
    assert remarks(results) == []
    results["benchmarks"]["easy greedy"]["models"]["base"]["no_answer"] = 0.9
    results["sets"]["easy"]["unparseable"] = 2
    left_out, silent = remarks(results)
    assert left_out.startswith("easy: 2 problems are left out")
    assert silent.startswith("base gives no answer to more than half of easy greedy. It has to stand in")


class TestCard:
    def test_a_section_before_the_citations_which_is_replaced(self):
        text = add_to_card(CARD, made_up())
        before, _, after = text.partition("## Evaluation")
        assert before.startswith(CARD.partition("\n## Citations")[0])
        assert after.endswith("\n## Citations\n\nCite.\n")
        assert markdown(made_up()) in text
        other = made_up()
        other["benchmarks"].pop("hard avg@2")
        again = add_to_card(text, other)
        assert again == add_to_card(CARD, other) != text

    def test_at_the_end_of_another_card(self):
        assert add_to_card("# Mine\n", made_up()).startswith("# Mine\n\n<!-- trl-sgpo evaluate -->\n## Evaluation\n")

    def test_which_file(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            card_path(str(tmp_path))
        (tmp_path / "README.md").write_text(CARD)
        assert card_path(str(tmp_path)) == card_path(str(tmp_path / "README.md")) == tmp_path / "README.md"
