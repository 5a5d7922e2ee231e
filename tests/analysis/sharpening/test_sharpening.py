"""Real training runs with a probe, on a tiny model."""

import inspect
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sharpening_ranks
import torch
from conftest import assert_same_parameters, words_as_steps
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo import SGPOTrainer, StepwiseJudge
from trl_sgpo.analysis import SharpeningCallback
from trl_sgpo.analysis.metrics import pass_at_k
from trl_sgpo.analysis.sharpening.base import AdaptersOff, ExchangedWeights, ReferenceModel
from trl_sgpo.analysis.sharpening.probe import Probe, Stopwatch, plan_batches, seed_of, token_logps, undisturbed
from trl_sgpo.tasks.rewrite_chain import make_dataset


PROBE = [{**row, "domain": "even" if i % 2 else "odd"} for i, row in enumerate(make_dataset(4, 2, seed=9))]
N, EVERY, STEPS = 4, 2, 3
TIMES = re.compile("time|runtime|per_second|seconds|flos|epoch")


def odd_length(prompts, completions, **kwargs):
    return [float(len(completion.split()) % 2) for completion in completions]


def every_other(prompts, completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]


def needs_solution(prompts, completions, solution, **kwargs):
    return odd_length(prompts, completions)


def judge(**kwargs):
    return StepwiseJudge(
        lambda problem, steps: None if len(steps) % 3 else len(steps) // 2, segmenter=words_as_steps, **kwargs
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_model(tokenizer):
    """With dropout, so that a random state that is not put back shows in every forward pass."""

    def make(seed=0):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                attention_dropout=0.2,
                max_position_embeddings=64,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )

    return make


@pytest.fixture
def make(make_trainer, tmp_path):
    """`make(callback=None, **config)`: a trainer, and with `callback` its arguments, a probe in it."""

    def make(callback=None, rewards=(odd_length,), trainer_class=GRPOTrainer, trainer_args=None, **config):
        options = {"max_steps": STEPS, "max_completion_length": 6, **config}
        if trainer_class is GRPOTrainer:
            options["config_class"] = GRPOConfig
        trainer = make_trainer(list(rewards), trainer_class=trainer_class, trainer_args=trainer_args, **options)
        if callback is not None:
            trainer.probe = SharpeningCallback(
                **{
                    "trainer": trainer,
                    "prompts": PROBE,
                    "n_samples": N,
                    "every": EVERY,
                    "cache_dir": tmp_path / "cache",
                    **callback,
                }
            )
            trainer.add_callback(trainer.probe)
        return trainer

    return make


def probes(trainer):
    return [entry for entry in trainer.state.log_history if "sharpening/pass@1" in entry]


def training_log(trainer):
    """What training logged of itself, without times."""
    entries = [
        {key: value for key, value in entry.items() if not TIMES.search(key) and not key.startswith("sharpening/")}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in entries if len(entry) > 1]


def table(trainer, name):
    return pd.read_parquet(Path(trainer.args.output_dir) / "sharpening" / f"{name}.parquet")


def count_generation(trainer):
    calls = []
    inner = trainer._generate

    def wrapped(prompts):
        calls.append(len(prompts))
        return inner(prompts)

    trainer._generate = wrapped
    return calls


