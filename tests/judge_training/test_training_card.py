"""The model card of a trained judge, and its push to the Hub."""

import json

import pytest
import yaml
from solutions_to_learn import parsed, write_solutions
from toys import save_model

from trl_sgpo.judge_training.arguments import JudgeTrainArguments
from trl_sgpo.judge_training.card import model_card
from trl_sgpo.judge_training.data import read_data
from trl_sgpo.judges.prm import PRMJudge
from trl_sgpo.scripts import judge_train


@pytest.fixture
def data(tmp_path):
    return write_solutions(tmp_path / "train.jsonl")


@pytest.fixture
def base(tmp_path, make_model, tokenizer):
    return save_model(make_model(), tokenizer, tmp_path / "base")


def test_the_card_names_what_is_on_the_hub_and_nothing_else(data):
    found = read_data(JudgeTrainArguments(data=[str(data)]))
    arguments = JudgeTrainArguments(data=["someone/steps", str(data)])
    result = {"f1": 0.5, "acc_error": 0.4, "acc_correct": 2 / 3, "threshold": 0.25, "dev_rows": 9}
    card = model_card("me/judge", arguments, "Qwen/Qwen2.5-0.5B", found, result)
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert front["datasets"] == ["someone/steps"]
    assert front["pipeline_tag"] == "token-classification"
    assert "someone/steps, train.jsonl" in card
    assert str(data.parent) not in card
    assert "| F1: harmonic mean of the next two | 0.500 |" in card


def test_push(data, base, tmp_path, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, private=None, exist_ok=False):
            return type("Repo", (), {"repo_id": name})()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed[repo_id] = {path.name: path.read_text() for path in folder_path.glob("*.[jm][sd]*")}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    judge_train.run(
        *parsed(
            data=[data],
            model_name_or_path=base,
            output_dir=tmp_path / "judge",
            max_steps=1,
            push_to_hub=True,
            hub_model_id="me/my-judge",
        )
    )
    files = pushed["me/my-judge"]
    assert json.loads(files["config.json"])["prm_spec"]["threshold"] == PRMJudge(tmp_path / "judge").threshold
    assert 'PRMJudge("me/my-judge")' in files["README.md"]
    assert "## Evaluation" in files["README.md"]
