import math

import pytest
import yaml
from trl import GRPOConfig, TrlParser

from trl_sgpo import SGPOConfig


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"success_threshold": math.nan}, "success_threshold=nan: no outcome reward can reach it"),
        (
            {"judge_scope": "all"},
            r"judge_scope='all' is unknown: it must be one of \['failed_groups', 'all_incorrect'\]",
        ),
        ({"judge_until": 0.0}, r"judge_until=0.0 must lie in \(0, 1\]"),
        ({"judge_until": 1.5}, r"judge_until=1.5 must lie in \(0, 1\]"),
        ({"judge_until": math.nan}, r"judge_until=nan must lie in \(0, 1\]"),
        ({"failed_group_weight": -1.0}, "failed_group_weight=-1.0 must be a finite number of at least 0"),
        ({"failed_group_weight": math.inf}, "failed_group_weight=inf must be a finite number"),
        ({"rts_share_of": "group"}, r"rts_share_of='group' is unknown: it must be one of \['completion', 'longest'\]"),
        (
            {"failed_groups": "sign"},
            r"failed_groups='sign' is unknown: it must be one of \['sgpo', 'prefix', 'none', 'nsr', 'ngrpo', 'zvp', 'lens'\]",
        ),
    ],
)
def test_bad_values(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        SGPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **config)


def test_adds_only_what_the_trainer_decides():
    added = set(SGPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    assert added == {
        "outcome_reward",
        "success_threshold",
        "judge_scope",
        "judge_until",
        "failed_group_weight",
        "prefix_reward",
        "error_penalty",
        "prefix_baseline",
        "rts_share_of",
        "failed_groups",
        "exclude_dead_groups",
        "skip_dead_tokens",
        "skip_dead_updates",
    }
    changed = [
        name
        for name, field in GRPOConfig.__dataclass_fields__.items()
        if SGPOConfig.__dataclass_fields__[name].default != field.default
    ]
    assert not changed


def test_every_own_field_has_help():
    for name in set(SGPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__):
        assert SGPOConfig.__dataclass_fields__[name].metadata["help"]
        assert f"{name} (`" in SGPOConfig.__doc__


def test_a_grpo_yaml_loads_unchanged(tmp_path):
    values = {"output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 8, "beta": 0.04}
    values |= {"loss_type": "grpo", "scale_rewards": "none", "use_cpu": True, "bf16": False, "learning_rate": 1e-5}
    path = tmp_path / "grpo.yaml"
    path.write_text(yaml.safe_dump(values))
    parsed = [TrlParser((cls,)).parse_args_and_config(["--config", str(path)])[0] for cls in (GRPOConfig, SGPOConfig)]
    theirs, ours = (vars(config) for config in parsed)
    for name, value in values.items():
        assert ours[name] == theirs[name] == value
    assert ours["judge_until"] == 1.0


def test_the_own_fields_in_a_yaml(tmp_path):
    # `none` is a word to YAML, not the absence of a value
    path = tmp_path / "sgpo.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nfailed_groups: none\n"
        "outcome_reward: [math_reward, code_reward]\nexclude_dead_groups: true\n"
    )
    (config,) = TrlParser((SGPOConfig,)).parse_args_and_config(["--config", str(path)])
    assert (config.failed_groups, config.outcome_reward) == ("none", ["math_reward", "code_reward"])
    assert config.exclude_dead_groups is True


def test_one_name_of_an_outcome_on_a_command_line(tmp_path):
    arguments = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--outcome_reward",
        "math_reward",
    ]
    (config,) = TrlParser((SGPOConfig,)).parse_args_and_config(arguments)
    assert config.outcome_reward == "math_reward"