class TestTrainingIsUntouched:
    @pytest.mark.parametrize("peft", [False, True], ids=["full", "peft"])
    @pytest.mark.parametrize("trainer_class", [GRPOTrainer, SGPOTrainer])
    def test_bit_for_bit(self, make, trainer_class, peft, tmp_path):
        def trainer(name, callback):
            rewards = [odd_length] if trainer_class is GRPOTrainer else [odd_length, judge()]
            trainer_args = {}
            if peft:
                lora = pytest.importorskip("peft").LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
                trainer_args["peft_config"] = lora
            made = make(
                callback,
                rewards,
                trainer_class,
                trainer_args,
                output_dir=str(tmp_path / name),
                log_completions=True,
                gradient_checkpointing=True,
                # Two generation rounds per update without the probe, so that buffers and counters matter
                steps_per_generation=2,
                gradient_accumulation_steps=2,
                per_device_train_batch_size=4,
            )
            made.train()
            return made

        everything = {"every": 1, "batch_rank": True, "batch_update": True, "judge": judge()}
        without, with_it = trainer("without", None), trainer("with", everything)
        assert [entry["step"] for entry in probes(with_it)] == [0, 1, 2, 3]
        assert_same_parameters(without, with_it)
        assert training_log(without) == training_log(with_it)
        assert without.state.num_input_tokens_seen == with_it.state.num_input_tokens_seen
        for step in range(1, STEPS + 1):
            path = Path("completions") / f"completions_{step:05d}.parquet"
            a, b = (pd.read_parquet(tmp_path / name / path) for name in ("without", "with"))
            pd.testing.assert_frame_equal(a, b)
        assert "_generate_and_score_completions" not in with_it.__dict__  # nobody listens any more

    def test_states_are_put_back_after_an_exception(self, make):
        trainer = make(gradient_checkpointing=True)
        trainer.model.train()
        frozen = trainer.model.model.layers[0]
        frozen.eval()
        trainer.model.gradient_checkpointing_enable()
        trainer._metrics["train"]["kept"].append(1.0)
        metrics, attributes = trainer._metrics, (trainer._step, trainer._buffered_inputs)
        use_cache = trainer.model.config.use_cache
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

        def disturb():
            assert not any(module.training for module in trainer.model.modules())
            random.random(), np.random.rand(), torch.rand(3)
            trainer.model.gradient_checkpointing_disable()
            trainer.model.config.use_cache = not use_cache
            trainer._metrics["eval"]["leak"].append(1.0)
            trainer._step, trainer._buffered_inputs = 77, []
            raise KeyError("inside")

        with pytest.raises(KeyError), undisturbed(trainer):
            disturb()
        assert random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all()
        assert torch.equal(torch.get_rng_state(), states[2])
        assert trainer.model.training
        assert not frozen.training
        assert trainer.model.is_gradient_checkpointing
        assert trainer.model.config.use_cache == use_cache
        assert trainer._metrics is metrics
        assert metrics["train"] == {"kept": [1.0]}
        assert not metrics["eval"]
        assert (trainer._step, trainer._buffered_inputs) == attributes

    def test_a_reward_that_fails_in_a_probe_costs_that_probe_only(self, make, caplog, tmp_path):
        prompts = {row["prompt"] for row in PROBE}

        def fragile(prompts_seen=prompts):
            def outcome(prompts, completions, **kwargs):
                random.random()  # a reward function that draws leaves no trace either
                if set(prompts) & prompts_seen:
                    raise RuntimeError("the verifier is down")
                return odd_length(prompts, completions)

            return outcome

        without = make(None, [fragile(set())], output_dir=str(tmp_path / "without"))
        without.train()
        trainer = make({"every": 1}, [fragile()])
        with caplog.at_level(logging.WARNING, "trl_sgpo"):
            trainer.train()
        assert caplog.text.count("the verifier is down") >= 1
        assert caplog.text.count("A probe of SharpeningCallback failed") == 1
        assert not probes(trainer)
        assert trainer.state.global_step == STEPS
        assert_same_parameters(without, trainer)

    def test_the_next_probe_makes_up_for_the_base(self, make):
        fails = [True]

        def outcome(prompts, completions, **kwargs):
            if prompts[0] == PROBE[0]["prompt"] and fails:
                fails.clear()
                raise RuntimeError("once")
            return odd_length(prompts, completions)

        trainer = make({}, [outcome])
        trainer.train()
        assert [entry["step"] for entry in probes(trainer)] == [2, 3]
        assert "sharpening/base_pass@1" in probes(trainer)[0]
        assert len(table(trainer, "base")) == len(PROBE) * N


