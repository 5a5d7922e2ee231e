"""
Every benchmark script once, with settings so small that it ends in seconds. What it writes goes to a temporary folder.

The controlled study and the study on a pretrained model have tests of their own.
"""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from recipes.judge import make_data
from recipes.quickstart import run as quickstart
from trl_sgpo.scripts.judge_train import main as judge_train
from trl_sgpo.tasks.rewrite_chain import PretrainConfig


pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
TINY = PretrainConfig(clean_updates=2, noisy_updates=2, layers=1, width=16, heads=2)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """`record(name, *arguments)`: runs `benchmarks/<name>/run.py` and returns what it has recorded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # one for each worker, whatever a benchmark takes

    def run(name, *arguments, **settings):
        module = importlib.import_module(f"benchmarks.{name}.run")
        for setting, value in settings.items():
            monkeypatch.setattr(module, setting, value)
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        # A script writes its record beside itself
        recorded = (ROOT / "benchmarks" / name / "results.json").read_bytes()
        if hasattr(module, "HERE"):
            monkeypatch.setattr(module, "HERE", tmp_path)
        module.main()
        assert (ROOT / "benchmarks" / name / "results.json").read_bytes() == recorded
        return json.loads((tmp_path / "results.json").read_text())

    return run


def test_base_against_base(record):
    found = record("base_against_base", "--pairs", 2, PROBES=[(32, 16)])
    assert sum(found["probes"][0]["verdicts"].values()) == 2


def test_difficulty_dial(record):
    found = record("difficulty_dial", BASES={"tiny": TINY})
    assert [row["n_operations"] for row in found["rows"]] == [2, 3, 4, 5]


def test_dynamics(record, tmp_path):
    from benchmarks.dynamics import run

    few = {name: rule for name, rule in run.RULES.items() if name == "sgd"}
    module = {"RULES": few, "SHARES": (0.75,), "SWEEP": (0.5, 0.75), "SWEPT": ("sgd",), "NOISY": (), "LUCKY": ("sgd",)}
    found = record("dynamics", **module, SIMULATED=(("grpo", 8, True),), PLOTS=tmp_path / "plots")
    ratios = found["updates"]["sgd"]["0.75"]
    recorded = json.loads((ROOT / "benchmarks/dynamics/results.json").read_text())
    assert ratios == recorded["updates"]["sgd"]["0.75"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"theorem.png", "sweep.png", "gradient.png"}


def test_judges(record, tmp_path):
    rows = [
        {"problem": f"{a} + 1 and then + 1", "steps": [f"{a} + 1 = {a + 1}", f"{a + 1} + 1 = {a + 3}"], "label": 1}
        for a in range(8)
    ]
    rows += [{"problem": f"{a} + 1", "steps": [f"{a} + 1 = {a + 1}"], "label": -1} for a in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = record("judges", "--data", data)
    assert found["judges"]["arithmetic"]["standard_mean"]["f1"] == 1
    assert found["judges"]["constant, first step"]["standard_mean"]["f1"] == 0


def test_judge_throughput(record, tmp_path):
    """With a server of its own, on loopback."""
    pytest.importorskip("aiohttp")
    setting = "50 ms, 64 served at a time"
    output = ["--output", tmp_path / "results.json"]
    found = record("judge_throughput", "--repeats", 1, "--settings", setting, *output, REQUESTS=64)["settings"][
        setting
    ]
    assert found["transports"]["aiohttp"]["ratio_to_aiohttp"]["median"] == 1
    assert found["transports"]["openai"]["seconds"]["median"] > 0


def test_overhead(record):
    found = record("overhead", "--rounds", 1, STEPS=2, WARM_UP=1)
    cases = ("no_failed_group", "every_group_failed", "every_group_failed_prefix_credit", "no_failed_group_skipping")
    for case in cases:
        assert math.isfinite(found[case]["ratio_median"])
        assert 0 < found[case]["own_share_of_step"] < 1
    assert found["no_failed_group"]["judge_share_of_step"] == 0 < found["every_group_failed"]["judge_share_of_step"]


def test_skipping(tmp_path, monkeypatch):
    from benchmarks.overhead import skip

    small = {"N_ROWS": 16, "PROMPT": 3, "LENGTH": 10, "VOCABULARY": 100, "HERE": tmp_path}
    for name, value in small.items():
        monkeypatch.setattr(skip, name, value)
    monkeypatch.setattr(skip.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(sys, "argv", ["skip.py", "--pairs", "1"])
    skip.main()
    found = json.loads((tmp_path / "skip_results.json").read_text())
    assert all(found[case]["ratio_median"] > 0 for case in skip.CASES)


def test_prm_throughput(record):
    found = record("prm_throughput", PROBLEMS=1, COMPLETIONS=2, ROUNDS=1, PREFIX_ROUNDS=1)
    assert found["completions"] == 2
    assert found["judge_throughput_over_bare_forward"]["median"] > 0


def test_quickstart(record, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "BASE", TINY)
    monkeypatch.setattr(quickstart, "N_EVALUATED", 4)
    found = record("quickstart", "--tokens", 500, "--output", tmp_path / "out", "--record", tmp_path, BASE=TINY)
    recorded = json.loads((ROOT / "benchmarks/quickstart/results.json").read_text())
    assert set(found) == set(recorded)
    assert [set(run) for run in found["runs"]] == [set(run) for run in recorded["runs"][:2]]
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_sharpening(record, tmp_path):
    found = record(
        "sharpening",
        "--seeds",
        0,
        BASE=TINY,
        OUTPUT=tmp_path / "out",
        N_SAMPLES=8,
        KS=[1, 8],
        N_PROMPTS=(2, 2, 2),
        ARMS={"grpo": ("grpo", "problems", 500), "sgpo": ("sgpo", "problems", 500)},
    )
    assert [run["arm"] for run in found["runs"]] == ["grpo", "sgpo"]
    assert set(found["runs"][0]["probes"][-1]["domains"]) == {"trained", "one_operation_more", "unseen_letters"}


def test_trained_judge(record, tmp_path, monkeypatch):
    """From the data on: the judge is trained here."""
    for module in (quickstart, make_data):
        monkeypatch.setattr(module, "BASE", TINY)
    arguments = ["--base", tmp_path / "base", "--output", tmp_path / "judge", "--rows", 64, "--test-rows", 8]
    monkeypatch.setattr(sys, "argv", ["make_data.py", *map(str, arguments)])
    make_data.main()
    overrides = {
        "data": tmp_path / "judge/train.jsonl",
        "exclude": tmp_path / "judge/test_noise.jsonl",
        "model_name_or_path": tmp_path / "base",
        "output_dir": tmp_path / "prm",
        "max_steps": 2,
        "warmup_steps": 1,
        "dev_share": 0.5,
    }
    words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    config = ROOT / "recipes/judge/rewrite_chain.yaml"
    monkeypatch.setattr(sys, "argv", ["judge_train", "--config", str(config), *words])
    judge_train()
    found = record(
        "trained_judge",
        *("--seeds", 0, "--tokens", 500, "--judge", tmp_path / "prm", "--data", tmp_path / "judge"),
        *("--base", tmp_path / "base", "--output", tmp_path / "out", "--record", tmp_path / "results.json"),
        BASE=TINY,
        N_EVALUATED=4,
    )
    assert [run["arm"] for run in found["runs"]] == ["grpo", "oracle", "trained", "trained_finished"]
    assert found["runs"][1]["judge"]["same_as_checker"] == 1


def test_every_script_is_run_here():
    scripts = {path.parent.name for path in ROOT.glob("benchmarks/*/run.py")}
    files = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert scripts <= files | {name.removeprefix("test_") for name in globals()}
