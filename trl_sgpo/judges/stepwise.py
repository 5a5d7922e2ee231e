"""
[`StepwiseJudge`]: the reward function that turns a judge's verdicts into rewards.

It does not know which completions deserve judging: [`SGPOTrainer`] decides that. Whatever the judge or the segmenter
does, it does not raise during training: what cannot be judged is an abstention with its reason, never a number.
"""

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_sgpo.groups import TRANSFORMS, rts_to_reward
from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict, ask, is_empty
from trl_sgpo.judges.callable import CallableJudge
from trl_sgpo.judges.log_once import LogOnce
from trl_sgpo.steps import (
    CutCompletion,
    Segmenter,
    check_spans,
    completion_turns,
    cut_completion,
    rts_by_characters,
    rts_by_steps,
    segment,
)


logger = logging.getLogger(__name__)

# The name of the reward column, in GRPOTrainer too
REWARD_NAME = "stepwise_judge"

UNITS = ("steps", "characters")
NO_ERROR_RULES = ("abstain", "last_step")

# Columns that no judge is given: it has the problem and the steps
NOT_IN_ROW = ("prompt", "completion", "completion_ids")

_LONGEST_REASON = 2000  # characters

# What a user's segmenter is tried on before any training begins
_SEGMENTER_PROBE = "First we add 2 and 3.\n2 + 3 = 5; so x = 5\n\nStep 2: double it. 2 * 5 = 10; done\n\nAnswer: 10"


@dataclass(frozen=True)
class StepScore:
    """The score of one completion."""

    status: str  # the verdict's, after all checks: "error", "no_error" or "abstain"
    first_error: int | None  # 0-based index of the first wrong step
    n_steps: int  # as the judge saw them
    rts_steps: float | None  # reasoning trajectory score by steps; `None` for a completion without a score
    rts_characters: float | None
    reason: str  # the verdict's reason, or why there is none
    called: bool  # whether the judge was asked
    unchecked: frozenset[int] = frozenset()  # indices of the steps before the wrong one that the judge did not check
    cut: CutCompletion | None = None  # the completion's text and the other steps, if it has a first wrong one

    @property
    def n_right(self) -> int | None:
        """How many steps before the first wrong one were checked: the index of the wrong one among the steps of `cut`."""
        return None if self.first_error is None else self.first_error - len(self.unchecked)


