"""`trl-sgpo evaluate` whose models vLLM runs."""

import os
from unittest import mock

from toys import byte_tokenizer, save_model, write_rows, writer
from vllm_server import ENVIRONMENT

from trl_sgpo.evaluation.evaluation import evaluate
from trl_sgpo.scripts.evaluate import EvaluateArguments


SIZES = {"hidden_size": 64, "intermediate_size": 128}  # heads of 32


def test_it_says_what_transformers_says(tmp_path, monkeypatch):
    """Greedy answers are the same. Sampled ones come about as often: their seeds are other generators'."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "set.jsonl", [{"problem": f"Problem {i}", "answer": "6"} for i in range(8)])
    tokenizer = byte_tokenizer()
    save_model(writer(tokenizer, {"6": 0.25, "9": 0.75}, **SIZES), tokenizer, tmp_path / "base")
    save_model(writer(tokenizer, {"6": 0.9, "9": 0.1}, **SIZES), tokenizer, tmp_path / "trained")
    found = {}
    with mock.patch.dict(os.environ, ENVIRONMENT):
        for engine, engine_args in (
            ("transformers", {}),
            ("vllm", {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}),
        ):
            found[engine] = evaluate(
                EvaluateArguments(
                    models=["base", "trained"],
                    sets=["set.jsonl", "set.jsonl@32"],
                    output=engine,
                    engine=engine,
                    engine_args=engine_args,
                    max_new_tokens=16,
                    temperature=1.0,
                    top_p=1.0,
                    resamples=100,
                )
            )["benchmarks"]
    for model, share in (("base", 0.25), ("trained", 0.9)):
        greedy = [found[engine]["set greedy"]["models"][model]["accuracy"]["value"] for engine in found]
        assert greedy[0] == greedy[1] == (model == "trained")
        sampled = [found[engine]["set avg@32"]["models"][model] for engine in found]
        for one in sampled:  # 256 samples
            assert abs(one["accuracy"]["value"] - share) < 0.12
            assert one["tokens"] == len(r"\boxed{6}") + 1
            assert one["cut"] == one["no_answer"] == 0