class TestNumbers:
    def test_what_is_logged_and_what_is_written(self, make, make_model):
        trainer = make({"extract_answer": lambda text: text.split()[-1] if text.split() else None, "judge": judge()})
        base = make_model().eval()
        trainer.train()
        logged = probes(trainer)
        assert [entry["step"] for entry in logged] == [0, 2, 3]
        assert logged[0]["sharpening/kl_k1"] == logged[0]["sharpening/kl_k3"] == 0  # the policy is the base still
        assert logged[-1]["sharpening/kl_k1"] != 0
        for entry in logged:
            samples = table(trainer, f"policy_{entry['step']:06d}")
            assert len(samples) == len(PROBE) * N
            assert list(samples["prompt_id"]) == [i for i in range(len(PROBE)) for _ in range(N)]
            assert samples["correct"].dtype == samples["process_correct"].dtype == bool
            assert list(samples["correct"]) == [len(text.split()) % 2 == 1 for text in samples["text"]]
            assert not (samples["process_correct"] & ~samples["correct"]).any()
            c = samples.groupby("prompt_id")["correct"].sum()
            verified = samples.groupby("prompt_id")["process_correct"].sum()
            for k in (1, 2, 4):
                assert entry[f"sharpening/pass@{k}"] == pytest.approx(pass_at_k([N] * 4, c, k).mean())
                assert entry[f"sharpening/process_pass@{k}"] == pytest.approx(pass_at_k([N] * 4, verified, k).mean())
            assert entry["sharpening/kl_k1"] == pytest.approx((samples["logp_policy"] - samples["logp_base"]).mean())
            assert entry["sharpening/base_perplexity"] == pytest.approx(
                math.exp(-samples["logp_base"].sum() / samples["n_tokens"].sum())
            )
            for key in ("tilt/beta", "support/preserved", "saturation", "domain/odd/gain", "maj@2", "answer_entropy"):
                assert any(name.startswith(f"sharpening/{key}") for name in entry), key
            assert not any(isinstance(value, float) and math.isnan(value) for value in entry.values())
        # Under the base's own weights, with transformers' forward and nothing of TRL
        samples = table(trainer, "policy_000003")
        tokenizer = trainer.processing_class
        for _, row in samples.iloc[::5].iterrows():
            prompt = tokenizer(PROBE[row["prompt_id"]]["prompt"])["input_ids"]
            written = tokenizer(row["text"])["input_ids"]
            if len(written) != row["n_tokens"] or tokenizer.pad_token_id in written:
                written.append(tokenizer.eos_token_id)
            if len(written) != row["n_tokens"]:
                continue  # a special token in the middle does not survive decoding
            ids = torch.tensor([prompt + written])
            logp = base(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])
            assert row["logp_base"] == pytest.approx(logp.sum().item(), abs=1e-3)
        base_table = table(trainer, "base")
        assert set(base_table) == {
            "prompt_id",
            "sample",
            "text",
            "correct",
            "process_correct",
            "logp_base",
            "n_tokens",
        }
        assert list(base_table["text"]) != list(table(trainer, "policy_000000")["text"])  # drawn independently
        settings = json.loads((Path(trainer.args.output_dir) / "sharpening/probe.json").read_text())
        wanted = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_completion_length": 6, "n": N, "ks": [1, 2, 4]}
        assert {key: settings[key] for key in wanted} == wanted
        assert list(table(trainer, "prompts")["domain"]) == ["odd", "even"] * 2

    def test_seconds_add_up(self, make):
        trainer = make({})
        spent = []
        inner = trainer.probe._run_probe

        def timed(step):
            start = time.perf_counter()
            inner(step)
            spent.append(time.perf_counter() - start)

        trainer.probe._run_probe = timed
        trainer.train()
        for entry, wall in list(zip(probes(trainer), spent, strict=False))[1:]:  # the first one counts the base's too
            parts = {k: v for k, v in entry.items() if k.startswith("sharpening/seconds/") and not k.endswith("total")}
            assert {f"sharpening/seconds/{p}" for p in ("generate", "logps", "base_logps", "score", "metrics")} <= set(
                parts
            )
            assert entry["sharpening/seconds/total"] == pytest.approx(wall, rel=0.1, abs=0.01)
            assert sum(parts.values()) == pytest.approx(wall, rel=0.1, abs=0.02)

    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            ({}, ExchangedWeights),
            ({"beta": 0.1}, ReferenceModel),
            ({"beta": 0.1, "sync_ref_model": True}, ExchangedWeights),
        ],
    )
    def test_where_the_base_comes_from(self, make, make_model, tokenizer, tmp_path, config, kind):
        make_model().save_pretrained(tmp_path / "policy")
        model = {"model": str(tmp_path / "policy")}
        trainer = make({"at_begin": False}, trainer_args=model, max_steps=2, **config)
        trainer.train()
        assert isinstance(trainer.probe._base, kind)
        samples = table(trainer, "policy_000002")
        other = make({"at_begin": False}, trainer_args={"model": make_model()}, max_steps=2)
        other.train()
        if not config:  # a KL term trains otherwise
            assert list(samples["logp_base"]) == list(table(other, "policy_000002")["logp_base"])
        assert (samples["logp_base"] != samples["logp_policy"]).any()

    def test_another_base_may_be_given(self, make, make_model, tmp_path):
        make_model(seed=5).save_pretrained(tmp_path / "elsewhere")
        trainer = make({"base_model": str(tmp_path / "elsewhere")}, max_steps=1)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        assert probes(trainer)[0]["sharpening/kl_k1"] != 0
        assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
        same = make({"base_model": make_model()}, max_steps=1)
        same.train()
        assert probes(same)[0]["sharpening/kl_k1"] == 0

    def test_parts_can_be_left_out(self, make):
        trainer = make({"base_logps": False, "at_begin": False, "at_end": False, "batch_metrics": False})
        trainer.train()
        assert [entry["step"] for entry in probes(trainer)] == [2]
        entry = probes(trainer)[0]
        assert "sharpening/kl_k1" not in entry
        assert "sharpening/base_pass@1" in entry
        assert trainer.probe._base is None
        assert not any(key.startswith("sharpening/batch") for e in trainer.state.log_history for key in e)
        assert "logp_base" not in table(trainer, "policy_000002")

    def test_without_the_base(self, make):
        trainer = make({"sample_base": False, "base_logps": False, "at_begin": False})
        calls = count_generation(trainer)
        trainer.train()
        assert len(calls) == 2 * len(PROBE) * N // 8 + STEPS
        assert "sharpening/pass@4" in probes(trainer)[0]
        assert not any("base" in key or "support" in key for entry in probes(trainer) for key in entry)

    def test_added_while_training_runs(self, make):
        """Without its first event it knows no base, but the policy's samples have their numbers."""
        trainer = make()
        late = SharpeningCallback(trainer, PROBE, n_samples=N, every=EVERY)

        class AddsIt(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 0:
                    trainer.add_callback(late)

        trainer.add_callback(AddsIt())
        trainer.train()
        assert [entry["step"] for entry in probes(trainer)] == [2, 3]
        assert "sharpening/base/pass@1" not in probes(trainer)[0]

    def test_files_of_an_earlier_run_are_not_mixed_in(self, make):
        trainer = make({"at_begin": False})
        folder = Path(trainer.args.output_dir) / "sharpening"
        folder.mkdir(parents=True)
        for name in ("policy_000001.parquet", "policy_000777.parquet", "notes.txt"):
            (folder / name).write_text("old")
        trainer.train()
        assert {path.name for path in folder.iterdir()} == {
            *("base.parquet", "prompts.parquet", "probe.json", "notes.txt"),
            *("policy_000002.parquet", "policy_000003.parquet"),
        }


class TestBaseSamples:
    def test_a_second_start_draws_none(self, make, tmp_path):
        first = make({"at_begin": False}, max_steps=1)
        calls = count_generation(first)
        first.train()
        per_probe = len(PROBE) * N // 8
        assert len(calls) == 2 * per_probe + 1  # base, policy, training
        second = make({"at_begin": False}, max_steps=1, output_dir=str(tmp_path / "second"))
        calls = count_generation(second)
        second.train()
        assert len(calls) == per_probe + 1
        pd.testing.assert_frame_equal(table(first, "base"), table(second, "base"))
        for changed in ({"temperature": 0.9}, {"max_completion_length": 5}):
            third = make({"at_begin": False}, max_steps=1, output_dir=str(tmp_path / "third"), **changed)
            calls = count_generation(third)
            third.train()
            assert len(calls) == 2 * per_probe + 1

    @pytest.mark.parametrize("peft", [False, True], ids=["full", "peft"])
    def test_resuming(self, make, make_model, tmp_path, caplog, peft):
        lora = {"peft_config": pytest.importorskip("peft").LoraConfig(target_modules=["q_proj"])} if peft else {}
        settings = {"save_strategy": "steps", "save_steps": 2, "trainer_args": lora}
        whole = make({}, **settings)
        whole.train()
        checkpoint = str(Path(whole.args.output_dir) / "checkpoint-2")

        def resumed(callback, **config):
            trainer = make(callback, max_steps=4, **{**settings, **config})
            with caplog.at_level(logging.WARNING, "trl_sgpo"):
                trainer.train(resume_from_checkpoint=checkpoint)
            return next(entry for entry in probes(trainer) if entry["step"] == 4)

        # In the same folder: the samples of the base are known by what is written there
        again = resumed({})
        assert "sharpening/base_pass@1" in again
        assert ("sharpening/kl_k1" in again) == peft
        assert ("The run was resumed" in caplog.text) == (not peft)
        # Elsewhere, with no cache: adapters can still be switched off, other weights have moved
        caplog.clear()
        elsewhere = {"output_dir": str(tmp_path / "elsewhere"), "save_strategy": "no"}
        entry = resumed({"cache_dir": tmp_path / "empty"}, **elsewhere)
        assert ("sharpening/base_pass@1" in entry) == peft
        assert ("the base is out of reach" in caplog.text) == (not peft)
        if not peft:
            entry = resumed({"cache_dir": tmp_path / "empty", "base_model": make_model()}, **elsewhere)
            assert entry["sharpening/base_pass@1"] == again["sharpening/base_pass@1"]
            assert entry["sharpening/kl_k1"] != 0

    def test_adapters_off_is_the_base(self, make, make_model):
        lora = pytest.importorskip("peft").LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = make({}, trainer_args={"peft_config": lora}, max_steps=1)
        trainer.train()
        assert isinstance(trainer.probe._base, AdaptersOff)
        assert probes(trainer)[0]["sharpening/kl_k1"] != 0  # adapters that are not zero to begin with
        plain = make({}, max_steps=1)
        plain.train()
        assert list(table(trainer, "base")["text"]) == list(table(plain, "base")["text"])


class TestTrainingBatches:
    @pytest.mark.parametrize("trainer_class", [GRPOTrainer, SGPOTrainer])
    def test_numbers(self, make, trainer_class):
        trainer = make(
            {"at_begin": False, "at_end": False, "every": 99, "batch_rank": True, "batch_update": True},
            trainer_class=trainer_class,
            max_steps=2,
        )
        seen = []
        inner = trainer._generate_and_score_completions

        def recorded(inputs):
            output = inner(inputs)
            seen.append({key: value.clone() for key, value in output.items() if isinstance(value, torch.Tensor)})
            return output

        trainer._generate_and_score_completions = recorded
        after = trainer.probe._batches.after_update

        def check():
            batch = seen[-1]
            prompts = [
                row[m.bool()].tolist() for row, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
            ]
            written = [
                row[m.bool()].tolist()
                for row, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
            ]
            with undisturbed(trainer):
                seen[-1]["after"] = torch.stack(
                    [row.sum() for row in token_logps(trainer, trainer.model, prompts, written)[0]]
                )
            captured = trainer.probe._batches._captured[0]
            seen[-1]["before"], seen[-1]["correct"] = captured.logps, captured.correct
            after()

        trainer.probe._batches.after_update = check
        trainer.train()
        for entry, batch in zip(trainer.state.log_history, seen, strict=False):
            assert (
                entry["sharpening/batch/pass@1"] == entry["rewards/odd_length/mean"] == batch["correct"].float().mean()
            )
            assert entry["sharpening/batch/displacement"] == pytest.approx(
                (batch["after"] - batch["before"])[batch["correct"]].mean().item(), abs=1e-5
            )
            assert entry["sharpening/batch/displacement"] > 0
            live = batch["advantages"] != 0
            tokens = batch["completion_mask"].sum(dim=1)
            assert entry["sharpening/batch/effective_tokens"] == pytest.approx(
                (tokens[live].sum() / tokens.sum()).item()
            )
            shares = [value for key, value in entry.items() if key.startswith("sharpening/batch/uplift")]
            assert shares
            assert all(0 <= share <= 1 for share in shares)

    def test_a_batch_is_measured_after_its_last_update(self, make):
        trainer = make(
            {"at_begin": False, "at_end": False, "every": 99, "batch_update": True},
            [every_other],
            max_steps=4,
            num_iterations=2,
            gradient_accumulation_steps=1,
        )
        trainer.train()
        steps = [e["step"] for e in trainer.state.log_history if "sharpening/batch/displacement" in e]
        assert steps == [2, 4]

    def test_what_costs_nothing(self, make):
        trainer = make({"at_begin": False, "at_end": False, "every": 99}, max_steps=8)
        trainer.train()
        steps = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]
        # A step of this model takes some tens of milliseconds; of any other, more. benchmarks/sharpening has the share
        assert trainer.probe._batches.seconds / 8 < 0.1 * np.median(steps)


