import pytest
from conftest import logged
from transformers import TrainerControl

from trl_sgpo.tasks.token_budget import TokenBudget


def half(prompts, completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]


class Recorder(TokenBudget):
    """Evaluates after every second update."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.evaluated = []

    def due(self):
        return self.updates % 2 == 0

    def evaluate(self):
        self.evaluated.append(self.generated)


def test_a_run_ends_when_its_tokens_are_spent(make_trainer):
    budget = Recorder(tokens=200)
    trainer = make_trainer([half], max_steps=100)
    trainer.add_callback(budget)
    trainer.train()
    per_update = [round(8 * length) for length in logged(trainer, "completions/mean_length")]
    assert budget.generated == sum(per_update) >= 200 > sum(per_update[:-1])
    assert budget.updates == len(per_update) == trainer.state.global_step
    spent = [0, *(sum(per_update[:i]) for i in range(1, len(per_update) + 1))]
    assert budget.evaluated == [spent[i] for i in range(len(spent)) if i % 2 == 0 or i == len(per_update)]


def test_a_run_that_is_out_of_updates_is_evaluated_at_its_end(make_trainer):
    budget = Recorder(tokens=10**9)
    trainer = make_trainer([half], max_steps=3)
    trainer.add_callback(budget)
    trainer.train()
    assert budget.updates == 3
    assert len(budget.evaluated) == 3  # at first, after two updates, at the end
    assert budget.evaluated[-1] == budget.generated


@pytest.mark.parametrize(("reached", "stops"), [(False, False), (True, True)])
def test_a_goal_of_a_subclass_ends_the_run(reached, stops):
    class Goal(Recorder):
        def finished(self):
            return reached

    budget, control = Goal(tokens=1000), TrainerControl()
    budget.count(10, control)
    assert not control.should_training_stop  # nothing was evaluated after this update
    budget.count(10, control)
    assert control.should_training_stop == stops
