"""
Run by `test_sharpening.py` on one process and on several: two updates with a probe before, between and after.

    torchrun ... sharpening_ranks.py <folder> plain|fails|zero3 ...
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo.analysis import SharpeningCallback
from trl_sgpo.tasks.rewrite_chain import PretrainConfig, build_model, build_tokenizer, make_dataset


ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def train(folder: Path, mode: str, probed: bool = True) -> dict:
    """Trains, and returns this rank's log: of the probes, and of the training itself."""
    rank, n_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokenizer = build_tokenizer()
    model = build_model(PretrainConfig(layers=1, width=32, heads=2), tokenizer)
    if mode == "zero3":
        if rank == 0:
            model.save_pretrained(folder / "policy")
        dist.barrier()
        model = str(folder / "policy")
    probe = make_dataset(3, n_operations=2, seed=9)  # three prompts of four samples: uneven for two ranks
    probe_prompts = set(probe["prompt"])

    def odd_length(prompts, completions, **kwargs):
        if mode == "fails" and rank == 1 and set(prompts) & probe_prompts:
            raise RuntimeError("this rank has lost its verifier")
        return [float(len(completion.split()) % 2) for completion in completions]

    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8 // n_ranks,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        max_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        deepspeed=ZERO3 if mode == "zero3" else None,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=odd_length,
        args=args,
        train_dataset=make_dataset(12, n_operations=2, seed=0),
        processing_class=tokenizer,
    )
    if probed:
        callback = SharpeningCallback(
            trainer=trainer,
            prompts=probe,
            n_samples=4,
            every=1,
            batch_size=5,
            cache_dir=folder / "cache",
            batch_update=True,
        )
        trainer.add_callback(callback)
    trainer.train()
    history = trainer.state.log_history
    return {
        "probes": [entry for entry in history if "sharpening/pass@1" in entry],
        "training": [[entry["loss"], entry["grad_norm"], entry["num_tokens"]] for entry in history if "loss" in entry],
    }


if __name__ == "__main__":
    out, modes = Path(sys.argv[1]), sys.argv[2:]
    if "zero3" in modes:
        import deepspeed

        deepspeed.init_distributed("gloo")
    for name in modes:
        logs = {"with": train(out / name, name), "without": train(out / name / "without", name, probed=False)}
        (out / name / f"rank{os.environ['RANK']}.json").write_text(json.dumps(logs))
    dist.destroy_process_group()
    # torch now and then aborts while the interpreter ends, see two_ranks.py. Everything to be tested is written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