class _FakeVLLM:
    """Answers as vLLM's colocated engine would: the same for the same prompt and seed."""

    def __init__(self):
        self.generation_kwargs = {"stop": ["x"]}
        self.asked = []

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        seed = self.generation_kwargs.get("seed")
        self.asked.append((seed, [tuple(prompt) for prompt in prompts], num_generations))
        written = [[4 + seed_of(seed, prompt) % 12, 1] for prompt in prompts]
        return None, written, [[[0.0], [0.0]] for _ in written], None


def test_vllm_is_seeded_per_request(make):
    trainer = make()
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, _FakeVLLM(), -1
    probe = Probe(trainer, [row["prompt"] for row in PROBE], n_samples=6, batch_size=3)
    with undisturbed(trainer):
        samples = probe.samples(probe.draw("policy/0", Stopwatch()))
    assert sorted((s.prompt_id, s.sample) for s in samples) == [(i, j) for i in range(4) for j in range(6)]
    for _, _, num_generations in trainer.vllm_generation.asked:
        assert num_generations == 1
    seeds = {}
    for seed, _, _ in trainer.vllm_generation.asked:
        seeds[seed] = seeds.get(seed, 0) + 1
    assert len(seeds) == 6
    assert trainer.vllm_generation.generation_kwargs == {"stop": ["x"]}
    assert len({s.text for s in samples if s.prompt_id == 0}) > 1
    assert trainer.num_generations_eval == 4


