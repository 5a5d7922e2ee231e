"""Reading and sampling annotated solutions."""

import json
from collections import Counter

import pytest
from annotated_solutions import write

from trl_sgpo.judge_evaluation.data import read_rows, sample_rows


class TestReading:
    def read(self, tmp_path, *rows, name="own.jsonl", **arguments):
        return read_rows([str(write(tmp_path / name, rows))], **arguments)

    def label(self, tmp_path, **fields):
        rows, _ = self.read(tmp_path, {"problem": "p", "steps": ["a", "b", "c"], **fields})
        return rows[0].label

    def test_processbench(self, tmp_path):
        row = {"id": "gsm8k-0", "generator": "m", "problem": "p", "steps": ["a", "b"], "final_answer_correct": False}
        rows, sources = self.read(tmp_path, {**row, "label": 1}, name="gsm8k.jsonl")
        assert (rows[0].id, rows[0].subset, rows[0].label, rows[0].known_wrong) == ("gsm8k-0", "gsm8k", 1, True)
        assert (sources[0]["rows"], sources[0]["skipped"]) == (1, {})

    def test_mr_ben(self, tmp_path):
        row = {
            "Question_UUID": "u",
            "Subject": "math",
            "Question": "p",
            "Options": "A: 1\nB: 2",
            "Ground_Truth_Answer": "A",
            "Model_Solution_Steps": ["Step 1: a", "Step 2: b"],
            "Model_Solution_Correctness": "incorrect",
            "Model_Solution_First_Error_Step": "2",
        }
        rows, sources = self.read(
            tmp_path,
            row,
            {**row, "Model_Solution_Correctness": "correct", "Model_Solution_First_Error_Step": "N/A"},
            {**row, "Model_Solution_First_Error_Step": "N/A"},
            {**row, "Model_Solution_First_Error_Step": "the loop"},
            {**row, "Model_Solution_First_Error_Step": "3"},
            {**row, "Model_Solution_First_Error_Step": "0"},
        )
        assert [one.label for one in rows] == [1, -1]
        assert rows[0].problem == "p\nOptions:\nA: 1\nB: 2"
        assert (rows[0].subset, rows[0].id, rows[0].reference) == ("math", "u", "A")
        assert rows[0].group == rows[1].group
        assert sources[0]["skipped"] == {
            "called incorrect, without a first wrong step": 1,
            "the first wrong step is no number": 1,
            "label out of range": 2,
        }

    @pytest.mark.parametrize(
        ("fields", "label"),
        [
            ({"label": -1}, -1),
            ({"first_error": 2}, 2),
            ({"first_error_step": 0}, 0),
            ({"label": 1.0}, 1),
            ({"labels": [True, False, True]}, 1),
            ({"labels": [True, True, True]}, -1),
            ({"labels": [1, 0, None]}, 1),
        ],
    )
    def test_labels(self, tmp_path, fields, label):
        assert self.label(tmp_path, **fields) == label

    def test_an_empty_reference_is_none(self, tmp_path):
        row = {"problem": "p", "steps": ["a"], "label": 0}
        rows, _ = self.read(
            tmp_path,
            {**row, "reference": ""},
            {**row, "reference": float("nan"), "answer": "4"},
            {**row, "reference": [], "answer": 0},
        )
        assert [one.reference for one in rows] == [None, "4", "0"]

    def test_stepwise_supervision_rows(self, tmp_path):
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p"}]
        rows, _ = self.read(tmp_path, {"prompt": prompt, "completions": ["a", "b"], "labels": [True, False]})
        assert (rows[0].problem, rows[0].steps, rows[0].label) == ("p", ("a", "b"), 1)

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"label": 3}, "label out of range"),
            ({"label": -2}, "label out of range"),
            ({"label": None}, "label is empty"),
            ({"label": 0, "steps": []}, "no steps"),
            ({"label": 0, "steps": [" "]}, "no steps"),
            ({"labels": [True]}, "labels and steps differ in number"),
            ({"labels": [None, False, True]}, "a step before the first wrong one has no label"),
        ],
    )
    def test_skipped_rows_are_counted(self, tmp_path, fields, reason):
        good = {"problem": "p", "steps": ["a", "b", "c"]}
        rows, sources = self.read(tmp_path, {**good, **fields}, {**good, "label": 0})
        assert len(rows) == 1
        assert sources[0]["skipped"] == {reason: 1}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                {"steps": ["a"], "label": 0},
                r"line 1: there is no problem, only the fields \['label', 'steps'\]. Name it",
            ),
            ({"problem": "p", "label": 0}, "line 1: there is no list of steps"),
            ({"problem": "p", "steps": ["a"]}, "line 1: there is no label"),
            ({"problem": 3, "steps": ["a"], "label": 0}, "line 1: problem=3 must be a string"),
            ({"problem": "p", "steps": "a", "label": 0}, "line 1: steps='a' must be a list of strings"),
            ({"problem": "p", "steps": ["a", 2], "label": 0}, r"line 1: steps=\['a', 2\] must be a list of strings"),
            ({"problem": "p", "steps": ["a"], "label": "0.5"}, "line 1: label='0.5' must be the 0-based index"),
            ({"problem": "p", "steps": ["a"], "label": True}, "line 1: label=True must be the 0-based index"),
            ({"problem": "p", "steps": ["a"], "labels": 1}, "line 1: labels=1 must be a list"),
            (
                {"problem": "p", "steps": ["a"], "labels": ["+"]},
                r"line 1: labels=\['\+'\] must be true \(or 1\), false",
            ),
            (
                {"problem": "p", "steps": ["a", "b", "c"], "labels": [1, 0, -1]},
                "In PRM800K's form 0 is neutral and -1 wrong",
            ),
            ({"problem": "p", "steps": ["a", "b", "c"], "labels": [0, 1, -1]}, "true for 1 and 0, false for -1"),
            ({"problem": "p", "steps": ["a", "b", "c"], "labels": [0, 1, 2]}, r"labels=\[0, 1, 2\] must be true"),
            ({"problem": "p", "steps": ["a", "b"], "labels": [False, float("nan")]}, "must be true"),
            ({"problem": "p", "steps": ["a", "b"], "labels": [0.9, 0.2]}, "must be true"),
            ({"problem": "p", "steps": ["a"], "label": 0, "final_answer_correct": "no"}, "final_answer_correct='no'"),
            ("p", "line 1: it is str, not an object"),
        ],
    )
    def test_what_cannot_be_understood(self, tmp_path, row, message):
        with pytest.raises(ValueError, match=message):
            self.read(tmp_path, row)

    @pytest.mark.parametrize("name", ["own.json", "own.jsonl"])
    def test_a_file_that_begins_with_a_byte_order_mark(self, tmp_path, name):
        row = {"problem": "p", "steps": ["a"], "label": 0}
        text = json.dumps([row] if name == "own.json" else row)
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_rows([str(tmp_path / name)])[0][0].label == 0

    def test_json_list_and_broken_json(self, tmp_path):
        path = tmp_path / "own.json"
        path.write_text(json.dumps([{"problem": "p", "steps": ["a\u2028b"], "label": 0}], ensure_ascii=False))
        assert read_rows([str(path)])[0][0].steps == ("a\u2028b",)
        path.write_text('{"problem": "p"')
        with pytest.raises(ValueError, match=r"own.json, line 1 is not valid JSON"):
            read_rows([str(path)])
        with pytest.raises(ValueError, match=r"missing\.jsonl' does not exist"):
            read_rows([str(tmp_path / "missing.jsonl")])

    def test_a_dataset_with_splits(self, tmp_path):
        """As the Hub has ProcessBench: the split is the subset."""
        for split in ("gsm8k", "math"):
            write(tmp_path / f"{split}.jsonl", [{"problem": split, "steps": ["a", "b"], "label": 1}] * 2)
        files = "\n".join(f"  - split: {split}\n    path: {split}.jsonl" for split in ("gsm8k", "math"))
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n")
        rows, sources = read_rows([str(tmp_path)])
        assert Counter(row.subset for row in rows) == {"gsm8k": 2, "math": 2}
        assert [source["split"] for source in sources] == ["gsm8k", "math"]
        assert all(source["fingerprint"] and source["name"] == tmp_path.name for source in sources)
        assert {row.subset for row in read_rows([str(tmp_path)], split="math")[0]} == {"math"}
        with pytest.raises(ValueError, match=r"split='algebra' is not in .* which has \['gsm8k', 'math'\]"):
            read_rows([str(tmp_path)], split="algebra")

    def test_samples_keep_groups_whole(self, workplace):
        rows, _ = read_rows(["rows.jsonl"])
        sample = sample_rows(rows, 10, seed=0)
        assert len(sample) == 9
        assert set(Counter(row.problem for row in sample).values()) == {3}
        assert sample == sorted(sample, key=rows.index)
        assert sample == sample_rows(rows, 10, seed=0) != sample_rows(rows, 10, seed=1)
        assert sample_rows(rows, 100, seed=0) == rows
        assert len(sample_rows(rows, 1, seed=0)) == 3
