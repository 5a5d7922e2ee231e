"""What the trainer is given beside its config: columns, weights, judges. Refused before any weight is loaded, if it can be."""

import pytest
from conftest import by_kind, first_long_word
from datasets import Dataset, DatasetDict, IterableDataset
from toys import CountingJudge, all_failed, stepwise
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import GRPOTrainer

from trl_sgpo import StepwiseJudge
from trl_sgpo.arguments import check_datasets, known_columns
from trl_sgpo.judges import ArithmeticJudge


ONCE = {"max_steps": 1, "generation_kwargs": {"suppress_tokens": [0, 1]}}


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing of GRPOTrainer's own is reached."""

    def reached(*args, **kwargs):
        raise AssertionError("weights would have been loaded")

    monkeypatch.setattr(GRPOTrainer, "__init__", reached)


def with_column(dataset, name):
    return dataset.add_column(name, ["x"] * len(dataset))


@pytest.mark.parametrize("column", ["prompts", "completions"])
class TestColumnsThatNoRewardFunctionCanBeGiven:
    @pytest.mark.parametrize(
        ("argument", "wrap", "where"),
        [
            ("train_dataset", lambda rows: rows, "train_dataset"),
            ("train_dataset", lambda rows: rows.to_iterable_dataset(), "train_dataset"),
            ("train_dataset", lambda rows: rows.with_format("numpy"), "train_dataset"),
            ("eval_dataset", lambda rows: rows, "eval_dataset"),
            ("eval_dataset", lambda rows: rows.to_iterable_dataset(), "eval_dataset"),
            ("eval_dataset", lambda rows: {"hard": rows}, r"eval_dataset\['hard'\]"),
            ("eval_dataset", lambda rows: DatasetDict(hard=rows), r"eval_dataset\['hard'\]"),
        ],
    )
    def test_are_named_when_the_trainer_is_made(
        self, make_trainer, dataset, no_weights, column, argument, wrap, where
    ):
        with pytest.raises(ValueError, match=f"{where} has a column '{column}'.* Rename the column or remove it"):
            make_trainer(
                [all_failed, stepwise()],
                trainer_args={argument: wrap(with_column(dataset, column))},
                eval_strategy="steps" if argument == "eval_dataset" else "no",
                eval_steps=1,
            )

    def test_of_a_dataset_that_is_never_evaluated_do_no_harm(self, make_trainer, dataset, column):
        make_trainer(
            [all_failed, stepwise()], trainer_args={"eval_dataset": with_column(dataset, column)}, max_steps=1
        ).train()

    @pytest.mark.parametrize(
        "late",
        [
            lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
            lambda rows: rows.with_transform(lambda batch: batch),
        ],
    )
    def test_of_a_dataset_that_cannot_tell_are_named_before_it_generates(self, make_trainer, dataset, column, late):
        trainer = make_trainer(
            [all_failed, stepwise()], trainer_args={"train_dataset": late(with_column(dataset, column))}
        )
        trainer._generate = lambda *args, **kwargs: pytest.fail("it has generated")
        with pytest.raises(ValueError, match=f"The dataset has a column '{column}'"):
            trainer.train()

    def test_of_a_rollout_function_are_named(self, make_trainer, tokenizer, column):
        def rollout(prompts, trainer):
            ids = [tokenizer("b c [V]")["input_ids"] for _ in prompts]
            return {
                "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
                "completion_ids": ids,
                "logprobs": None,
                column: ["x"] * len(ids),
            }

        trainer = make_trainer([all_failed, stepwise()], trainer_args={"rollout_func": rollout}, max_steps=1)
        with pytest.raises(ValueError, match=f"What rollout_func returns has a column '{column}'"):
            trainer.train()

    def test_do_not_matter_if_no_function_is_given_them(self, dataset, tokenizer, column):
        rows = with_column(dataset, column)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **sizes))
        check_datasets([model, "the name of a reward model"], False, train_dataset=rows)
        check_datasets([by_kind], True, train_dataset=rows)  # remove_unused_columns=True
        shown = [name for name in rows.column_names if name != column]
        check_datasets([by_kind], False, train_dataset=rows.with_format(columns=shown))
        with pytest.raises(ValueError, match=f"train_dataset has a column '{column}'"):
            check_datasets([model, by_kind], False, train_dataset=rows)


@pytest.mark.parametrize("column", ["completion", "completion_ids", "trainer_state", "log_extra", "log_metric"])
def test_columns_that_trl_leaves_out_or_replaces_train(make_trainer, dataset, column):
    judge = CountingJudge()
    make_trainer(
        [all_failed, stepwise(judge)], trainer_args={"train_dataset": with_column(dataset, column)}, **ONCE
    ).train()
    assert judge.calls == 8


