"""The completions table, in the terminal and as files, beside a user's own columns."""

import json
import threading
from pathlib import Path

import pandas as pd
import pytest
from conftest import length_reward
from toys import FixedJudge, all_failed, stepwise
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from trl_sgpo import StepwiseJudge, Verdict
from trl_sgpo.analysis.report import completions
from trl_sgpo.round_log import JUDGE_COLUMNS, _print_fitting, _verdict


def one_of_each(items):
    verdicts = [Verdict.error(2), Verdict.no_error(), Verdict.abstain("too hard")]
    return [verdicts[i % 3] if len(item.steps) > 2 else Verdict.error(0) for i, item in enumerate(items)]


def logs_columns_of_its_own(prompts, completions, log_extra, **kwargs):
    for name in ("verdict", "n_steps", "rts", "first_error", "verdict_reason"):
        log_extra(name, [f"{name} {i}" for i in range(len(completions))])
    return [0.0] * len(completions)


CONFIG = {"log_completions": True, "max_steps": 1, "generation_kwargs": {"suppress_tokens": [0, 1]}}


def table_of(trainer, step=1):
    return pd.read_parquet(Path(trainer.args.output_dir) / "completions" / f"completions_{step:05d}.parquet")


class TestPrintedTable:
    @pytest.fixture
    def printed(self, make_trainer, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "80")
        printer = grpo_trainer.print_prompt_completions_sample

        def train(funcs, *args, **config):
            trainer = make_trainer(funcs, *args, **{**CONFIG, **config})
            trainer.train()
            assert grpo_trainer.print_prompt_completions_sample is printer
            return capsys.readouterr().out

        return train

    def test_it_fits_80_columns(self, printed):
        text = printed([all_failed, stepwise(FixedJudge(one_of_each))])
        table = text[text.index("╭") : text.index("╯") + 1].splitlines()
        header = [line.strip("│ ").strip("┃").split("┃") for line in table if "┃" in line]
        names = [" ".join(" ".join(cells).split()) for cells in zip(*header, strict=True)]
        assert names == ["Prompt", "Completion", "all failed", "Advantage", "verdict"]
        assert {len(line) for line in table} == {80}

    def test_prompt_and_completion_are_not_squeezed(self, printed):
        lines = printed([all_failed, stepwise(FixedJudge(one_of_each))]).splitlines()
        header = next(line for line in lines if "Prompt" in line)
        widths = [len(cell) - 2 for cell in header.strip("│ ").strip("┃").split("┃")]
        assert min(widths[:2]) >= 12

    def test_verdicts_in_words(self, printed):
        text = printed([all_failed, stepwise(FixedJudge(one_of_each))])
        for verdict in ("step 3 of 12", "no error", "abstains"):
            assert verdict in text

    def test_an_empty_completion(self):
        assert _verdict("error", float("nan"), 0.0) == "empty"
        assert _verdict("", float("nan"), float("nan")) == ""  # nobody asked

    def test_without_a_judge_it_is_trls(self, printed):
        funcs = [all_failed, length_reward]
        ours, theirs = printed(funcs), printed(funcs, GRPOTrainer, GRPOConfig)
        table = [[line for line in text.splitlines() if line.startswith("│")] for text in (ours, theirs)]
        assert table[0] == [line.replace("_", " ") for line in table[1]]
        assert table[0]

    @pytest.mark.parametrize("with_judge", [True, False])
    @pytest.mark.parametrize(("width", "n"), [(80, 0), (120, 1), (200, 5)])
    def test_columns_of_reward_functions_as_far_as_there_is_room(self, monkeypatch, capsys, width, n, with_judge):
        monkeypatch.setenv("COLUMNS", str(width))
        texts = ["How many clips did she sell in April and in May together? " * 4] * 2
        columns = {f"column_{i}": ["[72, '72']"] * 2 for i in range(5 + (not with_judge))}
        verdicts = {"judge_status": ["error"] * 2, "judge_first_error": [0.0] * 2, "judge_n_steps": [4.0] * 2}
        extra = {**columns, **(verdicts if with_judge else {})}
        printer = grpo_trainer.print_prompt_completions_sample
        _print_fitting(printer, texts, texts, {"accuracy_reward": [0.0] * 2}, [0.0] * 2, 1, 2, extra=extra)
        header = next(line for line in capsys.readouterr().out.splitlines() if "Prompt" in line)
        cells = header.strip("│ ").strip("┃").split("┃")
        names = [cell.strip() for cell in cells]
        assert sum(name.startswith("column") for name in names) == n + (n > 0 and not with_judge)
        assert ("verdict" in names) == with_judge
        assert min(len(cell) - 2 for cell in cells[:2]) >= (24 if width > 80 else 12)

    def test_a_users_columns_stay(self, make_trainer, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")
        shown = []
        monkeypatch.setattr(
            grpo_trainer, "print_prompt_completions_sample", lambda *args, extra: shown.append((args[2], extra))
        )
        make_trainer(
            [logs_columns_of_its_own, length_reward, stepwise()], outcome_reward="length_reward", **CONFIG
        ).train()
        rewards, extra = shown[0]
        assert list(rewards) == ["logs columns of its own", "length reward"]
        assert list(extra) == ["first error", "n steps", "rts", "verdict", "verdict reason", "judge's verdict"]
        assert extra["verdict"][0] == "verdict 0"

    def test_after_an_error_trls_function_is_back(self, make_trainer, monkeypatch):
        def fails(*args, **kwargs):
            raise OSError("the terminal is gone")

        monkeypatch.setattr(grpo_trainer, "print_prompt_completions_sample", fails)
        trainer = make_trainer([all_failed, stepwise()], **CONFIG)
        with pytest.raises(OSError, match="the terminal is gone"):
            trainer.train()
        assert grpo_trainer.print_prompt_completions_sample is fails


def test_a_users_own_columns_are_not_overwritten(make_trainer, dataset):
    trainer = make_trainer(
        [logs_columns_of_its_own, stepwise(FixedJudge(one_of_each))],
        trainer_args={"eval_dataset": dataset},
        eval_strategy="steps",
        eval_steps=2,
        **{**CONFIG, "max_steps": 3},
    )
    trainer.train()
    table = table_of(trainer)
    for name in ("verdict", "n_steps", "rts", "first_error", "verdict_reason"):
        assert table[name].tolist() == [f"{name} {i}" for i in range(8)]
    assert set(JUDGE_COLUMNS) <= set(table.columns)
    assert table["judge_status"].tolist() == [
        "error",
        "no_error",
        "abstain",
        "error",
        "no_error",
        "abstain",
        "error",
        "no_error",
    ]


def test_a_users_column_of_the_judges_name_is_refused(make_trainer):
    def logs(prompts, completions, log_extra, **kwargs):
        log_extra("judge_reason", ["mine"] * len(completions))
        return [0.0] * len(completions)

    trainer = make_trainer([logs, stepwise()], **CONFIG)
    with pytest.raises(ValueError, match="has logged the column 'judge_reason' with log_extra"):
        trainer.train()
    assert "judge_status" not in trainer._pending_extra_logs


def test_two_trainers_that_log_at_once_put_trls_function_back(make_trainer):
    printer = grpo_trainer.print_prompt_completions_sample
    logs = [make_trainer([all_failed, stepwise()], **CONFIG)._round_log for _ in range(2)]
    inside, leave = threading.Event(), threading.Event()

    def first():
        with logs[0].readable_table():
            inside.set()
            leave.wait(10)

    def second():
        with logs[1].readable_table():
            pass

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert grpo_trainer.print_prompt_completions_sample is printer


class TestLoudLine:
    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (lambda problem, steps: 0.0, "first_error=0.0 is of type float, and the index of a step is an integer"),
            (lambda problem, steps: "0", "first_error='0' is of type str, and the index"),
            (lambda problem, steps: [0], "first_error=[0] is of type list, and the index"),
            (lambda problem, steps: {}["answer"], "KeyError: 'answer'"),
            (lambda problem, steps: Verdict.abstain("too hard\n" + "x" * 999), "too hard\\n" + "x" * 291),
        ],
    )
    def test_it_gives_the_usual_reason(self, make_trainer, caplog, answer, reason):
        make_trainer([all_failed, stepwise(answer)], **{**CONFIG, "log_completions": False}).train()
        (said,) = [line for line in caplog.messages if "THE JUDGE GAVE NO USABLE VERDICT" in line]
        assert f"8 of 8 abstentions on this rank: {reason}" in said.replace('"', "").replace("rank: '", "rank: ")
        assert "x" * 300 not in said

    def test_the_most_frequent_one(self, make_trainer, caplog):
        reasons = iter(["rare", *["frequent"] * 5, *["other"] * 2])
        judge = stepwise(lambda problem, steps: Verdict.abstain(next(reasons)))
        make_trainer([all_failed, judge], **CONFIG).train()
        assert "5 of 8 abstentions on this rank: 'frequent'." in caplog.text

    def test_without_an_abstention_there_is_none(self, make_trainer, caplog):
        make_trainer([all_failed, stepwise(lambda problem, steps: None)], **CONFIG).train()
        assert "THE JUDGE GAVE NO USABLE VERDICT" in caplog.text
        assert "abstentions on this rank" not in caplog.text


def test_completions_of_one_step_are_said_once(make_trainer, caplog):
    judge = StepwiseJudge(lambda problem, steps: 0, segmenter=lambda text: [(0, len(text))] if text.strip() else [])
    trainer = make_trainer([all_failed, judge], max_steps=2)
    trainer.train()
    assert caplog.text.count("has a single step") == 1


def test_the_file_beside_the_table_names_all_outcomes(make_trainer):
    def none(prompts, completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer([all_failed, none, stepwise()], outcome_reward=["none", "all_failed"], **CONFIG)
    trainer.train()
    settings = json.loads((Path(trainer.args.output_dir) / "sgpo.json").read_text())
    assert settings == {
        "outcome_reward": ["all_failed", "none"],
        "success_threshold": 0.5,
        "failed_groups": "sgpo",
    }


def test_the_report_knows_the_judges_columns():
    assert completions.OWN_COLUMNS == JUDGE_COLUMNS