class StepwiseJudge:
    """
    Reward function that rewards the correct prefix of a completion, as found by a step-wise judge.

    Put it into `reward_funcs` beside the outcome reward. [`SGPOTrainer`] asks it about the completions of failed groups
    only. Any other trainer calls it as a plain reward function, and then it judges every completion. Its reward column
    is called `stepwise_judge`.

    The reasoning trajectory score RTS is the share of the completion before its first wrong step. Steps there that the
    judge says it did not check ([`Verdict`], `checked`) are left out. The reward is
    `1 / (1 + exp(-beta * (RTS - gamma)))` (arXiv 2505.11595, Eq. 2).

    Args:
        judge ([`StepJudge`] or `Callable`):
            The judge, or a plain function `f(problem, steps, **row) -> int | None` (see [`CallableJudge`]).
        beta (`float`, *optional*, defaults to `10.0`):
            Steepness of the logistic in Eq. 2, not GRPO's KL coefficient. The paper's text swaps the values of `beta`
            and `gamma`; see [`~trl_sgpo.groups.rts_to_reward`].
        gamma (`float`, *optional*, defaults to `0.5`):
            The RTS that earns a reward of one half.
        transform (`str`, *optional*, defaults to `"logistic"`):
            `"logistic"` or `"identity"` (the reward is the RTS itself).
        unit (`str`, *optional*, defaults to `"steps"`):
            What RTS counts: `"steps"` (the paper) or `"characters"`, which short filler steps cannot inflate as much.
        segmenter (`Callable`, *optional*):
            Cuts a text into steps: `text -> [(start, end), ...]`, character spans, ordered and disjoint. Defaults to
            [`~trl_sgpo.steps.segment`].
        no_error (`str`, *optional*, defaults to `"abstain"`):
            What "no error" means for a completion that is known to be wrong. `"abstain"`: the judge missed the error,
            so there is no verdict. Otherwise a judge with little recall would pay for writing many steps.
            `"last_step"`: the last step is the wrong one, for judges that see everything.
        reference_column (`str`, *optional*):
            The dataset column that holds the reference solution or answer. Defaults to `"solution"`, if there is one. A
            row whose value is empty (`None`, NaN, only white space, an empty list) has no reference. If a column that
            is named here is in no row, one warning says so.
        include_thinking (`bool`, *optional*, defaults to `False`):
            Whether steps are cut in thinking too. By default only text outside of thinking is judged, if there is
            any. See [`~trl_sgpo.steps.judged_regions`] for the marks that are known.
        problem (`Callable`, *optional*):
            What the judge is told is the problem: `prompt -> text`, called with the prompt as TRL hands it to reward
            functions, a string or a list of messages. Defaults to [`problem_text`], which takes the last message of
            the user: write your own for conversations of several turns, or for a passage in the system message.

    Raises:
        TypeError: If `judge`, `segmenter`, `reference_column` or `problem` is of a wrong type.
        ValueError: If another argument is out of its range, or the segmenter returns overlapping or unordered spans.

    Example:

    ```python
    >>> judge = StepwiseJudge(lambda problem, steps: 1, transform="identity")
    >>> judge(prompts=["What is 2 + 2?"], completions=["First add the numbers.\\n\\nThat gives 5."])
    [0.5]
    ```
    """

    def __init__(
        self,
        judge: StepJudge | Callable[..., Any],
        beta: float = 10.0,
        gamma: float = 0.5,
        transform: str = "logistic",
        unit: str = "steps",
        segmenter: Segmenter | None = None,
        no_error: str = "abstain",
        reference_column: str | None = None,
        include_thinking: bool = False,
        problem: Callable[[Any], str] | None = None,
    ) -> None:
        if isinstance(judge, StepwiseJudge):
            raise TypeError("judge is a `StepwiseJudge` already: put it into `reward_funcs` as it is.")
        self.judge = as_judge(judge)
        if not (beta >= 0 and math.isfinite(beta)):
            raise ValueError(
                f"beta={beta} must be a finite number of at least 0, else rewards fall with the RTS. The default is 10."
            )
        if not math.isfinite(gamma):
            raise ValueError(f"gamma={gamma} must be a finite number: it is the RTS that earns half. Use 0.5.")
        for argument, value, choices in (
            ("transform", transform, TRANSFORMS),
            ("unit", unit, UNITS),
            ("no_error", no_error, NO_ERROR_RULES),
        ):
            if value not in choices:
                raise ValueError(
                    f"{argument}={value!r} is unknown: it must be one of {list(choices)}. The default is {choices[0]!r}."
                )
        if not 0 <= gamma <= 1 and transform == "logistic":
            low, high = rts_to_reward(torch.tensor([0.0, 1.0]), beta, gamma).tolist()
            warnings.warn(
                f"gamma={gamma} lies outside [0, 1], where RTS lies, so with beta={beta} all rewards lie between "
                f"{low:.2g} and {high:.2g}. The paper's text swaps the two; sensible values are beta=10, gamma=0.5.",
                UserWarning,
                stacklevel=2,
            )
        if segmenter is not None:
            if not callable(segmenter):
                raise TypeError(
                    f"segmenter={segmenter!r} is not callable. Give a function from a text to its steps' character "
                    "spans, for instance `lambda text: [(0, 10), (10, len(text))]`."
                )
            _probe(segmenter)
        if reference_column is not None and not isinstance(reference_column, str):
            raise TypeError(
                f"reference_column={reference_column!r} is no name of a column. Give a string, or None for 'solution'."
            )
        if problem is not None:
            from trl.trainer.utils import is_async_callable

            if not callable(problem) or is_async_callable(problem):
                raise TypeError(
                    f"problem={problem!r} is no plain function from a prompt to the problem's text. Give one, for "
                    "instance `lambda prompt: prompt[0]['content']`."
                )
        self.__name__ = REWARD_NAME  # what TRL calls the column of a callable
        self.beta = beta
        self.gamma = gamma
        self.transform = transform
        self.unit = unit
        self.segmenter = segment if segmenter is None else segmenter
        self.no_error = no_error
        self.reference_column = "solution" if reference_column is None else reference_column
        self._reference_is_named = reference_column is not None
        self.include_thinking = include_thinking
        self.problem = problem_text if problem is None else problem
        self._log_once = LogOnce(logger)

    def __repr__(self) -> str:
        rule = f"beta={self.beta:g}, gamma={self.gamma:g}, " if self.transform == "logistic" else ""
        return (
            f"StepwiseJudge({self.judge.name}, {rule}transform={self.transform!r}, unit={self.unit!r}, "
            f"no_error={self.no_error!r})"
        )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        """
        The plain reward function: judges every completion, right or wrong. Gives each a reward in [0, 1], or `None` if
        the judge abstained.

        Args:
            prompts, completions (`Sequence`):
                One prompt and one completion per row, strings or lists of messages.
            kwargs:
                The dataset's columns, each a list with one value per row, and TRL's own arguments.
        """
        columns = {
            name: values
            for name, values in kwargs.items()
            if isinstance(values, Sequence) and not isinstance(values, str) and len(values) == len(prompts)
        }
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(prompts))]
        scores = self.score(prompts, completions, rows, known_wrong=False)
        rts = torch.tensor([math.nan if self.rts(s) is None else self.rts(s) for s in scores], dtype=torch.float64)
        return [None if math.isnan(reward) else reward for reward in self.rewards(rts).tolist()]

    def rewards(self, rts: torch.Tensor) -> torch.Tensor:
        """Eq. 2 with this judge's `beta`, `gamma` and `transform`: RTS of any shape to rewards, NaN to NaN."""
        return rts_to_reward(rts, self.beta, self.gamma, self.transform)

    def rts(self, score: StepScore) -> float | None:
        """The RTS of a score in this judge's `unit`, in [0, 1]; `None` where there is none."""
        return score.rts_steps if self.unit == "steps" else score.rts_characters

    def size(self, score: StepScore) -> int | None:
        """
        What the RTS of a completion known to be wrong is a share of: its steps, or the characters in them, but for
        unchecked steps before the first wrong one. `None` where there is no RTS.
        """
        if self.rts(score) is None:
            return None
        if self.unit == "steps":
            return score.n_steps - len(score.unchecked)
        return sum(end - start for start, end in score.cut.spans) if score.cut else 0

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rows: Sequence[Mapping[str, Any]],
        known_wrong: bool = True,
        decoded: Sequence[str | None] | None = None,
    ) -> list[StepScore]:
        """
        One score per completion, in order. Never raises for what a judge or a segmenter does. The arguments are as in
        [`~StepwiseJudge.__call__`], with the dataset rows. If the completions are known to be wrong, every RTS is
        below 1. `decoded` is what the completions' own ids decode to, see [`~trl_sgpo.steps.completion_turns`].
        """
        if self._reference_is_named and rows and not any(self.reference_column in row for row in rows):
            self._log_once(
                "reference",
                f"reference_column={self.reference_column!r} is in no row, so the judge is shown no reference. The "
                f"columns are {sorted({name for row in rows for name in row})}. Name one of them, or add the column: `dataset_map` "
                "does so for training, `--row` for `trl-sgpo judge`.",
            )
        scores: list[StepScore | None] = [None] * len(completions)
        cuts: dict[int, CutCompletion] = {}
        items: list[JudgeItem] = []
        texts = [None] * len(completions) if decoded is None else decoded
        for i, (prompt, completion, row, text) in enumerate(zip(prompts, completions, rows, texts, strict=True)):
            try:
                cut = cut_completion(completion, self.segmenter, include_thinking=self.include_thinking, decoded=text)
                problem, reference = self.problem(prompt), row.get(self.reference_column)
                if not isinstance(problem, str):
                    raise TypeError(f"`problem` returned {problem!r:.200}, but the judge needs the problem's text")
                item = JudgeItem(
                    problem=problem,
                    steps=cut.steps,
                    reference=None if is_empty(reference) else str(reference),
                    known_wrong=known_wrong,
                    row={k: v for k, v in row.items() if k not in NOT_IN_ROW},
                    context=cut.context,
                )
            except Exception as error:
                self._log_once.failed("A completion could not be made ready for the judge")
                scores[i] = _unscored(Verdict.abstain(f"{type(error).__name__}: {error}"), 0, called=False)
                continue
            if cut.blank:
                # Nothing was written, so nothing is right, and no judge has to be asked
                scores[i] = StepScore("error", None, 0, 0.0, 0.0, "empty completion", called=False)
                continue
            if not cut.spans:
                scores[i] = _unscored(Verdict.abstain("the segmenter found no step"), 0, called=False)
                continue
            cuts[i] = cut
            items.append(item)
        if items:

            def log(judge: StepJudge) -> None:
                self._log_once.failed(f"The judge {judge.name} raised an exception")

            verdicts = ask(self.judge, items, log)
            for (i, cut), verdict in zip(cuts.items(), verdicts, strict=True):
                scores[i] = self._score(verdict, cut, known_wrong)
        return scores  # type: ignore[return-value]  # every row was filled above

    def _score(self, verdict: Verdict, cut: CutCompletion, known_wrong: bool) -> StepScore:
        n_steps, first_error = len(cut.spans), verdict.first_error
        if verdict.status == "no_error":
            if not known_wrong:
                reason, unchecked = _readable(verdict.reason), _unchecked(verdict, n_steps)
                return StepScore("no_error", None, n_steps, 1.0, 1.0, reason, called=True, unchecked=unchecked)
            if self.no_error == "last_step":
                first_error = n_steps - 1
        if first_error is None:
            return _unscored(verdict, n_steps, called=True)
        unchecked = _unchecked(verdict, first_error)
        cut, n_right = cut.without(unchecked), first_error - len(unchecked)
        return StepScore(
            status=verdict.status,
            first_error=first_error,
            n_steps=n_steps,
            rts_steps=rts_by_steps(n_right, len(cut.spans)),
            rts_characters=rts_by_characters(n_right, cut.spans),
            reason=_readable(verdict.reason),
            called=True,
            unchecked=unchecked,
            cut=cut,
        )


