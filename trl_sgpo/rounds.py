"""
[`Round`]: the data of one generation round, and how a judge is asked about it. There is no trainer and no config in
it. A round is the only thing that the trainer's two hooks tell each other, and all that a treatment is told.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_sgpo.groups import GroupKinds, SortedGroups, group_kinds, weighted_sum
from trl_sgpo.judges.stepwise import StepScore, StepwiseJudge


STATUSES = ("error", "no_error", "abstain")

_N_NUMBERS = 11  # of a completion, as they are gathered


class Judged(NamedTuple):
    """
    What a judge said in a round. Tensors have the shape `(P, G)`, with NaN where there is no score.

    Args:
        scores (`list[StepScore | None]` of length B):
            Those of this rank's completions, with the spans of their steps; `None` where nobody was asked.
        rts_PG, rts_steps_PG, rts_characters_PG (`torch.Tensor`):
            Reasoning trajectory scores in the judge's unit, by steps and by characters.
        n_steps_PG, n_unchecked_PG (`torch.Tensor`):
            Number of steps, and of those before the first wrong one that the judge did not check.
        status_PG, called_PG (`torch.Tensor`):
            Index in `STATUSES`; 1 if the judge was asked, 0 if the score needed no call.
        length_PG (`torch.Tensor`):
            Tokens of every completion, judged or not; NaN where the round does not know them.
        masked_PG (`torch.Tensor`):
            Which completions were truncated and have no loss, boolean. Nobody was asked about them.
        reward_PG (`torch.Tensor`):
            The rewards of `rts_PG` by Eq. 2, or of its shares of the longest completion (`rts_share_of="longest"`).
        seconds (`float`):
            What the slowest rank spent judging.
    """

    scores: list[StepScore | None]
    rts_PG: Tensor
    rts_steps_PG: Tensor
    rts_characters_PG: Tensor
    n_steps_PG: Tensor
    n_unchecked_PG: Tensor
    status_PG: Tensor
    called_PG: Tensor
    length_PG: Tensor
    masked_PG: Tensor
    reward_PG: Tensor
    seconds: float


@dataclass
class Round:
    """
    One generation round as every rank sees it: P groups of G completions, of which this rank holds B. Tensors of shape
    `(P, G)` are the same on every rank. `rewards_PGF` and `output` are TRL's: a treatment does not write into them.

    Args:
        training (`bool`):
            Whether it is a round of training, as TRL took it before it generated.

    Attributes:
        rewards_PGF (`torch.Tensor` of shape `(P, G, F)`), weights_F (`torch.Tensor` of shape `(F,)`):
            Rewards of all ranks, NaN for None, and their weights. The judge's column is NaN throughout.
        judge_index (`int` or `None`):
            Column of the judge.
        outcome_PG (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards, NaN where a completion has none.
        success_threshold (`float`):
            A completion is correct when its outcome reaches this value.
        kinds ([`~trl_sgpo.groups.GroupKinds`]):
            Which groups are solved, mixed, failed.
        rows (`slice`):
            Where this rank's B completions stand among the P * G of all ranks.
        completion_ids (`Sequence[Sequence[int]]` of length B):
            Token ids of this rank's completions, without padding.
        masked_B (`Sequence[bool]` of length B):
            Which of this rank's completions were truncated and have no loss, with `mask_truncated_completions`; empty
            without it.
        to_judge_PG (`torch.Tensor` of shape `(P, G)` or `None`):
            Which completions the treatment wants judged, boolean; `None` if it is not the judge's turn.
        judged ([`Judged`] or `None`), groups ([`~trl_sgpo.groups.SortedGroups`] or `None`):
            What the judge said, and what that makes of the failed groups, by the treatment's `sort`; `None` if nobody
            was asked.
        output (`dict` or `None`):
            TRL's output for this rank's completions: ids, masks and GRPO's advantages. In groups of equal rewards
            these are exactly 0 with `exclude_dead_groups`, `skip_dead_tokens` or `skip_dead_updates`. There after super
            only.
        metrics (`dict[str, float]`):
            What a treatment wants logged for this round; the same on every rank.
        advantages_PG (`torch.Tensor` of shape `(P, G)` or `None`):
            For the log: advantages of all ranks' completions, NaN where TRL's own stand. A treatment that knows them
            spares a gather. It sets them on every rank or on none.
        judge_rewards_PG (`torch.Tensor` of shape `(P, G)` or `None`):
            For the log: what the reward `stepwise_judge` shows, NaN where a completion has none.
    """

    training: bool
    rewards_PGF: Tensor = field(init=False)
    weights_F: Tensor = field(init=False)
    judge_index: int | None = field(init=False, default=None)
    outcome_PG: Tensor = field(init=False)
    success_threshold: float = field(init=False, default=0.5)
    kinds: GroupKinds = field(init=False)
    rows: slice = field(init=False)
    completion_ids: Sequence[Sequence[int]] = field(init=False, default=())
    masked_B: Sequence[bool] = field(init=False, default=())
    to_judge_PG: Tensor | None = field(init=False, default=None)
    judged: Judged | None = field(init=False, default=None)
    groups: SortedGroups | None = field(init=False, default=None)
    output: dict[str, Any] | None = field(init=False, default=None)
    metrics: dict[str, float] = field(init=False, default_factory=dict)
    advantages_PG: Tensor | None = field(init=False, default=None)
    judge_rewards_PG: Tensor | None = field(init=False, default=None)

    def fill(
        self,
        rewards_PGF: Tensor,
        weights_F: Tensor,
        outcome_PG: Tensor,
        success_threshold: float = 0.5,
        judge_index: int | None = None,
        rows: slice | None = None,
        completion_ids: Sequence[Sequence[int]] = (),
        masked: Sequence[bool] = (),
    ) -> "Round":
        """Takes in what is known once the rewards are there, and sorts the groups. Without `rows` there is one rank."""
        self.rewards_PGF, self.weights_F, self.judge_index = rewards_PGF, weights_F, judge_index
        self.outcome_PG, self.success_threshold = outcome_PG, success_threshold
        self.kinds = group_kinds(outcome_PG, success_threshold)
        self.rows = slice(0, outcome_PG.numel()) if rows is None else rows
        self.completion_ids, self.masked_B = completion_ids, masked
        return self

    @cached_property
    def wrong_PG(self) -> Tensor:
        """Which completions are known to be wrong, boolean."""
        return self.outcome_PG < self.success_threshold  # NaN compares false

    @cached_property
    def others_PG(self) -> Tensor:
        """The weighted sum of all rewards but the judge's, NaN where a completion has none: GRPO's reward."""
        return weighted_sum(self.rewards_PGF, self.weights_F)

    @cached_property
    def uneven_P(self) -> Tensor:
        """Groups in which a completion without an outcome has another reward, boolean, shape `(P,)`."""
        return (torch.isnan(self.outcome_PG) & ~torch.isnan(self.others_PG)).any(dim=1)

    @property
    def askable_PG(self) -> Tensor:
        """The outcomes of a judged round, NaN where nobody could be asked: the completion has no loss."""
        assert self.judged is not None, "a round that nobody judged cannot tell"
        return self.outcome_PG.masked_fill(self.judged.masked_PG, torch.nan)

    @property
    def advantages_B(self) -> Tensor:
        """GRPO's advantages of this rank's completions, shape `(B,)`."""
        return self._of_output("advantages")

    @property
    def own_BT(self) -> Tensor:
        """Which tokens of this rank's completions the policy wrote and the loss counts, boolean, shape `(B, T)`."""
        assert self.output is not None, "TRL's output is there after super only"
        return own_tokens(self.output)

    @property
    def tool_mask_BT(self) -> Tensor | None:
        """Which tokens no tool wrote, shape `(B, T)`; `None` in a run without tools."""
        return self._of_output("tool_mask")

    @property
    def old_logps_BT(self) -> Tensor | None:
        """Log-probabilities under the policy that wrote the completions, shape `(B, T)`, if TRL has computed them."""
        return self._of_output("old_per_token_logps")

    def _of_output(self, name: str) -> Any:
        assert self.output is not None, "TRL's output is there after super only"
        return self.output.get(name)

    def local(self, values_PG: Tensor) -> Tensor:
        """This rank's part of the values of all completions, shape `(B, ...)`; of shape `(P,)` it may be one per group."""
        if values_PG.dim() == 1:
            values_PG = values_PG.unsqueeze(1).expand(self.outcome_PG.shape)
        return values_PG.flatten(0, 1)[self.rows]

    def per_completion(self, advantages: Tensor) -> Tensor:
        """
        One advantage per completion of this rank, for the log, shape `(B,)`: of advantages per token the mean over the
        policy's own tokens.
        """
        if advantages.dim() == 1:
            return advantages
        own_BT, plain_B = self.own_BT, self.advantages_B
        mean_B = (advantages * own_BT).sum(dim=1) / own_BT.sum(dim=1).clamp(min=1)
        return torch.where((advantages != plain_B.unsqueeze(1)).any(dim=1), mean_B, plain_B)


def own_tokens(output: Mapping[str, Any]) -> Tensor:
    """Which tokens of a batch the policy wrote and the loss counts, boolean, shape `(B, T)`."""
    mask_BT, tool_mask_BT = output["completion_mask"], output.get("tool_mask")
    return (mask_BT if tool_mask_BT is None else mask_BT * tool_mask_BT).bool()


def ask_judge(
    judge: StepwiseJudge,
    wanted: Sequence[int],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    decode: Callable[[int], str | None] = lambda i: None,
) -> list[StepScore | None]:
    """
    The scores of the `wanted` ones among wrong completions, `None` for the others. Texts and rows go in and scores come
    out, so that it does not matter which rank or thread asks. `decode` gives what the ids of a completion decode to.
    """
    scores: list[StepScore | None] = [None] * len(completions)
    if wanted:
        found = judge.score(
            [prompts[i] for i in wanted],
            [completions[i] for i in wanted],
            [rows[i] for i in wanted],
            known_wrong=True,
            decoded=[decode(i) for i in wanted],
        )
        for i, score in zip(wanted, found, strict=True):
            scores[i] = score
    return scores


def judge_round(
    round: Round,
    to_judge_PG: Tensor,
    judge: StepwiseJudge,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    gather: Callable[[Tensor], Tensor],
    decode: Callable[[Sequence[int]], str] | None = None,
    of_longest: bool = False,
) -> Judged:
    """
    Each rank asks about its own completions in `to_judge_PG`, but those that have no loss, and all ranks learn the scores.
    `prompts`, `completions` and `rows` are those of this rank, `gather` gives from its `(B, N)` numbers those of all
    ranks, `(P * G, N)`. Every rank joins it, with or without anything to ask. `decode` gives the text of a completion's
    ids. With `of_longest` the rewards are those of shares of the longest completion, see [`of_longest_completion`].
    """
    start = time.perf_counter()
    masked = round.masked_B or [False] * len(completions)
    wanted = [i for i in round.local(to_judge_PG).nonzero().flatten().tolist() if not masked[i]]

    def decoded(i: int) -> str | None:
        return decode(round.completion_ids[i]) if decode is not None and round.completion_ids else None

    scores = ask_judge(judge, wanted, prompts, completions, rows, decoded)
    seconds = time.perf_counter() - start if wanted else 0.0
    lengths = [float(len(ids)) for ids in round.completion_ids] or [math.nan] * len(scores)
    rows_BN = [[*_numbers(score, judge), *row, seconds] for score, *row in zip(scores, lengths, masked, strict=True)]
    numbers_BN = torch.tensor(rows_BN, device=round.outcome_PG.device)
    numbers_NPG = gather(numbers_BN).T.reshape(_N_NUMBERS, *round.outcome_PG.shape)
    rts_PG, size_PG, by_steps_PG, by_characters_PG, n_steps_PG, n_unchecked_PG = numbers_NPG[:6]
    status_PG, called_PG, length_PG, masked_PG, seconds_PG = numbers_NPG[6:]
    return Judged(
        scores,
        rts_PG,
        by_steps_PG,
        by_characters_PG,
        n_steps_PG,
        n_unchecked_PG,
        status_PG,
        called_PG,
        length_PG,
        masked_PG.bool(),
        reward_PG=judge.rewards(of_longest_completion(rts_PG, size_PG) if of_longest else rts_PG),
        seconds=seconds_PG.max().item(),
    )


def verified_steps(judged: Judged) -> Tensor:
    """
    The number of each completion's checked steps before the first wrong one, shape `(P, G)`; NaN without a score. Nothing
    more has to be gathered for it.
    """
    # Exact up to four million steps
    return (judged.rts_steps_PG * (judged.n_steps_PG - judged.n_unchecked_PG)).round()


def of_longest_completion(rts_PG: Tensor, size_PG: Tensor) -> Tensor:
    """
    Scores as shares of the longest scored completion of their group, from shares of the completions themselves. A
    completion that stops early no longer scores higher than one that gets as many steps right and goes on. Both arguments
    have the shape `(P, G)`, with NaN where there is no score. Sizes are in steps or characters.

    Example:

    ```python
    >>> rts_PG = torch.tensor([[3 / 4, 3 / 6, 4 / 6]])  # three right steps of four, three of six, four of six
    >>> of_longest_completion(rts_PG, torch.tensor([[4.0, 6.0, 6.0]]))
    tensor([[0.5000, 0.5000, 0.6667]])
    ```
    """
    longest_P = size_PG.nan_to_num(nan=0.0).amax(dim=1).clamp(min=1)
    # The products are whole numbers: rounded, so that ties stay ties
    return (rts_PG * size_PG).round() / longest_P.unsqueeze(1)


def _numbers(score: StepScore | None, judge: StepwiseJudge) -> list[float]:
    """A score as a row of numbers that can be gathered, in the order of [`Judged`]; NaN for what is not there."""
    if score is None:
        return [math.nan] * (_N_NUMBERS - 3)
    scores = (judge.rts(score), judge.size(score), score.rts_steps, score.rts_characters)
    return [
        *(math.nan if value is None else float(value) for value in scores),
        float(score.n_steps),
        float(len(score.unchecked)),
        float(STATUSES.index(score.status)),
        float(score.called),
    ]
