"""
What is logged of a generation round: metrics, the columns of the completions table, and the warnings that are said
once. TRL's own log is kept true here, too: after a treatment has changed advantages, the table shows the changed ones.
"""

import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer import grpo_trainer

from trl_sgpo.groups import SortedGroups, group_pass_at_k, nanstd, value_range
from trl_sgpo.judges.log_once import LogOnce
from trl_sgpo.judges.stepwise import REWARD_NAME, StepScore, StepwiseJudge
from trl_sgpo.length_alarm import LengthAlarm
from trl_sgpo.rounds import STATUSES, Judged, Round, verified_steps


logger = logging.getLogger(__name__)

# Two trainers of a process may log at once, and what they replace in TRL's module is one function
_ONE_AT_A_TIME = threading.RLock()

# Columns that the judge adds to the parquet files of the completions
JUDGE_COLUMNS = ("judge_first_error", "judge_n_steps", "judge_rts", "judge_status", "judge_reason")

_LONGEST_REASON = 300  # characters of a reason in the log
_TEXT_WIDTH = 24  # characters of a line for the prompt in the printed table, and as many for the completion
_COLUMN_WIDTH = 16  # and for any other column


class RoundLog:
    """
    Writes what is to be logged of a round into TRL's collections.

    Args:
        metrics (`dict`):
            TRL's `_metrics`: a list of values for each key, of which the mean is logged, by `"train"` and `"eval"`.
        logs, log_extra (`dict`, `Callable`):
            TRL's `_logs`, what the completions table is made of, and its `_log_completion_extra`.
        judge ([`StepwiseJudge`], *optional*):
            The judge, if the treatment asks one.
        main_process (`bool`):
            Whether this is the rank that speaks.
    """

    def __init__(
        self,
        metrics: dict[str, Any],
        logs: dict[str, Any],
        log_extra: Callable[[str, list], None],
        outcome_names: list[str],
        judge: StepwiseJudge | None,
        main_process: bool,
    ) -> None:
        self.metrics, self.logs, self.log_extra = metrics, logs, log_extra
        self.outcome_names, self.judge, self.main_process = outcome_names, judge, main_process
        self._silent_rounds = 0
        self._length_alarm = LengthAlarm()
        self._log_once = LogOnce(logger)
        self._table_described = False

    def write(self, round: Round) -> None:
        """
        Logs a round whose rewards and verdicts are there. To be called once in every round, before TRL flushes the
        table's columns.
        """
        self._log_groups(round)
        if self.judge is None:
            return
        if round.training:
            self._log_not_asked(round)
        if round.judged is not None and round.groups is not None:
            self._log_failed_groups(round, round.groups)
            self._log_lengths(round, round.judged)
            self._log_verdicts(round, round.judged, self.judge)
        elif round.training:
            # A round in which nobody was asked counts too: what is logged is the mean over rounds
            for name in ("groups/rescued", "groups/tied", "groups/tied_other_rewards", "judge_calls", "judge_seconds"):
                self._log(round, f"sgpo/{name}", 0.0)
            self._log(round, "sgpo/groups/unjudged", round.kinds.failed_P.float().mean().item())

    def write_table(self, round: Round, taken: Collection[str] = ()) -> None:
        """
        One value per local row in every round, judged or not: TRL appends columns, and a skipped call shifts them.
        `taken` are the columns that reward functions have logged; one of the judge's names among them raises a
        `ValueError`.
        """
        if self.judge is None:
            return
        both = sorted(set(JUDGE_COLUMNS) & set(taken))
        if both:
            raise ValueError(
                f"A reward function has logged the column {both[0]!r} with log_extra, which is one of the judge's "
                f"{list(JUDGE_COLUMNS)}. Give it another name."
            )
        scores = round.judged.scores if round.judged is not None else [None] * (round.rows.stop - round.rows.start)
        rows = [_table_row(score, self.judge) for score in scores]
        for name, column in zip(JUDGE_COLUMNS, zip(*rows, strict=True), strict=True):
            self.log_extra(name, list(column))

    def show(self, round: Round, advantages: Tensor, gather: Callable[[Tensor], Tensor] | None) -> None:
        """
        Puts what a treatment has changed where TRL has logged its own: the advantages, and the judge's rewards.
        `advantages`, of shape `(B,)` or `(B, T)`, are those that this rank trains with. Every rank joins `gather`.
        Without one there is no table that would show them.
        """
        for key, value in round.metrics.items():
            try:
                self._log(round, key, float(value))
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"round.metrics[{key!r}]={value!r} is not a number, so it cannot be logged."
                ) from error
        if (rewards_PG := round.judge_rewards_PG) is not None:
            values = self.metrics["train"]
            values[f"rewards/{REWARD_NAME}/mean"][-1:] = [torch.nanmean(rewards_PG).item()]
            values[f"rewards/{REWARD_NAME}/std"][-1:] = [nanstd(rewards_PG, dim=(0, 1)).item()]
            _replace_end(self.logs["rewards"][REWARD_NAME], rewards_PG)
        if round.advantages_PG is None and gather is not None:
            round.advantages_PG = gather(round.per_completion(advantages))
        if round.advantages_PG is not None:
            _replace_end(self.logs["advantages"], round.advantages_PG, keep_nan=True)

    def _log(self, round: Round, key: str, value: float) -> None:
        """Logs a value that is the same on every rank. Unlike TRL's `log_metric`, nothing is averaged over ranks."""
        self.metrics["train" if round.training else "eval"][key].append(value)

    def _log_groups(self, round: Round) -> None:
        """Metrics that need outcomes only; they are there in evaluation and without a judge too."""
        outcome_PG, kinds = round.outcome_PG, round.kinds
        n_scored = (~torch.isnan(outcome_PG)).sum()
        n_others = round.rewards_PGF.shape[2] - len(self.outcome_names) - (round.judge_index is not None)
        if self.outcome_names and n_others > 0:
            self._log_groups_without_outcome(round)
        if n_scored == 0:
            return
        self._log(round, "sgpo/accuracy", ((outcome_PG >= round.success_threshold).sum() / n_scored).item())
        if outcome_PG.shape[1] > 1:
            shares = torch.stack([kinds.solved_P, kinds.mixed_P, kinds.failed_P]).float().mean(dim=1).tolist()
            for kind, share in zip(("solved", "mixed", "failed"), shares, strict=True):
                self._log(round, f"sgpo/groups/{kind}", share)
        for k, estimate in group_pass_at_k(outcome_PG, round.success_threshold).items():
            self._log(round, f"sgpo/pass@{k}", estimate)

    def _log_groups_without_outcome(self, round: Round) -> None:
        """A group without any outcome and with another reward trains as in GRPO, and is in none of the kinds."""
        no_outcome_P = torch.isnan(round.outcome_PG).all(dim=1) & (~torch.isnan(round.others_PG)).any(dim=1)
        share = no_outcome_P.float().mean().item()
        self._log(round, "sgpo/groups/no_outcome", share)
        if share > 0 and round.training and self.main_process:
            self._log_once(
                "no outcome",
                "%.0f %% of the groups of this round have another reward but no outcome: %s gave None for all of their "
                "completions. They train as in GRPO, and are never counted as failed. If they belong to another task, name its "
                "reward too: outcome_reward=[%s, ...]. The metric sgpo/groups/no_outcome counts them. This is said once.",
                100 * share,
                " and ".join(map(repr, self.outcome_names)),
                ", ".join(map(repr, self.outcome_names)),
            )

    def _log_failed_groups(self, round: Round, groups: SortedGroups) -> None:
        """What became of the failed groups: shares of all groups."""
        others_teach_P = value_range(round.others_PG) > 0
        for name, group_P in (
            ("rescued", groups.rescued_P),
            ("tied", groups.tied_P),
            ("tied_other_rewards", groups.tied_P & others_teach_P),
            ("unjudged", round.kinds.failed_P & ~groups.rescued_P & ~groups.tied_P),
        ):
            self._log(round, f"sgpo/groups/{name}", group_P.float().mean().item())

    def _log_not_asked(self, round: Round) -> None:
        """Failed groups about which nobody was asked, a part of those that are unjudged; says once why."""
        failed_P, to_judge_PG = round.kinds.failed_P, round.to_judge_PG
        masked_PG = torch.zeros_like(round.wrong_PG) if round.judged is None else round.judged.masked_PG
        not_asked_P = failed_P if to_judge_PG is None else failed_P & ~(to_judge_PG & ~masked_PG).any(dim=1)
        self._log(round, "sgpo/groups/not_asked", not_asked_P.float().mean().item())
        if to_judge_PG is None or not self.main_process:
            return
        uneven_P, n_masked = not_asked_P & round.uneven_P, int((to_judge_PG & masked_PG).sum())
        if uneven_P.any():
            self._log_once(
                "uneven",
                "%.0f %% of the groups of this round failed and were not judged, because one of their completions has another "
                "reward and no outcome (%s gave None): its reward cannot be compared with the judge's. They train as in GRPO. "
                "Give every completion of a task an outcome, or none of its rewards, or use failed_groups='prefix'. The metric "
                "sgpo/groups/not_asked counts them. This is said once.",
                100 * uneven_P.float().mean().item(),
                " and ".join(map(repr, self.outcome_names)),
            )
        if n_masked:
            self._log_once(
                "truncated",
                "mask_truncated_completions=True: %d of %d wrong completions of this round were truncated. Their tokens are masked, "
                "so a verdict could teach nothing, and they are not judged. Raise max_completion_length, or set "
                "mask_truncated_completions=False to let their correct prefix be rewarded. This is said once.",
                n_masked,
                int(to_judge_PG.sum()),
            )

    def _log_lengths(self, round: Round, judged: Judged) -> None:
        """How long the completions of failed groups are; says once if that changes and accuracy gets no better."""
        if not round.kinds.failed_P.any():
            return
        lengths = judged.length_PG[round.kinds.failed_P]
        length = lengths.mean().item()
        self._log(round, "sgpo/failed/mean_length", length)
        n_steps = torch.nanmean(judged.n_steps_PG[round.kinds.failed_P]).item()
        if not math.isnan(n_steps):
            self._log(round, "sgpo/failed/mean_steps", n_steps)
        changed = self._length_alarm.add(lengths.numel(), length, self.metrics["train"]["sgpo/accuracy"][-1])
        if changed is not None and self.main_process:
            self._log_once(*changed)

    def _log_verdicts(self, round: Round, judged: Judged, judge: StepwiseJudge) -> None:
        """Metrics of the judge, from what all ranks found; says loudly if it judged nothing."""
        scored_PG = ~torch.isnan(judged.rts_PG)
        n_calls = int(judged.called_PG.nansum())
        self._log(round, "sgpo/judge_calls", float(n_calls))
        self._log(round, "sgpo/judge_seconds", judged.seconds)
        if scored_PG.any():
            gap_PG = judged.rts_steps_PG - judged.rts_characters_PG
            self._log(round, "sgpo/rts", judged.rts_PG[scored_PG].mean().item())
            self._log(round, "sgpo/rts_gap", gap_PG[scored_PG].mean().item())
        n_right, n_unchecked = (
            n_PG[scored_PG].sum().item() for n_PG in (verified_steps(judged), judged.n_unchecked_PG)
        )
        if n_right + n_unchecked:
            self._log(round, "sgpo/unchecked_steps", n_unchecked / (n_right + n_unchecked))
        compared_P = round.kinds.failed_P & (scored_PG.sum(dim=1) >= 2)
        if compared_P.any():
            self._log(round, "sgpo/rts_spread", value_range(judged.rts_PG)[compared_P].mean().item())
        if n_calls == 0:
            return
        asked_PG = judged.called_PG == 1
        rates = {name: (judged.status_PG[asked_PG] == i).float().mean().item() for i, name in enumerate(STATUSES)}
        self._log(round, "sgpo/abstain_rate", rates["abstain"])
        self._log(round, "sgpo/no_error_rate", rates["no_error"])
        self._log(round, "sgpo/steps_per_completion", judged.n_steps_PG[asked_PG].mean().item())
        if judged.n_steps_PG[asked_PG].max() == 1 and self.main_process:
            self._log_once(
                "one step",
                "Every completion that was judged in this round has a single step, so an error in it gives all of them the same "
                "score, and their groups teach nothing. Give StepwiseJudge a segmenter that cuts your task's completions into "
                "steps (the default one cuts at headings, blank lines, lines or sentences). If the steps stand in the thinking, "
                "which is left out by default, set `include_thinking=True`. This is said once.",
            )
        if torch.isnan(judged.rts_PG[asked_PG]).all():
            self._silent_rounds += 1
            # At the 1st, 2nd, 4th, 8th ... such round: loud, and yet the log stays readable
            if self._silent_rounds & (self._silent_rounds - 1) == 0 and self.main_process:
                logger.warning(
                    "THE JUDGE GAVE NO USABLE VERDICT in this round: of %d completions known to be wrong it abstained on "
                    "%.0f %% and found no error in %.0f %%. The failed groups train as in GRPO, that is, not at all. "
                    "Rounds like this so far: %d. Is the judge (%s) reachable and able? %sThe column `judge_reason` of "
                    "the completions table (`log_completions=True`) has all reasons.",
                    n_calls,
                    100 * rates["abstain"],
                    100 * rates["no_error"],
                    self._silent_rounds,
                    judge.judge.name,
                    _usual_reason(judged.scores),
                )

    def warn_of_rollouts(self) -> None:
        """Says once that a rollout function returns text of others, which cannot be told from the policy's."""
        self._log_once(
            "rollouts",
            "rollout_func returns env_mask: the completions hold text that the policy did not write. TRL hands them to reward "
            "functions as one text, so the judge takes that text for the policy's, and it counts in RTS. Give StepwiseJudge a "
            "segmenter that leaves it out, or use tools or environment_factory, whose results are known to be no steps. This is "
            "said once.",
        )

    def describe_table(self, folder: Path, success_threshold: float, treatment: str) -> None:
        """Says once, beside the completions' files, what their columns mean, for whoever reads them later."""
        if self._table_described:
            return
        self._table_described = True
        if self.main_process:
            folder.mkdir(parents=True, exist_ok=True)
            names = self.outcome_names
            settings = {
                "outcome_reward": names[0] if len(names) == 1 else names,
                "success_threshold": success_threshold,
                "failed_groups": treatment,
            }
            (folder / "sgpo.json").write_text(json.dumps(settings, indent=2) + "\n")

    @contextmanager
    def readable_table(self) -> Iterator[None]:
        """
        While it lasts, TRL prints completions with one column `verdict` in place of the judge's, and with as many columns of
        reward functions as there is room for. All of them would squeeze prompt and completion to six letters. The files
        keep all columns.
        """
        if not hasattr(grpo_trainer, "print_prompt_completions_sample"):
            yield
            return
        with _ONE_AT_A_TIME:
            printer = grpo_trainer.print_prompt_completions_sample
            grpo_trainer.print_prompt_completions_sample = partial(_print_fitting, printer)
            try:
                yield
            finally:
                grpo_trainer.print_prompt_completions_sample = printer