def as_judge(judge: Any, argument: str = "judge") -> StepJudge:
    """The judge itself, or a function as a judge; `argument` is what an error calls it."""
    if inspect.isclass(judge):
        raise TypeError(
            f"{argument}={judge.__name__} is a class, not a judge: give an instance, `{judge.__name__}()`."
        )
    if isinstance(judge, StepwiseJudge):  # it is callable, but as a reward function
        raise TypeError(f"{argument} is a `StepwiseJudge`, a reward function: give the judge inside it, its `.judge`.")
    if isinstance(judge, StepJudge):
        return judge
    if not callable(judge):
        raise TypeError(
            f"{argument}={judge!r} is neither a `StepJudge` nor a function `f(problem, steps, **row)` that gives the "
            "0-based index of the first wrong step, or None for no error. Give such a function or a judge from "
            "`trl_sgpo.judges`."
        )
    return CallableJudge(judge)


def problem_text(prompt: Any) -> str:
    """
    The problem that a prompt poses: a string as it is; of a list of messages, the text of the last one of the user.
    Earlier turns, which may be examples, and the system message are left out, and so are images.
    """
    if isinstance(prompt, str):
        return prompt
    users = [message for message in prompt if message.get("role") == "user"]
    return completion_turns([users[-1] if users else prompt[-1]])[0].text


