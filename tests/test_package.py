"""What an install promises."""

import subprocess
import sys

import trl_sgpo


def test_public_names():
    assert set(trl_sgpo.__all__) == {
        "CallableJudge",
        "JudgeItem",
        "SGPOConfig",
        "SGPOTrainer",
        "StepJudge",
        "StepwiseJudge",
        "Verdict",
    }
    for name in trl_sgpo.__all__:
        assert getattr(trl_sgpo, name).__name__ == name
    assert set(trl_sgpo.__all__) <= set(dir(trl_sgpo))


def imported_modules(statement):
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_is_quick():
    assert not imported_modules("import trl_sgpo") & {"torch", "transformers", "trl", "datasets"}
    for light in (
        "trl_sgpo.steps, trl_sgpo.loading",
        "trl_sgpo.judge_training.arguments, trl_sgpo.judge_training.data, trl_sgpo.judge_training.card",
        "trl_sgpo.scripts.judge_train",
        "trl_sgpo.scripts.judge_eval, trl_sgpo.judge_evaluation.evaluation, trl_sgpo.judge_evaluation.tables",
        "trl_sgpo.scripts.evaluate, trl_sgpo.evaluation.evaluation, trl_sgpo.evaluation.tables, trl_sgpo.evaluation.card",
    ):
        heavy = {"torch", "transformers", "trl", "datasets", "matplotlib", "rich"}
        assert not imported_modules(f"import {light}") & heavy


def test_no_optional_dependency_is_imported():
    optional = {"aiohttp", "openai", "matplotlib", "rich", "math_verify", "vllm", "deepspeed"}
    assert (
        not imported_modules("import trl_sgpo.judges, trl_sgpo.judges.openai, trl_sgpo.tasks.rewrite_chain") & optional
    )
