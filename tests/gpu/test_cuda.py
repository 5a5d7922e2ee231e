"""
The trainer and the judges with a model on a CUDA device, in bf16. Not among the other tests, which need no such device:

    python -m pytest tests/gpu
"""

import copy
import os
import signal
import subprocess
from importlib.util import find_spec

import pytest
import torch
from conftest import assert_every_parameter_moved, assert_same_parameters, logged, parameters
from prm_families import make_family
from server import free_port
from toys import all_failed, all_mixed, byte_tokenizer, save_model, stepwise, tiny_llama
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo.judges import GenerativeJudge, JudgeItem
from trl_sgpo.judges.prm import PRMJudge


ITEMS = [
    JudgeItem(
        "What is 2 + 3, doubled?", ("Add 2 and 3.", "2 + 3 = 6", "Doubled, that is 12.", "So the answer is 12.")
    ),
    JudgeItem("What is 3 * 3?", ("Three threes.", "Three and three is six.")),
    JudgeItem("What is 2 + 2?", ("5",)),
] * 4
ON_CUDA = {"use_cpu": False, "bf16": True}


@pytest.fixture
def make_cuda_trainer(make_trainer):
    return lambda rewards, *args, **config: make_trainer(rewards, *args, **{**ON_CUDA, **config})


# The trainer


@pytest.mark.parametrize("failed_groups", ["sgpo", "prefix"])
@pytest.mark.parametrize("skip_dead_tokens", [False, True])
def test_training(make_cuda_trainer, failed_groups, skip_dead_tokens):
    rewards = [all_failed, stepwise()]
    trainer = make_cuda_trainer(rewards, failed_groups=failed_groups, skip_dead_tokens=skip_dead_tokens)
    assert trainer.model.device.type == "cuda"
    before = parameters(trainer)
    trainer.train()
    assert_every_parameter_moved(before, trainer)
    assert logged(trainer, "sgpo/groups/failed") == [1.0] * 4
    assert all(torch.isfinite(torch.tensor(logged(trainer, "grad_norm"))))


def test_without_a_failed_group_it_is_grpo(make_cuda_trainer):
    ours = make_cuda_trainer([all_mixed, stepwise()], reward_weights=[1.0, 0.0])
    ours.train()
    theirs = make_cuda_trainer([all_mixed], GRPOTrainer, GRPOConfig)  # sets the seed again
    theirs.train()
    assert_same_parameters(ours, theirs)


def test_a_policy_that_was_loaded_by_a_device_map(make_cuda_trainer, tokenizer, make_model, tmp_path):
    folder = save_model(make_model(), tokenizer, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": 0})
    trainer = make_cuda_trainer([all_failed, stepwise()], trainer_args={"model": model}, failed_groups="prefix")
    before = parameters(trainer)
    trainer.train()
    assert_every_parameter_moved(before, trainer)


# Judges


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    return str(make_family("qwen2.5-math-prm", tmp_path_factory.mktemp("prm")).folder)


@pytest.fixture(scope="module")
def writer_folder(tmp_path_factory):
    tokenizer = byte_tokenizer()
    return str(save_model(tiny_llama(tokenizer, hidden_size=64), tokenizer, tmp_path_factory.mktemp("judge")))


def test_prm_scores_equal_those_of_the_cpu(prm):
    on_cpu = PRMJudge(prm, device="cpu").scores(ITEMS)
    judge = PRMJudge(prm, dtype=torch.float32)
    assert judge.device == torch.device("cuda:0")
    for here, there in zip(judge.scores(ITEMS), on_cpu, strict=True):
        assert here == pytest.approx(there, abs=1e-3)
    judge = PRMJudge(prm)
    assert next(judge._parts[0].parameters()).dtype == torch.bfloat16
    for here, there in zip(judge.scores(ITEMS), on_cpu, strict=True):
        assert here == pytest.approx(there, abs=0.1)


def test_a_prm_that_waits_in_the_memory_of_the_cpu(prm):
    judge = PRMJudge(prm, offload=True)
    before = torch.cuda.memory_allocated()
    assert [v.status for v in judge.judge(ITEMS)] == [v.status for v in PRMJudge(prm, device="cpu").judge(ITEMS)]
    assert next(judge._parts[0].parameters()).device.type == "cpu"
    assert torch.cuda.memory_allocated() == before


def test_what_does_not_fit_is_halved_and_a_single_one_is_an_abstention(prm):
    judge = PRMJudge(prm)
    long = JudgeItem("?", ("x" * 900,))
    once = torch.cuda.memory_stats()["num_ooms"]
    torch.cuda.empty_cache()
    share = (torch.cuda.memory_reserved() + 2**21) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        verdicts = judge.judge([long] * 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_stats()["num_ooms"] > once
    assert len(verdicts) == 64
    assert all(v.status != "abstain" or "does not fit into the memory of cuda:0" in v.reason for v in verdicts)


def test_a_generative_judge(writer_folder):
    """Its model is random: read by its scores it says something, and the same as on the CPU."""
    judge = GenerativeJudge(writer_folder, answer="score", dtype=torch.float32)
    assert judge.device == torch.device("cuda:0")
    here, there = (one.judge(ITEMS) for one in (judge, GenerativeJudge(writer_folder, answer="score", device="cpu")))
    assert {v.status for v in here} == {"error"}
    assert [v.first_error for v in here] == [v.first_error for v in there]


def test_a_generative_judge_that_samples_leaves_the_policys_samples_as_they_are(writer_folder):
    judge = GenerativeJudge(writer_folder, votes=2, temperature=0.7, max_new_tokens=16)
    torch.cuda.manual_seed(0)
    state = torch.cuda.get_rng_state()
    assert {v.status for v in judge.judge(ITEMS)} == {"abstain"}  # a random model's words
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_judge_in_training(make_cuda_trainer, prm):
    judge = PRMJudge(prm)
    trainer = make_cuda_trainer([all_failed, stepwise(judge)], failed_groups="prefix", max_steps=2)
    before = copy.deepcopy(judge._parts[0].state_dict())
    trainer.train()
    assert logged(trainer, "sgpo/abstain_rate") == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in judge._parts[0].state_dict().items())


# vLLM


@pytest.fixture
def server(tmp_path):
    """`server(folder)`: the address of TRL's vLLM server, on the second device."""
    started = []

    def start(folder):
        port = free_port()
        command = ["trl", "vllm-serve", "--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1", "HF_HUB_OFFLINE": "1"}
        with open(tmp_path / "server.log", "w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
        return f"http://127.0.0.1:{port}"  # TRL's client waits for it

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def _with_vllm(mode, devices):
    missing = not find_spec("vllm") or torch.cuda.device_count() < devices
    reason = "vLLM is not installed" if devices == 1 else "TRL's server needs vLLM and a device of its own"
    return pytest.param(mode, marks=pytest.mark.skipif(missing, reason=reason))


@pytest.mark.parametrize("mode", [_with_vllm("colocate", 1), _with_vllm("server", 2)])
def test_vllm(make_cuda_trainer, server, writer_folder, mode):
    where = (
        {"vllm_server_base_url": server(writer_folder)} if mode == "server" else {"vllm_gpu_memory_utilization": 0.2}
    )
    trainer = make_cuda_trainer(
        [all_failed, stepwise()],
        trainer_args={"model": writer_folder, "processing_class": None},
        failed_groups="prefix",
        use_vllm=True,
        vllm_mode=mode,
        max_steps=2,
        **where,
    )
    before = parameters(trainer)
    trainer.train()
    assert_every_parameter_moved(before, trainer)
