"""Two real processes over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from trl_sgpo.groups import group_advantages


ON_ONE = ("baseline", "longest", "lens", "zvp", "whole", "live")
ON_TWO = (*ON_ONE, "straddle", "one_sided", "prefix", "fails_on_one_rank", "masked")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """`two_ranks(mode, n_processes)`: what each rank wrote down, the errors and the folder. All modes are run at once."""
    launched = {}

    def launch(n_processes):
        folder = tmp_path_factory.mktemp(f"on_{n_processes}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
        modes = ON_ONE if n_processes == 1 else ON_TWO
        result = subprocess.run(
            [*command, str(Path(__file__).parent / "two_ranks.py"), str(folder), *modes],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "true"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return folder, result.stderr

    def run(mode, n_processes=2):
        if n_processes not in launched:
            launched[n_processes] = launch(n_processes)
        folder, stderr = launched[n_processes]
        ranks = [json.loads((folder / mode / f"rank{rank}.json").read_text()) for rank in range(n_processes)]
        return ranks, stderr, folder / mode

    return run


def test_groups_that_straddle_ranks(two_ranks):
    (rank0, rank1), _, folder = two_ranks("straddle")
    assert rank0["sizes"] == rank1["sizes"] == [6, 6]  # each judges its own rows, once a round
    assert rank0["checksum"] == rank1["checksum"]
    assert rank0["gathers_per_round"] == rank1["gathers_per_round"] == 1  # the scores
    for step, (a, b) in enumerate(zip(rank0["rounds"], rank1["rounds"], strict=True), start=1):
        rewards = torch.tensor(a["rewards"])
        assert torch.equal(rewards.nan_to_num(), torch.tensor(b["rewards"]).nan_to_num())  # one matrix on both ranks
        assert rewards.shape == (12, 2)
        assert torch.isnan(rewards[:, 1]).all()  # nobody writes into it
        table = pd.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
        assert len(table) == 12
        assert table["judge_first_error"].notna().all()
        rts = (table["judge_first_error"] / table["judge_n_steps"]).tolist()
        assert rts == pytest.approx(table["judge_rts"].tolist(), rel=1e-6)
        # The advantages of both ranks together are those of three whole groups, at half the weight
        expected = 0.5 * group_advantages(torch.tensor(rts, dtype=torch.float32).view(3, 4))
        advantages = torch.tensor(a["advantages"] + b["advantages"]).view(3, 4)
        torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
        assert advantages[1].abs().max() > 0  # the group in the middle, half of it on each rank
        assert table["advantage"].tolist() == pytest.approx(advantages.flatten().tolist())
        # Row by row: the reward is the RTS itself, so the column of rescued groups is that of the scores
        rescued = table["stepwise_judge"].notna()
        assert table["stepwise_judge"][rescued].tolist() == pytest.approx(
            table["judge_rts"][rescued].tolist(), rel=1e-5
        )
        assert rescued.sum() == (advantages != 0).any(dim=1).sum() * 4
    logs = [[entry for entry in rank["log"] if "sgpo/judge_calls" in entry] for rank in (rank0, rank1)]
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if k.startswith("sgpo/")} == {
            k: v for k, v in b.items() if k.startswith("sgpo/")
        }
        assert a["sgpo/judge_calls"] == 12


def test_a_rank_with_nothing_to_judge(two_ranks):
    (rank0, rank1), _, _ = two_ranks("one_sided")
    assert rank0["sizes"] == [6, 6]
    assert rank1["sizes"] == []
    assert rank0["checksum"] == rank1["checksum"]
    assert rank1["log"][0]["sgpo/judge_calls"] == 6
    assert rank0["gathers_per_round"] == rank1["gathers_per_round"] == 1
    assert rank1["log"][0]["sgpo/groups/mixed"] == rank1["log"][0]["sgpo/groups/failed"] == 0.5


def test_credit_per_token_on_one_rank_only(two_ranks):
    (rank0, rank1), _, folder = two_ranks("prefix")
    assert rank0["sizes"] == [6, 6]
    assert rank1["sizes"] == []
    assert rank0["checksum"] == rank1["checksum"]
    assert rank0["gathers_per_round"] == rank1["gathers_per_round"] == 3  # scores, places, what the table shows
    for a, b in zip(rank0["rounds"], rank1["rounds"], strict=True):
        halves = [torch.tensor(half["advantages"]) for half in (a, b)]
        assert [half.dim() for half in halves] == [2, 1]
        assert set(halves[0].unique().tolist()) <= {0.5, -0.25, 0.0}
    table = pd.read_parquet(folder / "completions" / "completions_00001.parquet")
    halves = [torch.tensor(rank["rounds"][0]["advantages"]) for rank in (rank0, rank1)]
    lengths = table["completion"].str.split().str.len().tolist()
    expected = [row[:n].mean().item() for row, n in zip(halves[0], lengths, strict=False)] + halves[1].tolist()
    assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_baseline_of_a_group_on_two_ranks_is_that_of_the_whole_group(two_ranks):
    (whole,), _, _ = two_ranks("baseline", n_processes=1)
    (rank0, rank1), _, _ = two_ranks("baseline")
    assert rank0["sizes"] == [6, 6]
    assert rank1["sizes"] == [4, 4]  # of its last four two are right
    assert rank0["checksum"] == rank1["checksum"] == pytest.approx(whole["checksum"], rel=1e-6)
    # As without a baseline: scores, places with what is logged of the credit, what the table shows
    assert rank0["gathers_per_round"] == rank1["gathers_per_round"] == whole["gathers_per_round"] == 3
    for a, b, both in zip(rank0["rounds"], rank1["rounds"], whole["rounds"], strict=True):
        expected = torch.tensor(both["advantages"])
        halves = [torch.tensor(half["advantages"]) for half in (a, b)]
        halves = [torch.nn.functional.pad(half, (0, expected.shape[1] - half.shape[1])) for half in halves]
        torch.testing.assert_close(torch.cat(halves), expected)
        _, straddling, mixed = expected.view(3, 4, -1)
        assert straddling[:2].any()
        assert straddling[2:].any()
        assert (mixed[::2] < 0).any()
    logs = [[entry for entry in rank["log"] if "sgpo/accuracy" in entry] for rank in (rank0, rank1, whole)]
    for entries in zip(*logs, strict=True):
        ours = [
            {k: v for k, v in entry.items() if k.startswith("sgpo/") and k != "sgpo/judge_seconds"}
            for entry in entries
        ]
        assert ours[0] == ours[1] == pytest.approx(ours[2])
        assert ours[0]["sgpo/credit/size"] > 0
        assert 0 <= ours[0]["sgpo/credit/silent"] < 1


def test_the_longest_completion_of_a_group_may_lie_on_the_other_rank(two_ranks):
    (whole,), _, _ = two_ranks("longest", n_processes=1)
    (rank0, rank1), _, folder = two_ranks("longest")
    assert rank0["checksum"] == rank1["checksum"] == pytest.approx(whole["checksum"], rel=1e-6)
    for step, (a, b, both) in enumerate(zip(rank0["rounds"], rank1["rounds"], whole["rounds"], strict=True), start=1):
        advantages = torch.tensor(a["advantages"] + b["advantages"])
        torch.testing.assert_close(advantages, torch.tensor(both["advantages"]), rtol=1e-4, atol=1e-5)
        table = pd.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet").iloc[:8]
        n_steps = torch.tensor(table["judge_n_steps"].tolist()).view(2, 4)
        longest = n_steps.amax(dim=1, keepdim=True)
        assert n_steps[1, :2].max() != n_steps[1, 2:].max()  # so one rank has to learn of the other's
        shares = torch.tensor(table["judge_first_error"].tolist()).view(2, 4) / longest
        torch.testing.assert_close(advantages[:8].view(2, 4), 0.5 * group_advantages(shares), rtol=1e-4, atol=1e-5)


def test_a_judge_that_fails_on_one_rank(two_ranks):
    (rank0, rank1), stderr, _ = two_ranks("fails_on_one_rank")
    assert rank0["checksum"] == rank1["checksum"]
    assert rank0["log"][0]["sgpo/abstain_rate"] == 0.5
    # The first group is judged, the middle one has half its verdicts, the last one none
    assert rank0["log"][0]["sgpo/groups/unjudged"] == pytest.approx(1 / 3)
    assert stderr.count("this rank has lost its judge") >= 1


def test_completions_that_are_masked_on_one_rank(two_ranks):
    (rank0, rank1), _, _ = two_ranks("masked")
    assert rank0["sizes"] == [6, 6]
    assert rank1["sizes"] == []
    assert rank0["checksum"] == rank1["checksum"]
    assert rank0["gathers_per_round"] == rank1["gathers_per_round"] == 1  # the masks come with the scores
    logs = [[entry for entry in rank["log"] if "sgpo/judge_calls" in entry] for rank in (rank0, rank1)]
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if "sgpo/" in k} == {k: v for k, v in b.items() if "sgpo/" in k}
        assert a["sgpo/judge_calls"] == 6
        assert a["sgpo/groups/not_asked"] == pytest.approx(1 / 3)
    advantages = torch.tensor(rank0["rounds"][0]["advantages"] + rank1["rounds"][0]["advantages"]).view(3, 4)
    assert not advantages[2].any()
    assert not advantages[1, 2:].any()
    assert advantages[1, 0] == -advantages[1, 1] != 0  # half of the group had to be enough


@pytest.mark.parametrize("mode", ["lens", "zvp"])
def test_treatments_without_a_judge_on_two_ranks_equal_those_on_one(two_ranks, mode):
    (whole,), _, _ = two_ranks(mode, n_processes=1)
    (rank0, rank1), _, _ = two_ranks(mode)
    assert rank0["checksum"] == rank1["checksum"] == pytest.approx(whole["checksum"], rel=1e-6)
    # LENS: likelihoods, dead groups. RL-ZVP: what the table shows
    assert rank0["gathers_per_round"] == rank1["gathers_per_round"] == {"lens": 2, "zvp": 1}[mode]
    for a, b, both in zip(rank0["rounds"], rank1["rounds"], whole["rounds"], strict=True):
        halves = [torch.tensor(half["advantages"]) for half in (a, b)]
        expected = torch.tensor(both["advantages"])
        if mode == "zvp":
            assert [half.dim() for half in halves] == [2, 1]  # nothing failed on rank 1
            halves[1] = halves[1].unsqueeze(1).expand(-1, expected.shape[1])
            halves[0] = torch.nn.functional.pad(halves[0], (0, expected.shape[1] - halves[0].shape[1]))
        torch.testing.assert_close(torch.cat(halves), expected, rtol=1e-4, atol=1e-5)
    logs = [[entry for entry in rank["log"] if "sgpo/accuracy" in entry] for rank in (rank0, rank1, whole)]
    for entries in zip(*logs, strict=True):
        ours = [{k: v for k, v in entry.items() if k.startswith("sgpo/")} for entry in entries]
        assert ours[0] == ours[1] == ours[2]
    if mode == "lens":
        assert logs[0][0]["sgpo/groups/dead"] == pytest.approx(1 / 3)
        groups = torch.tensor(whole["rounds"][0]["advantages"]).view(3, 4)
        assert not groups[0].any()
        assert groups[1].unique().numel() == 4
        lengths = torch.tensor([4 + row % 5 for row in range(12)]).view(3, 4).sum(dim=1)
        factor = lengths.sum() / lengths[1:].sum()
        torch.testing.assert_close(groups[2], factor * group_advantages(torch.tensor([[0.0, 1, 0, 1]]))[0])


@pytest.mark.parametrize("n_processes", [1, 2])
def test_dead_rows_and_updates_are_left_out_on_both_ranks(two_ranks, n_processes):
    """Rank 0 has no live row, and has to compute as many rows as rank 1."""
    (whole,), _, _ = two_ranks("whole", n_processes=1)
    ranks, _, _ = two_ranks("live", n_processes=n_processes)
    for rank in ranks:
        assert rank["checksum"] == pytest.approx(whole["checksum"], rel=1e-6)
        assert [entry["sgpo/dead_updates"] for entry in rank["log"] if "sgpo/dead_updates" in entry] in (
            [0.0, 1.0],
            [],
        )
    assert len({rank["checksum"] for rank in ranks}) == 1
