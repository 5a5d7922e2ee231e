"""
Step-wise judges: what a judge is ([`StepJudge`], [`JudgeItem`], [`Verdict`]), the reward function that turns verdicts
into rewards ([`StepwiseJudge`]), and one file per judge. Nothing here imports an optional dependency at import time.
"""

from trl_sgpo.judges.arithmetic import ArithmeticJudge
from trl_sgpo.judges.base import JudgeItem, StepJudge, Verdict
from trl_sgpo.judges.cached import CachedJudge
from trl_sgpo.judges.callable import CallableJudge
from trl_sgpo.judges.combinators import EarliestError, Fallback, MajorityVote
from trl_sgpo.judges.generative import GenerativeJudge
from trl_sgpo.judges.openai import OpenAIJudge
from trl_sgpo.judges.prm import PRMJudge, PRMSpec
from trl_sgpo.judges.prompt import JudgePrompt
from trl_sgpo.judges.reference import ReferenceJudge
from trl_sgpo.judges.stepwise import StepwiseJudge
from trl_sgpo.judges.vllm_pooling import VLLMPoolingJudge


__all__ = [
    "ArithmeticJudge",
    "CachedJudge",
    "CallableJudge",
    "EarliestError",
    "Fallback",
    "GenerativeJudge",
    "JudgeItem",
    "JudgePrompt",
    "MajorityVote",
    "OpenAIJudge",
    "PRMJudge",
    "PRMSpec",
    "ReferenceJudge",
    "StepJudge",
    "StepwiseJudge",
    "VLLMPoolingJudge",
    "Verdict",
]
