"""What the commands print, on terminals of several widths and into a pipe."""

import os
import re
import sys

import pytest

from trl_sgpo.terminal import fitted, print_table


TEXT = (
    "A reason of several words, with a-word-that-is-not-cut, and an address http://localhost:8000/v1/with/a/long/path"
)


def test_a_pipe_gets_the_text_as_it_is():
    assert fitted(TEXT, "  - ", "    ") == f"  - {TEXT}"
    assert fitted("", "   1  ok     ") == "   1  ok"


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_gets_lines_that_fit(columns, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24)))
    lines = fitted(TEXT, "  - ", "    ").split("\n")
    assert lines[0].startswith("  - A reason")
    assert all(line.startswith("    ") for line in lines[1:])
    assert all(len(line) <= columns for line in lines if "http" not in line)  # an address stays whole
    assert " ".join(line[4:] for line in lines) == TEXT
    assert fitted("", "   1  ok     ") == "   1  ok"
    assert fitted("    d = 6", "   1  ok     ", " " * 13) == "   1  ok         d = 6"


HEADER = ["run", "RTS MAE", "other rewards"]
ROWS = [["grpo-seed0, first fifth", "0.182 [0.170, 0.194]", "0"], ["a", "-", "12.5"]]


@pytest.fixture
def terminal(monkeypatch, capsys):
    def printed(columns, *table):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        print_table(*table)
        return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()

    return printed


def test_a_table_that_has_room(terminal):
    lines = terminal(80, "Title", HEADER, ROWS, "A note.")
    assert lines[1] == "Title"
    assert lines[-1] == "A note."
    assert any("grpo-seed0, first fifth  0.182 [0.170, 0.194]" in line for line in lines)
    cells = [line.split() for line in lines if line.strip().startswith("a ")]
    assert cells == [["a", "-", "12.5"]]


def test_a_narrow_terminal_cuts_nothing_off(terminal):
    lines = terminal(40, "Title", HEADER, ROWS)
    assert max(map(len, lines)) <= 40
    assert "…" not in "".join(lines)
    words = " ".join(lines).split()
    assert {"grpo-seed0,", "0.182", "[0.170,", "0.194]", "rewards", "12.5"} <= set(words)


def test_a_pipe_has_no_width(capsys):
    print_table("Title", HEADER, [["a" * 100, "0.182 [0.170, 0.194]", "0"]])
    assert f"{'a' * 100}  0.182 [0.170, 0.194]" in capsys.readouterr().out


def test_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.box", None)
    print_table("Title", HEADER, ROWS, "A note.")
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Title",
        "run                      RTS MAE               other rewards",
        "grpo-seed0, first fifth  0.182 [0.170, 0.194]  0",
        "a                        -                     12.5",
        "A note.",
    ]
