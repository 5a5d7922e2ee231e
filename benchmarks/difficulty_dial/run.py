"""
The difficulty dial of RewriteChain, measured: the share of groups of eight that fail, by pretraining noise, number of
letters and number of operations.

    python -m benchmarks.difficulty_dial.run
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import provenance, write_results
from trl_sgpo.tasks.rewrite_chain import PretrainConfig, evaluate, load_or_pretrain, make_dataset


HERE = Path(__file__).parent
OUTPUT = Path("outputs")
BASES = {
    "difficulty_dial/noise-0.3": PretrainConfig(noise=0.3),
    "difficulty_dial/noise-0.6": PretrainConfig(noise=0.6),
    "quickstart/base": PretrainConfig(),  # the quickstart's
    "difficulty_dial/noise-0.95-length-4": PretrainConfig(noise=0.95, length=4),
}


def main():
    rows = []
    for folder, config in BASES.items():
        path = load_or_pretrain(OUTPUT / folder, config)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        for n_operations in (2, 3, 4, 5):
            prompts = make_dataset(128, n_operations, seed=2, length=config.length)["prompt"]
            dial = {"noise": config.noise, "length": config.length, "n_operations": n_operations}
            rows.append({**dial, **asdict(evaluate(model, tokenizer, prompts))})
            print(json.dumps(rows[-1]), flush=True)
    record = {
        **provenance(("trl", "transformers", "torch"), threads=torch.get_num_threads()),
        "config": asdict(PretrainConfig()),
        "rows": rows,
    }
    write_results(HERE / "results.json", record)


if __name__ == "__main__":
    main()
