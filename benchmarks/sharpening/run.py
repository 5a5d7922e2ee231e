"""
Does SGPO expand what its base model can do, or sharpen it? And what happens if the base has nothing to sharpen?

    python -m benchmarks.sharpening.run

GRPO and SGPO of the quickstart, three seeds each, with SharpeningCallback: 64 samples per prompt every 140 updates and at the end. The
probe set has three domains: problems like the trained ones, and two that lie outside of the base's support (one operation more than it
ever saw; letters that it never saw). A third method trains SGPO on these letters.

Every finished run is kept in outputs/sharpening/<arm>-seed<n>. A study that was interrupted continues with the next run.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers

from benchmarks.common import provenance, write_results
from recipes.quickstart.run import BASE, N_OPERATIONS, TOKENS, quiet_trainer
from trl_sgpo import StepwiseJudge
from trl_sgpo.analysis import SharpeningCallback
from trl_sgpo.analysis.metrics import (
    kl_k1,
    mean_estimate,
    pass_at_k,
    perplexity,
    rank_of_correct,
    sampling_efficiency_gap,
    saturation,
    support_table,
    tilt_fit,
    tilt_line,
)
from trl_sgpo.tasks.rewrite_chain import (
    SECOND_ALPHABET,
    first_wrong_block,
    load_or_pretrain,
    make_dataset,
    segment_blocks,
)
from trl_sgpo.tasks.token_budget import TokenBudget


HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "quickstart"
OUTPUT = Path("outputs/sharpening")

N_SAMPLES, EVERY = 64, 140
N_PROMPTS = (32, 8, 8)  # of the three domains
KS = [1, 2, 4, 8, 16, 32, 64]
# arm: recipe, problems, tokens
ARMS = {
    "grpo": ("grpo", "problems", TOKENS),
    "sgpo": ("sgpo", "problems", TOKENS),
    "sgpo_unseen_letters": ("sgpo", "unseen_letters", TOKENS // 4),
}


def probe_set() -> list[dict]:
    trained, longer, unseen = N_PROMPTS
    domains = {
        "trained": make_dataset(trained, N_OPERATIONS, seed=2, length=BASE.length),
        "one_operation_more": make_dataset(longer, N_OPERATIONS + 1, seed=3, length=BASE.length),
        "unseen_letters": make_dataset(unseen, N_OPERATIONS, seed=4, length=BASE.length, alphabet=SECOND_ALPHABET),
    }
    return [{**row, "domain": domain} for domain, rows in domains.items() for row in rows]


def train(arm: str, seed: int, base: Path) -> dict:
    recipe, problems, tokens = ARMS[arm]
    folder = OUTPUT / f"{arm}-seed{seed}"
    overrides = {
        "model_name_or_path": base,
        "dataset_name": OUTPUT / f"{problems}.jsonl",
        "output_dir": folder,
        "seed": seed,
        "disable_tqdm": "true",
        "max_steps": 10_000,
        "log_completions": "true",  # for the report
        "num_completions_to_print": 1,
        "per_device_eval_batch_size": 256,  # rows per forward pass of a probe
    }
    trainer = quiet_trainer(RECIPE / f"{recipe}.yaml", overrides)
    budget = TokenBudget(tokens)
    trainer.add_callback(budget)
    trainer.add_callback(
        SharpeningCallback(
            trainer=trainer,
            prompts=probe_set(),
            n_samples=N_SAMPLES,
            every=EVERY,
            at_begin=(arm, seed) == ("grpo", 0),  # the base against itself, once
            judge=StepwiseJudge(first_wrong_block, segmenter=segment_blocks),
            extract_answer=lambda text: text.split(";")[-1].strip() or None,
            batch_rank=True,
            batch_update=True,
            batch_size=256,
            cache_dir=OUTPUT / "cache",
        )
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_state()
    history = trainer.state.log_history
    probes = [entry for entry in history if "sharpening/pass@1" in entry]
    training = [entry for entry in history if "sgpo/accuracy" in entry]
    moved = sum(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    return {
        "arm": arm,
        "seed": seed,
        "learning_rate": trainer.args.learning_rate,
        "updates": len(training),
        "generated_tokens": budget.generated,
        "seconds": round(seconds, 1),
        "probe_seconds": round(sum(entry["sharpening/seconds/total"] for entry in probes), 1),
        "parameters_moved": f"{moved} of {len(before)}",
        "groups": {
            kind: statistics.mean(entry.get(f"sgpo/groups/{kind}", 0.0) for entry in training)
            for kind in ("solved", "mixed", "failed", "rescued", "tied")
        },
        "batches": {
            key: statistics.mean(values)
            for key in ("rank_by_policy", "displacement", "uplift_q1", "uplift_q2", "uplift_q3", "uplift_q4")
            if (
                values := [
                    e[f"sharpening/batch/{key}"] for e in history if e.get(f"sharpening/batch/{key}") is not None
                ]
            )
        },
        "probes": [
            {
                "step": entry["step"],
                "entropy": entry["sharpening/entropy"],
                "seconds": {
                    k.split("/")[-1]: round(v, 2) for k, v in entry.items() if k.startswith("sharpening/seconds")
                },
                "domains": compare(folder / "sharpening", entry["step"]),
            }
            for entry in probes
        ],
    }


def overhead(base: Path, updates: int = 40) -> dict:
    """What the metrics of training batches cost that need no forward pass, as a share of a training step."""
    overrides = {
        "model_name_or_path": base,
        "dataset_name": OUTPUT / "problems.jsonl",
        "output_dir": OUTPUT / "overhead",
        "disable_tqdm": "true",
        "max_steps": updates,
    }
    trainer = quiet_trainer(RECIPE / "sgpo.yaml", overrides)
    no_probe = {"every": 10**9, "at_begin": False, "at_end": False, "sample_base": False, "base_logps": False}
    callback = SharpeningCallback(trainer=trainer, prompts=probe_set(), n_samples=1, **no_probe)
    trainer.add_callback(callback)
    trainer.train()
    steps = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]
    ours = callback._batches.seconds / updates
    return {
        "milliseconds_per_step": round(1000 * ours, 3),
        "share_of_a_step": round(ours / statistics.median(steps), 5),
    }


def compare(folder: Path, step: int) -> dict:
    """Base and policy, domain by domain, from the files that the callback wrote."""
    prompts, base, policy = (
        {name: np.array(values) for name, values in pq.read_table(folder / f"{file}.parquet").to_pydict().items()}
        for file in ("prompts", "base", f"policy_{step:06d}")
    )
    found = {}
    for domain in dict.fromkeys(prompts["domain"]):
        ids = prompts["prompt_id"][prompts["domain"] == domain]
        mine, bases = np.isin(policy["prompt_id"], ids), np.isin(base["prompt_id"], ids)

        def count(table, column, ids=ids):
            return np.array([table[column][table["prompt_id"] == i].sum() for i in ids])

        base_c, c, n = count(base, "correct"), count(policy, "correct"), np.full(len(ids), N_SAMPLES)
        correct, prompt = policy["correct"][mine], policy["prompt_id"][mine]
        logp, logp_base, n_tokens = (policy[name][mine] for name in ("logp_policy", "logp_base", "n_tokens"))
        fit, line = tilt_fit(logp - logp_base, correct, prompt), tilt_line(n, base_c, n, c)
        table = support_table(base_c, c, n)
        found[domain] = clean(
            {
                "n_prompts": len(ids),
                "pass_at_k": {k: round(float(pass_at_k(n, c, k).mean()), 4) for k in KS},
                "base_pass_at_k": {k: round(float(pass_at_k(n, base_c, k).mean()), 4) for k in KS},
                "pass_at_1": interval(mean_estimate(c / n)),
                "process_pass_at_k": {
                    k: round(float(pass_at_k(n, count(policy, "process_correct"), k).mean()), 4)
                    for k in (KS[0], 8, KS[-1])
                },
                "base_process_pass_at_k": {
                    k: round(float(pass_at_k(n, count(base, "process_correct"), k).mean()), 4)
                    for k in (KS[0], 8, KS[-1])
                },
                "support": {
                    "P": table.preserved,
                    "E": table.expanded,
                    "S": table.shrunk,
                    "O": table.out_of_reach,
                    "E_null": round(table.expanded_null, 2),
                    "S_null": round(table.shrunk_null, 2),
                    "p_expanded": table.p_expanded,
                    "p_shrunk": table.p_shrunk,
                    "unseen_rate": table.unseen_rate,
                },
                "tilt": {
                    "beta": interval(fit.beta),
                    "sd_correct": fit.sd_correct,
                    "sd_incorrect": fit.sd_incorrect,
                    "n_prompts": fit.n_prompts,
                    "slope": interval(line.slope),
                    "intercept": interval(line.intercept),
                },
                "kl_k1": kl_k1(logp, logp_base),
                "base_perplexity": perplexity(logp_base, n_tokens),
                "base_perplexity_of_base_samples": perplexity(base["logp_base"][bases], base["n_tokens"][bases]),
                "perplexity": perplexity(logp, n_tokens),
                "rank_by_base": rank_of_correct(logp_base, correct, prompt).value,
                "efficiency_gap": sampling_efficiency_gap(n, base_c, n, c, KS[-1]).value,
                "saturation": {
                    f"{b.low:g}-{b.high:g}": [round(b.gain.value, 4), round(b.n_prompts, 1)]
                    for b in saturation(n, base_c, n, c)
                    if b.n_prompts > 0
                },
            }
        )
    return found


def interval(estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def clean(value):
    """Rounded, and without NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 4)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    base = load_or_pretrain(OUTPUT / "base", BASE)
    make_dataset(4000, N_OPERATIONS, seed=1, length=BASE.length).to_json(OUTPUT / "problems.jsonl")
    make_dataset(4000, N_OPERATIONS, seed=1, length=BASE.length, alphabet=SECOND_ALPHABET).to_json(
        OUTPUT / "unseen_letters.jsonl"
    )
    runs = []
    for seed in args.seeds:
        for arm in ARMS:
            kept = OUTPUT / f"{arm}-seed{seed}" / "result.json"
            if not kept.exists():
                result = train(arm, seed, base)
                kept.write_text(json.dumps(result))
            runs.append(json.loads(kept.read_text()))
            last = runs[-1]["probes"][-1]["domains"]["trained"]
            print(
                f"{arm} {seed}: {runs[-1]['seconds']} s, probes {runs[-1]['probe_seconds']} s, pass@1 "
                f"{last['pass_at_k']['1']} pass@64 {last['pass_at_k'][str(KS[-1])]} (base {last['base_pass_at_k'][str(KS[-1])]}), "
                f"{last['support']}",
                flush=True,
            )
    record = {
        **provenance(("trl", "transformers", "torch", "accelerate"), threads=torch.get_num_threads()),
        "command": " ".join(["python", "-m", "benchmarks.sharpening.run", *sys.argv[1:]]),
        "batch_metrics": overhead(base),
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_completion_length": 40, "n": N_SAMPLES},
        "runs": runs,
    }
    write_results(HERE / "results.json", record)


if __name__ == "__main__":
    main()
