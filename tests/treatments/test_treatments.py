"""Every treatment, through the trainer: against a loop over the rows, and GRPO bit for bit wherever it does not act."""

import inspect
import math
import random
import statistics
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import assert_every_parameter_moved, by_kind, logged, parameters, record_rounds
from toys import CountingJudge, FixedJudge, all_failed, all_mixed, stepwise
from trl import GRPOConfig, GRPOTrainer

from trl_sgpo import SGPOConfig, Verdict
from trl_sgpo.groups import SortedGroups, grpo_advantages
from trl_sgpo.treatments import TREATMENTS, Policy, Round, Treatment


NAN = math.nan
SIZE, WEIGHTS, FACTOR = 4, [1.0, 0.3, 0.8], 0.6  # of a group; of outcome, other reward and judge; failed_group_weight
SCALINGS = [
    ("group", "sum_then_normalize"),
    ("batch", "sum_then_normalize"),
    ("none", "sum_then_normalize"),
    ("group", "normalize_then_sum"),
]
ROOT = Path(__file__).parents[2]


def outcome(prompts, completions, **kwargs):
    """Failed, mixed and solved groups, with a None here and there."""
    rng = random.Random(1)
    kinds = [rng.choice(["failed", "failed", "mixed", "solved"]) for _ in range(len(completions) // SIZE)]
    values = {"failed": [0.0], "mixed": [0.0, 1.0], "solved": [1.0]}
    return [None if rng.random() < 0.1 else rng.choice(values[kinds[i // SIZE]]) for i in range(len(completions))]


def other(prompts, completions, **kwargs):
    """Another reward, None wherever the outcome is, else sometimes."""
    rng = random.Random(2)
    given = outcome(prompts, completions)
    return [None if value is None or rng.random() < 0.1 else rng.choice([0.0, 0.5, 1.0]) for value in given]


def random_verdicts(items):
    rng = random.Random(3)
    return [
        Verdict.abstain("no idea") if rng.random() < 0.3 else Verdict.error(rng.randrange(4) % len(item.steps))
        for item in items
    ]


def is_none(value):
    return value is None or math.isnan(value)


def mean(values):
    return statistics.fmean(values)


def std(values):
    return statistics.stdev(values) + 1e-4 if len(values) > 1 else NAN


def normalised(values, divisor=None):
    """Eq. 1 inside a group, None left out; `divisor` in place of the group's own standard deviation."""
    known = [v for v in values if not is_none(v)]
    if not known:
        return [NAN] * len(values)
    divisor = std(known) if divisor is None else divisor
    return [NAN if is_none(v) else (v - mean(known)) / divisor for v in values]


def total(columns, weights):
    rows = zip(*columns, strict=True)
    return [
        NAN if all(map(is_none, row)) else sum(w * v for w, v in zip(weights, row, strict=True) if not is_none(v))
        for row in rows
    ]


def advantages_of(columns, weights, scale, aggregation, divisor=None):
    """What GRPO makes of reward columns, one value per row."""
    n = len(columns[0])
    groups = [slice(i, i + SIZE) for i in range(0, n, SIZE)]
    if aggregation == "sum_then_normalize":
        rewards = total(columns, weights)
        if divisor is None:
            divisor = {"group": None, "none": 1.0, "batch": std([r for r in rewards if not is_none(r)])}[scale]
        found = [a for group in groups for a in normalised(rewards[group], divisor)]
    else:
        scaled = [[a for group in groups for a in normalised(column[group])] for column in columns]
        rewards = total(scaled, weights)
        known = [r for r in rewards if not is_none(r)]
        found = [(r - mean(known)) / std(known) for r in rewards]
    return [0.0 if math.isnan(a) else a for a in found]


def rescued_groups(table):
    """From the first row of each rescued group to its judged rows' rewards, by the rules of the paper's treatment."""
    found = {}
    for i in range(0, len(table), SIZE):
        rows = range(i, i + SIZE)
        scored = [j for j in rows if not is_none(table["outcome"][j])]
        judged = {j: eq_2(table["judge_rts"][j]) for j in scored if not is_none(table["judge_rts"][j])}
        failed = len(scored) >= 2 and not any(table["outcome"][j] >= 0.5 for j in scored)
        enough = len(judged) >= 2 and 2 * len(judged) >= len(scored)
        if failed and enough and len(set(judged.values())) > 1:
            found[i] = (scored, judged)
    return found


def rewards_in_mixed_groups(table, others):
    """From the first row of each mixed group to its wrong rows' rewards, scaled so that none passes a right one."""
    found = {}
    for i in range(0, len(table), SIZE):
        rows = [j for j in range(i, i + SIZE) if not is_none(table["outcome"][j])]
        right = [j for j in rows if table["outcome"][j] >= 0.5]
        wrong = [j for j in rows if j not in right]
        judged = {j: eq_2(table["judge_rts"][j]) for j in wrong if not is_none(table["judge_rts"][j])}
        if not right or not judged or 2 * len(judged) < len(wrong):
            continue
        kept = {}
        for j in wrong:
            share = min(max(min(others[k] for k in right) - others[j], 0.0) / WEIGHTS[2], 1.0)
            if share > 0:
                kept[j] = judged.get(j, mean(judged.values())) * share
        if kept:
            found[i] = kept
    return found


def eq_2(rts):
    return 1 / (1 + math.exp(-10 * (rts - 0.5)))


def reference_sgpo(table, scope, scale, aggregation, factor):
    """Puts the judge's rewards into the matrix, lets GRPO's formula act, and scales the judge's part. NaN where GRPO stays."""
    columns = [table["outcome"].tolist(), table["other"].tolist()]
    sums_first = aggregation == "sum_then_normalize"
    rescued = rescued_groups(table)
    judge = [NAN] * len(table)
    factors = [NAN] * len(table)
    for i, (scored, judged) in rescued.items():
        for j in scored:
            # An abstention gets the mean of its group; in columns that are normalised each by itself it stays empty
            judge[j] = judged.get(j, mean(judged.values()) if sums_first else NAN)
        spread = math.sqrt((len(judged) - 1) / (len(scored) - 1)) if sums_first and scale == "group" else 1.0
        factors[i : i + SIZE] = [factor * spread] * SIZE
    if scope == "all_incorrect":
        others = total(columns, WEIGHTS[:2])
        for i, kept in rewards_in_mixed_groups(table, others).items():
            for j, reward in kept.items():
                judge[j] = reward
            factors[i : i + SIZE] = [1.0] * SIZE
    matrix = [*columns, judge]
    with_judge = advantages_of(matrix, WEIGHTS, scale, aggregation)
    divisor = None
    if sums_first and scale == "batch":
        divisor = std([r for r in total(matrix, WEIGHTS) if not is_none(r)])
    without = advantages_of(columns, WEIGHTS[:2], scale, aggregation, divisor)
    return [a + f * (b - a) for a, b, f in zip(without, with_judge, factors, strict=True)], judge


def run(make_trainer, name, **config):
    """One round of eight groups, and its table, TRL's output and the advantages that train."""
    judged = TREATMENTS[name].asks_judge
    funcs = [outcome, other, stepwise(FixedJudge(random_verdicts))] if judged else [outcome, other]
    trainer = make_trainer(
        funcs,
        failed_groups=name,
        outcome_reward="outcome",
        reward_weights=WEIGHTS[: len(funcs)],
        failed_group_weight=FACTOR,
        log_completions=True,
        per_device_train_batch_size=8 * SIZE,
        max_steps=1,
        generation_kwargs={"suppress_tokens": [0, 1]},  # so that every completion has as many steps as tokens
        **config,
    )
    rounds = record_rounds(trainer)
    trainer.train()
    table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet")
    return trainer, table, rounds[0]


def plain_grpo(make_trainer, **config):
    """The same round of a GRPOTrainer: the trainer, its reward matrix, its advantages."""
    grpo = make_trainer(
        [outcome, other],
        GRPOTrainer,
        GRPOConfig,
        reward_weights=WEIGHTS[:2],
        per_device_train_batch_size=8 * SIZE,
        max_steps=1,
        generation_kwargs={"suppress_tokens": [0, 1]},
        **config,
    )
    rounds, matrices, inner = record_rounds(grpo), [], grpo._calculate_rewards
    grpo._calculate_rewards = lambda *args: matrices.append(inner(*args)) or matrices[-1]
    grpo.train()
    return grpo, matrices[0].view(-1, SIZE, 2), rounds[0]["advantages"]


@pytest.mark.parametrize(("scale", "aggregation"), SCALINGS)
def test_the_formula_that_is_written_again_is_trls_bit_for_bit(make_trainer, scale, aggregation):
    config = {"scale_rewards": scale, "multi_objective_aggregation": aggregation}
    _, rewards_PGF, advantages = plain_grpo(make_trainer, **config)
    assert torch.equal(
        grpo_advantages(rewards_PGF, torch.tensor(WEIGHTS[:2]), scale, aggregation).flatten(), advantages
    )


CASES = [(name, "failed_groups", *scaling) for name in TREATMENTS for scaling in SCALINGS]
CASES += [("sgpo", "all_incorrect", *scaling) for scaling in SCALINGS if scaling[1] == "sum_then_normalize"]


@pytest.mark.essential
@pytest.mark.parametrize(("name", "scope", "scale", "aggregation"), CASES)
def test_equals_a_loop_and_leaves_the_others_to_grpo(make_trainer, name, scope, scale, aggregation):
    config = {"scale_rewards": scale, "multi_objective_aggregation": aggregation}
    plain = plain_grpo(make_trainer, **config)[2]
    trainer, table, found = run(make_trainer, name, judge_scope=scope, **config)
    advantages, length = found["advantages"], found["completion_ids"].shape[1]
    known_outcome = [not is_none(value) for value in table["outcome"]]
    failed = [
        sum(known_outcome[i : i + SIZE]) >= 2 and not (table["outcome"][i : i + SIZE] >= 0.5).any()
        for i in range(0, len(table), SIZE)
        for _ in range(SIZE)
    ]
    expected = plain.unsqueeze(1).repeat(1, length)
    if name == "sgpo":
        values, judge = reference_sgpo(table, scope, scale, aggregation, FACTOR)
        treated = ~torch.tensor(values).isnan()
        expected = torch.where(treated.unsqueeze(1), torch.tensor(values).unsqueeze(1), expected)
        known = [value for value in judge if not math.isnan(value)]
        log = trainer.state.log_history[0]
        assert log["rewards/stepwise_judge/mean"] == pytest.approx(mean(known), rel=1e-5)
        assert log["rewards/stepwise_judge/std"] == pytest.approx(statistics.stdev(known), rel=1e-5)
        assert table["stepwise_judge"].tolist() == pytest.approx(judge, rel=1e-5, nan_ok=True)
    elif name == "prefix":
        treated = torch.zeros(len(table), dtype=torch.bool)
        for i in range(0, len(table), SIZE):
            rts = [value for value in table["judge_rts"][i : i + SIZE] if not is_none(value)]
            rescued = failed[i] and 2 * len(rts) >= sum(known_outcome[i : i + SIZE]) and max(rts, default=0) > 0
            for j in range(i, i + SIZE):
                first = table["judge_first_error"][j]
                if rescued and not is_none(first):
                    treated[j] = True
                    expected[j, : int(first)] += FACTOR * 1.0
                    expected[j, int(first)] -= FACTOR * 0.5
        assert table["stepwise_judge"].isna().all()
        assert logged(trainer, "rewards/stepwise_judge/mean") == []
    elif name == "none":
        treated = torch.zeros(len(table), dtype=torch.bool)
    else:
        treated = torch.tensor([a and b for a, b in zip(failed, known_outcome, strict=True)])
        for i in range(0, len(table), SIZE):
            rows = [j for j in range(i, i + SIZE) if treated[j]]
            outcomes = [table["outcome"][j] for j in rows]
            pi = {j: math.exp(found["logps"][j].mean().item()) for j in rows}
            cost = {j: -pi[j] / (1 - pi[j]) for j in rows}
            for j in rows:
                if name == "zvp":
                    expected[j] += FACTOR * -0.1 * (found["entropy"][j].max() - found["entropy"][j])
                    continue
                expected[j] += FACTOR * {
                    "nsr": lambda j: -1.0,
                    "ngrpo": lambda j, o=outcomes: (table["outcome"][j] - mean([*o, 1.0])) / std([*o, 1.0]),
                    "lens": lambda j, c=cost: (c[j] - mean(c.values())) / std(list(c.values())),
                }[name](j)
    per_token = advantages if advantages.dim() > 1 else advantages.unsqueeze(1).expand(-1, length)
    torch.testing.assert_close(per_token, expected, rtol=1e-3, atol=2e-5)
    assert treated.any() == (name != "none")
    assert not treated.all()
    untouched = per_token[~treated]
    assert torch.equal(untouched, plain[~treated].unsqueeze(1).expand_as(untouched))  # bit for bit
    # What the table shows is what trains: of advantages per token the mean
    assert table["advantage"].tolist() == pytest.approx(per_token.mean(dim=1).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", [name for name in TREATMENTS if name != "none"])
def test_rewards_compare_with_those_of_a_grpo_run(make_trainer, name):
    """The matrix is read only, so what TRL logs of it does not depend on the treatment."""
    keys = ("reward", "reward_std", "frac_reward_zero_std", "rewards/outcome/mean", "rewards/other/mean")
    grpo = plain_grpo(make_trainer)[0]
    ours = run(make_trainer, name)[0]
    assert [ours.state.log_history[0][key] for key in keys] == [grpo.state.log_history[0][key] for key in keys]


class HalfBlame(Treatment):
    """Blames the judged completions of a failed group, by half as much if they begin with a right step."""

    asks_judge = True

    def setup(self, args: SGPOConfig) -> None:
        super().setup(args)
        self.weight = args.failed_group_weight

    def sort(self, round: Round) -> SortedGroups:
        has_verdict_P = (~torch.isnan(round.judged.rts_PG)).any(dim=1)
        rescued_P = round.kinds.failed_P & has_verdict_P  # equal scores teach too, so no group is tied
        return SortedGroups(rescued_P, torch.zeros_like(rescued_P))

    def advantages(self, round: Round, policy: Policy) -> torch.Tensor:
        blame_PG = torch.where(round.judged.rts_PG > 0, -0.5, -1.0)
        blamed_PG = ~torch.isnan(round.judged.rts_PG) & round.kinds.failed_P.unsqueeze(1)  # NaN: no verdict
        return round.advantages_B + self.weight * round.local(blame_PG * blamed_PG)


class TestOwnTreatment:
    def test_trains(self, make_trainer):
        grpo = make_trainer([by_kind], GRPOTrainer, GRPOConfig, max_steps=1, per_device_train_batch_size=16)
        plain = record_rounds(grpo)
        grpo.train()
        trainer = make_trainer(
            [by_kind, stepwise()],
            trainer_args={"treatment": HalfBlame()},
            failed_group_weight=0.4,
            per_device_train_batch_size=16,
            log_completions=True,
            max_steps=1,
        )
        rounds = record_rounds(trainer)
        start = parameters(trainer)
        trainer.train()
        assert_every_parameter_moved(start, trainer)
        table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet")
        blame = [
            0.0 if status == "" else -0.2 if rts > 0 else -0.4
            for status, rts in zip(table["judge_status"], table["judge_rts"], strict=True)
        ]
        assert set(blame) == {0.0, -0.2, -0.4}
        advantages = rounds[0]["advantages"]
        torch.testing.assert_close(advantages, plain[0]["advantages"] + torch.tensor(blame))
        assert table["advantage"].tolist() == pytest.approx(advantages.tolist())
        log = trainer.state.log_history[0]
        assert log["sgpo/groups/rescued"] == log["sgpo/groups/failed"] == 0.5
        assert log["sgpo/groups/tied"] == log["sgpo/groups/unjudged"] == 0

    def test_the_docs_show_the_same_code(self):
        page = (ROOT / "docs" / "howto" / "write_a_treatment.md").read_text()
        assert inspect.getsource(HalfBlame).strip() in page

    def test_its_name_is_on_the_card_and_beside_the_table(self, make_trainer, tmp_path):
        trainer = make_trainer(
            [by_kind, stepwise()],
            trainer_args={"treatment": HalfBlame()},
            log_completions=True,
            max_steps=1,
        )
        trainer.train()
        trainer.create_model_card(model_name="tiny")
        assert "(treatment `HalfBlame`)" in (tmp_path / "run" / "README.md").read_text()
        assert '"failed_groups": "HalfBlame"' in (tmp_path / "run" / "sgpo.json").read_text()

    def test_what_it_logs(self, make_trainer):
        class Logging(HalfBlame):
            def advantages(self, round, policy):
                round.metrics["sgpo/share_judged"] = (~torch.isnan(round.judged.rts_PG)).float().mean().item()
                return super().advantages(round, policy)

        trainer = make_trainer([all_failed, stepwise()], trainer_args={"treatment": Logging()}, max_steps=2)
        trainer.train()
        assert logged(trainer, "sgpo/share_judged") == [1.0, 1.0]

    def test_without_a_judge_it_may_treat_other_rounds(self, make_trainer):
        class Doubled(Treatment):
            def treats(self, round):
                return True

            def advantages(self, round, policy):
                return 2 * round.advantages_B

        runs = []
        for treatment in (None, Doubled()):
            trainer = make_trainer([all_mixed], trainer_args={"treatment": treatment}, max_steps=1)
            rounds = record_rounds(trainer)
            trainer.train()
            runs.append(rounds[0]["advantages"])
        assert torch.equal(runs[1], 2 * runs[0])

    @pytest.mark.parametrize(
        ("treatment", "funcs", "config", "error", "message"),
        [
            (HalfBlame, [by_kind], {}, TypeError, r"not the class: `treatment=HalfBlame\(\)`"),
            ("nsr", [by_kind], {}, TypeError, "treatment='nsr' is no treatment. Give an instance"),
            (
                HalfBlame(),
                [by_kind],
                {},
                ValueError,
                r"treatment=HalfBlame\(\) asks a judge, and reward_funcs holds no",
            ),
            (
                HalfBlame(),
                [by_kind, stepwise()],
                {"failed_groups": "nsr"},
                ValueError,
                r"treatment=HalfBlame\(\) and failed_groups='nsr' both say what is done with failed groups",
            ),
        ],
    )
    def test_errors(self, make_trainer, monkeypatch, treatment, funcs, config, error, message):
        # Before any weight is touched: super is not reached
        monkeypatch.setattr(GRPOTrainer, "__init__", lambda *args, **kwargs: pytest.fail("super was reached"))
        with pytest.raises(error, match=message):
            make_trainer(funcs, trainer_args={"treatment": treatment}, **config)

    def test_advantages_of_a_wrong_shape(self, make_trainer):
        class Whole(Treatment):
            def advantages(self, round, policy):
                return round.outcome_PG  # of all groups, not of this rank's completions

        trainer = make_trainer([all_failed], trainer_args={"treatment": Whole()}, max_steps=1)
        with pytest.raises(ValueError, match=r"The treatment 'Whole' returned advantages of shape \(2, 4\).*\(8,\)"):
            trainer.train()

    def test_advantages_that_are_not_finite(self, make_trainer):
        class ByScore(HalfBlame):
            def advantages(self, round, policy):
                return round.local(round.judged.rts_PG).double()  # NaN for an abstention

        judge = stepwise(FixedJudge(random_verdicts))
        trainer = make_trainer([all_failed, judge], trainer_args={"treatment": ByScore()}, max_steps=1)
        with pytest.raises(ValueError, match="The treatment 'ByScore' returned advantages that are not finite"):
            trainer.train()

    def test_a_forgotten_return(self, make_trainer):
        class Forgets(Treatment):
            def advantages(self, round, policy):
                round.local(round.outcome_PG)

        trainer = make_trainer([all_failed], trainer_args={"treatment": Forgets()}, max_steps=1)
        with pytest.raises(TypeError, match="The treatment 'Forgets' returned NoneType, not a tensor"):
            trainer.train()

    def test_metrics_are_numbers(self, make_trainer):
        class Logging(HalfBlame):
            value = torch.tensor(2.0)

            def advantages(self, round, policy):
                round.metrics["own/value"] = self.value
                return super().advantages(round, policy)

        for value in (torch.tensor(2.0), [1, 2]):
            Logging.value = value
            trainer = make_trainer([all_failed, stepwise()], trainer_args={"treatment": Logging()}, max_steps=1)
            if isinstance(value, list):
                with pytest.raises(TypeError, match=r"round.metrics\['own/value'\]=\[1, 2\] is not a number"):
                    trainer.train()
            else:
                trainer.train()
                assert logged(trainer, "own/value") == [2.0]
                assert isinstance(logged(trainer, "own/value")[0], float)

    def test_two_trainers_do_not_share_its_settings(self, make_trainer):
        treatment = HalfBlame()
        trainers = [
            make_trainer([by_kind, stepwise()], trainer_args={"treatment": treatment}, failed_group_weight=weight)
            for weight in (0.4, 0.8)
        ]
        assert [trainer.treatment.weight for trainer in trainers] == [0.4, 0.8]

    def test_it_may_do_without_an_outcome(self, make_trainer):
        class Doubled(Treatment):
            needs_outcome = False

            def treats(self, round):
                return True

            def advantages(self, round, policy):
                return 2 * round.advantages_B

        trainer = make_trainer([all_mixed, outcome], trainer_args={"treatment": Doubled()}, max_steps=1)
        trainer.train()
        assert trainer.outcome_indices == []
        Doubled.needs_outcome = True
        with pytest.raises(ValueError, match="has to know which completions are wrong"):
            make_trainer([all_mixed, outcome], trainer_args={"treatment": Doubled()})

    def test_the_rounds_in_evaluation_are_not_treated(self, make_trainer, dataset):
        judge = CountingJudge()
        trainer = make_trainer(
            [all_failed, stepwise(judge)],
            trainer_args={"treatment": HalfBlame(), "eval_dataset": dataset},
        )
        rounds = record_rounds(trainer)
        trainer.evaluate()
        assert judge.calls == 0
        assert not any(found["advantages"].any() for found in rounds)


def test_an_observer_is_told_of_each_round_and_its_final_output(make_trainer):
    trainer = make_trainer([by_kind, stepwise()], max_steps=2)
    told = []
    trainer.round_observers.append(lambda round, output: told.append((round, output)))
    rounds = record_rounds(trainer)
    trainer.train()
    assert len(told) == len(rounds) == 2
    for (round, output), found in zip(told, rounds, strict=True):
        assert round.training
        assert torch.equal(output["advantages"], found["advantages"])
        assert not torch.equal(round.advantages_B, found["advantages"])  # those are GRPO's
        assert torch.isnan(round.rewards_PGF[..., round.judge_index]).all()


def test_nothing_of_a_round_stays_in_the_trainer(make_trainer):
    """The two hooks tell each other nothing but the Round, and forget it, after an error too."""
    trainer = make_trainer([by_kind, stepwise()], max_steps=2, exclude_dead_groups=True)
    before, treatment = dict(vars(trainer)), dict(vars(trainer.treatment))
    own = set(vars(trainer)) - set(vars(make_trainer([by_kind], GRPOTrainer, GRPOConfig)))
    trainer.train()
    assert {name for name in own if vars(trainer)[name] is not before[name]} == set()
    assert trainer._round is None
    assert vars(trainer.treatment) == treatment
    assert not any(isinstance(value, Round | torch.Tensor) for value in vars(trainer._round_log).values())

    def fails(*args):
        raise RuntimeError("out of memory")

    trainer._calculate_rewards = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert trainer._round is None
