"""
Every upstream symbol this package stands on, by name. If one is missing or has changed, the test that fails says which.

Needs TRL and transformers only, not this package, so it can be pointed at any release:
`pip install trl==X && pytest --noconftest tests/test_contract.py`.
"""

import importlib
import inspect
import re
from importlib import resources

import pytest


SYMBOLS = [
    "accelerate.utils.gather",
    "huggingface_hub.ModelCard.load",
    "trl.DatasetMixtureConfig",
    "trl.GRPOConfig",
    "trl.GRPOTrainer",
    "trl.ModelConfig",
    "trl.TrlParser",
    "trl.get_dataset",
    "trl.get_peft_config",
    "trl.get_quantization_config",
    "trl.rewards.accuracy_reward",
    "trl.rewards.get_soft_overlong_punishment",
    "trl.rewards.reasoning_accuracy_reward",
    "trl.rewards.think_format_reward",
    "trl.scripts.grpo.GRPOScriptArguments",
    "trl.trainer.grpo_trainer.EnvironmentFactory",
    "trl.trainer.grpo_trainer.RewardFunc",
    "trl.trainer.grpo_trainer.RolloutFunc",
    "trl.models.utils.disable_gradient_checkpointing",
    "trl.trainer.utils.get_callable_name",
    "trl.trainer.utils.get_config_model_id",
    "trl.GRPOTrainer._name",
    "trl.GRPOTrainer._paper",
    "trl.GRPOTrainer._tag_names",
    "transformers.PreTrainedConfig",
]

SIGNATURES = {
    "GRPOTrainer.__init__": [
        "self",
        "model",
        "reward_funcs",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "reward_processing_classes",
        "callbacks",
        "optimizers",
        "quantization_config",
        "peft_config",
        "tools",
        "rollout_func",
        "environment_factory",
    ],
    "GRPOTrainer._calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "GRPOTrainer._generate_and_score_completions": ["self", "inputs"],
    "GRPOTrainer._get_per_token_logps_and_entropies": [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ],
    "GRPOTrainer._log_completion_extra": ["self", "column", "values"],
    "GRPOTrainer.create_model_card": ["self", "model_name", "dataset_name", "tags"],
}

# Attributes that GRPOTrainer sets on itself and this package reads
ATTRIBUTES = [
    "_logs",
    "_metrics",
    "_tokenizer",
    "eos_token_ids",
    "log_completions",
    "loss_type",
    "mask_truncated_completions",
    "multi_objective_aggregation",
    "num_generations",
    "num_generations_eval",
    "reward_func_names",
    "reward_funcs",
    "reward_weights",
    "scale_rewards",
]

CONFIG_FIELDS = [
    "gradient_checkpointing_kwargs",
    "importance_sampling_level",
    "loss_type",
    "multi_objective_aggregation",
    "reward_weights",
    "scale_rewards",
    "trust_remote_code",
]


def lookup(path: str):
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for name in parts[split:]:
            if not hasattr(found, name):
                pytest.fail(f"the installed release has no `{path}`: `{name}` is missing")
            found = getattr(found, name)
        return found
    pytest.fail(f"the installed release has no `{path}`: nothing of it can be imported")


@pytest.mark.parametrize("path", SYMBOLS)
def test_symbol(path):
    lookup(path)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    actual = list(inspect.signature(lookup(f"trl.{path}")).parameters)
    assert actual == SIGNATURES[path], f"the signature of `trl.{path}` has changed"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute(name):
    source = "".join(inspect.getsource(cls) for cls in lookup("trl.GRPOTrainer").__mro__ if "trl" in cls.__module__)
    assert re.search(rf"self\.{name}\b\s*(:[^=\n]+)?=[^=]", source), f"GRPOTrainer sets no attribute `self.{name}`"


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_config_field(name):
    assert name in lookup("trl.GRPOConfig").__dataclass_fields__, f"GRPOConfig has no field `{name}`"


def test_model_card_template():
    text = resources.files("trl").joinpath("templates/lm_model_card.md").read_text()
    assert "### Framework versions\n\n" in text, "the model card has no section `Framework versions`"


def test_advantages_may_be_scaled_after_they_were_made():
    source = inspect.getsource(lookup("trl.GRPOTrainer._generate_and_score_completions"))
    assert '"advantages": advantages' in source, "the output of `_generate_and_score_completions` has no `advantages`"
    assert "(std_rewards + 1e-4)" in source, "the standard deviation of the rewards is no longer increased by 1e-4"
    assert 'self._logs["advantages"].extend' in source, "`_logs` keeps no `advantages`"


def test_what_a_forward_pass_takes_is_in_the_output():
    output = inspect.getsource(lookup("trl.GRPOTrainer._generate_and_score_completions"))
    taken = SIGNATURES["GRPOTrainer._get_per_token_logps_and_entropies"][8:]
    names = [
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "tool_mask",
        "old_per_token_logps",
        *taken,
    ]
    for name in names:
        assert f'"{name}": ' in output or f'output["{name}"]' in output, f"the output has no `{name}`"


def test_what_the_losses_divide_by():
    source = inspect.getsource(lookup("trl.GRPOTrainer._compute_loss"))
    source = source[source.index('if self.loss_type in ["grpo", "sapo"]') :]
    divisors = {
        '["grpo", "sapo"]': "mask.sum(-1).clamp(min=1.0)).mean()",
        '"bnpo"': "(per_token_loss * mask).sum() / mask.sum()",
        '"dr_grpo"': "(per_token_loss.size(0) * self.max_completion_length)",
        '["cispo", "dapo", "vespo"]': 'inputs["num_items_in_batch"]',
        '"luspo"': "(per_token_loss * mask).sum(-1).mean()",
    }
    branches = re.split(r"(?:if|elif) self\.loss_type (?:in|==) ", source)[1:]
    for loss_types, divisor in divisors.items():
        found = [branch for branch in branches if branch.startswith(loss_types)]
        assert found, f"the loss has no branch for {loss_types}"
        assert divisor in found[0], f"the loss of {loss_types} no longer divides as in `{divisor}`"
