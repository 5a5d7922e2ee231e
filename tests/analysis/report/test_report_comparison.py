"""The probes of base and policy: known situations get the right word, and broken folders a reason."""

import json

import numpy as np
import pandas as pd
import pytest
from report_folders import SCENARIOS, write_probe

from trl_sgpo.analysis.jsonable import jsonable
from trl_sgpo.analysis.metrics import pass_at_k
from trl_sgpo.analysis.report.comparison import ProbeError, analyse, analyse_or_explain, read_probes
from trl_sgpo.analysis.sharpening.compare import base_rates


WORDS = {"sharpening": "sharpened", "expansion": "expanded", "no change": "no change", "shrinkage": "shrank"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_findings(scenario, tmp_path):
    numbers, finding = analyse(write_probe(tmp_path, scenario) / "sharpening")
    assert finding.kind == WORDS[scenario]
    if scenario == "sharpening":
        assert numbers["tilt_line"].slope.low - 0.1 < 1 < numbers["tilt_line"].slope.high + 0.1
    if scenario == "expansion":
        assert np.median(numbers["base_rates_of_expanded"]) < 1e-6
    if scenario == "no change":
        assert abs(numbers["over_time"]["kl"][-1]) < 1e-6


def test_numbers_are_those_of_the_metrics(tmp_path):
    folder = write_probe(tmp_path, "sharpening", n_prompts=12, n=16) / "sharpening"
    numbers, _ = analyse(folder, guess=0.1)
    base = pd.read_parquet(folder / "base.parquet")
    c = base.groupby("prompt_id")["correct"].sum().to_numpy()
    assert numbers["k"] == [1, 2, 4, 8, 16]
    for i, k in enumerate(numbers["k"]):
        estimate = numbers["pass_at_k"]["base"][i]
        assert estimate.value == pytest.approx(pass_at_k(16, c, k).mean())
        assert estimate.low <= estimate.value <= estimate.high
    assert numbers["pass_at_k"]["chance"][1] == pytest.approx(0.19)
    assert numbers["steps"] == [50, 100, 150]
    assert set(numbers["saturation"]) == {"all prompts", "algebra", "geometry"}
    json.dumps(jsonable(numbers), allow_nan=False)


def test_base_rates_recover_the_base_from_the_policy(tmp_path):
    folder = write_probe(tmp_path, "sharpening", n_prompts=20, n=400) / "sharpening"
    base, policy = (pd.read_parquet(folder / f"{name}.parquet") for name in ("base", "policy_000150"))
    ids = list(range(20))
    direct = base.groupby("prompt_id")["correct"].mean().to_numpy()
    assert base_rates(policy, ids) == pytest.approx(direct, abs=0.07)


def test_a_prompt_missing_in_one_file_is_left_out_of_all(tmp_path):
    folder = write_probe(tmp_path, "sharpening", n_prompts=10, n=8) / "sharpening"
    policy = pd.read_parquet(folder / "policy_000100.parquet")
    policy[policy["prompt_id"] != 3].to_parquet(folder / "policy_000100.parquet")
    probes = read_probes(folder)
    assert probes.prompt_ids == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert any("step 100 has other prompts" in note for note in probes.notes)
    assert analyse(folder)[0]["n_prompts"] == 9


def test_without_log_probabilities_steps_domains_and_settings(tmp_path):
    folder = write_probe(tmp_path, "expansion", domain=False) / "sharpening"
    for path in folder.glob("*.parquet"):
        frame = pd.read_parquet(path)
        for name in ("logp_base", "logp_policy", "process_correct"):
            if name in frame.columns:
                frame[name] = None  # as the callback writes what it has not
        frame.to_parquet(path)
    (folder / "probe.json").write_text('{"model": ')
    numbers, finding, missing = analyse_or_explain(folder)
    assert finding.kind == "expanded"  # by the tilt line
    assert numbers["tilt_fit"] is None
    assert set(numbers["saturation"]) == {"all prompts"}
    said = " ".join(missing)
    for words in ("No process_correct", "No log-probabilities", "probe.json could not be read"):
        assert words in said


def test_a_cut_off_probe_is_left_out(tmp_path):
    folder = write_probe(tmp_path, "sharpening", n_prompts=10, n=8) / "sharpening"
    last = folder / "policy_000150.parquet"
    last.write_bytes(last.read_bytes()[:500])
    numbers, _, missing = analyse_or_explain(folder)
    assert numbers["step"] == 100
    assert any("policy_000150.parquet could not be read" in note for note in missing)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "base.parquet").unlink(), "base.parquet is missing"),
        (lambda f: (f / "base.parquet").write_bytes(b""), "base.parquet could not be read"),
        (lambda f: pd.DataFrame({"prompt_id": [1]}).to_parquet(f / "base.parquet"), "no column correct"),
        (lambda f: [p.unlink() for p in f.glob("policy_*")], "none of the policy yet"),
        (
            lambda f: pd.DataFrame({"prompt_id": [99], "correct": [True]}).to_parquet(f / "base.parquet"),
            "different probes",
        ),
    ],
)
def test_probes_that_cannot_be_used(spoil, words, tmp_path):
    folder = write_probe(tmp_path, "sharpening", n_prompts=10, n=8) / "sharpening"
    spoil(folder)
    with pytest.raises(ProbeError, match=words):
        analyse(folder)
    numbers, finding, missing = analyse_or_explain(folder)
    assert (numbers, finding.kind) == (None, "unknown")
    assert words in missing[0]


def test_few_prompts_and_samples_are_no_traceback(tmp_path):
    for n_prompts, n in ((1, 1), (2, 64), (10, 1), (10, 2)):
        folder = write_probe(tmp_path / f"{n_prompts}-{n}", "sharpening", n_prompts, n) / "sharpening"
        assert analyse(folder)[1].kind == "unknown"


def test_one_domain_of_several(tmp_path):
    folder = write_probe(tmp_path, "sharpening", n_prompts=24, n=16) / "sharpening"
    numbers, _ = analyse(folder, domain="algebra")
    assert numbers["n_prompts"] == 12
    assert set(numbers["prompts"]["domain"]) == {"algebra"}
    assert set(numbers["saturation"]) == {"all prompts"}
    assert any("2 domains together" in note for note in analyse(folder)[0]["notes"])
    with pytest.raises(ProbeError, match=r"'physics': its domains are \['algebra', 'geometry'\]"):
        analyse(folder, domain="physics")
