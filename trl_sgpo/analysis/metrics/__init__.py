"""
Metrics as pure functions of counts, answers and log-probabilities. Nothing here knows trainers, models or files.

    rates.py       pass@k, Cover@tau, maj@k, answer entropy; a number with its bootstrap interval; a test for pairs
    support.py     which prompts base and policy solve, the gain by difficulty, the tilt line: from counts
    likelihood.py  perplexity, KL, tilt strength, ranks: from log-probabilities

Throughout, q is the base model, pi is the policy, x is a prompt, y is a sample, and `c` of a prompt's `n` samples are
correct. An average over prompts has a bootstrap interval over prompts ([`bootstrap`]). An undefined number is NaN.
"""

from trl_sgpo.analysis.metrics.likelihood import (
    TiltFit,
    kl_k1,
    likelihood_displacement,
    normalised_ranks,
    perplexity,
    rank_of_correct,
    tilt_fit,
    uplift_by_rank,
)
from trl_sgpo.analysis.metrics.rates import (
    Estimate,
    answer_entropy,
    bootstrap,
    chance_pass_at_k,
    cover_at,
    maj_at_k,
    mean_estimate,
    pass_at_k,
    percentile_interval,
    sign_flip_p,
    usual_ks,
)
from trl_sgpo.analysis.metrics.support import (
    SaturationBucket,
    SupportTable,
    TiltLine,
    sampling_efficiency_gap,
    saturation,
    support_table,
    tilt_gain,
    tilt_line,
)


__all__ = [
    "Estimate",
    "SaturationBucket",
    "SupportTable",
    "TiltFit",
    "TiltLine",
    "answer_entropy",
    "bootstrap",
    "chance_pass_at_k",
    "cover_at",
    "kl_k1",
    "likelihood_displacement",
    "maj_at_k",
    "mean_estimate",
    "normalised_ranks",
    "pass_at_k",
    "percentile_interval",
    "perplexity",
    "rank_of_correct",
    "sampling_efficiency_gap",
    "saturation",
    "sign_flip_p",
    "support_table",
    "tilt_fit",
    "tilt_gain",
    "tilt_line",
    "uplift_by_rank",
    "usual_ks",
]
