"""The controlled study's own arithmetic, and a run of its kinds of arms that is over in seconds."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.controlled_study import report, settings, tables, training
from benchmarks.controlled_study.noisy_judges import noisy_judge
from benchmarks.controlled_study.records import Records, best_learning_rate
from benchmarks.controlled_study.settings import ARMS, Run
from benchmarks.curves import area, tokens_to
from trl_sgpo import SGPOConfig
from trl_sgpo.tasks.rewrite_chain import first_wrong_block, sample_problem


def curve(*points):
    return {"curve": [{"tokens": tokens, "accuracy": accuracy} for tokens, accuracy in points]}


def test_tokens_to_an_accuracy():
    record = curve((0, 0.0), (100, 0.2), (200, 0.6), (300, 0.4))
    assert tokens_to(record, 0.5) == pytest.approx(175)
    assert tokens_to(record, 0.7) == math.inf
    assert tokens_to(curve((0, 0.6), (100, 0.4), (200, 0.6)), 0.5) == 0


def test_area_under_a_curve():
    record = curve((0, 0.0), (100, 0.4), (200, 0.4))
    assert area(record, 100) == pytest.approx(0.2)
    assert area(record, 150) == pytest.approx((0.2 * 100 + 0.4 * 50) / 150)
    # With a goal a curve counts up to its height, and one that ended there stays there
    fast = curve((0, 0.0), (100, 0.4), (200, 0.45)) | {"stop_at": 0.4, "tokens": 400}
    slow = curve((0, 0.0), (100, 0.4), (200, 0.5), (400, 0.6)) | {"stop_at": 0.4, "tokens": 400}
    assert area(slow, 400) == pytest.approx((0.2 * 100 + 0.4 * 300) / 400)
    assert area(fast, 400) == pytest.approx(area(slow, 400))


class TestNoisyJudge:
    def problems(self):
        rng = random.Random(0)
        for _ in range(2000):
            problem = sample_problem(rng, 5, 4)
            blocks = problem.blocks(noise=0.4, rng=rng)
            yield problem.prompt, blocks, first_wrong_block(problem.prompt, blocks)

    @pytest.mark.parametrize("kind", ["random", "early", "late", "stubborn"])
    def test_share_and_direction_of_what_is_wrong(self, kind):
        judge = noisy_judge(kind, 0.4, seed=1)
        found = [(true, judge(prompt, blocks)) for prompt, blocks, true in self.problems()]
        for true, said in found:
            if true is None:
                assert said is None
            elif kind == "early":
                assert said <= true
            elif kind == "late":
                assert said >= true
        movable = {"early": range(1, 5), "late": range(4)}.get(kind, range(5))
        wrong = [true != said for true, said in found if true is not None and true in movable]
        expected = (
            0.4 * 4 / 5 if kind in ("random", "stubborn") else 0.4
        )  # a random step is the right one once in five times
        assert sum(wrong) / len(wrong) == pytest.approx(expected, abs=0.04)

    def test_a_judge_that_blames_the_last_step(self):
        judge = noisy_judge("last", 1, seed=0)
        said = [(true, judge(prompt, blocks), len(blocks)) for prompt, blocks, true in self.problems()]
        assert all(answer == (None if true is None else n - 1) for true, answer, n in said)

    def test_a_stubborn_judge_repeats_itself(self):
        one, other = noisy_judge("stubborn", 0.4, seed=1), noisy_judge("stubborn", 0.4, seed=2)
        assert all(one(prompt, blocks) == other(prompt, blocks) for prompt, blocks, _ in self.problems())

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="kind='sloppy' is unknown"):
            noisy_judge("sloppy", 0.1, seed=0)


def test_the_arms_are_valid_and_the_keys_differ(tmp_path):
    for arm in ARMS.values():
        SGPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arm.config)
    for table in tables.TABLES.values():
        runs = table.runs()
        assert len(
            {replace(run, learning_rate=1.0).key if run.learning_rate == 0 else run.key for run in runs}
        ) == len(runs)
        assert all(run.arm in ARMS for run in runs)
        assert all(settings.base_config(run.dial).exposure <= 0.1 for run in runs)


class TestRecords:
    def record(self, rate, accuracy, arm="sgpo", judge="exact"):
        run = Run("95", arm, rate, settings.TUNING_SEEDS[0], 100, judge=judge)
        return {"key": run.key, **vars(run), **curve((0, 0.0), (100, accuracy))}

    def test_a_line_that_was_cut_off_is_made_again(self, tmp_path):
        records = Records(tmp_path)
        records.append(self.record(1e-4, 0.5))
        with (tmp_path / "runs.jsonl").open("a") as file:
            file.write('{"key": "95/gr')
        again = Records(tmp_path)
        assert len(again.runs) == 1
        again.append(self.record(2e-4, 0.5))
        assert len(Records(tmp_path).runs) == 2

    def test_the_learning_rate_with_the_largest_area_wins(self, tmp_path):
        records = Records(tmp_path)
        for rate, accuracy in ((1e-4, 0.3), (2e-4, 0.5), (4e-4, 0.1)):
            records.append(self.record(rate, accuracy))
        records.append(self.record(3e-4, 0.9))  # not on the grid that all arms are tuned on
        assert best_learning_rate(records, "95", "sgpo", "exact") == 2e-4
        assert best_learning_rate(records, "95", "sgpo_half", "exact") == 2e-4
        assert best_learning_rate(records, "95", "sgpo", "late:0.4") is None
        records.append(self.record(1e-4, 0.2, judge="late:0.4"))
        assert best_learning_rate(records, "95", "sgpo", "late:0.4") == 1e-4
        assert best_learning_rate(records, "95", "sgpo", "exact", completions_per_update=256) is None

    def test_the_report_reads_the_runs_at_the_chosen_learning_rate(self, tmp_path):
        records = Records(tmp_path)
        for rate, accuracy in ((1e-4, 0.3), (2e-4, 0.5)):
            records.append(self.record(rate, accuracy))
            run = Run("95", "sgpo", rate, 0, 100)
            records.append({"key": run.key, **vars(run), **curve((0, 0.0), (100, accuracy))})
        assert [row["learning_rate"] for row in report.main_runs(records, "95", "sgpo")] == [2e-4]


def test_sft_sees_the_prompt_that_it_is_evaluated_on(tmp_path, monkeypatch):
    tiny = replace(settings.BASE, clean_updates=2, noisy_updates=2, layers=1, width=16, heads=2)
    monkeypatch.setitem(settings.DIALS, "95", tiny)
    run = Run("95", "sft", 1e-3, 0, 1_000)
    trainer = training._trainer(run, training.base_model("95", tmp_path), tmp_path)
    row, problem = trainer.train_dataset[0], training.problems("95", 1, seed=1)[0]
    tokenizer = trainer.processing_class
    prompt, solution = (tokenizer(problem[name])["input_ids"] for name in ("prompt", "solution"))
    assert row["input_ids"] == [*prompt, *solution, tokenizer.eos_token_id]


def test_runs_are_recorded_and_shown(tmp_path, monkeypatch, capsys):
    """Every kind of arm for two updates on a base of no skill, and the tables made of it."""
    tiny = replace(settings.BASE, clean_updates=2, noisy_updates=2, layers=1, width=16, heads=2)
    monkeypatch.setitem(settings.DIALS, "95", tiny)
    monkeypatch.setattr(training, "N_DESCRIBED", 4)
    monkeypatch.setattr(training, "N_EVALUATED", 4)
    monkeypatch.setattr(training, "N_PROBED", 2)
    records = Records(tmp_path / "results")
    records.append({"base": "95", **training.describe_base("95", tmp_path)})
    runs = [Run("95", arm, 1e-3, 0, 2_000, probe=arm == "prefix") for arm in ("grpo", "sgpo", "prefix", "sft")]
    for run in (*runs, replace(runs[1], report=True)):
        record = {"key": run.key, **vars(run), **training.train(run, tmp_path)}
        assert record["tokens_generated"] >= 2_000
        assert len(record["curve"]) == 2
        assert record["updates"] >= 1
        records.append(json.loads(json.dumps(record)))
    assert set(records.runs["95/prefix/exact/G8/lr0.001/seed0"]["probes"]) == {"end"}
    monkeypatch.setattr(sys, "argv", ["report.py", "--output", str(tmp_path / "results")])
    report.main()
    printed = capsys.readouterr().out
    assert "| prefix credit | 0.001 | > 2k" in printed
    assert (
        "| 95 | SGPO, as in the paper | 2k: 0.00 | Sharpened or expanded? Unknown, because the probe has only 2 prompts"
        in printed
    )
    assert "Nothing is learnt: none of the 16 logged groups teaches" in printed
    assert (tmp_path / "results" / "curves_95.png").stat().st_size > 0


def test_the_recorded_tables_are_those_of_the_recorded_runs(tmp_path, monkeypatch):
    recorded = Path(report.__file__).parent / "results"
    for name in ("runs.jsonl", "bases.jsonl"):
        (tmp_path / name).write_bytes((recorded / name).read_bytes())
    monkeypatch.setattr(report, "draw_curves", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["report.py", "--output", str(tmp_path)])
    report.main()
    assert (tmp_path / "tables.md").read_text() == (recorded / "tables.md").read_text()
