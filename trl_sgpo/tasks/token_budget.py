"""
Runs that end after a number of generated tokens. Methods are compared at equal tokens, because an update generates
more tokens with one method than with another. It is in the package because recipes have to run without the benchmarks.
"""

from typing import Any

from transformers import TrainerCallback


class TokenBudget(TrainerCallback):
    """
    Counts the generated tokens (`generated`) and updates (`updates`), and ends the run when `tokens` of them, over all
    processes, are spent. A subclass may evaluate along the way: [`evaluate`] is called before training, whenever
    [`due`] says so, and when the run ends. It counts what the trainer logs, so it needs `logging_steps=1` and one
    generation round per update.

    Example:

    ```python
    trainer = SGPOTrainer(..., args=SGPOConfig(max_steps=10_000, logging_steps=1), callbacks=[TokenBudget(130_000)])
    ```
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.generated = 0
        self.updates = 0
        self._evaluated_at = -1

    def evaluate(self) -> None:
        """To be overridden. Does nothing here."""

    def due(self) -> bool:
        """To be overridden: whether to evaluate after this update."""
        return False

    def finished(self) -> bool:
        """Whether the run is over. It is asked after an evaluation."""
        return self.generated >= self.tokens

    def count(self, tokens: int, control: Any) -> None:
        """Takes note of an update that has generated so many tokens."""
        self.generated += tokens
        self.updates += 1
        if self.generated >= self.tokens or self.due():
            self._evaluate()
            if self.finished():
                control.should_training_stop = True

    def _evaluate(self) -> None:
        self._evaluated_at = self.generated
        self.evaluate()

    def on_train_begin(self, args, state, control, **kwargs):
        self._evaluate()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "completions/mean_length" in logs:
            self.count(round(logs["completions/mean_length"] * args.generation_batch_size), control)

    def on_train_end(self, args, state, control, **kwargs):
        if self.generated > self._evaluated_at:  # the run was out of updates before it was out of tokens
            self._evaluate()