def _print_fitting(
    printer: Callable[..., None],
    prompts: Any,
    completions: Any,
    rewards: dict,
    advantages: Any,
    *args: Any,
    extra: dict | None = None,
) -> None:
    """
    As TRL's `printer`, with verdicts in place of the judge's columns, names that a narrow column can break, and no more
    columns of reward functions than there is room for. `accuracy_reward` alone has three.
    """
    own = {name: (extra or {}).get(name, []) for name in JUDGE_COLUMNS}
    others = {name: values for name, values in (extra or {}).items() if name not in JUDGE_COLUMNS}
    judged = zip(own["judge_status"], own["judge_first_error"], own["judge_n_steps"], strict=True)
    verdicts = [_verdict(*of_one) for of_one in judged]
    shown = {name.replace("_", " "): values for name, values in rewards.items() if name != REWARD_NAME}
    room = _console_width() - 2 * _TEXT_WIDTH
    n_others = max(0, room // _COLUMN_WIDTH - len(shown) - (advantages is not None) - bool(verdicts))
    extra = {name.replace("_", " "): others[name] for name in list(others)[:n_others]}
    if verdicts:
        extra["verdict" if "verdict" not in extra else "judge's verdict"] = verdicts
    printer(prompts, completions, shown, advantages, *args, extra=extra)


def _console_width() -> int:
    """Characters of a line of the table. It is printed with `rich`, so that is installed."""
    from rich.console import Console

    return Console().width


def _usual_reason(scores: Sequence[StepScore | None]) -> str:
    """A sentence with the reason that most abstentions of this rank give; empty if there is none."""
    reasons = Counter(score.reason for score in scores if score and score.status == "abstain" and score.reason)
    if not reasons:
        return ""
    ((reason, n),) = reasons.most_common(1)
    return f"{n} of {reasons.total()} abstentions on this rank: {reason[:_LONGEST_REASON]!r}. "


def _table_row(score: StepScore | None, judge: StepwiseJudge) -> tuple[float, float, float, str, str]:
    """The values of `JUDGE_COLUMNS`. One type per column, so that a folder of files can be read."""
    if score is None:
        return math.nan, math.nan, math.nan, "", ""
    first_error, rts = score.first_error, judge.rts(score)
    return (
        math.nan if first_error is None else float(first_error),
        float(score.n_steps),
        math.nan if rts is None else rts,
        score.status,
        score.reason,
    )


def _verdict(status: str, first_error: float, n_steps: float) -> str:
    """A verdict in words, for the printed table."""
    if status == "":
        return ""
    if not math.isnan(first_error):
        return f"step {first_error + 1:.0f} of {n_steps:.0f}"
    return {"abstain": "abstains", "no_error": "no error"}.get(status, "empty")


def _replace_end(logged: Any, values_PG: Tensor, keep_nan: bool = False) -> None:
    """Puts this round's values where TRL has logged its own, at the end of a bounded queue; NaN may mean that TRL's stay."""
    values = values_PG.flatten().tolist()
    n_recent = min(len(logged), len(values))
    old = [logged.pop() for _ in range(n_recent)][::-1]
    recent = values[len(values) - n_recent :]
    logged.extend(a if keep_nan and math.isnan(b) else b for a, b in zip(old, recent, strict=True))
