"""
[`Treatment`]: what is done with failed groups. One subclass per method, one file per family of them. A treatment is
told about a finished generation round ([`~trl_sgpo.rounds.Round`]) and gives back advantages. What belongs to a round
stands in the `Round`, never on the treatment.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trl_sgpo.groups import SortedGroups, enough_verdicts, value_range
from trl_sgpo.policy import Policy
from trl_sgpo.rounds import Round


if TYPE_CHECKING:
    from trl_sgpo.config import SGPOConfig


class Treatment(ABC):
    """
    A method for failed groups. A subclass sets the class attributes and writes `advantages`; the other methods have defaults.

    Attributes:
        name (`str`):
            What the model card, `sgpo.json` and messages call it. Defaults to the name of the class.
        asks_judge (`bool`, defaults to `False`):
            Whether the round is judged before `advantages` is asked for. It needs a [`StepwiseJudge`] in `reward_funcs` then.
        needs_outcome (`bool`, defaults to `True`):
            Whether it has to know which completions are wrong. If so, a run in which that cannot be told is refused.
        per_token (`bool`, defaults to `False`):
            Whether it tells the tokens of a completion apart. Options of TRL that tie them together are warned of then.
    """

    name: ClassVar[str] = ""
    asks_judge: ClassVar[bool] = False
    needs_outcome: ClassVar[bool] = True
    per_token: ClassVar[bool] = False

    judge_scope: str = "failed_groups"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def setup(self, args: "SGPOConfig") -> None:
        """
        Called once, before any weights are loaded: raises for settings under which the treatment cannot work, warns of
        those under which it works badly, and keeps those that it needs. Of a plain `GRPOConfig` the settings of SGPO
        have their defaults.
        """
        self.judge_scope = args.judge_scope
        if self.per_token:
            _warn_if_tokens_are_tied(args, self.name)

    def warn_of_unused(self, args: "SGPOConfig", names: Sequence[str], why: str) -> None:
        """To be called in `setup`: warns of settings that are not at their default and have no effect."""
        from trl_sgpo.config import SGPOConfig  # it names the treatments, so it imports this module

        # `args` may be a plain GRPOConfig, or of a subclass with fields and defaults of its own
        defaults = {own.name: own.default for own in (*fields(SGPOConfig), *fields(args))}
        for name in names:
            if (value := getattr(args, name)) != defaults[name]:
                warnings.warn(
                    f"{name}={value!r} has no effect with failed_groups={self.name!r}, {why}",
                    UserWarning,
                    stacklevel=4,
                )

    def to_judge(self, round: Round) -> Tensor:
        """
        Which completions the judge is asked about, shape `(P, G)`, boolean: the wrong ones of the groups in `judge_scope`. Those
        that have no loss (`mask_truncated_completions`) are left out afterwards.
        """
        kinds = round.kinds
        judged_P = kinds.failed_P | kinds.mixed_P if self.judge_scope == "all_incorrect" else kinds.failed_P
        return round.wrong_PG & judged_P.unsqueeze(1)

    def sort(self, round: Round) -> SortedGroups:
        """
        Which failed groups of a judged round teach now, and which do not although they were judged, for the log. By
        default those with verdicts for at least half of their completions: with different scores, and with equal ones.
        A treatment under which equal scores teach too has to say so here.
        """
        assert round.judged is not None, "a round that nobody judged cannot be sorted"
        enough_P = round.kinds.failed_P & enough_verdicts(round.askable_PG, round.judged.rts_PG)
        tied_P = value_range(round.judged.rts_PG) == 0
        return SortedGroups(rescued_P=enough_P & ~tied_P, tied_P=enough_P & tied_P)

    def treats(self, round: Round) -> bool:
        """
        Whether `advantages` is asked for in a round of training, the same on every rank. By default: if the round was
        judged, or, for a treatment without a judge, if a group failed.
        """
        return round.judged is not None if self.asks_judge else bool(round.kinds.failed_P.any())

    @abstractmethod
    def advantages(self, round: Round, policy: Policy) -> Tensor:
        """
        The advantages of this rank's completions, of shape `(B,)`, or per token, `(B, T)`, all finite. GRPO's are
        `round.advantages_B`; they are to be returned, not written into. Every rank has to make the same calls of
        `policy`.
        """


class NoTreatment(Treatment):
    """Plain GRPO: no judge is asked, and failed groups teach nothing. The control of a comparison."""

    name = "none"
    needs_outcome = False

    def treats(self, round: Round) -> bool:
        return False

    def advantages(self, round: Round, policy: Policy) -> Tensor:
        return round.advantages_B


def checked_advantages(advantages: Any, round: Round, name: str) -> Tensor:
    """What the treatment `name` returned for a round, detached and on the round's device; raises if that cannot be used."""
    if not isinstance(advantages, Tensor):
        raise TypeError(
            f"The treatment {name!r} returned {type(advantages).__name__}, not a tensor of advantages. Its method "
            "`advantages` has to return one."
        )
    advantages = advantages.detach().to(round.advantages_B)
    shapes = (round.advantages_B.shape, round.own_BT.shape)
    if advantages.shape not in shapes:
        raise ValueError(
            f"The treatment {name!r} returned advantages of shape {tuple(advantages.shape)}. They must be of shape "
            f"{tuple(shapes[0])}, one per completion of this rank, or of shape {tuple(shapes[1])}, one per token."
        )
    if not torch.isfinite(advantages).all():
        raise ValueError(
            f"The treatment {name!r} returned advantages that are not finite, which would destroy the weights. NaN in a "
            "score means that there is no verdict: give such a completion no advantage."
        )
    return advantages


def _warn_if_tokens_are_tied(args: "SGPOConfig", name: str) -> None:
    """Warns of options of TRL that are made for one advantage per completion."""
    found = []
    if args.importance_sampling_level != "token":
        found.append(
            f"importance_sampling_level={args.importance_sampling_level!r} ties the tokens of a completion to one "
            f"ratio, so the gradient of one token's advantage reaches all of them, and the treatment {name!r} no longer "
            "tells the tokens apart. Use importance_sampling_level='token'."
        )
    if args.off_policy_mask_threshold is not None:
        found.append(
            f"off_policy_mask_threshold={args.off_policy_mask_threshold} drops off-policy completions unless their "
            f"advantage is positive. With the treatment {name!r} it goes by the advantage of each token, so of such a "
            "completion the blame is dropped and the reward kept. Leave it out."
        )
    for message in found:
        warnings.warn(message, UserWarning, stacklevel=5)
