"""
Every upstream symbol and behaviour this package stands on. If one is missing or has changed, the test that fails says which.
Behaviour is run on a tiny GRPOTrainer; upstream's source is read only where nothing can be run.

Needs TRL and transformers only, not this package, so it can be pointed at any release:
`pip install trl==X && pytest --noconftest tests/test_contract.py`.
"""

import importlib
import inspect
import itertools

import pytest
import torch


pytestmark = pytest.mark.essential


SYMBOLS = [
    "accelerate.commands.launch.launch_command_parser",
    "accelerate.utils.gather",
    "huggingface_hub.ModelCard.load",
    "trl.DatasetMixtureConfig",
    "trl.GRPOConfig",
    "trl.GRPOTrainer",
    "trl.ModelConfig",
    "trl.TrlParser",
    "trl.trainer.utils.split_pixel_values_by_grid",
    "trl.trainer.utils.unsplit_pixel_values_by_grid",
    "trl.get_dataset",
    "trl.get_peft_config",
    "trl.get_quantization_config",
    "trl.rewards.accuracy_reward",
    "trl.rewards.get_soft_overlong_punishment",
    "trl.rewards.reasoning_accuracy_reward",
    "trl.rewards.think_format_reward",
    "trl.scripts.grpo.GRPOScriptArguments",
    "trl.trainer.grpo_trainer.EnvironmentFactory",
    "trl.trainer.grpo_trainer.print_prompt_completions_sample",
    "trl.trainer.grpo_trainer.RewardFunc",
    "trl.trainer.grpo_trainer.RolloutFunc",
    "trl.models.utils.disable_gradient_checkpointing",
    "trl.cli.accelerate_config.resolve_accelerate_config_argument",
    "trl.trainer.utils.get_callable_name",
    "trl.trainer.utils.get_config_model_id",
    "trl.trainer.utils.is_async_callable",
    "trl.GRPOTrainer._name",
    "trl.GRPOTrainer._paper",
    "trl.GRPOTrainer._tag_names",
    "transformers.PreTrainedConfig",
    "transformers.hf_argparser.string_to_bool",
    "transformers.trainer_utils.get_last_checkpoint",
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
    "GRPOTrainer._prepare_inputs": ["self", "generation_batch"],
    "GRPOTrainer._compute_loss": ["self", "model", "inputs"],
    "GRPOTrainer._tokenize_prompts": ["self", "prompts"],
    "GRPOTrainer._log_completion_extra": ["self", "column", "values"],
    "GRPOTrainer.log": ["self", "logs", "start_time"],
    "GRPOTrainer.create_model_card": ["self", "model_name", "dataset_name", "tags"],
}

# Attributes that GRPOTrainer sets on itself and this package reads
ATTRIBUTES = [
    "accelerator",
    "model",
    "rollout_func",
    "state",
    "_buffered_inputs",
    "_logs",
    "_metrics",
    "_step",
    "_tokenizer",
    "aux_loss_enabled",
    "eos_token_ids",
    "log_completions",
    "loss_type",
    "mask_truncated_completions",
    "multi_objective_aggregation",
    "num_generations",
    "num_generations_eval",
    "pad_to_multiple_of",
    "reward_func_names",
    "reward_funcs",
    "reward_weights",
    "scale_rewards",
]

LOSS_TYPES = ["bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo"]

