"""The experiment on real text, from the data to the record, with a tiny model; and what its judge calls wrong."""

import json
import random
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from trl_sgpo.judges import JudgeItem


sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.real_text.judge import (
    ReferenceJudge,
    equations,
    exact_answer,
    final_answer,
    make_judge,
    plain_text,
)
from benchmarks.real_text.judge_evaluation import corrupt
from benchmarks.real_text.pretraining import epoch_batches
from benchmarks.real_text.run import main


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices as small as these are faster with one thread, and much faster on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


REFERENCE = (
    "He has 3*4=<<3*4=12>>12 apples.\nHe eats half: 12/2 = $<<12/2=6>>6.\nThen 50% are <<6*0.5=3>>3 left.\n#### 3"
)


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
        ("#### 72", "72"),
        ("24+48 = 72\n#### 1,072", "1072"),
        ("#### $-3.50", "-3.5"),
        ("####72 clips", "72"),
        ("#### .5", "0.5"),
        ("72", None),
        ("#### many", None),
        ("####", None),
        ("#### 1\n#### 2", None),  # who answers twice does not answer
        ("#### " + "9" * 5000, "1" + "0" * 40),
    ],
)
def test_the_final_answer_is_the_number_behind_the_only_mark(text, answer):
    assert final_answer(text) == answer


def test_the_outcome_is_an_exact_match():
    completions = ["so\n#### 3.0", "so\n#### 4", "3", "#### 3\n#### 4"]
    assert exact_answer(["?"] * 4, completions, [REFERENCE] * 4) == [1.0, 0.0, 0.0, 0.0]


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
    for text in ("1+" * 20_000 + "=", "= 12 " + "ab " * 20_000, "=1" * 20_000, "<<" * 20_000, "1" * 40_000 + "+1=2"):
        verdict(text)
        final_answer("####" + text)
    assert time.process_time() - start < 5  # half a second; quadratic time would be minutes


# The judge


def test_the_reference_itself_is_right():
    steps = plain_text(REFERENCE).splitlines(keepends=True)
    for judge in (ReferenceJudge(), make_judge()):
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
    assert verdict(*steps, judge=make_judge()).reason == "12/2 = 5 (is 6)"
    assert verdict("12/2 = 6", "12 + 1 = 13", "2 + 2 = 5", judge=make_judge()).first_error == 1


def test_corrupted_solutions_have_a_wrong_number_where_they_say():
    rng = random.Random(0)
    text = plain_text(REFERENCE)
    for _ in range(30):
        wrong, start = corrupt(text, False, rng)
        assert wrong != text
        assert verdict(wrong[start:], judge=make_judge()).first_error == 0
        follows, start = corrupt(text, True, rng)
        line = follows[start:].splitlines()[0]
        left, right = line.split("=")[0], equations(line)[0].results[0].value
        assert eval(left) == right  # digits and one operator
    assert corrupt("no equation here", False, rng) is None
    assert corrupt("2 * 3 = 7", False, rng) is None  # wrong already


def test_an_epoch_has_every_row_once_and_is_the_same_again():
    ids = [[i] * (1 + i % 7) for i in range(50)]
    batches = epoch_batches(ids, 8, seed=0, epoch=3)
    assert sorted(row for batch in batches for row in batch) == sorted(ids)
    assert batches == epoch_batches(ids, 8, seed=0, epoch=3) != epoch_batches(ids, 8, seed=0, epoch=4)


# The whole


