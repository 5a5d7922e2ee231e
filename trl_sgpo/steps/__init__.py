"""
Completions, steps and the reasoning trajectory score (RTS) of Stepwise Guided Policy Optimization
(https://huggingface.co/papers/2505.11595), in pure Python. In the paper the judge cuts the text. Here a plain function
does it: every judge sees the same steps, and a verdict can be mapped back to characters and tokens. The time of every
function is linear in the length of the text, even if a policy in training writes a text that is made to be slow.
"""

from trl_sgpo.steps.completions import (
    CutCompletion,
    Turn,
    completion_to_text,
    completion_turns,
    cut_completion,
    judged_regions,
)
from trl_sgpo.steps.rts import rts_by_characters, rts_by_steps
from trl_sgpo.steps.segmenter import Segmenter, Span, check_spans, segment


__all__ = [
    "CutCompletion",
    "Segmenter",
    "Span",
    "Turn",
    "check_spans",
    "completion_to_text",
    "completion_turns",
    "cut_completion",
    "judged_regions",
    "rts_by_characters",
    "rts_by_steps",
    "segment",
]
