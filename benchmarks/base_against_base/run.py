"""
How often the report finds a change although there is none: base against base, simulated, with the rules of the report.

    python -m benchmarks.base_against_base.run

Prompts differ in difficulty (normal logits of pass@1); both sides are drawn from the same pass rates.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from benchmarks.common import commit, write_results
from trl_sgpo.analysis.metrics import mean_estimate, pass_at_k, support_table
from trl_sgpo.analysis.report.finding import LEVEL, Evidence, decide


HERE = Path(__file__).parent
PROBES = [(96, 64), (32, 16), (200, 64)]  # prompts, samples per prompt


def verdict(n_prompts: int, n_samples: int, seed: int) -> tuple[str, bool]:
    """The report's verdict on one pair of probes, and whether the test of the support alone raises an alarm."""
    rng = np.random.default_rng(seed)
    rates = 1 / (1 + np.exp(-rng.normal(-2, 1.5, n_prompts)))
    n = np.full(n_prompts, n_samples)
    base, again = rng.binomial(n, rates), rng.binomial(n, rates)
    first, second = ([pass_at_k(n, c, k) for k in (1, n_samples)] for c in (base, again))
    support = support_table(base, again, n)
    evidence = Evidence(
        n_prompts,
        n_samples,
        n_samples,
        mean_estimate(first[0]),
        mean_estimate(second[0]),
        mean_estimate(first[1]),
        mean_estimate(second[1]),
        mean_estimate(second[0] - first[0], level=LEVEL),
        mean_estimate(second[1] - first[1], level=LEVEL),
        support,
    )
    return decide(evidence).kind, bool(support.changes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="simulated pairs per size of probe")
    args = parser.parse_args()
    results = {"commit": commit(), "pairs": args.pairs, "level": LEVEL, "probes": []}
    for n_prompts, n_samples in PROBES:
        bar = tqdm(range(args.pairs), desc=f"{n_prompts} prompts x {n_samples} samples")
        found = [verdict(n_prompts, n_samples, seed) for seed in bar]
        kinds = dict(Counter(kind for kind, _ in found))
        alarms = sum(alarm for _, alarm in found)
        print(f"{n_prompts} x {n_samples}: {kinds}; support_table alone raises {alarms} alarms")
        results["probes"].append(
            {"prompts": n_prompts, "samples": n_samples, "verdicts": kinds, "support_table_alarms": alarms}
        )
    write_results(HERE / "results.json", results)


if __name__ == "__main__":
    main()
