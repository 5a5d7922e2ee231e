"""Base and policy compared: the log and the report show the same numbers, and torch is not needed for them."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from trl_sgpo.analysis.report.comparison import analyse
from trl_sgpo.analysis.sharpening.base import write_parquet
from trl_sgpo.analysis.sharpening.compare import compare, count
from trl_sgpo.analysis.sharpening.log import FILE_COLUMNS, as_columns, log_numbers
from trl_sgpo.analysis.sharpening.probe import Sample, k3_terms


P, N = 10, 8
DOMAINS = ["odd" if i % 2 else "even" for i in range(P)]


def samples(rng, rates, policy):
    found = []
    for prompt in range(P):
        for number in range(N):
            sample = Sample(prompt, number, "text", "text", [1] * rng.integers(3, 9), scored=True)
            sample.correct = bool(rng.random() < rates[prompt])
            sample.process_correct = sample.correct and bool(rng.random() < 0.8)
            sample.logp_base = float(rng.normal(-9, 2))
            if policy:
                sample.logp_policy = sample.logp_base + float(rng.normal(sample.correct, 0.5))
            found.append(sample)
    return found


@pytest.fixture
def both():
    rng = np.random.default_rng(0)
    rates = rng.uniform(0, 0.6, P) * (np.arange(P) > 1)
    return samples(rng, rates, policy=False), samples(rng, rates + 0.3, policy=True)


def test_the_log_and_the_report_have_the_same_numbers(both, tmp_path):
    base, policy = both
    for name, rows in (("base", base), ("policy_000003", policy)):
        write_parquet(tmp_path / f"{name}.parquet", {key: [getattr(row, key) for row in rows] for key in FILE_COLUMNS})
    write_parquet(tmp_path / "prompts.parquet", {"prompt_id": range(P), "domain": DOMAINS})
    (tmp_path / "probe.json").write_text(json.dumps({}))
    page, _ = analyse(tmp_path)
    logged = log_numbers(policy, base, P, ks=[1, 2, 4, 8], taus=[0.5], domains=DOMAINS)
    pairs = {
        "kl_k1": page["over_time"]["kl"][-1],
        "base_perplexity": page["over_time"]["base_perplexity"][-1],
        "rank_by_policy": page["rank_under_policy"].value,
        "efficiency_gap": page["efficiency_gap"].value,
        "tilt/beta": page["tilt_fit"].beta.value,
        "tilt/beta_low": page["tilt_fit"].beta.low,
        "tilt/slope": page["tilt_line"].slope.value,
        "support/p_expanded": page["support"].p_expanded,
        "support/nscr_high": page["support"].nscr.high,
        "cover@0.5": page["cover"]["policy"][page["cover"]["tau"].index(0.5)].value,
        "base_cover@0.5": page["cover"]["base"][page["cover"]["tau"].index(0.5)].value,
        "domain/odd/gain": page["saturation"]["odd"]["gain"].value,
    }
    for i, k in enumerate(page["k"]):
        pairs[f"pass@{k}"] = page["pass_at_k"]["policy"][i].value
        pairs[f"base_pass@{k}"] = page["pass_at_k"]["base"][i].value
        pairs[f"process_pass@{k}"] = page["pass_at_k"]["policy_process"][i].value
    for bucket in page["saturation"]["all prompts"]["buckets"]:
        if not math.isnan(bucket.gain.value):
            pairs[f"saturation/{bucket.low:g}-{bucket.high:g}"] = bucket.gain.value
    assert {key: logged[key] for key in pairs} == pytest.approx(pairs, rel=1e-12)


def test_counts_equal_loop(both):
    _, policy = both
    columns = as_columns(policy)
    found = count(columns, [2, 3, 7])  # samples of other prompts do not count
    assert found.n.tolist() == [N] * 3
    for name, what in ((found.c, "correct"), (found.verified, "process_correct")):
        assert name.tolist() == [sum(getattr(s, what) for s in policy if s.prompt_id == i) for i in (2, 3, 7)]


def test_other_prompts_are_left_out(both):
    base, policy = map(as_columns, both)
    few = [2, 3, 5, 7]
    some = {
        name: [v for v, i in zip(values, policy["prompt_id"], strict=True) if i in few]
        for name, values in policy.items()
    }
    assert compare(base, policy, few, N).of_policy == compare(base, some, few, N).of_policy


def test_without_log_probabilities(both):
    for side in both:
        for sample in side:
            sample.logp_base = sample.logp_policy = sample.process_correct = None
    logged = log_numbers(both[1], both[0], P, ks=[1, 4], taus=[0.5])
    assert not [key for key in logged if "perplexity" in key or "kl" in key or "rank" in key or "process" in key]
    assert {"pass@4", "base_pass@4", "tilt/slope"} <= set(logged)
    assert "tilt/beta" not in logged


def test_k3_is_the_kl_of_two_dice():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    terms = k3_terms(p.log(), q.log())
    assert (terms >= 0).all()
    # Over the policy's own distribution the mean is exact: E[exp(-d)] = 1
    assert (p * terms).sum().item() == pytest.approx((p * (p / q).log()).sum().item())
    assert k3_terms(q.log(), q.log()).tolist() == [0, 0, 0]


def test_numbers_and_report_need_no_torch():
    modules = ("sharpening.log", "report.summary", "report.page", "report.tables")
    code = f"import sys, {', '.join('trl_sgpo.analysis.' + name for name in modules)}; "
    code += "print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr
