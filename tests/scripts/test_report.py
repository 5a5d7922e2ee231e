"""The report as its users make it: from folders to a page."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from report_folders import SCENARIOS, write_probe, write_run

from trl_sgpo.analysis.report.glossary import glossary_markdown
from trl_sgpo.scripts.report import main
from trl_sgpo.tasks.rewrite_chain import accuracy_reward


pytestmark = pytest.mark.slow  # whole commands


ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """What a page asks for from elsewhere, its ids and links, and whether its tags are balanced."""

    VOID = {"meta", "link", "br", "img", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.targets, self.outside = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "srcset", "href", "xlink:href", "action"):
                (self.targets if value.startswith("#") else self.outside).append(value)
        assert tag != "script"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(capsys, output, *args):
    main([*map(str, args), "--output", str(output)])
    page = (output / "index.html").read_text()
    summary = json.loads((output / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    return page, summary, capsys.readouterr().out


def test_a_plain_grpo_run_gives_a_full_report(make_trainer, tmp_path, capsys):
    from trl import GRPOConfig, GRPOTrainer

    trainer = make_trainer(
        [accuracy_reward], GRPOTrainer, GRPOConfig, log_completions=True, num_completions_to_print=0, max_steps=6
    )
    trainer.train()
    trainer.save_state()
    capsys.readouterr()
    page, summary, out = report(capsys, tmp_path / "report", tmp_path / "run")
    (run,) = summary["runs"]
    assert (run["outcome"], run["group_size"], run["n_groups"], run["last_step"]) == ("accuracy_reward", 4, 12, 6)
    assert run["numbers"]["unjudged"]["all"] == 1  # a random model solves nothing
    assert run["numbers"]["answer_entropy"]["end"]["value"] > 0
    assert run["numbers"]["pass@4"]["end"]["value"] == 0
    assert "reward" in run["numbers"]
    assert "grad_norm" in run["numbers"]
    assert "Nothing is learnt: none of the 12 logged groups teaches" in out
    assert "a step-wise judge can make them teach" in page
    assert run["finding"]["kind"] == "unknown"
    assert any("SharpeningCallback" in text for text in summary["missing"])


def test_sgpo_and_probes_side_by_side(tmp_path, capsys):
    paths = []
    for arm, scenario in (("grpo", "no change"), ("sgpo", "sharpening")):
        for seed in (0, 1):
            path = write_run(tmp_path / f"{arm}-seed{seed}", seed=seed, judge=arm == "sgpo")
            write_probe(path, scenario, n_prompts=24, n=16, seed=seed + 1)
            paths.append(path)
    page, summary, out = report(capsys, tmp_path / "report", *paths, "--guess", 0.01, "--title", "Arms <compared>")
    assert list(summary["labels"]) == ["grpo", "sgpo"]
    assert summary["labels"]["sgpo"]["runs"] == ["sgpo-seed0", "sgpo-seed1"]
    ends = [run["numbers"]["accuracy"]["end"]["value"] for run in summary["runs"] if run["label"] == "sgpo"]
    assert summary["labels"]["sgpo"]["numbers"]["accuracy"]["end"] == {
        "value": pytest.approx(sum(ends) / 2),
        "low": min(ends),
        "high": max(ends),
    }
    assert [run["finding"]["kind"] for run in summary["runs"]][2:] == ["sharpened", "sharpened"]
    judge = summary["runs"][2]["judge"]
    assert judge == {
        "calls": 200.0,
        "seconds": 10.0,
        "share_of_step_time": 0.25,
        "seconds_per_call": 0.05,
        "abstain_rate": pytest.approx(0.1),
        "no_error_rate": None,
    }
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {target[1:] for target in parsed.targets} <= set(parsed.ids)
    assert set(parsed.outside) == {"data:,"}
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", page)
    assert "Arms &lt;compared&gt;" in page
    assert "Sharpened inside the base" in page
    assert page.count("<svg") == len(list((tmp_path / "report").glob("*.png"))) > 30
    # Every colour follows the page's theme
    assert not re.search(r"(?:fill|stroke): #(?!000000)[0-9a-f]{6}", page[page.index("<svg") :])
    assert "Side by side" in out
    assert "sgpo-seed0: Sharpened inside the base's support: pass@1" in out


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_words_for_known_situations(scenario, tmp_path, capsys):
    page, _, out = report(capsys, tmp_path / "report", write_probe(tmp_path / "run", scenario))
    headline = {
        "sharpening": "Sharpened inside the base's support",
        "expansion": "Expanded beyond the base's reach",
        "no change": "No change that this probe can see",
        "shrinkage": "Shrank: the support is smaller than the base's",
    }[scenario]
    assert headline in out
    assert headline.replace("'", "&#39;") in page
    assert "No log: no curves" in page


def test_what_is_missing_is_said_once_and_the_rest_is_there(tmp_path, capsys):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad", n_files=3)
    file = bad / "completions" / "completions_00002.parquet"
    file.write_bytes(file.read_bytes()[:300])
    page, summary, out = report(
        capsys, tmp_path / "report", good, good / "completions", bad, tmp_path / "nowhere", "--label", "a", "--label", "b", "--label", "c", "--label", "d"
    )  # fmt: skip
    assert [(run["name"], run["label"]) for run in summary["runs"]] == [("good", "a"), ("bad", "c")]
    for words in (
        "nowhere does not exist. Looked for",
        "is the same run as",
        "1 of 3 completions files could not be read",
    ):
        assert out.count(words) == 1
    assert "What is missing, and why" in page


def test_runs_of_the_same_name_are_told_apart(tmp_path, capsys):
    paths = [write_run(tmp_path / arm / "seed0", n_files=3) for arm in ("grpo", "sgpo")]
    _, summary, _ = report(capsys, tmp_path / "report", *paths)
    assert [(run["name"], run["label"]) for run in summary["runs"]] == [("grpo/seed0", "grpo"), ("sgpo/seed0", "sgpo")]


def test_log_only_and_completions_only(tmp_path, capsys):
    log = tmp_path / "log"
    log.mkdir()
    entries = [
        {"step": s, "sgpo/accuracy": s / 10, "sgpo/groups/failed": 0.5, "sgpo/pass@2": 0.5} for s in range(1, 9)
    ]
    (log / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    texts = write_run(tmp_path / "texts", judge=True, log=False)
    _, summary, _ = report(capsys, tmp_path / "report", log, texts)
    assert summary["runs"][0]["numbers"]["accuracy"]["all"] == pytest.approx(0.45)
    assert "reward" not in summary["runs"][1]["numbers"]
    assert summary["runs"][1]["numbers"]["teaching"]["all"] > 0
    assert 0.3 < summary["runs"][1]["numbers"]["rts"]["all"] < 0.5  # the scores are uniform on 0, 0.2, ... 0.8


def test_the_groups_of_a_single_update_are_seen(tmp_path, capsys):
    report(capsys, tmp_path / "report", write_run(tmp_path / "run", n_files=1))
    picture = imread(tmp_path / "report" / "groups_1.png")[..., :3]
    assert (picture.min(axis=2) < 0.9).mean() > 0.3  # the area is painted


def test_tokens_and_answers(tmp_path, capsys, tokenizer, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "my_answers.py").write_text("def never(text):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    _, summary, _ = report(
        capsys, tmp_path / "report", write_run(tmp_path / "run", n_files=3),
        "--tokenizer", tmp_path / "tokenizer", "--answer", "my_answers.never",
    )  # fmt: skip
    assert summary["length_unit"] == "tokens"
    assert summary["runs"][0]["numbers"]["distinct_answers"]["all"] == 1
    assert not any("--tokenizer" in text for text in summary["missing"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "nowhere does not exist. Looked for the log (trainer_state.json"),
        (["run", "--label", "a", "--label", "b"], "--label was given 2 times for 1 runs"),
        (["run", "--group-size", "0"], "--group-size=0 must be at least 1"),
        (["run", "--guess", "2"], "--guess=2.0 must lie in"),
        (["run", "--answer", "no.such"], "--answer='no.such' could not be imported"),
        (["run", "--tokenizer", "./none"], "--tokenizer='./none' could not be loaded"),
    ],
)
def test_wrong_arguments(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", n_files=2)
    with pytest.raises(SystemExit) as exit:
        main([*args, "--output", "report"])
    assert words in str(exit.value)
    assert not (tmp_path / "report").exists()


def test_without_the_extra_there_are_words_and_tables(tmp_path):
    write_run(tmp_path / "run", n_files=3)
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['rich'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "from trl_sgpo.scripts.report import main; main(['run', '--output', 'report'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'trl-sgpo[plots]'" in done.stdout
    assert "The run in numbers" in done.stdout
    assert "<table>" in (tmp_path / "report" / "index.html").read_text()


MEASURE = """
import resource, sys, time
start = time.process_time()
from trl_sgpo.scripts.report import main
main(sys.argv[1:])
print(f"MEASURED {time.process_time() - start:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
"""


def test_ten_runs_of_two_hundred_files(tmp_path):
    """Under 10 s and 2 GB on a free core; twice that is allowed here, where others may be at work."""
    for i in range(10):
        write_run(
            tmp_path / f"arm{i % 2}-seed{i // 2}", n_files=200, n_groups=8, text_length=2000, seed=i, judge=i % 2 == 1
        )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURE,
            *sorted(map(str, tmp_path.glob("arm*"))),
            "--output",
            str(tmp_path / "report"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    seconds, gib = map(float, re.search(r"MEASURED ([\d.]+) s, ([\d.]+) GiB", done.stdout).groups())
    assert seconds < 20
    assert gib < 2


def test_the_guide_has_the_glossary_as_it_is():
    assert glossary_markdown() in (ROOT / "docs" / "howto" / "read_a_report.md").read_text()
