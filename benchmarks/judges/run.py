"""
The judges that need no model, on annotated solutions.

    python -m benchmarks.judges.run --data Qwen/ProcessBench mrben_math.jsonl

Everything goes to `outputs/judges`, and a compact record to `results.json` in this folder.
"""

import argparse
import shutil
from pathlib import Path

from benchmarks.common import commit, write_results
from trl_sgpo.judge_evaluation.evaluation import evaluate
from trl_sgpo.judge_evaluation.tables import show
from trl_sgpo.scripts.judge_eval import JudgeEvalArguments


HERE = Path(__file__).parent
JUDGES = {
    "arithmetic": "arithmetic",
    "constant, first step": "benchmarks.judges.constant.first_step",
    "constant, a third": "benchmarks.judges.constant.about_a_third",
    "constant, last step": "benchmarks.judges.constant.last_step",
    "constant, no error": "benchmarks.judges.constant.no_error",
}


def compact(results):
    """What the tables in the README are made of."""
    standard = ("f1", "acc_error", "acc_error_within_1", "acc_correct", "false_alarm_rate", "abstain_rate", "n")
    known = ("acc_error", "acc_error_within_1", "coverage", "rts_mae", "rts_mae_constant", "rts_bias", "rts_mae_all")
    known += ("rts_mae_constant_step", "rts_mae_constant_all", "n", "n_answered")
    groups = {key: value for key, value in results["groups"].items() if key not in ("subsets", "intervals")}

    def part(scores, keys):
        ends = {f"{key}_interval": scores["intervals"][key] for key in keys[:1] if "intervals" in scores}
        return {key: scores[key] for key in keys} | ends

    return {
        "standard": {name: part(scores, standard) for name, scores in results["standard"]["subsets"].items()},
        "standard_mean": part(results["standard"], standard),
        "known_wrong": {name: part(scores, known) for name, scores in results["known_wrong"]["subsets"].items()},
        "known_wrong_all": part(results["known_wrong"], (*known, "constant_all")),
        "groups": groups | {"intervals": results["groups"]["intervals"]},
        **_robustness(results.get("robustness")),
        "cost": {key: results["cost"][key] for key in ("judgements", "seconds", "completions_per_second")},
    }


def _robustness(found):
    if found is None:  # was not asked for
        return {}
    injection = {key: found["injection"][key] for key in ("overall", "control", "by_target")}
    return {"shapes": found["shapes"], "injection": injection}


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="names of the Hub or local files")
    data = parser.parse_args().data
    head, record = {"commit": commit()}, {}
    for name, judge in JUDGES.items():
        output = Path("outputs/judges", name.replace(", ", "-").replace(" ", "-"))
        args = JudgeEvalArguments(judge, data, str(output), robustness=True, robustness_rows=1000, injection_rows=50)
        results = evaluate(args)
        show(results)
        record[name] = rounded(compact(results))
        if name == "arithmetic":
            shutil.copy(output / "judge.png", HERE / "arithmetic.png")
    head |= {key: results[key] for key in ("data", "versions", "hardware", "settings")}
    write_results(HERE / "results.json", {**head, "judges": record})


if __name__ == "__main__":
    main()
