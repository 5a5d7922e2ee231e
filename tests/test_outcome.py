"""Which reward says right or wrong, for one task and for several."""

import logging
import math

import pytest
import torch
from conftest import logged, record_advantages
from toys import CountingJudge, stepwise

from trl_sgpo.outcome import find_outcomes, join_outcomes


NAN = math.nan


class TestFind:
    @pytest.mark.parametrize(
        ("names", "judge", "given", "n_given", "expected"),
        [
            (["right"], None, None, 1, [0]),
            (["judge", "right"], 0, None, 2, [1]),
            (["right", "length"], None, "right", 2, [0]),
            (["math", "length", "code"], None, ["code", "math"], 3, [0, 2]),
            # The rewards of environments are found together, if no other could be meant
            (["judge", "Maze", "Chess"], 0, None, 1, [1, 2]),
            (["Maze", "Chess"], None, None, 0, [0, 1]),
        ],
    )
    def test_found(self, names, judge, given, n_given, expected):
        assert find_outcomes(names, judge, given, needed_by="The judge", n_given=n_given) == expected

    def test_nothing_needs_one(self):
        assert find_outcomes(["right", "length"], None, None) == []
        assert find_outcomes([], None, None) == []

    @pytest.mark.parametrize(
        ("names", "given", "error", "message"),
        [
            (
                ["right", "length"],
                None,
                ValueError,
                "The judge has to know .*'right', 'length'.*outcome_reward='right'",
            ),
            (["right", "Maze"], None, ValueError, "The judge has to know .*'right', 'Maze'"),
            ([], None, ValueError, "The judge has to know .* no outcome reward"),
            (["right"], "wrong", ValueError, "outcome_reward='wrong' is not the name"),
            (["right", "length"], ["right", "wrong"], ValueError, "outcome_reward='wrong' is not the name"),
            (["right", "right"], "right", ValueError, "is the name of several"),
            (["right"], [], TypeError, r"outcome_reward=\[\] must be the name of a reward function, or a list"),
            (["right"], ["right", "right"], TypeError, "a list of different names"),
            (["right"], [1], TypeError, r"outcome_reward=\[1\] must be"),
        ],
    )
    def test_errors(self, names, given, error, message):
        with pytest.raises(error, match=message):
            find_outcomes(names, None, given, needed_by="The judge", n_given=1)


class TestJoin:
    def test_the_one_that_is_there(self):
        rewards = torch.tensor([[[1.0, NAN, 7.0], [NAN, 0.0, NAN]], [[NAN, NAN, 3.0], [NAN, 1.0, 3.0]]])
        found = join_outcomes(rewards, [0, 1], ["math", "code", "length"])
        torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [NAN, 1.0]]), equal_nan=True)
        assert torch.isnan(join_outcomes(rewards, [], ["math", "code", "length"])).all()

    def test_two_at_once(self):
        rewards = torch.tensor([[[1.0, NAN, NAN], [NAN, 0.0, NAN], [NAN, 1.0, 1.0]]])
        with pytest.raises(
            ValueError, match="Completion 2 of this round has two outcomes, from 'code' and from 'logic'"
        ):
            join_outcomes(rewards, [0, 1, 2], ["math", "code", "logic"])


def math_reward(prompts, completions, kind, **kwargs):
    return [0.0 if k == "failed" else None for k in kind]


def code_reward(prompts, completions, kind, **kwargs):
    return [None if k == "failed" else 0.0 for k in kind]


def format_reward(prompts, completions, **kwargs):
    return [0.1 * (i % 3) for i in range(len(completions))]


class TestSeveralTasks:
    """TRL's pattern: each reward function returns None for the rows of the other tasks."""

    config = {"per_device_train_batch_size": 16, "max_steps": 1, "generation_kwargs": {"suppress_tokens": [0, 1]}}

    def test_every_task_is_judged(self, make_trainer, caplog):
        judge = CountingJudge()
        trainer = make_trainer(
            [math_reward, code_reward, stepwise(judge)], outcome_reward=["math_reward", "code_reward"], **self.config
        )
        rounds = record_advantages(trainer)
        trainer.train()
        assert judge.calls == 16
        assert logged(trainer, "sgpo/groups/failed") == [1.0]
        assert rounds[0].view(4, 4).any(dim=1).float().mean() == logged(trainer, "sgpo/groups/rescued")[0]
        assert "have another reward but no outcome" not in caplog.text

    def test_groups_of_a_task_that_was_forgotten(self, make_trainer, caplog):
        judge = CountingJudge()
        config = {**self.config, "max_steps": 2}
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer([math_reward, code_reward, stepwise(judge)], outcome_reward="math_reward", **config)
            trainer.train()
        assert judge.calls == 16
        assert logged(trainer, "sgpo/groups/no_outcome") == [0.5, 0.5]
        assert logged(trainer, "sgpo/groups/failed") == [0.5, 0.5]
        assert (
            caplog.text.count("50 % of the groups of this round have another reward but no outcome: 'math_reward'")
            == 1
        )

    def test_the_share_is_a_mean_over_rounds(self, make_trainer):
        rounds = iter([None, 1.0])

        def at_times(prompts, completions, **kwargs):
            return (
                [next_value] * len(completions)
                if (next_value := next(rounds)) is not None
                else [None] * len(completions)
            )

        config = {**self.config, "max_steps": 2, "logging_steps": 2}
        make = make_trainer([at_times, format_reward, stepwise()], outcome_reward="at_times", **config)
        make.train()
        assert logged(make, "sgpo/groups/no_outcome") == [0.5]

    def test_two_outcomes_of_one_completion(self, make_trainer):
        trainer = make_trainer(
            [math_reward, format_reward, stepwise()], outcome_reward=["math_reward", "format_reward"], **self.config
        )
        with pytest.raises(ValueError, match="has two outcomes, from 'math_reward' and from 'format_reward'"):
            trainer.train()

    def test_environments_of_two_classes(self, make_trainer, chat_tokenizer, make_chat_model):
        from datasets import Dataset

        class Maze:
            def reset(self, **kwargs):
                return " Walk."

            def get_reward(self):
                return 0.0

        class Chess(Maze):
            pass

        judge = CountingJudge()
        rows = {
            "prompt": [[{"role": "user", "content": f"Play {i}."}] for i in range(4)],
            "environment": ["m", "c"] * 2,
        }
        trainer = make_trainer(
            [stepwise(judge)],
            trainer_args={
                "model": make_chat_model(),
                "processing_class": chat_tokenizer,
                "train_dataset": Dataset.from_dict(rows),
                "environment_factory": {"m": Maze, "c": Chess},
            },
            per_device_train_batch_size=16,
            max_steps=1,
        )
        trainer.train()
        assert trainer.reward_func_names == ["stepwise_judge", "Maze", "Chess"]
        assert trainer.outcome_indices == [1, 2]
        assert logged(trainer, "sgpo/groups/failed") == [1.0]
