"""Annotated solutions that a tiny judge can learn from, and the arguments of its training."""

from toys import write_rows

from trl_sgpo.scripts.judge_train import make_parser


PROBLEMS = [f"{a} {b} [R] [V] =" for a in "abcdef" for b in "abcdef"]


def solution(problem, first_error, n_steps=3):
    """A made-up rule that a tiny model can learn: a step with `f` in it is wrong."""
    steps = ["a b f ;" if i == first_error else "a b c ;" for i in range(n_steps)]
    return {"prompt": problem, "completions": steps, "labels": [i != first_error for i in range(n_steps)]}


def write_solutions(path):
    """One solution of each problem: the first, the second, the third or no step is wrong."""
    return write_rows(path, [solution(p, i % 4 if i % 4 < 3 else -1) for i, p in enumerate(PROBLEMS)])


def parsed(**arguments):
    """The arguments as they come from a command line."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dtype": "float32",
        "per_device_train_batch_size": 8,
        "max_length": 4096,
    }
    words = []
    for name, value in {**defaults, **arguments}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return make_parser().parse_args_and_config(words, fail_with_unknown_args=True)
