"""The tasks of the study on a pretrained model, and a run of it on a tiny model that is cut off and goes on."""

import json
import random
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from prm_families import make_family
from toys import all_mixed, byte_tokenizer, save_model, tiny_llama
from trl.trainer.utils import add_fused_lm_head

from benchmarks.pretrained import report, training
from benchmarks.pretrained import run as run_script
from benchmarks.pretrained.sampling import Effort, sample
from benchmarks.pretrained.settings import ARMS, MAIN, TABLES, Run
from benchmarks.pretrained.shared_prompts import _Draw, generate, log_probs
from benchmarks.pretrained.tasks import (
    Problem,
    accuracy_reward,
    chains,
    first_wrong_step,
    get_task,
    lenient_answer,
    make_chain,
    right_lines,
    strict_answer,
)
from trl_sgpo import SGPOConfig
from trl_sgpo.analysis.jsonable import append_lines
from trl_sgpo.judges import ArithmeticJudge, JudgeItem
from trl_sgpo.steps import segment


CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def steps_of(text):
    return tuple(text[start:end] for start, end in segment(text))


class TestTasks:
    def test_a_chain_is_right_and_its_judges_say_so(self):
        rng = random.Random(0)
        for n in (1, 3, 5, 5, 5):
            problem = make_chain(rng, n)
            steps = steps_of(problem.solution)
            assert len(problem.solution.splitlines()) == n + 1
            assert strict_answer(problem.solution) == problem.answer
            assert right_lines(problem.solution, problem.solution) == 1
            assert first_wrong_step(problem.question, steps, problem.solution) is None
            assert ArithmeticJudge().judge([JudgeItem(problem.question, steps)])[0].first_error is None

    @pytest.mark.parametrize(
        ("steps", "first", "share"),
        [
            (["2 + 3 = 5\n", "5 * 4 = 20\n#### 20"], None, 1),
            (["2 + 3 = 6\n", "6 * 4 = 24\n#### 24"], 0, 0),
            (["2 + 3 = 5\n", "5 * 3 = 15\n", "#### 15"], 1, 1 / 3),  # the arithmetic holds, the problem says 4
            (["2 + 3 = 5\n", "5 * 4 = 20"], 1, 2 / 3),  # no answer
            (["2 + 3 = 5\n", "5 * 4 = 20\n", "#### 20\n", "and so on"], 3, 1),
        ],
    )
    def test_the_exact_judge(self, steps, first, share):
        solution = "2 + 3 = 5\n5 * 4 = 20\n#### 20"
        assert first_wrong_step("", steps, solution) == first
        assert right_lines(solution, "".join(steps)) == pytest.approx(share)

    def test_answers(self):
        assert strict_answer("so 3\n#### 1,234") == lenient_answer("#### 1,234") == "1234"
        assert strict_answer("the answer is 12") is None
        assert lenient_answer("the answer is 12.50.") == "12.5"
        completions = [[{"role": "assistant", "content": "#### 7"}], "7"]
        assert accuracy_reward(completions, answer=["7", "7"]) == [1.0, 0.0]

    def test_problems_are_different_and_held_out(self):
        task = chains()
        trained = {p.question for p in task.to_train}
        assert len(trained) == len(task.to_train)
        assert not trained & {p.question for p in task.to_test}

    def test_word_problems_from_local_files(self, tmp_path):
        for split in ("train", "test"):
            rows = [{"question": f"{i}?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(6)]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = get_task("gsm8k", tmp_path)
        assert (len(task.to_imitate), len(task.to_train), len(task.to_test)) == (2, 4, 6)
        assert Problem("3?", "4", "3+1=4\n#### 4") in task.to_test


def test_tables_of_no_records_and_the_rate_that_tuning_chose(tmp_path):
    for arm in {run.arm for table in TABLES.values() for run in table.runs()}:
        assert SGPOConfig(
            str(tmp_path), use_cpu=True, per_device_train_batch_size=16, skip_dead_tokens=True, **ARMS[arm].config
        )
    assert report.best_rate([], "grpo") is None

    def tuned(arm, rate, accuracy):
        curve = [{"tokens": 100, "completions": 64, "accuracy": accuracy, "right_lines": 0.5, "length": 50.4}]
        return {"task": "chains", "arm": arm, "seed": 100, "learning_rate": rate, "tokens": 100, "curve": curve}

    runs = [tuned(arm, rate, accuracy) for arm in MAIN for rate, accuracy in ((1e-5, 0.1), (2e-5, 0.2))]
    assert report.best_rate(runs, "prefix_random") == 2e-5
    assert "| GRPO | 0.100 / 0.100 / 0.500 / 50 | 0.200 / 0.200 / 0.500 / 50 |" in report.tune_table(runs)


def test_accuracy_along_a_run_is_the_running_mean_of_512_completions():
    accuracies = [0.0] * 8 + [0.4] * 4
    curve = [{"tokens": 100 * (i + 1), "completions": 64, "accuracy": a} for i, a in enumerate(accuracies)]
    run = {"curve": curve}
    assert report.mean_accuracy(run) == pytest.approx(0.4 / 3)
    points = report.windows(run, "accuracy")
    assert [p["tokens"] for p in points] == [450, 550, 650, 750, 850]
    assert [p["accuracy"] for p in points] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert report.tokens_to_goal(run, 0.125) == pytest.approx(700)
    assert report.tokens_to_goal(run, 0.3) == float("inf")
    assert report.windows(run, "entropy") == []
    large = {"curve": [{**point, "completions": 128} for point in curve]}
    assert report.windows(large, "accuracy")[0]["tokens"] == 250


def test_tables_and_pictures_of_what_is_recorded(tmp_path, monkeypatch, capsys):
    point = {"completions": 512, "failed": 0.9, "right_lines": 0.3, "entropy": 0.1, "length": 50.0}

    def recorded(arm, rate, seed, tokens_and_accuracies):
        curve = [{**point, "tokens": t, "accuracy": a} for t, a in tokens_and_accuracies]
        end = {"sampled": {"accuracy": 0.2, "lenient": 0.3, "right_lines": 0.4, "length": 50}, "samples": 4}
        end |= {"right": [1, 0, 4], "pass": {"1": 0.2, "32": 0.5}}
        run = {"task": "chains", "arm": arm, "learning_rate": rate, "seed": seed, "tokens": 3000, "seconds": 60}
        return {**run, "curve": curve, "end": end}

    tuned = [recorded(arm, rate, 100, [(500, rate)]) for arm in MAIN for rate in (1e-5, 2e-5)]
    slow, fast = [(500, 0.0), (1500, 0.05), (2500, 0.15)], [(500, 0.1), (1500, 0.2), (2500, 0.3)]
    runs = [recorded("grpo", 2e-5, seed, slow) for seed in (0, 1)]
    runs += [recorded("prefix", 2e-5, 0, [(x + 500, y) for x, y in fast])]
    append_lines(tmp_path / "runs.jsonl", tuned + runs)
    monkeypatch.setattr(sys, "argv", ["report.py", "--output", str(tmp_path)])
    report.main()
    text = (tmp_path / "tables.md").read_text()
    assert text == capsys.readouterr().out
    grpo, prefix = (
        next(x for x in text.splitlines() if x.startswith(f"| {m} | 2e-05")) for m in ("GRPO", "prefix credit")
    )
    assert "| 2 | 0.067 [0.067, 0.067] | 2k [2k, 2k] | 1.00 | > 3k [> 3k, > 3k] | - |" in grpo
    assert "| 1 | 0.200 [0.200, 0.200] | 0k [0k, 0k] | 0.00 | 2k [2k, 2k] | < 0.67 | 3k [3k, 3k] | < 1.00 |" in prefix
    assert "| prefix credit | 0.20 [0.20, 0.20] | 0.50 [0.50, 0.50] |" in text
    assert (tmp_path / "chains.png").stat().st_size > 10_000


def test_what_is_recorded_is_not_run_again(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--output", str(tmp_path)])
        monkeypatch.setattr(run_script, "execute", lambda what, args: asked.extend(what) or failed)
        asked: list = []
        run_script.main()
        return asked

    failed = 0

    tuning = call("tune", "--tokens", "100")
    assert len(tuning) == 2 * len(MAIN)
    curve = [{"tokens": 100, "completions": 64, "accuracy": 0.1}]
    append_lines(tmp_path / "runs.jsonl", [{"key": run.key, **asdict(run), "curve": curve} for run in tuning[:4]])
    assert call("tune", "--tokens", "100") == tuning[4:]
    failed = 2
    with pytest.raises(SystemExit, match="2 failed, see above"):
        call("tune", "--tokens", "100")
    failed = 0
    assert {run.learning_rate for run in call("main", "--arms", "grpo", "--tokens", "100")} == {1e-5}
    with pytest.raises(SystemExit, match="prefix has no tuned learning rate yet"):
        call("main", "--arms", "prefix")


def test_the_trained_judge(tmp_path, monkeypatch):
    (run,) = TABLES["gsm8k_judge"].runs()
    monkeypatch.setattr(sys, "argv", ["run.py", "gsm8k_judge"])
    with pytest.raises(SystemExit):
        run_script.main()
    judge = training._judge(ARMS[run.arm].judge, chains(), make_family("trl", tmp_path).folder)
    wrong = judge.score(["What is 1 + 1?"], ["1 + 1 is\n\nthree"], [{"reference": "2"}])[0]
    assert "the median of the first wrong step" in wrong.reason


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([-torch.inf, 0.0, 2.0, -torch.inf, 1.0, -torch.inf]).repeat(20_000, 1)
    left = _Draw()(None, logits)
    assert (left > -torch.inf).sum(dim=1).eq(1).all()
    drawn = left.argmax(dim=1).bincount(minlength=6) / len(logits)
    torch.testing.assert_close(drawn, logits[0].softmax(dim=0), rtol=0, atol=0.02)
    assert drawn[[0, 3, 5]].eq(0).all()


@pytest.mark.slow
def test_completions_come_from_the_copy_in_16_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "precision", lambda: torch.bfloat16)
    tokenizer = byte_tokenizer(chat_template=CHAT)
    base = save_model(tiny_llama(tokenizer), tokenizer, tmp_path / "base")
    trainer = training.make_trainer(Run("chains", "grpo", 1e-3, 0, 1000), chains(), base, tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(-1)
    read = []
    for model in (trainer.model, trainer.sampler):
        model.base_model.register_forward_hook(lambda model, inputs, output: read.append(output[0].dtype))
    problems = chains().to_test[:2]
    texts, _ = sample(trainer.sampling(), tokenizer, problems, 2, 4)
    assert set(read) == {torch.bfloat16}
    assert len(texts) == 2
    assert torch.equal(trainer.sampler.lm_head.weight, trainer.model.lm_head.weight.bfloat16())


@pytest.mark.slow
class TestSharedPrompts:
    @pytest.fixture(params=[[0, 0, 0, 1, 1, 1], [0, 1, 0], [1, 0], [0]])
    def rows(self, request):
        return request.param

    @pytest.fixture
    def model(self):
        return tiny_llama(byte_tokenizer(chat_template=CHAT))

    @pytest.fixture
    def prompts(self, rows):
        texts = ["Start with 6.", "Add 16, please."]
        both = byte_tokenizer(chat_template=CHAT)(texts, padding=True, padding_side="left", return_tensors="pt")
        return {name: both[name][rows] for name in ("input_ids", "attention_mask")}

    def test_generates_the_same(self, monkeypatch, model, prompts, rows):
        read = []
        forward = type(model.base_model).forward

        def reading(self, input_ids=None, **kwargs):
            read.append(input_ids.shape)
            return forward(self, input_ids=input_ids, **kwargs)

        monkeypatch.setattr(type(model.base_model), "forward", reading)
        found = generate(model, **prompts, max_new_tokens=8, do_sample=False)
        assert (read[0] == (len(set(rows)), 14)) == (len(rows) > 2)
        expected = model.generate(**prompts, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, expected)

    def test_trains_the_same(self, model, prompts, rows):
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        n_rows, n_tokens = len(rows), 5
        torch.manual_seed(0)
        completions = torch.randint(3, 100, (n_rows, n_tokens))
        mask = torch.arange(n_tokens) < torch.tensor([[5, 3, 4, 1, 5, 2][:n_rows]]).T
        input_ids = torch.cat([prompts["input_ids"], completions], dim=1)
        attention_mask = torch.cat([prompts["attention_mask"], mask.long()], dim=1)
        weight = torch.randn(n_rows, n_tokens)

        def gradients(log_probs):
            model.zero_grad()
            (log_probs * weight * mask).sum().backward()
            return torch.cat([p.grad.flatten() for p in model.parameters()])

        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-n_tokens] = -100
        expected = model(input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
        found, entropies = log_probs(model, input_ids, attention_mask, n_tokens)
        assert found.shape == entropies.shape == (n_rows, n_tokens)
        torch.testing.assert_close(found[mask], expected.log_probs[:, -n_tokens:][mask])
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = log_probs(model, input_ids, attention_mask, n_tokens)
        torch.testing.assert_close(rounded[mask].float(), found[mask], rtol=0, atol=0.05)
        torch.testing.assert_close(entropies[mask], expected.entropy[:, -n_tokens:][mask])
        torch.testing.assert_close(
            gradients(found), gradients(expected.log_probs[:, -n_tokens:]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on(tmp_path, monkeypatch):
    """Base, a run that dies after two updates and is called again, and the tables of both."""
    tokenizer = byte_tokenizer(chat_template=CHAT)
    weights = save_model(tiny_llama(tokenizer), tokenizer, tmp_path / "weights")
    whole = chains()
    task = replace(whole, to_imitate=whole.to_imitate[:32], to_train=whole.to_train[:64], max_completion_length=12)
    monkeypatch.setattr(training, "EFFORT", {"chains": Effort(usual=(4, 2), wide=(2, 4))})
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    described = training.describe_base("chains", task, str(weights), tmp_path)
    base = training.make_base("chains", task, str(weights), tmp_path)
    assert described["groups"]["failed"] == 1

    monkeypatch.setattr(training, "accuracy_reward", all_mixed)  # this model is never right
    run = Run("chains", "imitation", 1e-3, 0, 3000)
    count = training.Watcher.count

    def dying(self, tokens, control):
        count(self, tokens, control)
        if self.updates == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Watcher, "count", dying)
    with pytest.raises(KeyboardInterrupt):
        training.train(run, task, base, tmp_path)
    monkeypatch.setattr(training.Watcher, "count", count)
    folder = tmp_path / run.key.replace("/", "-")
    assert training.last_checkpoint(folder).name == "checkpoint-2"
    assert training.train(run, task, base, tmp_path, until=time.time()) is None
    assert training.last_checkpoint(folder).name == "checkpoint-3"
    record = training.train(run, task, base, tmp_path)
    assert record["updates"] > 3
    assert record["tokens_generated"] >= 3000
    assert [point["tokens"] for point in record["curve"]] == sorted({p["tokens"] for p in record["curve"]})
    assert len(record["curve"]) == record["updates"]
    assert record["curve"][-1]["mixed"] == 1
    assert 0 <= record["curve"][-1]["right_lines"] < 1
    assert len(list((folder / "completions").glob("*.parquet"))) == record["updates"]
    before, after = (tiny_weights(path) for path in (base, folder / "policy"))
    assert not torch.equal(before, after)
    assert not list(folder.glob("checkpoint-*"))
    assert record["base_weights"] == described["base_weights"]
    append_lines(tmp_path / "bases.jsonl", [{"task": "chains", "base_weights": "another"}])
    with pytest.raises(ValueError, match="are of base another, and --work holds"):
        run_script._same_base("chains", record["base_weights"], tmp_path)


def tiny_weights(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.flatten() for p in model.parameters()])
