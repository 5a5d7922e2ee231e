"""The finding in words: every rule, on numbers."""

import math

import pytest

from trl_sgpo.analysis.metrics import Estimate, SupportTable
from trl_sgpo.analysis.report.finding import KINDS, Evidence, decide


NAN = Estimate(math.nan, math.nan, math.nan)


def table(expanded=2, shrunk=2, p_expanded=0.6, p_shrunk=0.6, preserved=80):
    return SupportTable(
        preserved=preserved,
        expanded=expanded,
        shrunk=shrunk,
        out_of_reach=100 - preserved - expanded - shrunk,
        srr=NAN,
        ndr=NAN,
        nscr=NAN,
        expanded_null=2.1,
        shrunk_null=2.2,
        p_expanded=p_expanded,
        p_shrunk=p_shrunk,
        unseen_rate=0.0457,
    )


def evidence(gain_1=(0.0, -0.02, 0.02), gain_k=(0.0, -0.05, 0.05), support=None, **other):
    values = {
        "n_prompts": 100,
        "n_samples": 64,
        "k": 64,
        "base_pass_1": Estimate(0.02, 0.01, 0.03),
        "policy_pass_1": Estimate(0.67, 0.6, 0.7),
        "base_pass_k": Estimate(0.8, 0.7, 0.9),
        "policy_pass_k": Estimate(0.82, 0.7, 0.9),
        "gain_1": Estimate(*gain_1),
        "gain_k": Estimate(*gain_k),
        "support": support or table(),
        **other,
    }
    return Evidence(**values)


UP, DOWN, WIDE = (0.6, 0.5, 0.7), (-0.6, -0.7, -0.5), (0.0, -0.3, 0.3)
WON = {"support": table(expanded=20, p_expanded=1e-6), "gain_1": UP, "gain_k": UP}


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        # 1. what nothing can be said of
        ({"n_prompts": 5}, "unknown", "only 5 prompts"),
        ({"n_samples": 4}, "unknown", "4 samples per prompt"),
        ({"k": 4}, "unknown", "4 samples per prompt"),
        ({"gain_1": (0.1, math.nan, math.nan)}, "unknown", "no interval"),
        ({"support": table(0, 0, preserved=0)}, "unknown", "neither base nor policy solved a single prompt in 64"),
        # 2. both
        ({"support": table(20, 20, 1e-6, 1e-6), "gain_1": UP}, "mixed", "both won and lost"),
        # 3. lost prompts
        ({"support": table(1, 20, 0.9, 1e-6), "gain_k": DOWN}, "shrank", "Shrank: the support is smaller"),
        ({"support": table(1, 20, 0.9, 1e-6), "gain_1": UP}, "shrank", "Sharpened at the cost of support"),
        # 4. won prompts
        (WON, "expanded", "Neither log-probabilities nor a tilt line"),
        ({**WON, "slope": Estimate(0.6, 0.5, 0.7)}, "expanded", "Expanded beyond what the base solved"),
        ({**WON, "slope": Estimate(0.98, 0.9, 1.1)}, "sharpened", "no more than a tilt of the base gives"),
        ({**WON, "base_rates": (1e-12, 1e-7, 0.01)}, "expanded", "would need about 10,000,000 samples"),
        ({**WON, "base_rates": (0.0, 0.0)}, "expanded", "more than 1,000,000,000 samples"),
        # The base's own log-probabilities weigh more than the line, which rests on a model
        (
            {**WON, "base_rates": (0.01, 0.02, 1e-9), "slope": Estimate(0.6, 0.5, 0.7)},
            "sharpened",
            "2 of 3 such prompts are within 6,400",
        ),
        ({**WON, "base_rates": (1e-12,), "slope": Estimate(0.98, 0.9, 1.1)}, "mixed", "no more than a tilt gives"),
        ({**WON, "guess": 0.25}, "unknown", "guessing alone reaches"),
        ({**WON, "process_gain_k": Estimate(0.0, -0.1, 0.1)}, "mixed", "no more have a right solution"),
        ({**WON, "process_gain_k": Estimate(0.2, 0.1, 0.3)}, "expanded", "Expanded"),
        # won beyond chance, but pass@k did not clearly rise
        ({"support": table(9, 1, 0.001), "gain_1": UP}, "sharpened", "Sharpened inside"),
        # 5. and 6.
        ({"gain_1": UP}, "sharpened", "Sharpened inside the base's support"),
        ({"gain_1": UP, "gain_k": DOWN}, "mixed", "pass@1 rose and pass@64 fell"),
        ({"gain_1": DOWN}, "mixed", "pass@1 fell"),
        ({"gain_k": UP}, "mixed", "pass@64 rose"),
        ({"gain_1": DOWN, "gain_k": UP}, "mixed", "pass@1 fell and pass@64 rose"),
        # 7.
        ({}, "no change", "No change that this probe can see"),
        ({"gain_1": WIDE}, "unknown", "more prompts or samples are needed"),
    ],
)
def test_rules(given, kind, words):
    finding = decide(evidence(**given))
    assert finding.kind == kind
    assert finding.kind in KINDS
    assert words in " ".join([str(finding), *finding.caveats])


def test_the_sentence_carries_its_evidence():
    said = str(decide(evidence(gain_1=UP, slope=Estimate(0.98, 0.9, 1.1), support=table(expanded=3))))
    assert said == (
        "Sharpened inside the base's support: pass@1 0.020 → 0.67 (change +0.60 [+0.50, +0.70]); pass@64 0.80 → 0.82 (change +0.00 "
        "[-0.050, +0.050]); 3 of 100 prompts won (by chance 2.1), 2 lost (by chance 2.2); tilt slope 0.98 [0.90, "
        "1.10]"
    )


@pytest.mark.parametrize("more", [{}, {"base_rates": (1e-12,)}, {"slope": Estimate(0.5, 0.4, 0.6)}])
def test_expanded_says_what_unsolved_can_mean(more):
    finding = decide(evidence(**WON, **more))
    assert finding.kind == "expanded"
    assert '"not solved by the base in 64 samples" may still mean a pass rate of up to 0.046' in finding.caveats[0]


def test_caveats():
    assert "known only as -0.30 to +0.30" in decide(evidence(gain_1=UP, gain_k=WIDE)).caveats[0]
    assert "an expansion could not show" in decide(evidence(gain_1=UP, base_pass_k=Estimate(1.0, 1.0, 1.0))).caveats[0]
    assert "Guessing alone reaches a pass@64 of 0.47" in decide(evidence(gain_1=UP, guess=0.01)).caveats[0]
