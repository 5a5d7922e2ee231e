"""The training script as its users run it."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from trl_sgpo import StepwiseJudge
from trl_sgpo.loading import load_judge, load_object, load_rows, load_stepwise_judge
from trl_sgpo.scripts.sgpo import make_parser


ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.parent for path in (ROOT / "recipes").glob("*/sgpo.yaml"))

JUDGES = '''
"""Judges of a user's own."""

from trl_sgpo import StepJudge, StepwiseJudge, Verdict


def by_length(problem, steps, answer):
    assert "####" in answer
    return sum(map(len, steps)) % len(steps)


class Own(StepJudge):
    def __init__(self, index):
        self.index = index

    def judge(self, items):
        return [Verdict.error(self.index % len(item.steps)) for item in items]


def first_message(prompt):
    return prompt[0]["content"]


def halves(text):
    return [(0, len(text) // 2), (len(text) // 2, len(text))]


ready = StepwiseJudge(Own(0), transform="identity")
'''


def run(*arguments, cwd):
    result = subprocess.run(
        [sys.executable, "-m", "trl_sgpo.scripts.sgpo", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CI": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    return result


@pytest.fixture
def workplace(tmp_path, make_chat_model, chat_tokenizer, monkeypatch):
    """A folder with a tiny model, GSM8K-like rows and a module of judges; it is the working directory."""
    make_chat_model().save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "my_judges.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_judges", None)
    return tmp_path


TINY = {
    "model_name_or_path": "base",
    "dataset_name": "gsm8k.jsonl",
    "dataset_map": "recipes.gsm8k.prepare.row_to_prompt",
    "reward_funcs": ["accuracy_reward"],
    "dtype": "float32",
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 48,
    "learning_rate": 1e-4,
    "max_steps": 3,
    "save_steps": 1,
    "logging_steps": 1,
    "log_completions": True,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
}


@pytest.mark.slow
def test_gsm8k_questions_from_a_path(workplace, gsm8k_path):
    """The whole script: conversational prompts, TRL's accuracy reward, a judge function, save, card, resume."""
    (workplace / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    common = ["--config", "tiny.yaml", "--judge", "my_judges.by_length", "--output_dir", "out"]
    result = run(*common, cwd=workplace)
    assert result.returncode == 0, result.stderr[-4000:]
    state = json.loads((workplace / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    log = [entry for entry in state["log_history"] if "sgpo/judge_calls" in entry]
    assert [entry["sgpo/groups/failed"] for entry in log] == [1.0] * 3
    assert all(entry["sgpo/judge_calls"] > 0 and entry["sgpo/abstain_rate"] == 0 for entry in log)
    assert max(entry["grad_norm"] for entry in log) > 0
    table = pd.read_parquet(workplace / "out" / "completions" / "completions_00003.parquet")
    assert table["judge_first_error"].notna().any()
    assert (workplace / "out" / "model.safetensors").exists()
    card = (workplace / "out" / "README.md").read_text()
    assert "my_judges.by_length" in card
    assert "gsm8k.jsonl" not in card  # a local path is no dataset of the Hub
    resumed = run(*common, "--max_steps", 4, "--resume_from_checkpoint", "true", cwd=workplace)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert "Training goes on from out/checkpoint-3." in resumed.stdout
    assert "goes on" not in result.stdout
    assert json.loads((workplace / "out" / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.slow
def test_a_bad_argument_ends_the_run_before_it_begins(workplace, gsm8k_path):
    (workplace / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    result = run("--config", "tiny.yaml", "--judge", "my_judges.missing", "--output_dir", "out", cwd=workplace)
    assert result.returncode != 0
    assert "judge='my_judges.missing' could not be imported from the working directory" in result.stderr
    assert not (workplace / "out").exists()
    result = run(
        "--config", "tiny.yaml", "--stepwise_judge_args", '{"gamma": 0.3}', "--output_dir", "out", cwd=workplace
    )
    assert "but no judge, so the run would be plain GRPO" in result.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
class TestRecipes:
    def test_the_pair_differs_in_the_judge_alone(self, recipe):
        grpo, sgpo = (yaml.safe_load((recipe / f"{arm}.yaml").read_text()) for arm in ("grpo", "sgpo"))
        different = {key for key in grpo.keys() | sgpo.keys() if grpo.get(key) != sgpo.get(key)}
        judge = {"judge", "judge_args", "stepwise_judge_args"}
        assert "judge" in different
        assert different <= judge
        assert all(key not in grpo for key in different)

    def test_the_readme_says_what_to_expect(self, recipe):
        text = (recipe / "README.md").read_text()
        for word in ("python", "sgpo/", "hardware", "minutes"):
            assert word.lower() in text.lower()

    @pytest.mark.parametrize("arm", ["grpo", "sgpo"])
    def test_the_file_is_understood(self, recipe, arm, monkeypatch):
        monkeypatch.chdir(ROOT)
        overrides = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "out", "--report_to", "none"]
        script_args, training_args, model_args, _ = make_parser().parse_args_and_config(
            ["--config", str(recipe / f"{arm}.yaml"), *overrides], fail_with_unknown_args=True
        )
        assert bool(script_args.judge) == (arm == "sgpo")
        assert training_args.num_generations == 8
        assert model_args.model_name_or_path


class TestLoading:
    def test_judges(self, workplace):
        from trl_sgpo.judges.openai import OpenAIJudge

        assert load_judge("my_judges.by_length").__name__ == "by_length"
        assert load_judge("my_judges.Own", {"index": 2}).index == 2
        assert load_judge("my_judges.Own", '{"index": 3}').index == 3
        assert load_judge("my_judges.ready").transform == "identity"
        assert isinstance(load_judge("openai", {"model": "m", "base_url": "http://localhost:1/v1"}), OpenAIJudge)

    @pytest.mark.parametrize(
        ("judge", "judge_args", "message"),
        [
            ("judgy", None, "judge='judgy' is neither a known name nor a dotted path"),
            ("my_judges.missing", None, "judge='my_judges.missing' could not be imported"),
            ("no_such_module.f", None, "judge='no_such_module.f' could not be imported"),
            ("my_judges.Own", "{index: 3", "is not valid JSON"),
            ("my_judges.Own", "[3]", "is no mapping of names to values"),
            ("my_judges.Own", {"place": 3}, "do not fit judge='my_judges.Own'"),
            ("openai", None, "argument: 'model'. Give what its constructor takes, written like '{\"model\":"),
            ("my_judges.by_length", {"index": 3}, "is not a class, so there is no constructor"),
        ],
    )
    def test_bad_judges(self, workplace, judge, judge_args, message):
        with pytest.raises(ValueError, match=message):
            load_judge(judge, judge_args)

    def test_every_argument_of_the_stepwise_judge_can_be_set(self, workplace):
        arguments = {
            "beta": 5.0,
            "gamma": 0.3,
            "transform": "identity",
            "unit": "characters",
            "segmenter": "my_judges.halves",
            "no_error": "last_step",
            "reference_column": "answer",
            "include_thinking": True,
            "problem": "my_judges.first_message",
        }
        assert set(arguments) == set(inspect.signature(StepwiseJudge).parameters) - {"judge"}
        for given in (arguments, json.dumps(arguments)):
            judge = load_stepwise_judge("my_judges.Own", {"index": 1}, given)
            assert judge.segmenter("abcd") == [(0, 2), (2, 4)]
            assert judge.problem([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == "a"
            values = {name: value for name, value in arguments.items() if name not in ("segmenter", "problem")}
            assert {name: getattr(judge, name) for name in values} == values
        assert load_stepwise_judge("my_judges.ready").judge.index == 0

    @pytest.mark.parametrize(
        ("judge", "arguments", "message"),
        [
            (
                "my_judges.by_length",
                {"rts_gamma": 0.3},
                r"unknown keys \['rts_gamma'\]. StepwiseJudge takes \['beta', 'gamma'",
            ),
            ("my_judges.by_length", {"unit": "words"}, "unit='words' is unknown"),
            ("my_judges.by_length", "{gamma: 1", "stepwise_judge_args='{gamma: 1' is not valid JSON"),
            (
                "my_judges.by_length",
                {"segmenter": "my_judges.no"},
                "stepwise_judge_args: segmenter='my_judges.no' could not",
            ),
            (
                "my_judges.by_length",
                {"problem": "my_judges.no"},
                "stepwise_judge_args: problem='my_judges.no' could not",
            ),
            ("my_judges.ready", {"gamma": 0.3}, "is a ready StepwiseJudge, which has its arguments already"),
        ],
    )
    def test_bad_arguments_of_the_stepwise_judge(self, workplace, judge, arguments, message):
        with pytest.raises(ValueError, match=message):
            load_stepwise_judge(judge, None, arguments)

    def test_rows(self, gsm8k_path):
        assert load_rows(str(gsm8k_path))["train"].column_names == ["question", "answer"]

    def test_prepared_gsm8k_rows(self, gsm8k_path, monkeypatch):
        from trl.rewards import accuracy_reward

        monkeypatch.chdir(ROOT)
        row = load_rows(str(gsm8k_path))["train"].map(load_object("recipes.gsm8k.prepare.row_to_prompt", "x"))[0]
        assert "<<" not in row["reference"]
        assert row["reference"].startswith("He has 3*4=12 apples.\nSo 12-2=10 are left.")
        # The unit is the reason why the prompt asks for a number without one
        answers = [[{"role": "assistant", "content": rf"So it is \boxed{{{n}}}."}] for n in (10, 11, "10 eggs")]
        assert accuracy_reward(answers, [row["solution"]] * 3) == [1.0, 0.0, 0.0]
        assert "a number without a unit" in row["prompt"][0]["content"]