CONFIG_FIELDS = [
    "beta",
    "entropy_coef",
    "gradient_checkpointing_kwargs",
    "importance_sampling_level",
    "loss_type",
    "multi_objective_aggregation",
    "off_policy_mask_threshold",
    "reward_weights",
    "router_aux_loss_coef",
    "scale_rewards",
    "steps_per_generation",
    "top_entropy_quantile",
    "trust_remote_code",
    "use_adaptive_entropy",
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


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(*reward_funcs, **config)`: a GRPOTrainer with a tiny random model; one update is two groups of four."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = ["<pad>", "<eos>", *"abcdefgh"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )

    def make(*reward_funcs, trainer_args=None, **config):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        args = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 1,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **config,
        }
        return GRPOTrainer(
            model=LlamaForCausalLM(
                LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape)
            ),
            reward_funcs=list(reward_funcs),
            args=GRPOConfig(**args),
            train_dataset=Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"]}),
            processing_class=tokenizer,
            **(trainer_args or {}),
        )

    return make


def right_or_wrong(prompts, completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]


def small_differences(prompts, completions, **kwargs):
    return [1e-4 * (i % 4) for i in range(len(completions))]


def sometimes(prompts, completions, **kwargs):
    return [None if i % 4 == 3 else 1.0 for i in range(len(completions))]


def recorded(trainer, name, change=None):
    """What a method of the trainer returns, in order; `change` may replace it."""
    inner, found = getattr(trainer, name), []

    def wrapped(*args, **kwargs):
        result = inner(*args, **kwargs)
        result = result if change is None else change(result)
        found.append(result)
        return result

    setattr(trainer, name, wrapped)
    return found


@pytest.mark.parametrize("path", SYMBOLS)
def test_symbol(path):
    lookup(path)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    actual = list(inspect.signature(lookup(f"trl.{path}")).parameters)
    assert actual == SIGNATURES[path], f"the signature of `trl.{path}` has changed"


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_config_field(name):
    assert name in lookup("trl.GRPOConfig").__dataclass_fields__, f"GRPOConfig has no field `{name}`"


def test_attributes(make_trainer):
    missing = [name for name in ATTRIBUTES if not hasattr(make_trainer(right_or_wrong), name)]
    assert not missing, f"GRPOTrainer has no attributes {missing}"


@pytest.mark.parametrize("column", ["prompts", "completions"])
def test_a_reward_function_cannot_be_given_a_column_of_that_name(make_trainer, column):
    """If this passes without an error, `trl_sgpo.arguments.TAKEN_NAMES` need not be refused any longer."""
    trainer = make_trainer(right_or_wrong)
    trainer.train_dataset = trainer.train_dataset.add_column(column, ["x"] * 4)
    with pytest.raises(TypeError, match=f"multiple values for keyword argument '{column}'"):
        trainer.train()


def test_rewards_are_a_gathered_matrix_with_nan_for_none(make_trainer):
    trainer = make_trainer(right_or_wrong, sometimes)
    matrices = recorded(trainer, "_calculate_rewards")
    trainer.train()
    (rewards,) = matrices
    assert rewards.shape == (8, 2)
    assert rewards.dtype == torch.float32
    assert rewards[:, 0].tolist() == [0.0, 1.0] * 4
    assert torch.isnan(rewards[:, 1]).tolist() == [False, False, False, True] * 2


def test_rewards_are_asked_for_in_evaluation_too(make_trainer):
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": ["a b", "c d"]})
    trainer = make_trainer(right_or_wrong, trainer_args={"eval_dataset": rows}, per_device_eval_batch_size=8)
    matrices = recorded(trainer, "_calculate_rewards", lambda rewards: (trainer.model.training, rewards))
    inner = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args: inner(*args)[1]
    trainer.evaluate()
    assert [training for training, _ in matrices] == [False] * len(matrices)
    assert matrices


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_how_rewards_become_advantages(make_trainer, scale_rewards, aggregation):
    """What is written again in this package, for a matrix that TRL has not seen. The rewards are small: 1e-4 counts."""
    trainer = make_trainer(
        small_differences,
        sometimes,
        reward_weights=[1.0, 1e-4],
        scale_rewards=scale_rewards,
        multi_objective_aggregation=aggregation,
    )
    matrices, outputs = recorded(trainer, "_calculate_rewards"), recorded(trainer, "_generate_and_score_completions")
    trainer.train()
    weights = torch.tensor([1.0, 1e-4])

    def normalised(values, over):
        known = [values[i] for i in over if not torch.isnan(values[i])]
        mean, std = torch.stack(known).mean(), torch.stack(known).std()
        return mean, std + 1e-4

    rewards, groups, everyone = matrices[0], [range(4), range(4, 8)], range(8)
    if aggregation == "normalize_then_sum":
        rewards = rewards.clone()
        for column in rewards.T:
            for group in groups:
                mean, std = normalised(column.clone(), group)
                column[group.start : group.stop] = (column[group.start : group.stop] - mean) / std
        groups, scale_rewards = [everyone], "group"
    total = (rewards * weights).nansum(dim=1)
    for group in groups:
        mean, std = normalised(total, group)
        if scale_rewards == "batch":
            std = normalised(total, everyone)[1]
        std = 1.0 if scale_rewards == "none" else std
        expected = (total[group.start : group.stop] - mean) / std
        torch.testing.assert_close(outputs[0]["advantages"][group.start : group.stop], expected)


def test_advantages_that_are_overwritten_reach_the_loss(make_trainer):
    seen = []
    for advantages in (None, torch.arange(8.0), torch.arange(48.0).view(8, 6)):
        trainer = make_trainer(right_or_wrong, generation_kwargs={"suppress_tokens": [0, 1]})
        if advantages is not None:
            recorded(
                trainer,
                "_generate_and_score_completions",
                lambda output, own=advantages: {**output, "advantages": own},
            )
        inner = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs, inner=inner: seen.append(inputs) or inner(model, inputs)
        trainer.train()
    # Rows are shuffled, each with its advantages
    assert sorted(seen[0]["advantages"].tolist()) != list(range(8))
    assert sorted(seen[1]["advantages"].tolist()) == list(range(8))
    assert sorted(seen[2]["advantages"][:, 0].tolist()) == [float(i) for i in range(0, 48, 6)]
    assert (seen[2]["advantages"].diff(dim=1) == 1).all()


@pytest.fixture
def loss_of(make_trainer):
    """`loss_of(loss_type, **changes)`: the loss of one and the same batch, with some of its entries replaced."""

    def make(loss_type):
        config = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
        trainer = make_trainer(right_or_wrong, loss_type=loss_type, **config)
        batches, inner = [], trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: batches.append(inputs) or inner(model, inputs)
        trainer.train()
        trainer._compute_loss = inner
        generator = torch.Generator().manual_seed(0)
        batch = {**batches[0], "advantages": torch.randn(8, generator=generator)}
        # Ratios on both sides of the clipping range
        drift = 0.5 * torch.randn(batch["completion_ids"].shape, generator=generator)
        batch["old_per_token_logps"] = -2 + drift
        trainer.model.train()
        return lambda **changes: trainer._compute_loss(trainer.model, {**batch, **changes}), batch

    return make


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_may_be_per_token(loss_of, loss_type):
    """No class inside TRL uses this branch any more (upstream 7331)."""
    loss, batch = loss_of(loss_type)
    per_token = batch["advantages"].unsqueeze(1).expand(batch["completion_ids"].shape).contiguous()
    torch.testing.assert_close(loss(advantages=per_token), loss())
    assert loss(advantages=2 * per_token) != loss()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_the_losses_divide_by(loss_of, loss_type):
    """Half of the rows have no advantage. Leaving them out multiplies the loss by the whole denominator over the rest's."""
    loss, batch = loss_of(loss_type)
    dead = torch.arange(8) >= 4
    with_dead = loss(advantages=batch["advantages"].masked_fill(dead, 0.0))
    live = {key: value[~dead] for key, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    n_tokens = batch["completion_mask"].sum(dim=1)
    live["num_items_in_batch"] = n_tokens[~dead].sum()
    factor = n_tokens.sum() / n_tokens[~dead].sum() if loss_type in ("dapo", "cispo", "vespo", "bnpo") else 2.0
    torch.testing.assert_close(loss(**live), factor * with_dead)
    assert with_dead != 0


def test_what_the_log_and_the_table_keep_of_a_round(make_trainer, monkeypatch):
    """The collections that are corrected after super, and the printing that is replaced while it lasts."""

    def logs_a_column(prompts, completions, log_extra, **kwargs):
        log_extra("length", [len(text.split()) for text in completions])
        return [None] * len(completions)

    printed = []
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.print_prompt_completions_sample",
        lambda *args, **kwargs: printed.append((args, kwargs)),
    )
    trainer = make_trainer(right_or_wrong, logs_a_column, log_completions=True)
    outputs = recorded(trainer, "_generate_and_score_completions")
    kept = {}

    def look(output):
        kept["rewards"] = {name: list(values) for name, values in trainer._logs["rewards"].items()}
        kept["advantages"], kept["extra"] = list(trainer._logs["advantages"]), dict(trainer._logs["extra"])
        kept["metrics"] = {key: list(values) for key, values in trainer._metrics["train"].items()}
        return output

    recorded(trainer, "_generate_and_score_completions", look)
    trainer.train()
    assert kept["advantages"] == outputs[0]["advantages"].tolist()
    assert kept["rewards"]["right_or_wrong"] == [0.0, 1.0] * 4
    assert all(value != value for value in kept["rewards"]["logs_a_column"])
    assert len(kept["metrics"]["rewards/logs_a_column/mean"]) == 1
    assert kept["metrics"]["rewards/logs_a_column/std"][0] != kept["metrics"]["rewards/logs_a_column/std"][0]
    assert list(kept["extra"]) == ["length"]
    ((prompts, completions, rewards, advantages, step, n_shown), kwargs) = printed[0]
    assert len(prompts) == len(completions) == len(advantages) == 8
    assert list(rewards) == ["right_or_wrong", "logs_a_column"]
    assert (step, n_shown, list(kwargs)) == (1, None, ["extra"])


def test_what_a_forward_pass_takes_is_in_the_output(make_trainer):
    trainer = make_trainer(right_or_wrong, num_iterations=2)
    outputs = recorded(trainer, "_generate_and_score_completions")
    trainer.train()
    names = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "old_per_token_logps"}
    assert names <= set(outputs[0])
    assert outputs[0]["old_per_token_logps"].shape == outputs[0]["completion_ids"].shape


def test_what_a_forward_pass_takes_of_images_and_tools_is_in_the_output():
    """Read: a run would take a model that sees images."""
    source = inspect.getsource(lookup("trl.GRPOTrainer._generate_and_score_completions"))
    taken = SIGNATURES["GRPOTrainer._get_per_token_logps_and_entropies"][8:]
    for name in ["tool_mask", *taken]:
        assert f'output["{name}"]' in source, f"the output has no `{name}`"


def test_a_round_is_split_into_a_new_list_of_micro_batches(make_trainer):
    """Each holds every key of the output, and an own one goes along."""
    trainer = make_trainer(right_or_wrong, gradient_accumulation_steps=2, num_iterations=2, max_steps=4)
    rows = iter(range(1000))
    recorded(
        trainer,
        "_generate_and_score_completions",
        lambda output: {**output, "own": torch.tensor([next(rows) for _ in output["advantages"]])},
    )
    seen, lists = [], []

    def look(inputs):
        lists.append(trainer._buffered_inputs)
        seen.append(inputs["own"].tolist())
        assert inputs is trainer._buffered_inputs[trainer._step % 2]
        return inputs

    recorded(trainer, "_prepare_inputs", look)
    trainer.train()
    assert len(seen) == 8
    assert seen[:2] == seen[2:4]
    assert sorted(seen[0] + seen[1]) == list(range(16))
    assert [a is b for a, b in itertools.pairwise(lists)] == [True, True, True, False, True, True, True]


def test_gradients_may_be_taken_away_before_the_optimizer_step(make_trainer):
    from transformers import TrainerCallback

    class Takes(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            assert any(value.grad is not None for value in trainer.model.parameters())
            trainer.optimizer.zero_grad(set_to_none=True)

    trainer = make_trainer(right_or_wrong, trainer_args={"callbacks": [Takes()]}, max_steps=2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    assert not trainer.optimizer.state
    assert trainer.lr_scheduler.last_epoch == trainer.state.global_step == 2


def test_model_card(make_trainer, tmp_path):
    make_trainer(right_or_wrong).create_model_card(model_name="tiny")
    assert "### Framework versions\n\n" in (tmp_path / "README.md").read_text(), "the card has no such section"
