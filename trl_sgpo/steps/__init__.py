"""
Completions, steps and the reasoning trajectory score (RTS) of Stepwise Guided Policy Optimization
(https://huggingface.co/papers/2505.11595), in pure Python.

- [`segment`] cuts a text into steps, and [`check_spans`] checks the spans of a segmenter of your own.
- [`completion_turns`] and [`completion_to_text`] give the text of a completion, and [`judged_region`] the part of a
  turn that is judged.
- [`cut_completion`] gives the steps of a completion.
- [`rts_by_steps`] and [`rts_by_characters`] give the share of a completion before its first wrong step.

In the paper the judge cuts the text. Here a plain function does it. Every judge therefore sees the same steps, and a
verdict can be mapped back to characters and tokens.

Left out on purpose: the mapping from RTS to a reward, the mapping from characters to tokens, and anything that needs
torch. The time of every function is linear in the length of the text, even if a policy in training writes a text that
is made to be slow.
"""

from trl_sgpo.steps.completions import (
    CutCompletion,
    Turn,
    completion_to_text,
    completion_turns,
    cut_completion,
    judged_region,
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
    "judged_region",
    "rts_by_characters",
    "rts_by_steps",
    "segment",
]