def word_problem(a, b, c, name="Tom"):
    """A problem with GSM8K's columns and marks, made up here."""
    return {
        "question": f"{name} has {a} bags with {b} apples each and eats {c} of them. How many apples are left?",
        "answer": f"{name} has {a}*{b}=<<{a}*{b}={a * b}>>{a * b} apples.\nSo {a * b}-{c}="
        f"<<{a * b}-{c}={a * b - c}>>{a * b - c} are left.\n#### {a * b - c}",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, person, n in (("train", "Tom", 24), ("test", "Ann", 6)):
        rows = [word_problem(2 + i % 5, 3 + i % 4, 1 + i % 3, f"{person} {i}") for i in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# Tiny, and yet the base writes solutions of the right form with wrong numbers in them: what a judge can tell apart
PRETRAIN = "--layers 1 --width 64 --heads 2 --vocabulary 400 --batch-size 8 --rl-questions 8 --validation-questions 4"
PRETRAIN = [*PRETRAIN.split(), "--learning-rate", "3e-3", "--max-completion", "40", "--minutes", "60"]
TRAIN = "--prompts-per-update 2 --group-size 4 --micro-batch 8 --evaluations 1 --evaluation-questions 2"
TRAIN += " --evaluation-samples 2 --probe-questions 3 --probe-samples 4 --max-completion 40 --learning-rate 1e-4"
TRAIN = [*TRAIN.split(), "--tokens", "330"]  # more than one update's, at most 8 * 40


def test_the_whole_experiment_and_that_nothing_finished_is_repeated(data, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    pretrain = ["pretrain", "--data", str(data), *PRETRAIN, "--updates", "100", *output]
    main(pretrain)
    base = tmp_path / "base"
    trained = json.loads((base / "pretrain.json").read_text())
    assert [point["update"] for point in trained["losses"]] == [50, 100]
    assert trained["losses"][-1]["validation"] < trained["losses"][0]["validation"]
    parts = {path.stem: path.read_text().splitlines() for path in (tmp_path / "data").iterdir()}
    assert {name: len(rows) for name, rows in parts.items()} == {"pretrain": 12, "validation": 4, "rl": 8, "test": 6}
    assert len(set().union(*parts.values())) == 30  # no question is in two parts
    evaluated = json.loads((base / "evaluation.json").read_text())
    assert len(evaluated["test_sampled"]) == len(evaluated["test_greedy"]) == 6
    written = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    main(pretrain)
    assert {path: path.stat().st_mtime_ns for path in base.iterdir() if path.name != "settings.json"} == {
        path: time for path, time in written.items() if path.name != "settings.json"
    }
    with pytest.raises(SystemExit, match="layers: 1 there, 2 now"):
        main([*pretrain, "--layers", "2"])

    train = ["train", "--arm", "grpo", "sgpo", "prefix", "--seed", "0", *TRAIN, *output]
    main(train)
    for arm in ("grpo", "sgpo", "prefix"):
        folder = tmp_path / "runs" / f"{arm}-seed0"
        result = json.loads((folder / "result.json").read_text())
        assert result["updates"] >= 2
        assert result["generated_tokens"] >= 330
        assert [point["step"] for point in result["curve"]] == [0, result["updates"]]
        assert result["groups"]["sgpo/groups/failed"] > 0
        completions = [pq.read_table(path).to_pylist() for path in sorted((folder / "completions").glob("*.parquet"))]
        assert len(completions) == result["updates"]
        verdicts = {row.get("verdict") for rows in completions for row in rows}
        assert ("error" in verdicts) == (arm != "grpo")
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert {1, 2} <= {entry["step"] for entry in log}
        assert any("sharpening/pass@4" in entry for entry in log)
    capsys.readouterr()
    main(train)
    assert capsys.readouterr().out.count("nothing to do") == 3
    with pytest.raises(SystemExit, match="tokens: 330 there, 331 now"):
        main([*train, "--tokens", "331"])

    main(["judge", "--data", str(data), *output])
    record = tmp_path / "record" / "results.json"
    main(["report", "--record", str(record), *output])
    shown = capsys.readouterr().out
    for words in ("grpo-seed0", "prefix credit", "minus GRPO", "report/index.html"):
        assert words in shown
    kept = json.loads(record.read_text())
    assert set(kept["results"]) == {"base", "grpo-seed0", "sgpo-seed0", "prefix-seed0"}
    assert set(kept["results"]["base"]["pass@k"]) == {"1", "2", "4"}
    assert kept["arms"]["sgpo"]["seeds"] == [0]
    assert kept["judge"]["right"]["reference"]["false_alarm_rate"] == 0
    assert {"commit", "versions", "hardware"} <= set(kept)
    assert str(data) not in record.read_text()
    assert (tmp_path / "curves.png").exists()
    assert record.with_name("curves.png").exists()


def test_pretraining_goes_on_where_it_was_broken_off(data, tmp_path, monkeypatch, capsys):
    import benchmarks.real_text.pretraining as module

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    monkeypatch.setattr(module, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    pretrain = ["pretrain", "--data", str(data), *PRETRAIN, "--updates", "6", "--validate-every", "3"]
    inner, calls = module.loss_of, []

    def breaks_off(model, batch, pad):
        calls.append(batch)
        if model.training and len(calls) == 5:
            raise KeyboardInterrupt
        return inner(model, batch, pad)

    monkeypatch.setattr(module, "loss_of", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        main([*pretrain, "--output", str(broken)])
    monkeypatch.setattr(module, "loss_of", inner)
    main([*pretrain, "--output", str(broken)])
    assert "Going on after update 3" in capsys.readouterr().out
    main([*pretrain, "--output", str(whole)])
    losses = [json.loads((folder / "base" / "pretrain.json").read_text())["losses"] for folder in (broken, whole)]
    assert losses[0][-1]["update"] == 6
    # The schedule follows the clock as well, so the two are not equal bit for bit
    assert losses[0][-1]["validation"] == pytest.approx(losses[1][-1]["validation"], abs=1e-3)


# What is wrong with the arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--data", "no/such/folder"], "there is no file no/such/folder/train.jsonl"),
        (["judge", "--data", "no/such/folder"], "or the Hub name openai/gsm8k"),
        (["judge", "--data", "{data}", "--first-error", "none.jsonl"], "is no file"),
        (["pretrain", "--data", "{data}", "--rl-questions", "24"], "leave -200 of 24"),
        (["pretrain", "--data", "{data}", *PRETRAIN, "--width", "33"], "multiple of 2"),
        (["pretrain", "--data", "{data}", *PRETRAIN, "--minutes", "0"], "must be more than 0"),
        (["train", "--arm", "grpo"], "Run `pretrain` first"),
        (["report"], "Run `train` first"),
    ],
)
def test_an_error_says_what_is_wrong_and_what_to_do(arguments, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(data) if argument == "{data}" else argument for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--output", "out"])


def test_an_unknown_arm_is_refused_and_the_known_ones_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--arm", "ppo"])
    assert "choose from" in capsys.readouterr().err


def test_rows_without_the_columns_or_an_answer_are_refused(tmp_path):
    for row, message in (
        ({"text": "x"}, r"has the columns \['text'\]"),
        ({"question": "q", "answer": "5"}, "does not end"),
    ):
        (tmp_path / "train.jsonl").write_text(json.dumps(row))
        with pytest.raises(SystemExit, match=message):
            main(["judge", "--data", str(tmp_path), "--output", str(tmp_path)])
