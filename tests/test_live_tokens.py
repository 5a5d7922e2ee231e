"""Batches without dead rows and tokens have the same gradient. What is live is said here once more, by naive loops."""

import itertools
import random

import pytest
import torch
from datasets import Dataset
from toys import byte_tokenizer, tiny_llama
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from trl_sgpo import SGPOConfig, SGPOTrainer
from trl_sgpo.live_tokens import count_live_rows, live_tokens, padding_can_go, smaller_batches, tokens_stand_alone


LOSS_TYPES = ["dapo", "cispo", "vespo", "bnpo", "grpo", "sapo", "dr_grpo", "luspo"]
N_ROWS, PROMPT, LENGTH = 6, 7, 11
IMAGE_START, IMAGE = 5, 6


def right(prompts, completions, **kwargs):
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def vision_model(tokenizer):
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
            },
            image_token_id=IMAGE,
            vision_start_token_id=IMAGE_START,
            vision_end_token_id=7,
        )
    )


@pytest.fixture
def trainer_for(tokenizer, tmp_path):
    """A trainer whose `_compute_loss` is asked for gradients of batches that are made here."""

    def make(model=None, n_batches=1, **config):
        trainer = SGPOTrainer(
            model or tiny_llama(tokenizer),
            right,
            SGPOConfig(
                str(tmp_path),
                per_device_train_batch_size=N_ROWS,
                num_generations=2,
                max_completion_length=LENGTH,
                gradient_accumulation_steps=n_batches,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                **config,
            ),
            Dataset.from_list([{"prompt": "1 + 1 ="}] * 4),
            processing_class=tokenizer,
        )
        trainer.current_gradient_accumulation_steps = n_batches
        trainer.model.train()
        return trainer

    return make


def make_batches(n_batches, seed, per_token=False, tools=False, share_live=0.5, vllm=None, vocabulary=250, spread=1.0):
    """Micro-batches as TRL makes them: left padded prompts, right padded completions, some rows without credit."""
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    batches = []
    for _ in range(n_batches):
        shared, spare = dice.randrange(3), dice.randrange(3)  # padding that all rows of the batch share
        prompts = [dice.randint(1, PROMPT - shared) for _ in range(N_ROWS)]
        lengths = [dice.randint(1, LENGTH - spare) for _ in range(N_ROWS)]
        batch = {
            "prompt_ids": torch.randint(3, vocabulary, (N_ROWS, PROMPT), generator=generator),
            "prompt_mask": torch.tensor([[0] * (PROMPT - n) + [1] * n for n in prompts]),
            "completion_ids": torch.randint(3, vocabulary, (N_ROWS, LENGTH), generator=generator),
            "completion_mask": torch.tensor([[1] * n + [0] * (LENGTH - n) for n in lengths]),
            "old_per_token_logps": -5.5 + spread * numbers(N_ROWS, LENGTH),
        }
        alive = torch.tensor([float(dice.random() < share_live) for _ in range(N_ROWS)])
        if per_token:
            ends = torch.tensor([dice.randint(0, LENGTH) for _ in range(N_ROWS)]).unsqueeze(1)
            batch["advantages"] = numbers(N_ROWS, LENGTH) * (torch.arange(LENGTH) < ends) * alive.unsqueeze(1)
        else:
            batch["advantages"] = numbers(N_ROWS) * alive
        if tools:
            batch["tool_mask"] = (numbers(N_ROWS, LENGTH) > -0.5).long()
        if vllm is not None:
            batch["importance_sampling_ratio"] = numbers(N_ROWS, 1 if vllm == "sequence" else LENGTH).exp()
            batch["sampling_per_token_logps"] = -5.5 + numbers(N_ROWS, LENGTH)
        batches.append(batch)
    total = sum(batch["completion_mask"].sum() for batch in batches)
    return [{**batch, "num_items_in_batch": total} for batch in batches]


