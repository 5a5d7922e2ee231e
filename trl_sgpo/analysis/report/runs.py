"""
Reads a run's folder: its log, its completions, its groups, and in words what is missing and why. An unfinished run is
used as far as it can be read. Nothing is unpickled: `training_args.bin` is never opened.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trl_sgpo.analysis.report.answers import Extractor, extract_answer
from trl_sgpo.analysis.report.completions import Rows, read_completions
from trl_sgpo.analysis.report.logged_groups import Groups, infer_group_size, make_groups


LOG_FILES = ("metrics.jsonl", "log_history.jsonl")
_SEED = re.compile(r"[-_./ ]*(?:seed|run|s)[-_]?\d+$", re.IGNORECASE)
_REWARD_KEY = re.compile(r"(?:eval_)?rewards/(.+)/mean")


class NoRunError(Exception):
    """A folder holds nothing for a report. The message says what was looked for."""


@dataclass
class Run:
    """What is known of a run."""

    name: str  # unique among the runs of a report
    label: str  # its method: runs with the same label are seeds of one method
    path: Path  # its folder
    log: list[dict[str, Any]] = field(default_factory=list)  # the entries of training, by step
    groups: Groups | None = None  # the logged completions
    outcome: str | None = None  # the reward that says right or wrong
    rewards: list[str] = field(default_factory=list)  # without the judge's
    has_judge: bool = False  # whether there is a judge's column
    n_files: int = 0
    probe: Path | None = None  # the folder with the probes of base and policy
    missing: list[str] = field(default_factory=list)  # what is not there, and why


def label_of(path: Path) -> str:
    """
    The method in a folder's name: the name without its seed.

    ```python
    >>> label_of(Path("outputs/sgpo-seed1")), label_of(Path("sgpo/seed_0")), label_of(Path("grpo"))
    ('sgpo', 'sgpo', 'grpo')
    ```
    """
    path = path.resolve() if path.name in ("", ".", "..") else path
    return _SEED.sub("", path.name) or _SEED.sub("", path.parent.name) or path.name


def run_folder(path: Path) -> Path:
    """The output folder of a run, also from its `completions` or `sharpening` folder or one of its checkpoints."""
    inner = (
        (path.name == "completions" and any(path.glob("completions_*.parquet")))
        or (path.name == "sharpening" and (path / "base.parquet").exists())
        or re.fullmatch(r"checkpoint-\d+", path.name)
    )
    return path.parent if inner else path


def read_run(
    path: Path,
    name: str,
    label: str,
    outcome: str | None = None,
    success_threshold: float | None = None,
    group_size: int | None = None,
    extract: Extractor = extract_answer,
    count_tokens: Callable[[list[str]], Sequence[int]] | None = None,
) -> Run:
    """
    Reads a run. Raises `NoRunError` if the folder holds neither a log nor completions nor probes.

    Args:
        outcome (`str`, *optional*):
            The reward that says right or wrong. Defaults to the one in the run's `sgpo.json`, else to the only reward.
        success_threshold (`float`, *optional*):
            A completion is correct if its outcome reaches this. Defaults to the value in `sgpo.json`, else to 0.5.
        group_size (`int`, *optional*):
            Completions of a group. By default the prompts tell.
    """
    run = Run(name=name, label=label, path=path)
    run.log, log_notes = read_log(path)
    folder, probe = path / "completions", path / "sharpening"
    run.probe = probe if any(probe.glob("*.parquet")) else None
    if not run.log and not any(folder.glob("completions_*.parquet")) and run.probe is None:
        raise NoRunError(
            f"{path} {'does not exist' if not path.exists() else 'is no run'}. Looked for the log (trainer_state.json, "
            f"there or in a checkpoint-<n>; {' or '.join(LOG_FILES)}), completions/completions_<step>.parquet "
            "(log_completions=True) and sharpening/ (SharpeningCallback). Give the output_dir of a run."
            + "".join(f" {note}" for note in log_notes)
        )
    run.missing += log_notes
    settings = _settings(path)
    logged = [
        match[1]
        for key in dict.fromkeys(k for entry in run.log for k in entry)
        if (match := _REWARD_KEY.fullmatch(key))
    ]
    read = read_completions(folder, logged or None, extract, count_tokens)
    run.n_files = read.n_files
    run.missing += read.notes
    if read.rows is None:
        run.missing.append(
            "No completions: group split, pass@k, answers and effective tokens come from the log or are left out. "
            "log_completions=True writes completions."
            if not read.n_files
            else "None of the completions files could be read: their numbers are left out."
        )
        run.rewards = [reward for reward in logged if reward != "stepwise_judge"]
        return run
    rows = read.rows
    run.rewards, run.has_judge = list(rows.rewards), rows.has_judge
    wanted = outcome or settings.get("outcome_reward")
    if isinstance(wanted, list):  # a run with several tasks
        wanted = _join_outcomes(rows, wanted)
    run.outcome, problem = choose_outcome(list(rows.rewards), wanted)
    run.missing += [problem] if problem else []
    if success_threshold is None:
        success_threshold = float(settings.get("success_threshold", 0.5))
    if group_size is None:
        group_size, guess = infer_group_size(rows.file, rows.prompt, rows.advantage)
        run.missing += [guess] if guess else []
    run.groups = _groups(run, rows, group_size, success_threshold, settings.get("failed_groups", "sgpo"))
    return run


def _groups(run: Run, rows: Rows, size: int, success_threshold: float, treatment: str) -> Groups | None:
    groups = make_groups(rows, size, run.outcome, success_threshold, treatment)
    if size == 1:
        run.missing.append(
            "Every completion has a prompt of its own (G = 1): there are no groups, so no group split and no pass@k beyond "
            "k = 1. If an evaluation with one completion per prompt has overwritten the files, log it at other steps."
        )
    if groups.n_left_out:
        run.missing.append(
            f"{groups.n_left_out} of {len(rows.step)} completions are part of no whole group of {size} and are left out "
            "(an evaluation at the same step overwrites part of a file)."
        )
    if not rows.has_advantage:
        run.missing.append(
            "The completions have no column `advantage` (TRL before 0.17): the rewards tell which groups teach."
        )
    if not len(groups.step):
        run.missing.append(
            f"No whole group of {size} completions was found: --group-size={size} does not fit the files."
        )
        return None
    if run.outcome and (groups.n_scored == 0).all():
        problem = f"The outcome {run.outcome!r} is NaN for every completion, so none is known to be right or wrong."
        run.missing.append(problem)
    return groups


def _join_outcomes(rows: Rows, names: list[str]) -> str:
    """Adds a column with the outcome that each completion has, and returns its name."""
    joined = " | ".join(names)
    columns = [rows.rewards[name] for name in names if name in rows.rewards]
    if columns:
        # Each outcome is None for the rows of the other tasks
        first = np.argmax(~np.isnan(columns), axis=0)
        rows.rewards[joined] = np.take_along_axis(np.array(columns), first[None], axis=0)[0]
    return joined


def choose_outcome(rewards: Sequence[str], wanted: str | None) -> tuple[str | None, str]:
    """The reward that says right or wrong, or `None` and the reason."""
    listed = ", ".join(rewards) or "none"
    if wanted is None and len(rewards) == 1:
        return rewards[0], ""
    if wanted in rewards:
        return wanted, ""
    if wanted is not None:
        return None, f"No outcome: there is no reward {wanted!r}. The columns are: {listed}. Name one with --outcome."
    if not rewards:
        return None, "No outcome: the completions have no column of rewards."
    return None, (
        f"No outcome: several rewards could say right or wrong ({listed}), so there is no group split, accuracy and "
        "pass@k. Name one with --outcome."
    )


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """
    The entries of training, by step, and notes about files that could not be read. They come from `trainer_state.json`
    of the folder or of its checkpoints, whichever reaches furthest, and from `LOG_FILES`.
    """
    notes: list[str] = []
    histories = []
    for state in [*path.glob("trainer_state.json"), *path.glob("checkpoint-*/trainer_state.json")]:
        try:
            history = json.loads(state.read_text())["log_history"]
            histories.append([entry for entry in history if isinstance(entry, dict) and "step" in entry])
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"{state.relative_to(path)} could not be read ({type(error).__name__}) and is left out.")
    entries = max(histories, key=lambda history: history[-1]["step"] if history else -1, default=[])
    merged: dict[Any, dict[str, Any]] = {}
    for entry in [*entries, *_json_lines(path, notes)]:
        # An evaluation, or the summary at the end, is an entry of its own at the same step
        if any(key.startswith("eval_") for key in entry) or "train_runtime" in entry:
            continue
        merged.setdefault(entry["step"], {}).update(entry)
    if not merged:
        notes.append(
            "No log: no curves of reward, entropy, loss and gradient, and no cost of the judge. trainer_state.json is "
            "written with every checkpoint and by trainer.save_state()."
        )
    return [merged[step] for step in sorted(merged)], notes


def _json_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    entries = []
    for name in LOG_FILES:
        if not (path / name).is_file():
            continue
        broken = 0
        for line in (path / name).read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    entries.append(entry)
            except ValueError:
                broken += bool(line.strip())
        if broken:
            notes.append(f"{broken} lines of {name} are cut off or no JSON and are left out.")
    return entries


def _settings(path: Path) -> dict[str, Any]:
    """The trainer's notes about the outcome and the treatment, if there are any."""
    try:
        settings = json.loads((path / "sgpo.json").read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