class TestPlan:
    @pytest.mark.parametrize("n_ranks", [1, 2, 3])
    @pytest.mark.parametrize("distinct", [False, True])
    @pytest.mark.parametrize(("n_prompts", "n_samples", "size"), [(4, 4, 8), (5, 3, 4), (1, 7, 2), (3, 2, 100)])
    def test_all_work_is_done_once(self, n_prompts, n_samples, size, distinct, n_ranks):
        plan = plan_batches(n_prompts, n_samples, size, n_ranks, distinct)
        done = [row for batch in plan for row in batch.rows[: batch.keep]]
        assert sorted(done) == [(i, j) for i in range(n_prompts) for j in range(n_samples)]
        assert len(plan) % n_ranks == 0
        assert len({len(batch.rows) for batch in plan}) == 1
        if distinct:
            for start in range(0, len(plan), n_ranks):
                rows = [row for batch in plan[start : start + n_ranks] for row in batch.rows[: batch.keep]]
                assert len({prompt for prompt, _ in rows}) == len(rows)
                assert len({sample for _, sample in rows}) <= 1

    def test_batches_do_not_depend_on_the_ranks(self):
        kept = [[b.rows for b in plan_batches(5, 3, 4, n_ranks) if b.keep] for n_ranks in (1, 2, 3)]
        assert kept[0] == kept[1] == kept[2]


