"""`VLLMPoolingJudge` against a real vLLM with a tiny process reward model of each layout that vLLM serves."""

import json

import pytest
from prm_families import make_family
from vllm_server import serving

from trl_sgpo import JudgeItem
from trl_sgpo.judges import PRMJudge, VLLMPoolingJudge


STEPS = ("Add 2 and 3.\nThat is easy.", "2 + 3 = 6 <extra_0>", "Doubled, that is 12.", "So it is 12.")
ITEMS = [JudgeItem(f"What is {i} + 3, doubled?", STEPS[: 1 + i % 4]) for i in range(12)]


@pytest.fixture(scope="module", params=["qwen2.5-math-prm", "trl"])
def family(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("models"), hidden_size=128)  # heads of 32


def step_tag_id(family):
    return family.tokenizer.convert_tokens_to_ids("<extra_0>")


def test_the_scores_are_those_of_the_same_model_in_process(family, tmp_path):
    options = ()
    if family.preset == "qwen2.5-math-prm":
        # Its rows are those at the step tag, and vLLM has the id of the real vocabulary
        options = ("--pooler-config", json.dumps({"step_tag_id": step_tag_id(family)}))
    here = PRMJudge(str(family.folder), device="cpu")
    expected = here.scores(ITEMS)
    assert len({round(score, 2) for row in expected for score in row}) > 5  # they differ
    with serving(family.folder, tmp_path / "log", "--runner", "pooling", *options) as server:
        there = VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder))
        for row, own in zip(there.scores(ITEMS), expected, strict=True):
            assert row == pytest.approx(own, abs=1e-3)
        for remote, own in zip(there.judge(ITEMS), here.judge(ITEMS), strict=True):
            assert (remote.status, remote.first_error, remote.n_steps) == (own.status, own.first_error, own.n_steps)


@pytest.mark.parametrize("family", ["qwen2.5-math-prm"], indirect=True)
def test_a_server_with_another_step_tag_says_how_to_set_it(family, tmp_path):
    with serving(family.folder, tmp_path / "log", "--runner", "pooling") as server:
        for verdict in VLLMPoolingJudge("m", server.url, tokenizer=str(family.folder)).judge(ITEMS):
            assert verdict.status == "abstain"
            assert "the server gave 0 rows" in verdict.reason
            assert f"""--pooler-config '{{"step_tag_id": {step_tag_id(family)}}}'""" in verdict.reason
