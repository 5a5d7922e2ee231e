"""Folders of runs and of probes with known contents, for the tests of the report."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd


def write_run(
    path: Path,
    n_files: int = 20,
    n_groups: int = 4,
    size: int = 8,
    seed: int = 0,
    judge: bool = False,
    text_length: int = 200,
    log: bool = True,
    accuracy: tuple[float, float] = (0.05, 0.5),
) -> Path:
    """A run as TRL leaves it: one completions file per update, and trainer_state.json."""
    rng = np.random.default_rng(seed)
    (path / "completions").mkdir(parents=True)
    history = []
    filler = "so we go on " * (text_length // 12)
    for step in range(1, n_files + 1):
        p = accuracy[0] + (accuracy[1] - accuracy[0]) * step / n_files
        difficulty = rng.beta(0.5, 0.5 * (1 - p) / p, size=n_groups)
        outcome = (rng.random((n_groups, size)) < difficulty[:, None]).astype(float)
        reward = outcome.copy()
        columns = {}
        if judge:
            failed = outcome.sum(axis=1) == 0
            rts = np.where(failed[:, None], rng.integers(0, 5, size=outcome.shape) / 5, np.nan)
            graded = np.where(np.isnan(rts), np.nan, 1 / (1 + np.exp(-10 * (rts - 0.5))))
            reward = np.where(np.isnan(graded), reward, graded)
            columns = {
                "stepwise_judge": graded.ravel(),
                "judge_first_error": (rts * 5).ravel(),
                "judge_n_steps": np.where(np.isnan(rts), np.nan, 5.0).ravel(),
                "judge_rts": rts.ravel(),
                "judge_status": np.where(np.isnan(rts), "", "error").ravel(),
                "judge_reason": [""] * outcome.size,
            }
        advantage = (reward - reward.mean(axis=1, keepdims=True)) / (reward.std(axis=1, ddof=1, keepdims=True) + 1e-4)
        frame = {
            "step": [step] * outcome.size,
            "prompt": [f"problem {step}.{g}" for g in range(n_groups) for _ in range(size)],
            "completion": [f"{filler} the answer is {int(v) if v else rng.integers(2, 9)}." for v in outcome.ravel()],
            "accuracy_reward": outcome.ravel(),
            **columns,
            "advantage": advantage.ravel(),
        }
        pd.DataFrame(frame).to_parquet(path / "completions" / f"completions_{step:05d}.parquet")
        entry = {
            "step": step,
            "loss": 1e-8,
            "grad_norm": float(np.abs(advantage).max() > 0) * 0.3,
            "reward": float(reward.mean()),
            "entropy": 1 - 0.5 * step / n_files,
            "rewards/accuracy_reward/mean": float(outcome.mean()),
            "completions/mean_length": 50.0,
            "completions/clipped_ratio": 0.0,
            "step_time": 2.0,
            "frac_reward_zero_std": float((np.abs(advantage).max(axis=1) < 1e-3).mean()),
        }
        if judge:
            entry |= {
                "sgpo/judge_calls": 10.0,
                "sgpo/judge_seconds": 0.5,
                "sgpo/abstain_rate": 0.1,
                "sgpo/rts_gap": 0.0,
            }
        history.append(entry)
    if log:
        (path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return path


SCENARIOS = ("sharpening", "expansion", "no change", "shrinkage")


def write_probe(
    path: Path, scenario: str, n_prompts: int = 96, n: int = 64, seed: int = 0, domain: bool = True
) -> Path:
    """
    A run's `sharpening` folder with three probes of the policy.

    Base rates are logit-normal. Sharpening is a tilt of all prompts by beta = 3. In an expansion a quarter of the prompts are
    impossible for the base (its own log-probabilities say so) and solved half of the time by the policy, as well. In a
    shrinkage the policy forgets two fifths of the prompts altogether. Every log-probability obeys its rate.
    """
    rng = np.random.default_rng(seed)
    folder = path / "sharpening"
    folder.mkdir(parents=True)
    impossible = np.arange(n_prompts) % 4 == 0 if scenario == "expansion" else np.zeros(n_prompts, dtype=bool)
    forgotten = np.arange(n_prompts) % 5 < 2 if scenario == "shrinkage" else np.zeros(n_prompts, dtype=bool)
    base = np.where(impossible, 1e-9, 1 / (1 + np.exp(-rng.normal(-2.0, 1.2, n_prompts))))
    beta = {"no change": 0.0, "shrinkage": 1.0}.get(scenario, 3.0)
    end = base * math.exp(beta) / (1 + base * math.expm1(beta))
    end = np.where(impossible, 0.5, np.where(forgotten, 1e-9, end))
    prompts = {"prompt_id": range(n_prompts), "prompt": [f"problem {i}" for i in range(n_prompts)]}
    if domain:
        prompts["domain"] = ["algebra" if i % 2 else "geometry" for i in range(n_prompts)]
    pd.DataFrame(prompts).to_parquet(folder / "prompts.parquet")
    settings = {"model": "tiny", "temperature": 1.0, "top_p": 1.0, "prompts_hash": "0", "n": n, "ks": [1, 2, 4]}
    (folder / "probe.json").write_text(json.dumps(settings))

    def samples(rate: np.ndarray, policy: bool) -> pd.DataFrame:
        prompt = np.repeat(np.arange(n_prompts), n)
        correct = rng.random(prompt.size) < rate[prompt]
        tokens = rng.integers(20, 40, prompt.size)
        # Given its class, a sample is equally likely under base and policy, so the ratio is that of the classes' rates
        ratio = np.where(correct, rate[prompt] / base[prompt], (1 - rate[prompt]) / (1 - base[prompt]))
        logp_base = -0.8 * tokens + rng.normal(0, 2, prompt.size)
        frame = {
            "prompt_id": prompt,
            "sample": np.tile(np.arange(n), n_prompts),
            "text": ["answer"] * prompt.size,
            "correct": correct,
            "process_correct": correct & (rng.random(prompt.size) < 0.9),
            "logp_base": logp_base,
            "n_tokens": tokens,
        }
        if policy:
            frame["logp_policy"] = logp_base + np.log(ratio)
        return pd.DataFrame(frame)

    samples(base, policy=False).to_parquet(folder / "base.parquet")
    for i, step in enumerate((50, 100, 150)):
        part = (i + 1) / 3
        samples(base ** (1 - part) * end**part if part < 1 else end, policy=True).to_parquet(
            folder / f"policy_{step:06d}.parquet"
        )
    return path