class TestBadInput:
    @pytest.mark.parametrize(
        ("callback", "error", "message"),
        [
            ({"prompts": []}, ValueError, "prompts is empty"),
            ({"prompts": [{"question": "a b [R] ="}]}, ValueError, r"prompts\[0\] has no column 'prompt'.*question"),
            ({"prompts": "a b [R] ="}, TypeError, "prompts=str is not a set of rows"),
            ({"prompts": [PROBE[0], PROBE[1], PROBE[0]]}, ValueError, r"prompts\[2\] is the same as prompts\[0\]"),
            ({"prompts": [PROBE[0], {"prompt": "a [R] ="}]}, ValueError, "lacks the column 'domain' in 1 of 2"),
            ({"n_samples": 4, "ks": [1, 8]}, ValueError, r"ks=\[1, 8\] must lie between 1 and n_samples=4"),
            ({"n_samples": 0}, ValueError, "n_samples=0 must be an integer of at least 1"),
            ({"every": 0}, ValueError, "every=0 must be an integer of at least 1"),
            ({"taus": [0.0]}, ValueError, "taus=.* must lie in"),
            ({"outcome_reward": "accuracy"}, ValueError, "'accuracy' is not the name of a reward.*'odd_length'"),
            ({"outcome_reward": 3}, TypeError, "outcome_reward=int is neither"),
            ({"success_threshold": math.nan}, ValueError, "success_threshold=nan"),
            ({"extract_answer": "last"}, TypeError, "extract_answer='last' is not callable"),
            ({"trainer": "trainer"}, TypeError, "trainer=str is not a GRPOTrainer"),
            ({"outcome_reward": lambda prompts, **kwargs: [], "batch_rank": True}, ValueError, "batch_rank and"),
        ],
    )
    def test_errors(self, make, callback, error, message):
        with pytest.raises(error, match=message):
            make(callback)

    def test_outcomes(self, make):
        several = [odd_length, needs_solution]
        with pytest.raises(
            ValueError, match=r"SharpeningCallback has to know.*'needs_solution'.*outcome_reward='odd_length'"
        ):
            make({}, several)
        chosen = make({"outcome_reward": "needs_solution"}, several)
        assert chosen.probe.outcomes == [needs_solution]
        with pytest.raises(ValueError, match=r"lacks the column 'solution' in 4 of 4 rows.*'needs_solution' needs"):
            make({"prompts": [{"prompt": row["prompt"]} for row in PROBE]}, [needs_solution])
        # A plain GRPOTrainer's judge is no candidate, and SGPOTrainer has decided itself
        assert make({}, [judge(), odd_length]).probe.outcomes == [odd_length]
        sgpo = make({}, [*several, judge()], SGPOTrainer, outcome_reward="odd_length", success_threshold=0.7)
        assert sgpo.probe.outcomes == [odd_length]
        assert sgpo.probe.success_threshold == 0.7
        assert sgpo.probe.judge is sgpo.stepwise_judge
        assert make({"judge": False}, [odd_length, judge()], SGPOTrainer).probe.judge is None

    def test_an_outcome_for_each_task(self, make):
        def first(prompts, completions, **kwargs):
            return [float(i % 2) if p == PROBE[0]["prompt"] else None for i, p in enumerate(prompts)]

        def others(prompts, completions, **kwargs):
            return [None if p == PROBE[0]["prompt"] else 1.0 for p in prompts]

        trainer = make({}, [first, others, judge()], SGPOTrainer, outcome_reward=["first", "others"], max_steps=1)
        assert trainer.probe.outcomes == [first, others]
        trainer.train()
        samples = table(trainer, "policy_000001")
        assert 0 < samples["correct"][samples["prompt_id"] == 0].mean() < 1
        assert samples["correct"][samples["prompt_id"] != 0].all()
        assert json.loads((trainer.probe.folder / "probe.json").read_text())["outcome_reward"] == "first | others"

    def test_a_base_of_another_shape(self, make, tokenizer):
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        trainer = make({"base_model": LlamaForCausalLM(config)})
        calls = count_generation(trainer)
        with pytest.raises(ValueError, match="base_model='LlamaForCausalLM' does not fit the policy"):
            trainer.train()
        assert not calls

    def test_greedy_sampling(self, make):
        with pytest.raises(ValueError, match="make generation greedy"):
            make({}, generation_kwargs={"do_sample": False})


