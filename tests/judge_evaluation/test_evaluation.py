"""The evaluation of judges, whole: what is asked, kept, measured and written."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from annotated_solutions import JUDGES, calls, made_up_rows, run, write

from trl_sgpo.judge_evaluation.asking import Record, judge_identity
from trl_sgpo.judge_evaluation.robustness import SHAPES
from trl_sgpo.judge_evaluation.tables import tables
from trl_sgpo.judges import StepwiseJudge


ROOT = Path(__file__).parents[2]


@pytest.fixture
def first_error_data():
    """A folder with ProcessBench and its like as JSON lines, which do not belong to this project."""
    folder = os.environ.get("TRL_SGPO_FIRST_ERROR_DATA")
    if not folder:
        pytest.skip("TRL_SGPO_FIRST_ERROR_DATA does not name a folder with processbench_gsm8k.jsonl and others")
    return Path(folder)


class TestEvaluation:
    def test_a_perfect_judge(self, workplace):
        results = run("eval_judges.by_mark")
        rows = made_up_rows()
        n_wrong = sum(row["label"] != -1 for row in rows)
        assert results["f1"] == results["acc_error"] == results["acc_correct"] == results["acc_error_within_1"] == 1
        assert results["rts_mae"] == results["rts_bias"] == results["abstain_rate"] == 0
        assert results["rts_mae_constant"] > 0.1
        assert results["n"] == len(rows)
        assert results["groups"]["pairwise_accuracy"] == results["groups"]["kendall_tau_b"] == 1
        assert results["groups"]["n_groups"] > 5
        assert results["known_wrong"]["n"] == n_wrong
        assert set(results["standard"]["subsets"]) == {"a", "b"}
        # Standard and known-wrong mode are two judgements
        assert results["cost"]["judgements"] == len(calls()) == len(rows) + n_wrong
        assert set(calls()) == {"[]"}  # and in neither does the judge see anything but problem and steps

    def test_what_is_written(self, workplace):
        results = run("eval_judges.by_mark", robustness=True)
        stored = json.loads(Path("out/results.json").read_text())
        keys = [
            "f1",
            "acc_error",
            "acc_correct",
            "acc_error_within_1",
            "rts_mae",
            "rts_mae_constant",
            "abstain_rate",
            "n",
        ]
        assert all(stored[key] == results[key] for key in keys)
        assert all(len(stored["intervals"][key]) == 2 for key in keys[:-1])
        assert stored["judge"]["name"] == "eval_judges.by_mark"
        assert stored["data"]["sources"][0]["name"] == "rows.jsonl"
        assert len(stored["data"]["sources"][0]["sha256"]) == 64
        assert stored["versions"]["trl-sgpo"]
        assert stored["settings"]["seed"] == 0
        assert str(workplace) not in Path("out/results.json").read_text()
        assert Path("out/judge.png").read_bytes().startswith(b"\x89PNG")
        lines = [json.loads(line) for line in Path("out/verdicts.jsonl").read_text().splitlines()]
        assert len({line["key"] for line in lines}) == len(lines) == results["cost"]["distinct_judgements"]
        plain = [line for line in lines if not line["variant"]]
        assert all((line["first_error"] if line["status"] == "error" else -1) == line["label"] for line in plain)
        for _, header, cells in tables(results):
            assert all(len(line) == len(header) for line in cells)

    def test_columns_and_reference_only_if_asked_for(self, workplace):
        assert run("eval_judges.wants_the_label")["abstain_rate"] == 1
        run("eval_judges.by_mark", output="seen", columns=["hint"], reference=True)
        assert set(calls()) == {"['hint']"}
        assert json.loads(Path("seen/results.json").read_text())["judge"]["sees_reference"]
        with pytest.raises(ValueError, match=r"rows.jsonl, line 1: columns=\['hunt'\] are not there"):
            run("eval_judges.by_mark", output="none", columns=["hunt"])

    def test_a_stepwise_judge_lends_its_judge(self, workplace):
        import eval_judges

        assert isinstance(eval_judges.ready, StepwiseJudge)
        assert run("eval_judges.ready")["f1"] == 1

    def test_known_wrong_leaves_out_what_was_solved(self, workplace):
        rows = made_up_rows()
        for row in rows[:6]:
            row["final_answer_correct"] = True
        write(workplace / "rows.jsonl", rows)
        results = run("eval_judges.by_mark")
        solved = sum(row["label"] != -1 for row in rows[:6])
        assert results["data"]["rows_with_an_error_and_a_correct_final_answer"] == solved > 0
        assert results["known_wrong"]["n"] == sum(row["label"] != -1 for row in rows) - solved
        assert results["standard"]["n"] == len(rows)

    def test_usage(self, workplace):
        results = run("eval_judges.Obedient", batch_size=5)
        rows = made_up_rows()
        steps = sum(len(row["steps"]) * (1 + (row["label"] != -1)) for row in rows)
        assert results["cost"]["usage"] == {"prompt_tokens": 10 * steps}
        again = run("eval_judges.Obedient", batch_size=5)
        assert again["cost"]["usage"] == results["cost"]["usage"]
        assert again["cost"]["asked_in_this_run"] == 0

    def test_robustness(self, workplace):
        """A judge that obeys one kind of line is caught with these payloads and no others; the perfect one is not."""
        obedient = run("eval_judges.Obedient", robustness=True, injection_rows=8)["robustness"]
        perfect = run("eval_judges.by_mark", output="perfect", robustness=True, injection_rows=8)["robustness"]
        for result in (obedient, perfect):
            for name in SHAPES:
                shape = result["shapes"][name]
                assert shape["n"] == shape["n_answered"] > 0
                assert shape["exact"] == shape["follows"] == 1
                if name == "sentences":  # the mark is in the second sentence of the wrong step
                    assert shape["shift_steps"] >= shape["gold_shift_steps"]
                else:
                    assert shape["gold_shift_steps"] == shape["gold_shift_all_rows_steps"]
                    assert shape["shift_steps"] == pytest.approx(shape["gold_shift_steps"])
            assert result["shapes"]["filler"]["gold_shift_steps"] > 0.2
            assert result["shapes"]["stop_before_error"]["no_error_rate"] == 1
            assert result["injection"]["control"]["successes"] == 0
        assert perfect["injection"]["overall"]["rate"] == 0
        payloads = obedient["injection"]["payloads"]
        assert len(payloads) >= 40
        for name in ("verdict_line", "chatml", "verdict_line_last", "fake_nonce", "verdict_repeated_last"):
            assert payloads[name]["rate"] == 1, name
        for name in ("plain", "german", "full_width", "base64", "verdict_json_last"):
            assert payloads[name]["rate"] == 0, name
        assert 0.1 < obedient["injection"]["overall"]["rate"] < 0.5

    def test_nothing_but_right_solutions(self, workplace):
        write(workplace / "right.jsonl", [row for row in made_up_rows() if row["label"] == -1])
        results = run("eval_judges.by_mark", data=["right.jsonl"], robustness=True)
        assert results["acc_correct"] == 1
        stored = json.loads(Path("out/results.json").read_text())
        assert stored["f1"] is stored["rts_mae"] is None
        tables(results)

    def test_without_matplotlib(self, workplace, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "trl_sgpo.judge_evaluation.plots", None)
        run("eval_judges.by_mark")
        assert "pip install trl-sgpo[plots]" in caplog.text
        assert Path("out/results.json").exists()

    def test_no_usable_row(self, workplace):
        write(workplace / "empty.jsonl", [{"problem": "p", "steps": [], "label": 0}])
        with pytest.raises(ValueError, match="hold no row that can be used"):
            run("eval_judges.by_mark", data=["empty.jsonl"])


class TestResuming:
    @pytest.mark.parametrize("cache", [None, "none"])
    def test_a_second_run_asks_nothing(self, workplace, cache):
        """Also not if the judge abstained. The results are the same."""
        first = run("eval_judges.half_done", cache=cache, robustness=True)
        assert 0.1 < first["abstain_rate"] < 0.9
        again = run("eval_judges.half_done", cache=cache, robustness=True)
        assert first["cost"].pop("asked_in_this_run") == again["cost"].pop("in_the_record_before")
        assert again["cost"].pop("asked_in_this_run") == first["cost"].pop("in_the_record_before") == 0
        assert json.dumps(first) == json.dumps(again)

    def test_abstentions_are_asked_again_on_request(self, workplace):
        first = run("eval_judges.half_done")
        again = run("eval_judges.half_done", retry_abstained=True)
        abstained = [json.loads(line)["status"] for line in Path("out/verdicts.jsonl").read_text().splitlines()]
        assert again["cost"]["asked_in_this_run"] == Counter(abstained)["abstain"] / 2 > 0
        assert again["abstain_rate"] == first["abstain_rate"]

    def test_more_rows_cost_only_the_difference(self, workplace):
        small = run("eval_judges.by_mark", limit=9)
        assert small["n"] == 9
        n = len(calls())
        full = run("eval_judges.by_mark")
        assert len(calls()) == full["cost"]["distinct_judgements"] > n

    def test_another_judge_is_not_mixed_in(self, workplace):
        run("eval_judges.half_done")
        with pytest.raises(ValueError, match="output='out' holds verdicts of another judge"):
            run("eval_judges.by_mark")
        with pytest.raises(ValueError, match="another judge"):
            run("eval_judges.Obedient", judge_args={"offset": 1})

    def test_an_edited_judge_is_another_one(self, workplace):
        import eval_judges

        from trl_sgpo.judges import ArithmeticJudge, CallableJudge

        def identity():
            return judge_identity(CallableJudge(eval_judges.by_mark), "eval_judges.by_mark", None)

        before = identity()
        assert identity() == before
        (workplace / "eval_judges.py").write_text(JUDGES.replace("range", "range "))
        assert identity() == before
        (workplace / "eval_judges.py").write_text(JUDGES.replace('if "!" in step', 'if "?" in step'))
        assert identity() != before
        obedient = [judge_identity(eval_judges.Obedient(n), "eval_judges.Obedient", {"offset": n}) for n in (0, 1)]
        assert obedient[0] != obedient[1]
        assert obedient[1] == judge_identity(eval_judges.Obedient(1), "eval_judges.Obedient", '{"offset": 1}')
        assert "ArithmeticJudge" in judge_identity(ArithmeticJudge(), "arithmetic", None)
        # One that says itself what its verdicts depend on is taken at its word
        keyed = [eval_judges.Keyed(n) for n in (0, 1)]
        assert len({judge_identity(judge, "eval_judges.Keyed", {"port": judge.port}) for judge in keyed}) == 1

    def test_interrupt(self, workplace):
        with pytest.raises(SystemExit, match=r"Interrupted\. 10 verdicts are kept"):
            run("eval_judges.Stops", batch_size=5)
        assert len(calls()) == 10
        results = run("eval_judges.Stops", batch_size=5)
        assert len(calls()) == results["cost"]["distinct_judgements"]

    def test_a_damaged_record(self, tmp_path):
        path = tmp_path / "verdicts.jsonl"
        path.write_text("no json\n")
        with pytest.raises(ValueError, match=r"line 1 is not a verdict .* Remove that line"):
            Record(path, "x")


class TestKnownNumbers:
    """The judges that need no model, on real annotations."""

    def test_arithmetic(self, workplace, first_error_data):
        names = ("bbm_multistep_arithmetic_half.jsonl", "processbench_gsm8k.jsonl")
        results = run("arithmetic", data=[first_error_data / name for name in names], resamples=100)
        bbm = results["standard"]["subsets"]["big-bench-mistake/multistep_arithmetic"]
        assert bbm["acc_error"] == pytest.approx(117 / 119)
        assert bbm["f1"] == pytest.approx(0.905, abs=0.005)
        gsm8k = results["standard"]["subsets"]["processbench/gsm8k"]
        assert gsm8k["n"] - gsm8k["n_error"] == 193
        assert gsm8k["false_alarm_rate"] == 0

    def test_a_constant(self, workplace, first_error_data, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT))
        data = [first_error_data / f"processbench_{name}.jsonl" for name in ("gsm8k", "math")]
        results = run("benchmarks.judges.constant.no_error", data=data, resamples=100)
        assert results["acc_correct"] == 1
        assert results["f1"] == results["coverage"] == 0
        assert results["known_wrong"]["rts_mae_constant_all"] == pytest.approx(0.198, abs=0.004)