def test_known_columns(dataset):
    assert known_columns(dataset) == known_columns(dataset.to_iterable_dataset()) == dataset.column_names
    assert known_columns(dataset.with_format("numpy", columns=["prompt"])) == ["prompt"]
    shown = dataset.with_format("numpy", columns=["prompt"], output_all_columns=True)
    assert known_columns(shown) == dataset.column_names
    assert known_columns(dataset.with_transform(lambda batch: batch)) is None
    assert known_columns(IterableDataset.from_generator(lambda: iter(dataset))) is None
    assert known_columns([{"prompt": "a"}]) is known_columns(None) is None


class TestColumnsOfTheJudge:
    def test_one_that_is_not_there(self, make_trainer, no_weights):
        with pytest.raises(
            ValueError, match=r"The judge .* has to be given the column 'answr'. What train_dataset has"
        ):
            make_trainer([all_failed, StepwiseJudge(lambda problem, steps, answr: 0)])

    def test_the_prompt_is_not_given_as_a_column(self, make_trainer, no_weights):
        with pytest.raises(
            ValueError, match=r"has to be given the column 'prompt'.* for a judge is \['kind', 'solution'\]"
        ):
            make_trainer([all_failed, StepwiseJudge(lambda problem, steps, *, prompt: 0)])

    @pytest.mark.parametrize(
        "judge",
        [
            lambda problem, steps, kind: 0,
            lambda problem, steps, answr=None: 0,
            lambda problem, steps, **row: 0,
            lambda kind, steps, problem="": 0,
        ],
    )
    def test_one_that_is_there_or_need_not_be(self, make_trainer, judge):
        make_trainer([all_failed, StepwiseJudge(judge)])

    def test_nobody_knows_what_a_rollout_function_or_a_stream_adds(self, make_trainer, dataset):
        judge = StepwiseJudge(lambda problem, steps, answr: 0)
        stream = IterableDataset.from_generator(lambda: iter(dataset))
        for given in ({"rollout_func": lambda prompts, trainer: {}}, {"train_dataset": stream}):
            make_trainer([all_failed, judge], trainer_args=given)

    def test_a_judge_that_is_not_asked(self, make_trainer):
        make_trainer([all_failed, StepwiseJudge(lambda problem, steps, answr: 0)], failed_groups="none")


class TestCounts:
    @pytest.mark.parametrize(
        ("funcs", "given", "message"),
        [
            ([by_kind, stepwise()], [1.0], r"reward_weights=\[1.0\] has the length 1, but reward_funcs has 2 entries"),
            (
                [stepwise(), by_kind],
                [1.0, 1.0, 2.0],
                r"has the length 3.* The StepwiseJudge at position 0 .* usually 1.0",
            ),
            ([by_kind, all_failed, stepwise()], [1.0, 0.5], "The StepwiseJudge at position 2 is one of them"),
            ([by_kind], [1.0, 0.5], "has the length 2, but reward_funcs has 1 entries, and each needs one.$"),
        ],
    )
    @pytest.mark.parametrize("failed_groups", ["sgpo", "none"])
    def test_weights(self, make_trainer, no_weights, funcs, given, message, failed_groups):
        config = {"outcome_reward": "by_kind", "failed_groups": failed_groups}
        with pytest.raises(ValueError, match=message):
            make_trainer(funcs, reward_weights=given, **config)

    def test_weights_with_credit_per_token(self, make_trainer, no_weights):
        with pytest.raises(ValueError, match="The StepwiseJudge at position 1 is one of them: put its weight there"):
            make_trainer([by_kind, stepwise()], reward_weights=[1.0], failed_groups="prefix")

    @pytest.mark.parametrize("given", ["one", ["one"], [None, "two", None]])
    def test_processing_classes(self, make_trainer, no_weights, tokenizer, given):
        with pytest.raises(
            ValueError, match=r"reward_processing_classes has the length \d, .* 2 entries.* put None there"
        ):
            make_trainer([by_kind, stepwise()], trainer_args={"reward_processing_classes": given})

    def test_what_fits(self, make_trainer):
        trainer = make_trainer(
            [by_kind, stepwise()],
            trainer_args={"reward_processing_classes": [None, None]},
            reward_weights=[1.0, 0.5],
            **ONCE,
        )
        trainer.train()
        assert trainer.reward_weights.tolist() == [1.0, 0.5]


class OwnStepwiseJudge(StepwiseJudge):
    pass


@pytest.mark.parametrize(
    "bare",
    [ArithmeticJudge(), ArithmeticJudge, StepwiseJudge, OwnStepwiseJudge, first_long_word, lambda problem, steps: 0],
)
def test_a_judge_that_nothing_wraps_is_no_reward_function(make_trainer, no_weights, bare):
    with pytest.raises(TypeError, match=r"which is no reward function. Wrap the judge: `StepwiseJudge\(judge\)`"):
        make_trainer([by_kind, bare])


def test_a_reward_function_of_columns_of_these_names_is_no_judge(make_trainer):
    def of_steps(problem, steps, completions, **kwargs):
        return [0.0] * len(completions)

    rows = Dataset.from_dict({"prompt": ["a b [R] ="] * 4, "problem": ["p"] * 4, "steps": ["s"] * 4})
    make_trainer([of_steps], trainer_args={"train_dataset": rows}, **ONCE).train()