def _unscored(verdict: Verdict, n_steps: int, called: bool) -> StepScore:
    return StepScore(verdict.status, None, n_steps, None, None, _readable(verdict.reason), called)


def _unchecked(verdict: Verdict, n_steps: int) -> frozenset[int]:
    """Which of the first `n_steps` steps the judge did not check."""
    return frozenset(() if verdict.checked is None else set(range(n_steps)).difference(verdict.checked))


def _probe(segmenter: Segmenter) -> None:
    """Checks the form of what a segmenter returns. One that cannot read the probe may still know its own task's text."""
    try:
        spans = segmenter(_SEGMENTER_PROBE)
    except Exception as error:
        logger.info("The segmenter could not be tried out on an example: %s: %s", type(error).__name__, error)
        return
    check_spans(_SEGMENTER_PROBE, spans)


def _readable(reason: str) -> str:
    """A reason as the completions table can keep it: valid UTF-8 of a bounded length."""
    return reason[:_LONGEST_REASON].encode("utf-8", "replace").decode("utf-8")


def _empty_column(prompts: Sequence[Any], **kwargs: Any) -> list[None]:
    """Stands where the judge stands while a trainer computes the other rewards."""
    return [None] * len(prompts)


_empty_column.__name__ = REWARD_NAME


def _is_bare_judge(func: Any) -> bool:
    """Whether it is a judge that no `StepwiseJudge` wraps: an instance, a class, or a function of a problem and steps."""
    if isinstance(func, StepJudge) or (inspect.isclass(func) and issubclass(func, StepJudge | StepwiseJudge)):
        return True
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # the name of a reward model; some built-ins
        return False
    return names[:2] == ["problem", "steps"] and "completions" not in names


def take_judge(funcs: list[Any]) -> tuple[StepwiseJudge | None, int | None]:
    """
    Takes the judge out of a list of reward functions, for a trainer that asks it itself. A function that rewards
    nothing takes its place. Returns the judge and its index, or two `None`.
    """
    indices = [i for i, func in enumerate(funcs) if isinstance(func, StepwiseJudge)]
    for func in funcs:
        if _is_bare_judge(func):
            raise TypeError(
                f"reward_funcs holds {func!r}, which is no reward function. Wrap the judge: `StepwiseJudge(judge)`."
            )
    if len(indices) > 1:
        raise ValueError(
            f"reward_funcs holds {len(indices)} StepwiseJudges, at the positions {indices}, and a group can be judged "
            "by one. To combine judges, combine them inside one `StepwiseJudge`."
        )
    if not indices:
        return None, None
    if any(getattr(func, "__name__", "") == REWARD_NAME for i, func in enumerate(funcs) if i != indices[0]):
        raise ValueError(
            f"reward_funcs holds a function called {REWARD_NAME!r} beside the StepwiseJudge, whose reward has that name. Rename it."
        )
    judge, funcs[indices[0]] = funcs[indices[0]], _empty_column
    return judge, indices[0]
