"""
Judges made of judges: a vote ([`MajorityVote`]), the earliest error that any of several finds ([`EarliestError`]), and
one judge after the other ([`Fallback`]).

The members are asked one after the other in the calling thread, so their deadlines add up. A member that fails
abstains with its reason, and the others still decide.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict, ask, identity
from trl_sgpo.judges.log_once import LogOnce
from trl_sgpo.judges.stepwise import as_judge


logger = logging.getLogger(__name__)


def plurality(votes: Sequence[Verdict], min_agreement: float = 0.5) -> Verdict:
    """
    The answer that most votes give. An answer is a first wrong step or "no error".

    The confidence is the winner's share of all votes, and the reason is the tally. The result is an abstention if all
    votes abstain, if the first place is tied, or if the share is below `min_agreement`. An abstention votes for no
    answer, but it counts as one of the votes.

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
    agreeing = [vote for vote in votes if (vote.status, vote.first_error) == winner]
    first = agreeing[0]
    return Verdict(first.status, first.first_error, first.n_steps, share, text, _checked_by_any(agreeing))


def _checked_by_any(votes: Sequence[Verdict]) -> tuple[int, ...] | None:
    """The steps that at least one of the verdicts has checked; `None` for all steps."""
    checked: set[int] = set()
    for vote in votes:
        if vote.checked is None:
            return None
        checked.update(vote.checked)
    return tuple(sorted(checked))


def check_min_agreement(min_agreement: Any) -> None:
    """Raises an error if the argument is no share."""
    if isinstance(min_agreement, bool) or not isinstance(min_agreement, int | float):
        raise TypeError(f"min_agreement={min_agreement!r} is not a number, the share of votes that the winner needs.")
    if not 0 <= min_agreement <= 1:
        raise ValueError(
            f"min_agreement={min_agreement} must lie in [0, 1]: it is the share of all votes that the winner needs, "
            f"not their number. For 5 votes of 8 give {5 / 8}."
        )


def earliest(votes: Sequence[Verdict]) -> Verdict:
    """
    The verdict with the smallest first error, else a "no error". An abstention if all votes abstain. A step is checked
    if any vote has checked it.
    """
    answers = [vote for vote in votes if vote.status != "abstain"]
    if not answers:
        return _nobody([vote.reason for vote in votes])
    errors = [(vote.first_error, i) for i, vote in enumerate(answers) if vote.first_error is not None]
    first = answers[min(errors)[1]] if errors else answers[0]
    return replace(first, checked=_checked_by_any(answers))


class Combinator(StepJudge):
    """The base of the judges made of judges: their members, and how a member is asked."""

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
        """Identifies this judge in a cache: it holds all that the verdicts depend on."""
        return f"{type(self).__name__}({_listed(identity(judge) for judge in self.judges)})"

    def _ask(self, judge: StepJudge, items: Sequence[JudgeItem]) -> list[Verdict]:
        def log(judge: StepJudge) -> None:
            self._log_once.failed(f"The judge {judge.name}, a member of {self.name}, raised an exception")

        return ask(judge, items, log)

    def _votes(self, items: Sequence[JudgeItem]) -> list[tuple[Verdict, ...]]:
        """Per item, the verdicts of all members."""
        return list(zip(*(self._ask(judge, items) for judge in self.judges), strict=True))


class MajorityVote(Combinator):
    """
    Vote of several judges, or of one that samples: the answer that most of them give, if enough agree.

    An answer is a first wrong step or "no error". The confidence is the winner's share of all votes, abstentions
    included. The reason is the tally. See [`~trl_sgpo.judges.combinators.plurality`].

    Args:
        judges (`Sequence[StepJudge | Callable]`):
            The voters. `MajorityVote([judge] * 8)` asks one judge eight times. It must then sample with a temperature
            above zero, and must have no cache of its own: cache the vote instead.
        min_agreement (`float`, *optional*, defaults to `0.5`):
            Share of all votes that the winner needs, in [0, 1]. With less, or at a tie for the first place, the vote
            abstains. With `0` every plurality wins.

    Raises:
        TypeError, ValueError: If `judges` is no list or empty, a member is neither a judge nor a function, or
            `min_agreement` is no number in [0, 1].

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
        check_min_agreement(min_agreement)
        self.min_agreement = min_agreement

    @property
    def cache_key(self) -> str:
        return f"{super().cache_key}, min_agreement={self.min_agreement!r}"

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        return [plurality(votes, self.min_agreement) for votes in self._votes(items)]


class EarliestError(Combinator):
    """
    The smallest first error that any of several judges finds. "No error" if none finds one and at least one says so.

    Use it for precise judges that each see one kind of error, such as a calculator beside a model. A single member
    that often sees errors where there are none moves the first error forward.

    Args:
        judges (`Sequence[StepJudge | Callable]`):
            The members. All are asked about every completion.

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
    Asks the first judge. If it abstains on a completion, the next judge is asked, and so on.

    "No error" cannot be right for a completion that is known to be wrong, so the next judge is asked then too. The
    "no error" stands if no later judge finds an error. Put the precise and cheap judge first. What both have checked counts
    then; a judge that abstained has checked nothing.

    Args:
        judges (`Sequence[StepJudge | Callable]`):
            The members, in the order in which they are asked.

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
                before = verdicts[i]
                if answer.status == "abstain":
                    reasons[i].append(answer.reason)
                    still_open.append(i)
                    continue
                checked = _checked_by_any([before, answer] if before else [answer])
                if answer.status == "no_error" and items[i].known_wrong:
                    still_open.append(i)
                    answer = before or answer  # the first one stands, unless an error is found
                verdicts[i] = replace(answer, checked=checked)
            open_items = still_open
        return [verdict or _nobody(why) for verdict, why in zip(verdicts, reasons, strict=True)]


def _listed(names: Iterable[str]) -> str:
    """`a, 3 x b`: names in their order, and how often each comes."""
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in Counter(names).items())


def _nobody(reasons: Sequence[str]) -> Verdict:
    return Verdict.abstain("all judges abstained: " + "; ".join(dict.fromkeys(reason or "-" for reason in reasons)))
