"""
Judges made of judges: a vote ([`MajorityVote`]), the most suspicious of several ([`EarliestError`]), and one after the
other ([`Fallback`]).

What a vote or a group of verdicts comes to is a pure function ([`plurality`], [`earliest`]); the classes only ask. The
members are asked one after the other in the calling thread, so their deadlines add up. A member that fails is one that
abstains, with its reason: the others still decide.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict, ask, identity
from trl_sgpo.judges.callable import CallableJudge
from trl_sgpo.judges.log_once import LogOnce
from trl_sgpo.judges.stepwise import StepwiseJudge


logger = logging.getLogger(__name__)


def plurality(votes: Sequence[Verdict], min_agreement: float = 0.5) -> Verdict:
    """
    What a vote comes to: the answer given most often, an answer being a first wrong step or "no error".

    Args:
        votes (`Sequence[Verdict]`):
            The verdicts on one completion, at least one. Abstentions vote for nothing, and count in the agreement.
        min_agreement (`float`, *optional*, defaults to `0.5`):
            Share of all votes that the winner needs.

    Returns:
        `Verdict`: The winner, its share of all votes as confidence and the tally as reason. An abstention if everyone
        abstained, at a tie for the first place, or below `min_agreement`.

    Example:

    ```python
    >>> verdict = plurality([Verdict.error(2), Verdict.error(2), Verdict.no_error(), Verdict.abstain("timeout")])
    >>> verdict.first_error, verdict.confidence
    (2, 0.5)
    >>> verdict.reason
    'first_error=2: 2 of 4, no_error: 1 of 4, abstain: 1 of 4 (timeout)'
    ```
    """
    answers = Counter((vote.status, vote.first_error) for vote in votes if vote.status != "abstain")
    tally = [
        f"{status if index is None else f'first_error={index}'}: {count} of {len(votes)}"
        for (status, index), count in answers.most_common()
    ]
    silent = [vote.reason for vote in votes if vote.status == "abstain"]
    if silent:
        reasons = "; ".join(dict.fromkeys(reason for reason in silent if reason))
        tally.append(f"abstain: {len(silent)} of {len(votes)}" + (f" ({reasons})" if reasons else ""))
    text = ", ".join(tally)
    if not answers:
        return Verdict.abstain(text)
    (winner, count), *others = answers.most_common(2)
    if others and others[0][1] == count:
        return Verdict.abstain(f"the vote is tied: {text}")
    share = count / len(votes)
    if share < min_agreement:
        return Verdict.abstain(f"the agreement is below min_agreement={min_agreement:g}: {text}")
    first = next(vote for vote in votes if (vote.status, vote.first_error) == winner)
    return Verdict(first.status, first.first_error, first.n_steps, share, text)


def earliest(votes: Sequence[Verdict]) -> Verdict:
    """
    The verdict with the smallest first error; "no error" if nobody finds one; an abstention if everyone abstains.

    Example:

    ```python
    >>> earliest([Verdict.error(3), Verdict.no_error(), Verdict.error(1, reason="5 is not 4")]).reason
    '5 is not 4'
    ```
    """
    errors = [(vote.first_error, i) for i, vote in enumerate(votes) if vote.first_error is not None]
    if errors:
        return votes[min(errors)[1]]
    return next((vote for vote in votes if vote.status == "no_error"), _nobody([vote.reason for vote in votes]))


class Combinator(StepJudge):
    """
    What the judges made of judges share: their members, and how a member is asked.

    Args:
        judges (`Sequence[StepJudge | Callable]`):
            The members, at least one. A function becomes a [`CallableJudge`].

    Raises:
        TypeError: If `judges` is no list, or a member is neither a judge nor a function.
        ValueError: If `judges` is empty.
    """

    def __init__(self, judges: Sequence[StepJudge | Callable[..., Any]]) -> None:
        if isinstance(judges, str) or not isinstance(judges, Sequence):
            raise TypeError(
                f"judges={judges!r} is not a list. Give a list of judges, `{type(self).__name__}([a, b])`."
            )
        if not judges:
            raise ValueError(f"judges={judges!r} is empty. `{type(self).__name__}` needs at least one judge to ask.")
        self.judges = [as_judge(judge, f"judges[{i}]") for i, judge in enumerate(judges)]
        self._log_once = LogOnce(logger)

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({_listed(judge.name for judge in self.judges)})"

    @property
    def cache_key(self) -> str:
        """What a cache knows this judge by: all that its verdicts depend on."""
        return f"{type(self).__name__}({_listed(identity(judge) for judge in self.judges)})"

    def _ask(self, judge: StepJudge, items: Sequence[JudgeItem]) -> list[Verdict]:
        return ask(judge, items, self._show_traceback)

    def _votes(self, items: Sequence[JudgeItem]) -> list[tuple[Verdict, ...]]:
        """Per item, the verdicts of all members."""
        return list(zip(*(self._ask(judge, items) for judge in self.judges), strict=True))

    def _show_traceback(self, judge: StepJudge) -> None:
        self._log_once.traceback(
            "The judge %s, a member of %s, raised an exception. It counts as abstaining on what it was asked about; "
            "further exceptions of the members stand in the verdicts' reasons and are not shown.",
            judge.name,
            self.name,
        )


class MajorityVote(Combinator):
    """
    Vote of several judges, or of one that samples: the answer given most often, if enough of them agree.

    An answer is a first wrong step or "no error". The confidence of the verdict is the winner's share of all votes,
    abstentions included, and its reason the tally. See [`plurality`].

    Args:
        judges (`Sequence[StepJudge | Callable]`):
            The voters. The same one several times asks it several times: `MajorityVote([judge] * 8)`. It then has to
            sample, with a temperature above zero and without a cache of its own (cache the vote instead).
        min_agreement (`float`, *optional*, defaults to `0.5`):
            Share of all votes that the winner needs, in [0, 1]; with less the vote abstains. It abstains at a tie for
            the first place too. `0` lets any plurality win.

    Raises:
        TypeError: If `judges` is no list, a member is neither a judge nor a function, or `min_agreement` no number.
        ValueError: If `judges` is empty or `min_agreement` lies outside [0, 1].

    Example:

    ```python
    >>> vote = MajorityVote([lambda problem, steps: 1, lambda problem, steps: 1, lambda problem, steps: None])
    >>> verdict = vote.judge([JudgeItem("What is 2 + 2?", ("Add them.", "2 + 2 = 5"))])[0]
    >>> verdict.first_error, verdict.reason
    (1, 'first_error=1: 2 of 3, no_error: 1 of 3')
    ```
    """

    def __init__(self, judges: Sequence[StepJudge | Callable[..., Any]], min_agreement: float = 0.5) -> None:
        super().__init__(judges)
        if isinstance(min_agreement, bool) or not isinstance(min_agreement, int | float):
            raise TypeError(
                f"min_agreement={min_agreement!r} is not a number. It is the share of all votes that the winner "
                "needs, for instance 0.5."
            )
        if not 0 <= min_agreement <= 1:
            raise ValueError(
                f"min_agreement={min_agreement} must lie in [0, 1]: it is the share of all votes that the winner "
                f"needs, not their number. For 5 votes of 8 give {5 / 8}."
            )
        self.min_agreement = min_agreement

    @property
    def cache_key(self) -> str:
        return f"{super().cache_key}, min_agreement={self.min_agreement!r}"

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [plurality(votes, self.min_agreement) for votes in self._votes(items)]


class EarliestError(Combinator):
    """
    The most suspicious of several judges: the smallest first error that any of them finds.

    "No error" only if none finds one and at least one says so. For precise judges that each see one kind of error,
    such as a calculator beside a model; a single trigger-happy member drags the first error forward.

    Args:
        judges (`Sequence[StepJudge | Callable]`):
            The members. All are asked about every completion.

    Raises:
        TypeError: If `judges` is no list, or a member is neither a judge nor a function.
        ValueError: If `judges` is empty.

    Example:

    ```python
    >>> judge = EarliestError([lambda problem, steps: None, lambda problem, steps: 1])
    >>> judge.judge([JudgeItem("What is 2 + 2?", ("Add them.", "2 + 2 = 5"))])[0].first_error
    1
    ```
    """

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [earliest(votes) for votes in self._votes(items)]


class Fallback(Combinator):
    """
    Asks the first judge; what it abstains on, the next one, and so on. Put the precise and cheap one first.

    "No error" cannot be right for a completion that is known to be wrong, so it goes on to the next judge too. If none
    of those finds an error, it stands.

    Args:
        judges (`Sequence[StepJudge | Callable]`):
            The members, in the order in which they are asked.

    Raises:
        TypeError: If `judges` is no list, or a member is neither a judge nor a function.
        ValueError: If `judges` is empty.

    Example:

    ```python
    >>> judge = Fallback([lambda problem, steps: Verdict.abstain("no equation"), lambda problem, steps: 1])
    >>> judge.judge([JudgeItem("What is 2 + 2?", ("Add them.", "It is five."))])[0].first_error
    1
    ```
    """

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(items)
        reasons: list[list[str]] = [[] for _ in items]
        open_items = list(range(len(items)))
        for judge in self.judges:
            if not open_items:
                break
            answers = self._ask(judge, [items[i] for i in open_items])
            still_open = []
            for i, answer in zip(open_items, answers, strict=True):
                if answer.status == "abstain":
                    reasons[i].append(answer.reason)
                    still_open.append(i)
                elif answer.status == "no_error" and items[i].known_wrong:
                    verdicts[i] = verdicts[i] or answer  # the first one stands, unless an error is found
                    still_open.append(i)
                else:
                    verdicts[i] = answer
            open_items = still_open
        return [verdict or _nobody(why) for verdict, why in zip(verdicts, reasons, strict=True)]


def as_judge(judge: Any, argument: str = "judge") -> StepJudge:
    """The judge itself, or a function as a judge; `argument` is what an error calls it."""
    if inspect.isclass(judge):
        raise TypeError(
            f"{argument}={judge.__name__} is a class, not a judge: give an instance, `{judge.__name__}()`."
        )
    if isinstance(judge, StepwiseJudge):
        # It is callable, but as a reward function
        raise TypeError(f"{argument} is a `StepwiseJudge`, a reward function: give the judge inside it, its `.judge`.")
    if isinstance(judge, StepJudge):
        return judge
    if not callable(judge):
        raise TypeError(
            f"{argument}={judge!r} is neither a `StepJudge` nor a function. Give a judge from `trl_sgpo.judges`, or a "
            "function `f(problem, steps, **row)` that returns the 0-based index of the first wrong step, or None for "
            "no error."
        )
    return CallableJudge(judge)


def _listed(names: Any) -> str:
    """`a, 3 x b`: names in their order, and how often each comes."""
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in Counter(names).items())


def _nobody(reasons: Sequence[str]) -> Verdict:
    return Verdict.abstain("all judges abstained: " + "; ".join(dict.fromkeys(reason or "-" for reason in reasons)))