def show_images(batch, n_images, where="prompt_ids"):
    """Gives a batch this many images for each row, in place, as TRL gives them for a Qwen model."""
    grids = {1: [(1, 2, 2)], 2: [(1, 2, 2), (1, 2, 4)], 0: []}
    batch["prompt_ids"][batch["prompt_ids"] <= 7] = 9
    batch["completion_ids"][batch["completion_ids"] <= 7] = 9
    batch["prompt_mask"][:] = torch.tensor([0] + [1] * (PROMPT - 1))
    found = [grid for n in n_images for grid in grids[n]]
    batch["num_images"], batch["image_grid_thw"] = n_images, torch.tensor(found)
    batch["pixel_values"] = torch.randn(sum(t * h * w for t, h, w in found), 3 * 2 * 14 * 14)
    for i, n in enumerate(n_images):
        tokens = [x for t, h, w in grids[n] for x in [IMAGE_START, *[IMAGE] * (t * h * w // 4)]]
        batch[where][i, 1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    batch["mm_token_type_ids"] = (torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1) == IMAGE).long()


def gradients(trainer, batches):
    """Of all parameters, added up over micro-batches, as the optimizer would see them."""
    trainer.model.zero_grad()
    for batch in batches:
        trainer._compute_loss(trainer.model, batch).backward()
    return {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}


def skipping(trainer, batches, n_live=None):
    """The smaller batches, with the settings that the trainer would give."""
    right, left = padding_can_go(trainer.model)
    size = 1 if trainer.loss_type == "bnpo" else len(batches)
    counts = count_live_rows(batches).view(-1, size).sum(dim=1).tolist()
    if n_live is not None:
        counts = [n_live] * len(counts)
    smaller = []
    for block, n in enumerate(counts):
        part = batches[block * size : (block + 1) * size]
        smaller += smaller_batches(part, n, trainer.loss_type, tokens_stand_alone(trainer.args), right, left)
    return smaller


def assert_same_gradients(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=tolerance)


def size_of(batches):
    return sum(
        batch["completion_ids"].numel() + batch["prompt_ids"].shape[0] * batch["prompt_ids"].shape[1]
        for batch in batches
    )


class TestLiveTokens:
    @pytest.mark.parametrize(("per_token", "tools"), itertools.product([False, True], repeat=2))
    def test_equals_a_loop(self, per_token, tools):
        (batch,) = make_batches(1, seed=3, per_token=per_token, tools=tools)
        for i in range(N_ROWS):
            for t in range(LENGTH):
                advantage = batch["advantages"][i, t] if per_token else batch["advantages"][i]
                own = batch["completion_mask"][i, t] == 1 and (not tools or batch["tool_mask"][i, t] == 1)
                assert bool(live_tokens(batch)[i, t]) == bool(own and advantage != 0)


def naive_rows(batches):
    """The live rows of micro-batches by their ids, each up to its last token with credit."""
    found = []
    for batch in batches:
        live = live_tokens(batch)
        for i in range(len(live)):
            ends = [t for t in range(live.shape[1]) if live[i, t]]
            if ends:
                ids = [int(x) for x, m in zip(batch["prompt_ids"][i], batch["prompt_mask"][i], strict=True) if m]
                found.append((ids, batch["completion_ids"][i, : ends[-1] + 1].tolist()))
    return sorted(found)


class TestWhatIsKept:
    @pytest.mark.parametrize("seed", range(20))
    def test_every_live_row_once_and_whole(self, seed):
        n_batches = 1 + seed % 4
        batches = make_batches(n_batches, seed, per_token=seed % 2 == 1, tools=seed % 3 == 1, share_live=seed / 20)
        n_live = int(count_live_rows(batches).sum())
        assert n_live == len(naive_rows(batches))
        smaller = smaller_batches(batches, n_live, "dapo")
        assert naive_rows(smaller) == naive_rows(batches)
        assert len(smaller) == n_batches
        rows = {len(batch["completion_ids"]) for batch in smaller}
        assert rows == {max(1, -(-n_live // n_batches))}
        for batch in smaller:
            live = live_tokens(batch)
            # Nothing that could still go
            assert live[:, -1].any() or (not live.any() and live.shape[1] == 1)
            assert batch["prompt_mask"][:, 0].any()
            shapes = {value.shape[0] for value in batch.values() if value.dim() > 0}
            assert shapes == rows

    def test_other_ranks_may_need_more_rows(self):
        batches = make_batches(2, seed=0, share_live=0.2)
        for n_live in (2, 5, 12):
            smaller = smaller_batches(batches, n_live, "dapo")
            assert [len(batch["completion_ids"]) for batch in smaller] == [-(-n_live // 2)] * 2
            assert naive_rows(smaller) == naive_rows(batches)

    def test_rows_of_like_length_share_a_batch(self):
        batches = make_batches(3, seed=1, share_live=1.0)
        lengths = sorted((len(completion) for _, completion in naive_rows(batches)), reverse=True)
        smaller = smaller_batches(batches, 3 * N_ROWS, "dapo")
        assert [batch["completion_ids"].shape[1] for batch in smaller] == lengths[::N_ROWS]

    def test_lengths_stay_multiples(self):
        batches = make_batches(1, seed=2, per_token=True)
        batches[0]["prompt_mask"][:, :5] = 0  # five shared places, of which four may go
        (batch,) = smaller_batches(batches, 3, "dapo", multiple=2)
        assert batch["prompt_ids"].shape[1] == PROMPT - 4
        n = batch["completion_ids"].shape[1]
        assert n % 2 == 0 or n == LENGTH

    def test_images_with_one_entry_per_row_stay_with_their_rows(self):
        """Idefics' layout: padded to the most images of a row. As many images as rows make no one-per-image layout of it."""
        (batch,) = make_batches(1, seed=0)
        batch["row"] = torch.arange(N_ROWS)
        batch["num_images"] = [2, 0, 2, 0, 2, 0]
        batch["pixel_values"] = batch["row"].view(-1, 1, 1).expand(-1, 2, 3)
        batch["pixel_attention_mask"] = torch.ones(N_ROWS, 2, 3)
        batch["advantages"] = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
        (smaller,) = smaller_batches([batch], 4, "dapo")
        rows = smaller["row"].tolist()
        assert sorted(rows) == [1, 2, 4, 5]
        assert smaller["pixel_values"][:, 0, 0].tolist() == rows
        assert smaller["num_images"] == [batch["num_images"][i] for i in rows]

    def test_bnpo_keeps_the_rows_of_a_micro_batch_together(self):
        with pytest.raises(ValueError, match="rows cannot change places"):
            smaller_batches(make_batches(2, seed=0), 3, "bnpo")

    def test_what_was_given_stays_as_it_was(self):
        batches = make_batches(2, seed=0, per_token=True)
        before = [{name: value.clone() for name, value in batch.items()} for batch in batches]
        smaller_batches(batches, 4, "grpo")
        for old, new in zip(before, batches, strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.essential
@pytest.mark.filterwarnings("ignore")
class TestGradients:
    @pytest.mark.parametrize("n_batches", [1, 3])
    @pytest.mark.parametrize(("per_token", "tools"), [(False, False), (True, False), (True, True)])
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_are_the_same(self, trainer_for, loss_type, per_token, tools, n_batches):
        trainer = trainer_for(n_batches=n_batches, loss_type=loss_type)
        for seed in range(3):
            # Its weight of a completion is next to 0 where the ratios of all tokens together are far from 1
            spread = 0.1 if loss_type == "vespo" else 1.0
            batches = make_batches(n_batches, seed, per_token, tools, spread=spread)
            smaller = skipping(trainer, batches)
            assert size_of(smaller) < 0.8 * size_of(batches)
            theirs = gradients(trainer, batches)
            assert_same_gradients(gradients(trainer, smaller), theirs)
            assert max(value.abs().max() for value in theirs.values()) > 1e-3

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_without_a_live_row_they_are_zero(self, trainer_for, loss_type):
        trainer = trainer_for(n_batches=2, loss_type=loss_type)
        batches = make_batches(2, seed=0, share_live=0.0)
        smaller = skipping(trainer, batches)
        assert [len(batch["completion_ids"]) for batch in smaller] == [1, 1]
        found = gradients(trainer, smaller)
        assert found
        assert all((value == 0).all() for value in found.values())

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_with_as_many_rows_as_another_rank_needs(self, trainer_for, loss_type):
        trainer = trainer_for(loss_type=loss_type)
        batches = make_batches(1, seed=4, per_token=True, share_live=0.3)
        assert_same_gradients(gradients(trainer, skipping(trainer, batches, n_live=5)), gradients(trainer, batches))

    @pytest.mark.parametrize(
        ("vllm", "config"),
        [
            ("token", {}),
            ("sequence", {}),
            ("token", {"loss_type": "grpo"}),
            (None, {"importance_sampling_level": "sequence", "loss_type": "grpo"}),
            (None, {"importance_sampling_level": "sequence", "loss_type": "luspo"}),
            (None, {"off_policy_mask_threshold": 0.5}),
            (None, {"delta": 1.5, "epsilon": 0.1, "epsilon_high": 0.3}),
        ],
    )
    def test_with_ratios_of_vllm_and_options_that_tie_tokens(self, trainer_for, vllm, config):
        trainer = trainer_for(n_batches=2, **config)
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = vllm is not None
        for seed in range(3):
            batches = make_batches(2, seed, per_token=vllm is not None, vllm=vllm)
            assert_same_gradients(gradients(trainer, skipping(trainer, batches)), gradients(trainer, batches))

    def test_of_a_model_with_absolute_positions(self, trainer_for, tokenizer):
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        trainer = trainer_for(GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **drop)))
        batches = make_batches(1, seed=1, per_token=True)
        batches[0]["prompt_mask"][:, :2] = 0
        smaller = skipping(trainer, batches)
        assert smaller[0]["prompt_ids"].shape[1] == PROMPT
        theirs = gradients(trainer, batches)
        assert_same_gradients(gradients(trainer, smaller), theirs)
        # Had the padding been cut, the positions would be others
        wrong = gradients(trainer, smaller_batches(batches, int(count_live_rows(batches)[0]), "dapo"))
        assert any((wrong[name] - theirs[name]).abs().max() > 1e-5 for name in wrong)

    def test_of_a_model_that_sees_images(self, trainer_for, vision_model):
        """Rows have one image, two, or none, of different sizes, and take theirs along."""
        trainer = trainer_for(vision_model, n_batches=2)
        batches = make_batches(2, seed=5, per_token=True)
        for batch in batches:
            show_images(batch, [1, 2, 0, 2, 0, 1])
        smaller = skipping(trainer, batches)
        assert sum(len(batch["pixel_values"]) for batch in smaller) < sum(len(b["pixel_values"]) for b in batches)
        theirs = gradients(trainer, batches)
        assert_same_gradients(gradients(trainer, smaller), theirs)
        vision = [value for name, value in theirs.items() if "visual" in name]
        assert max(value.abs().max() for value in vision) > 1e-5

    def test_of_a_model_to_which_tools_show_images(self, trainer_for, vision_model):
        """They stand in the completions, after the last credit and in rows without any, and their tokens stay."""
        trainer = trainer_for(vision_model)
        (batch,) = make_batches(1, seed=5)
        show_images(batch, [1, 0, 0, 1, 0, 0], where="completion_ids")
        batch["completion_mask"][:] = 1
        batch["advantages"] = torch.zeros(N_ROWS, LENGTH)
        batch["advantages"][0, 0] = batch["advantages"][1, 0] = 1.0
        for n_live in (2, 3, N_ROWS):
            smaller = smaller_batches([batch], n_live, "dapo")
            assert smaller[0]["completion_ids"].shape[1] == 3  # one token, and the two of an image
            assert_same_gradients(gradients(trainer, smaller), gradients(trainer, [batch]))

    def test_of_a_model_that_sees_images_in_dead_rows_only(self, trainer_for, vision_model):
        trainer = trainer_for(vision_model)
        (batch,) = make_batches(1, seed=5)
        show_images(batch, [0, 0, 1, 2, 1, 1])
        batch["advantages"] = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
        (smaller,) = smaller_batches([batch], 2, "dapo")
        assert "pixel_values" not in smaller
        ours, theirs = gradients(trainer, [smaller]), gradients(trainer, [batch])
        assert_same_gradients(ours, {name: theirs[name] for name in ours})
        assert all((theirs[name] == 0).all() for name in theirs.keys() - ours.keys())


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_local_experts": 2,
    "max_position_embeddings": 128,
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("llama", True),
        ("mistral", True),  # a sliding window
        ("gemma3_text", True),  # frequencies for each kind of layer
        ("llama4_text", False),  # chunks; scaled by place in long texts only, which are not tried here
        ("qwen3_next", True),  # linear attention
        ("lfm2", True),  # convolutions
        ("bloom", True),
        ("gpt2", False),
        ("recurrent_gemma", False),  # its state takes padding in
        ("deepseek_v4", False),  # blocks of tokens are compressed
        ("beam", False),  # scaled by place
    ],
)
def test_what_a_model_says_does_not_depend_on_padding_that_can_go(name, left):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {name}")
    torch.manual_seed(0)
    given = CONFIG_MAPPING[name]().to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in given}
    if given.get("layer_types"):
        sizes["layer_types"] = (sorted(set(given["layer_types"])) * 2)[:2]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes), dtype=torch.float32).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    assert padding_can_go(model) == (True, left)

    ids = torch.nn.functional.pad(torch.randint(3, 64, (2, 14)), (5, 4))
    ids[1, 5:8] = 0
    mask = (ids != 0).long()

    def logits(start, end):
        with torch.no_grad():
            found = model(input_ids=ids[:, start:end], attention_mask=mask[:, start:end], use_cache=False).logits
        return found[:, 8 - start : 15 - start]

    torch.testing.assert_close(logits(0, 23), logits(0, 15), rtol=1e-4, atol=1e-4)
    if left:
        torch.testing.assert_close(logits(0, 23), logits(5, 23), rtol=1e-4, atol=1e-4)


def test_frequencies_that_depend_on_the_length_keep_all_padding(tokenizer):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert padding_can_go(tiny_llama(tokenizer, rope_parameters=dynamic)) == (False, False)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "AdaptionPromptConfig"])
def test_learned_prompts_keep_left_padding(tokenizer, kind):
    peft = pytest.importorskip("peft")
    sizes = {"adapter_len": 2, "adapter_layers": 1} if kind == "AdaptionPromptConfig" else {"num_virtual_tokens": 2}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **sizes)
    assert padding_can_go(peft.get_peft_model(tiny_llama(tokenizer), config)) == (True, False)
