"""The study of a judge on real text: how its data are split, and all of its parts on a tiny model."""

import json
import random
import sys

import pytest
from toys import byte_tokenizer, save_model, tiny_llama, write_rows

from benchmarks.pretrained.tasks import gsm8k
from benchmarks.real_judge import data, run
from trl_sgpo.judge_evaluation.data import read_rows
from trl_sgpo.judge_training.data import same_problem


def word_problem(rng):
    a, b, c = (rng.randint(13, 99) for _ in range(3))
    steps = [f"{a}+{b} = <<{a}+{b}={a + b}>>{a + b}", f"{a + b}+{c} = <<{a + b}+{c}={a + b + c}>>{a + b + c}"]
    return {"question": f"{a} and {b} and {c}?", "answer": "\n".join([*steps, f"#### {a + b + c}"])}


def annotated_rows(source, subset, n_problems, per_problem=2):
    rng = random.Random(source + subset)
    rows = []
    for i in range(n_problems):
        for k in range(per_problem):
            steps = [f"{i} + {j} = {i + j}." for j in range(3)]
            label = rng.randint(-1, 2)
            # Two spellings of one problem
            problem = f"What is {i} in {subset}?" if k else f"What  is {i} in {subset}"
            row = {
                "id": f"{i}-{k}",
                "source": source,
                "subset": subset,
                "problem": problem,
                "steps": steps,
                "label": label,
            }
            rows.append({**row, "final_answer_correct": label == -1})
    return rows


@pytest.fixture
def folders(tmp_path):
    rng = random.Random(0)
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [word_problem(rng) for _ in range(90)])
    for name, source, subset in (
        ("mrben_math", "mr-ben", "math"),
        ("processbench_math", "processbench", "math"),
        ("processbench_gsm8k", "processbench", "gsm8k"),
    ):
        write_rows(tmp_path / f"{name}.jsonl", annotated_rows(source, subset, 8))
    return tmp_path


def test_no_problem_is_on_both_sides(folders):
    counts = data.make(folders / "out", folders, folders, planted=20, characters=60, heldout=None)
    parts = {name: read_rows([str(folders / "out" / f"{name}.jsonl")])[0] for name in counts}
    assert {name: len(rows) for name, rows in parts.items()} == counts
    assert counts["planted"] == 20
    assert counts["heldout_processbench_gsm8k"] == 16
    held = [row for name, rows in parts.items() if name.startswith("heldout") for row in rows]
    trained = {same_problem(row.problem) for name in ("planted", "annotated") for row in parts[name]}
    assert not trained & {same_problem(row.problem) for row in held}
    for name in data.HALVED:
        assert counts[f"heldout_{name}"] == 8
    assert all(data.length(row) <= 60 for row in parts["annotated"])
    assert {row.subset for row in held} == {"mr-ben/math", "processbench/math", "processbench/gsm8k"}
    # The policies of benchmarks/pretrained are trained on other problems
    imitated = {problem.question for problem in gsm8k(folders).to_imitate}
    assert {row.problem for row in parts["planted"]} <= imitated


@pytest.mark.slow
def test_all_parts(folders, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    weights = save_model(tiny_llama(tokenizer, tie_word_embeddings=True), tokenizer, folders / "weights")
    monkeypatch.setattr(run, "GENERATIVE", {**run.GENERATIVE, "max_length": 4096})
    monkeypatch.setattr(run, "CHECKED", 8)
    monkeypatch.setattr(run, "batch_tokens", lambda: 16384)  # a token is a byte here
    monkeypatch.setattr(run.torch, "set_num_threads", lambda n: None)

    def call(*parts):
        options = {
            "annotated": folders,
            "gsm8k": folders,
            "weights": weights,
            "output": folders / "work",
            "planted": 18,
        }
        options |= {"record": folders / "results.json", "generative-updates": 1, "generative-rows": 4, "heldout": 6}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["run.py", *parts, *words])
        run.main()

    call("data", "check", "classifier", "generative", "evaluate")
    printed = capsys.readouterr().out
    assert "on the 8 solutions that it was trained on" in printed
    record = json.loads((folders / "results.json").read_text())
    assert set(record["training"]) == {"classifier", "generative"}
    assert record["rows"]["planted"] == 18
    found = record["judges"]
    rules = [found[f"classifier, {rule}"] for rule in ("threshold", "argmin", "median")]
    assert all(one["standard"] == rules[0]["standard"] for one in rules)
    assert [one["known_wrong_all"]["coverage"] for one in rules[1:]] == [1, 1]
    assert "injection" in found["generative"]
    assert list(found["generative"]["standard"]) == ["processbench/gsm8k"]
    assert f"processbench/gsm8k\n\n{run.table(found, 'processbench/gsm8k')}" in printed
    assert run.groups_table(found) in printed
    # Every solution was scored once, for two modes and three rules
    scored = (folders / "work" / "evaluation" / "scores.jsonl").read_text().splitlines()
    texts = {(row.problem, row.steps) for row in read_rows(run.heldout(run_args(folders)))[0]}
    assert len(scored) == len(texts)

    # Nothing is made twice, and a training that was cut off goes on from a whole checkpoint
    def judge_train(words):
        asked.append((words, [path.name for path in (folders / "work" / "classifier").glob("checkpoint-*")]))

    asked: list = []
    monkeypatch.setattr(run, "judge_train", judge_train)
    call("data", "classifier", "generative")
    assert not asked
    (folders / "work" / "classifier" / "judge_train.json").unlink()
    for step in (3, 4):
        (folders / "work" / "classifier" / f"checkpoint-{step}").mkdir()
    (folders / "work" / "classifier" / "checkpoint-3" / "trainer_state.json").touch()
    call("classifier")
    ((words, checkpoints),) = asked
    assert words[-2:] == ["--resume_from_checkpoint", "true"]
    assert checkpoints == ["checkpoint-3"]


def run_args(folders):
    return type("Arguments", (), {"output": folders / "work"})
