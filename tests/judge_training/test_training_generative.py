"""Training a language model as a judge, with tiny models."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from solutions_to_learn import PROBLEMS, parsed, solution, write_solutions
from toys import save_model, write_rows

from trl_sgpo.judge_training.arguments import JudgeTrainArguments
from trl_sgpo.judge_training.data import as_item, read_data
from trl_sgpo.judge_training.generative import (
    Critique,
    balanced,
    critique_examples,
    known_wrong_by_turns,
    verdict_line,
)
from trl_sgpo.judges import JudgeItem, Verdict
from trl_sgpo.judges.generative import GenerativeJudge, QuestionLayout
from trl_sgpo.judges.prompt import JudgePrompt
from trl_sgpo.scripts import judge_train


@pytest.fixture
def data(tmp_path):
    return write_solutions(tmp_path / "train.jsonl")


@pytest.fixture
def chat_base(tmp_path, make_chat_model, chat_tokenizer):
    return save_model(make_chat_model(), chat_tokenizer, tmp_path / "chat")


class TestGenerative:
    def test_no_answer_more_often_than_the_average(self, data):
        rows = read_data(JudgeTrainArguments(data=[str(data)], dev_share=0.1)).train
        few = [row for row in rows if row.label == 0] + [row for row in rows if row.label == 1][:2]
        kept = balanced([Critique(row, False, "x") for row in few], seed=0)
        counts = Counter(critique.row.label for critique in kept)
        assert counts[1] == 2
        assert counts[0] == -(-len(few) // 2)

    def test_modes(self, data):
        rows = read_data(JudgeTrainArguments(data=[str(data)])).train
        modes = known_wrong_by_turns(rows)
        wrong = [mode for row, mode in zip(rows, modes, strict=True) if row.label >= 0]
        assert abs(2 * sum(wrong) - len(wrong)) <= 1
        assert not any(mode for row, mode in zip(rows, modes, strict=True) if row.label < 0)
        right_answer = [replace(row, final_answer_correct=True) for row in rows]
        assert not any(known_wrong_by_turns(right_answer))  # to say that it is wrong would be untrue

    def test_an_example_is_what_the_judge_asks(self, data, chat_tokenizer, monkeypatch):
        monkeypatch.setattr("trl_sgpo.judges.prompt._nonce", lambda texts: "0badcafe")
        row = read_data(JudgeTrainArguments(data=[str(data)])).train[0]
        layout = QuestionLayout(chat_tokenizer)
        (example,) = critique_examples([Critique(row, True, "So.\nFIRST_ERROR: 1\n")], layout, JudgePrompt(), None)
        _, asked = layout.ask(JudgePrompt(), as_item(row, known_wrong=True))
        assert example["input_ids"][: len(asked)] == asked
        assert example["labels"][: len(asked)] == [-100] * len(asked)
        answer = example["labels"][len(asked) :]
        assert answer == example["input_ids"][len(asked) :]
        assert chat_tokenizer.decode(answer) == "So.\nFIRST_ERROR: 1<|im_end|>"
        assert critique_examples([Critique(row, True, "So.")], layout, JudgePrompt(), 100) == []

    def test_verdict_lines_are_read_as_they_are_meant(self):
        question = JudgePrompt().ask(JudgeItem("p", ("a", "b"), known_wrong=False))
        assert question.verdict(verdict_line(-1)).status == "no_error"
        assert question.verdict(verdict_line(1)).first_error == 1

    def test_right_critiques_are_kept_and_trained_on(self, tmp_path, chat_base, monkeypatch, capsys):
        """Two rounds; the critiques are made up, the rest is real: sampling's bookkeeping, SFT, loading, evaluation."""
        path = write_rows(
            tmp_path / "train.jsonl", [solution(p, i % 2, n_steps=2) for i, p in enumerate(PROBLEMS[:8])]
        )
        asked = []

        def sample(self, items):
            asked.append((self.model_name, [item.known_wrong for item in items]))
            return [
                [
                    ("Look.\nFIRST_ERROR: 1", Verdict.error(0, 2)),
                    ("I cannot.", Verdict.abstain("no verdict")),
                ]
                for _ in items
            ]

        monkeypatch.setattr(GenerativeJudge, "sample", sample)
        result = judge_train.run(
            *parsed(
                kind="generative",
                data=[path],
                dev_share=0.25,
                model_name_or_path=chat_base,
                output_dir=tmp_path / "judge",
                samples=2,
                rounds=2,
                max_new_tokens=16,
                max_steps=2,
                per_device_train_batch_size=2,
            )
        )
        assert [Path(name).name for name, _ in asked] == ["chat", "judge"]
        assert True in asked[0][1]
        assert result["critiques/sampled"] == 12
        assert result["critiques/readable"] == 0.5
        n = sum(json.loads(line)["labels"][0] is False for line in path.read_text().splitlines())
        assert 0 < result["critiques/right"] <= n / 12
        assert result["examples"] == round(12 * result["critiques/right"])
        assert result["abstain_rate"] == 1.0  # it has learnt nothing in two steps
        assert "round 2: sampled 12, readable 0.5" in capsys.readouterr().out
        assert 'GenerativeJudge("judge")' in (tmp_path / "judge" / "README.md").read_text()

    def test_bootstrap(self, tmp_path, chat_base):
        """From bare verdict lines to a judge that scores its choices."""
        path = write_rows(tmp_path / "train.jsonl", [solution(p, 1, n_steps=2) for p in PROBLEMS[:6]])
        result = judge_train.run(
            *parsed(
                kind="generative",
                data=[path],
                bootstrap="all",
                answer="score",
                model_name_or_path=chat_base,
                output_dir=tmp_path / "judge",
                max_steps=12,
                learning_rate=1e-2,
                per_device_train_batch_size=2,
            )
        )
        assert result["examples"] == 5
        judge = GenerativeJudge(tmp_path / "judge", answer="score")
        verdict = judge.judge([JudgeItem("a a [R] =", ("a", "b"))])[0]
        assert verdict.first_error == 1
        assert 'GenerativeJudge("judge", answer="score")' in (tmp_path / "judge" / "README.md").read_text()

    def test_a_training_with_bare_verdicts_goes_on(self, tmp_path, chat_base):
        path = write_rows(tmp_path / "train.jsonl", [solution(p, 1, n_steps=2) for p in PROBLEMS[:6]])
        arguments = {
            "kind": "generative",
            "data": [path],
            "bootstrap": "all",
            "answer": "score",
            "model_name_or_path": chat_base,
            "output_dir": tmp_path / "judge",
            "per_device_train_batch_size": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        judge_train.run(*parsed(**arguments, max_steps=2, learning_rate=1e-2))
        trained = load_file(tmp_path / "judge" / "model.safetensors")
        # From the beginning these two steps would hardly move the base
        judge_train.run(*parsed(**arguments, max_steps=2, learning_rate=1e-6, resume_from_checkpoint="true"))
        again = load_file(tmp_path / "judge" / "model.safetensors")
        assert all(torch.equal(again[name], weight) for name, weight in trained.items())
        with pytest.raises(ValueError, match=r"only if bootstrap='all'\. With bootstrap='missing' each round"):
            judge_train.run(*parsed(**{**arguments, "bootstrap": "missing"}, resume_from_checkpoint="true"))

    def test_nothing_to_train_on(self, tmp_path, chat_base, monkeypatch):
        path = write_rows(tmp_path / "train.jsonl", [solution(p, 1, n_steps=2) for p in PROBLEMS[:6]])
        monkeypatch.setattr(GenerativeJudge, "sample", lambda self, items: [[] for _ in items])
        with pytest.raises(ValueError, match="If the model cannot judge yet, use `--bootstrap missing`"):
            judge_train.run(
                *parsed(kind="generative", data=[path], model_name_or_path=chat_base, output_dir=tmp_path / "judge")
            )
