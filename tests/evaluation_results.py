"""Results of an evaluation that nobody ran."""

import numpy as np

from trl_sgpo.analysis.jsonable import jsonable
from trl_sgpo.evaluation.results import Answers, comparison, summary


def made_up():
    """Two models on two sets of four problems, as `results.json` holds them."""

    def answers(correct):
        correct = np.array(correct, dtype=bool)
        return Answers(correct, np.ones_like(correct), np.full(correct.shape, 100.0), np.zeros_like(correct))

    benchmarks = {
        ("easy", "greedy"): ([[0], [0], [0], [1]], [[0], [1], [1], [1]]),
        ("hard", "avg@2"): ([[0, 0]] * 4, [[0, 1], [1, 1], [0, 0], [0, 0]]),
    }
    return jsonable(
        {
            "benchmarks": {
                f"{name} {kind}": {
                    "set": name,
                    "kind": kind,
                    "models": {
                        "base": summary(answers(base), 100),
                        "sgpo": {
                            **summary(answers(other), 100),
                            "against_base": comparison(answers(base), answers(other), 100),
                        },
                    },
                }
                for (name, kind), (base, other) in benchmarks.items()
            },
            "models": {"base": "owner/base", "sgpo": "sgpo"},
            "sets": {name: {"name": name, "unparseable": 0} for name in ("easy", "hard")},
            "decoding": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 2048, "engine": "vllm"},
            "scoring": "math-verify",
            "versions": {"trl-sgpo": "0.1.0", "transformers": "5.0"},
        }
    )
