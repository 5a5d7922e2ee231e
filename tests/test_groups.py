"""The pure functions against naive loops, and against the closed forms of the paper."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import matrix, tensor

from trl_sgpo.groups import (
    group_advantages,
    group_kinds,
    rts_to_reward,
    weighted_sum,
)


NAN = math.nan


class TestGroupKinds:
    @pytest.mark.parametrize(
        ("outcomes", "threshold", "kind"),
        [
            ([1.0, 1.0, 1.0], 0.5, "solved"),
            ([0.0, 1.0, 0.0], 0.5, "mixed"),
            ([0.0, 0.0, 0.0], 0.5, "failed"),
            ([-1.0, -1.0, -1.0], 0.5, "failed"),
            ([-1.0, 1.0, -1.0], 0.5, "mixed"),
            ([0.1, 0.49, 0.3], 0.5, "failed"),
            ([0.1, 0.5, 0.3], 0.5, "mixed"),
            ([-3.0, -2.0, -2.5], -2.2, "mixed"),
            ([None, None, None], 0.5, None),
            ([None, 0.0, None], 0.5, None),
            ([None, 0.0, 0.0], 0.5, "failed"),
            ([None, 1.0, 1.0], 0.5, "solved"),
        ],
    )
    def test_examples(self, outcomes, threshold, kind):
        kinds = group_kinds(tensor([outcomes]), threshold)
        assert [name for name in ("solved", "mixed", "failed") if getattr(kinds, f"{name}_P").item()] == (
            [kind] if kind else []
        )

    @given(matrix(st.sampled_from([None, -1.0, 0.0, 0.3, 0.5, 1.0])), st.sampled_from([-0.5, 0.3, 0.5, 1.0]))
    @settings(max_examples=200, deadline=None)
    def test_equals_loop(self, outcomes, threshold):
        kinds = group_kinds(tensor(outcomes), threshold)
        for p, row in enumerate(outcomes):
            correct = [torch.tensor(x).item() >= torch.tensor(threshold).item() for x in row if x is not None]
            counts = len(correct) >= 2
            assert kinds.solved_P[p].item() == (counts and all(correct))
            assert kinds.failed_P[p].item() == (counts and not any(correct))
            assert kinds.mixed_P[p].item() == (counts and any(correct) and not all(correct))


class TestReward:
    @given(st.floats(0, 1), st.floats(0, 30), st.floats(-1, 2))
    @settings(max_examples=200, deadline=None)
    def test_equals_the_papers_equation(self, rts, beta, gamma):
        expected = 1 / (1 + math.exp(-beta * (rts - gamma)))
        assert rts_to_reward(torch.tensor(rts, dtype=torch.float64), beta, gamma).item() == pytest.approx(
            expected, abs=1e-6
        )

    @pytest.mark.parametrize("transform", ["logistic", "identity"])
    @pytest.mark.parametrize("n_steps", [2, 3, 10, 64])
    def test_rises_with_the_first_wrong_step(self, transform, n_steps):
        # Guards the sign of the exponent: a reward that falls as the correct prefix grows would reward early errors
        rts = torch.arange(n_steps, dtype=torch.float64) / n_steps
        rewards = rts_to_reward(rts, transform=transform)
        assert (rewards.diff() > 0).all()
        assert (rewards >= 0).all()
        assert (rewards < 1).all()

    def test_the_papers_text_read_literally_is_nearly_flat(self):
        rewards = rts_to_reward(torch.tensor([0.0, 1.0]), beta=0.5, gamma=10.0)
        assert rewards.tolist() == pytest.approx([0.0067, 0.0110], abs=1e-4)

    def test_nan_stays_nan(self):
        assert torch.isnan(rts_to_reward(torch.tensor([NAN]))).all()

    def test_unknown_transform(self):
        with pytest.raises(ValueError, match=r"transform='step' is unknown: it must be one of"):
            rts_to_reward(torch.tensor([0.5]), transform="step")


class TestAdvantages:
    @given(matrix(st.sampled_from([None, -1.0, 0.0, 0.5, 1.0])), st.sampled_from(["group", "batch", "none"]))
    @settings(max_examples=200, deadline=None)
    def test_equals_loop(self, rewards, scale):
        def std(values):
            mean = sum(values) / len(values)
            return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))

        flat = [x for row in rewards for x in row if x is not None]
        expected = []
        for row in rewards:
            values = [x for x in row if x is not None]
            divisor = {"none": 1.0, "group": None, "batch": None}[scale]
            if scale == "group" and len(values) > 1:
                divisor = std(values) + 1e-4
            if scale == "batch" and len(flat) > 1:
                divisor = std(flat) + 1e-4
            for x in row:
                if x is None or divisor is None:
                    expected.append(0.0)
                else:
                    expected.append((x - sum(values) / len(values)) / divisor)
        actual = group_advantages(tensor(rewards), scale).flatten().tolist()
        assert actual == pytest.approx(expected, rel=1e-4, abs=2e-3)

    def test_weighted_sum_leaves_none_out(self):
        rewards = torch.tensor([[[1.0, NAN, 2.0], [NAN, NAN, NAN]]])
        total = weighted_sum(rewards, torch.tensor([1.0, 5.0, 0.5]))
        torch.testing.assert_close(total, tensor([[2.0, None]]), equal_nan=True)