def test_async_rewards(make):
    async def odd(prompts, completions, **kwargs):
        return odd_length(prompts, completions)

    trainer = make({}, [odd], max_steps=1)
    trainer.train()
    samples = table(trainer, "policy_000001")
    assert list(samples["correct"]) == [len(text.split()) % 2 == 1 for text in samples["text"]]


def test_conversations(make_chat_model, chat_tokenizer, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} + 1?"}]} for i in range(2)]

    def outcome(prompts, completions, completion_ids, **kwargs):
        assert all(ids for ids in completion_ids)
        return [float(len(completion[0]["content"]) % 2) for completion in completions]

    from datasets import Dataset

    trainer = GRPOTrainer(
        model=make_chat_model(),
        reward_funcs=outcome,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=5,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=chat_tokenizer,
    )
    for _ in range(2):  # drawn, then from the cache
        callback = SharpeningCallback(trainer=trainer, prompts=rows, n_samples=2, cache_dir=tmp_path / "cache")
        trainer.add_callback(callback)
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert [sample.correct for sample in callback._base_samples] == [
            len(sample.completion[0]["content"]) % 2 == 1 for sample in callback._base_samples
        ]
    assert json.loads(table(trainer, "prompts")["prompt"][1]) == rows[1]["prompt"]


def two_ranks(folder, *modes):
    """Runs the modes on two processes; what each rank has logged in each mode."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(Path(__file__).parent / "sharpening_ranks.py"), str(folder), *modes],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "true", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    logs = [[json.loads((folder / mode / f"rank{rank}.json").read_text()) for rank in (0, 1)] for mode in modes]
    for ranks in logs:
        for log in ranks:
            assert log["with"]["training"] == log["without"]["training"]  # whatever the probe did
            assert len(log["with"]["training"]) == 2
    return logs, result.stderr


def without_times(log):
    return [{key: value for key, value in entry.items() if "seconds" not in key} for entry in log["with"]["probes"]]


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """Two ranks draw what one draws; and where one fails, both skip the probe."""
    single = {"with": sharpening_ranks.train(tmp_path / "single", "plain")}
    (plain, fails), stderr = two_ranks(tmp_path, "plain", "fails")
    one, two = (
        {p.name: pd.read_parquet(p) for p in (tmp_path / name / "sharpening").glob("*.parquet")}
        for name in ("single", "plain")
    )
    assert set(one) == set(two)
    for name in ("base.parquet", "policy_000000.parquet"):
        pd.testing.assert_frame_equal(one[name], two[name])
    assert without_times(plain[0]) == without_times(plain[1])
    assert without_times(plain[0])[0] == without_times(single)[0]
    assert [entry["step"] for entry in plain[0]["with"]["probes"]] == [0, 1, 2]
    assert fails[0]["with"]["probes"] == fails[1]["with"]["probes"] == []
    assert "this rank has lost its verifier" in stderr


def test_zero_3(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    ((log, _),), _ = two_ranks(tmp_path, "zero3")
    log = log["with"]["probes"]
    assert [entry["step"] for entry in log] == [0, 1, 2]
    assert log[0]["sharpening/kl_k1"] == pytest.approx(0, abs=1e-4)
    assert log[-1]["sharpening/kl_k1"] != 0
    assert len(pd.read_parquet(tmp_path / "zero3" / "sharpening" / "policy_000002.parquet")) == 12


class TestContract:
    """What this callback takes for granted of TRL, beyond `tests/test_contract.py`."""

    def test_generate_returns_what_is_taken_from_it(self):
        source = inspect.getsource(GRPOTrainer._generate)
        assert list(inspect.signature(GRPOTrainer._generate).parameters) == ["self", "prompts"]
        returned = re.search(r"return (prompt_ids, completion_ids, \w+, completions\b)", source)
        assert returned, "`_generate` no longer returns prompt_ids, completion_ids, _, completions, ..."

    def test_log_probabilities(self):
        parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        assert list(parameters)[1:5] == ["model", "input_ids", "attention_mask", "logits_to_keep"]
        assert {"batch_size", "compute_entropy"} <= set(parameters)

    @pytest.mark.parametrize(
        "name",
        [
            "_buffered_inputs",
            "_current_train_step_time",
            "_dist",
            "_is_vlm",
            "_last_loaded_step",
            "_pending_extra_logs",
            "_pending_metrics",
            "_step",
            "async_loop",
            "chat_template_kwargs",
            "environment_factories",
            "num_iterations",
            "ref_model",
            "rollout_func",
            "vllm_generation",
        ],
    )
    def test_attribute(self, name):
        source = inspect.getsource(GRPOTrainer)
        assert re.search(rf"self\.{name}\b[^=\n]*=[^=]", source), f"GRPOTrainer sets no attribute `self.{name}`"


def test_importing_the_analysis_is_light():
    code = "import sys, trl_sgpo.analysis; print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
