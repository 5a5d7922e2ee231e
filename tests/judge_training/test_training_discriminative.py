"""Training a token classifier as a judge, with tiny models."""

import pytest
import torch
from solutions_to_learn import parsed, write_solutions
from toys import save_model
from transformers import LlamaConfig, LlamaForCausalLM

from trl_sgpo.judge_training.arguments import JudgeTrainArguments
from trl_sgpo.judge_training.data import as_item, read_data
from trl_sgpo.judge_training.discriminative import (
    ClassifierCollator,
    class_weights,
    classifier_examples,
    classifier_loss,
    right_step_lm_loss,
    step_labels,
)
from trl_sgpo.judges import JudgeItem
from trl_sgpo.judges.prm import PRMEncoder, PRMJudge, PRMSpec
from trl_sgpo.scripts import judge_train


@pytest.fixture
def data(tmp_path):
    return write_solutions(tmp_path / "train.jsonl")


@pytest.fixture
def base(tmp_path, make_model, tokenizer):
    return save_model(make_model(), tokenizer, tmp_path / "base")


class TestExamples:
    def test_labels(self):
        assert step_labels(4, 2) == [1, 1, 0, -100]
        assert step_labels(2, 2) == [1, 1]  # the error did not fit into the context
        assert step_labels(3, -1) == [1, 1, 1]

    def test_training_and_judging_share_one_layout(self, data, tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<step>"]})
        encoder = PRMEncoder(tokenizer, PRMSpec(separator="<step>"))
        rows = read_data(JudgeTrainArguments(data=[str(data)])).train
        for row, example in zip(rows, classifier_examples(rows, encoder), strict=True):
            whole = encoder.encode([as_item(row)])[0]
            assert example["input_ids"] == whole.ids[: len(example["input_ids"])]
            labelled = [i for i, label in enumerate(example["labels"]) if label != -100]
            assert labelled == whole.positions[: len(labelled)]
            labels = [example["labels"][i] for i in labelled]
            assert labels == ([1, 1, 1] if row.label < 0 else [1] * row.label + [0])
            assert len(example["input_ids"]) == labelled[-1] + 1

    def test_what_does_not_fit_is_not_learnt(self, data, tokenizer):
        rows = read_data(JudgeTrainArguments(data=[str(data)])).train
        encoder = PRMEncoder(tokenizer, PRMSpec(separator="="), max_length=10)
        examples = classifier_examples(rows, encoder)
        assert all(len(example["input_ids"]) <= 10 for example in examples)
        assert {sum(label != -100 for label in example["labels"]) for example in examples} == {1}

    def test_class_weights(self):
        examples = [{"labels": [1, 1, 1, 0, -100]}, {"labels": [1, -100]}]
        wrong, right = class_weights(examples, "weights")
        assert wrong * 1 == pytest.approx(right * 4)
        assert wrong + 4 * right == pytest.approx(5)
        assert class_weights(examples, "none") == (1.0, 1.0)

    def test_only_tokens_of_right_steps_are_expected(self, tokenizer):
        # Problem 1 2 3, step 4 5 right, step 6 7 wrong, the separator is 8
        examples = [
            {
                "input_ids": [1, 2, 3, 4, 5, 8, 6, 7, 8],
                "labels": [-100] * 5 + [1] + [-100] * 2 + [0],
                "starts": [3, 6],
            },
            {"input_ids": [1, 6, 8], "labels": [-100, -100, 0], "starts": [1]},
        ]
        tokenizer.padding_side = "right"
        batch = ClassifierCollator(tokenizer)(examples)
        assert batch["lm_labels"].tolist() == [[-100] * 3 + [4, 5] + [-100] * 4, [-100] * 9]
        assert batch["labels"].tolist()[1] == [-100, -100, 0] + [-100] * 6

    def test_language_modelling_loss(self):
        generator = torch.Generator().manual_seed(0)
        hidden, embeddings = torch.randn(2, 4, 3, generator=generator), torch.randn(5, 3, generator=generator)
        labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, -100, 4]])
        logps = (hidden @ embeddings.T).log_softmax(dim=-1)
        expected = -(logps[0, 0, 1] + logps[0, 1, 2] + logps[1, 2, 4]) / 3
        assert float(right_step_lm_loss(hidden, embeddings, labels)) == pytest.approx(float(expected), rel=1e-5)
        assert float(right_step_lm_loss(hidden, embeddings, torch.full_like(labels, -100))) == 0

    def test_loss_on_labels(self):
        logits = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([[-100, 1, 1, 0], [1, -100, -100, 0]])
        expected = 0.0
        for i, row in enumerate(labels.tolist()):
            for j, label in enumerate(row):
                if label != -100:
                    expected -= float(logits[i, j].log_softmax(dim=-1)[label]) * (3.0, 0.5)[label]
        assert float(classifier_loss(logits, labels, (3.0, 0.5))) == pytest.approx(expected, rel=1e-5)


class TestDiscriminative:
    @pytest.mark.parametrize("lm_weight", [0.0, 1.0])
    def test_it_learns_is_calibrated_and_is_loaded_as_it_was_trained(self, lm_weight, data, base, tmp_path, capsys):
        result = judge_train.run(
            *parsed(
                data=[data],
                model_name_or_path=base,
                separator="<step>",
                output_dir=tmp_path / "judge",
                learning_rate=1e-2,
                max_steps=60,
                dev_share=0.3,
                lm_weight=lm_weight,
            )
        )
        assert result["f1"] == result["acc_error"] == result["acc_correct"] == 1.0
        judge = PRMJudge(tmp_path / "judge")
        assert judge.threshold == result["threshold"]
        assert judge.spec.separator == "<step>"
        items = [JudgeItem("f a [L] [V] =", ("a b c ;", "a b f ;", "a b c")), JudgeItem("x", ("a b c <step> ;",))]
        verdicts = judge.judge(items)
        assert verdicts[0].first_error == 1
        assert verdicts[1].status == "no_error"  # the separator in the text is text
        shown = capsys.readouterr().out
        assert "solutions to train on" in shown
        assert "f1                   1.000" in shown
        card = (tmp_path / "judge" / "README.md").read_text()
        assert 'PRMJudge("judge")' in card
        assert f"| threshold, kept in `config.json` | {result['threshold']:.3f} |" in card
        assert str(tmp_path) not in card

    def test_untied_embeddings_cannot_model_language(self, data, tokenizer, tmp_path):
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "untied")
        tokenizer.save_pretrained(tmp_path / "untied")
        arguments = parsed(
            data=[data], model_name_or_path=tmp_path / "untied", output_dir=tmp_path / "judge", lm_weight=1.0
        )
        with pytest.raises(ValueError, match=r"lm_weight=1.0 needs a model with tied embeddings"):
            judge_train.run(*arguments)

    def test_an_adapter_is_refused(self, data, base, tmp_path):
        arguments = parsed(data=[data], model_name_or_path=base, output_dir=tmp_path / "judge", use_peft=True)
        with pytest.raises(ValueError, match="use_peft=True does not go with kind='discriminative'"):
            judge_train.run(*arguments)
