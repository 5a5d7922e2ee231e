"""`SGPOTrainer` whose completions a vLLM engine in the same process samples (`vllm_mode="colocate"`)."""

import os
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import assert_every_parameter_moved, parameters, record_rounds
from toys import all_failed, save_model, stepwise, tiny_llama
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation
from vllm.model_executor.layers import utils as vllm_layers
from vllm_server import ENVIRONMENT


@pytest.fixture
def trainable_engine(monkeypatch):
    """
    An engine that can be given new weights. On a CPU vLLM packs the weights of linear layers when it has loaded them, and
    throws the plain ones away: there is nothing left to update. So here the layers use the plain weights.
    """

    def use_plain_weights(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(vllm_layers, "dispatch_cpu_unquantized_gemm", use_plain_weights)
    # TRL leaves the type to vLLM, which takes bfloat16: too coarse for a comparison
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, dtype="float32", enforce_eager=True))
    # The engine stays in this process. TRL sets further variables, which no other test may see
    with mock.patch.dict(os.environ, {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}):
        yield


def logps_of(model, one_round):
    ids = torch.cat([one_round["prompt_ids"], one_round["completion_ids"]], dim=1)
    mask = torch.cat([one_round["prompt_mask"], one_round["completion_mask"]], dim=1)
    length = one_round["completion_ids"].shape[1]
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].log_softmax(-1)
    return logps.gather(2, one_round["completion_ids"].unsqueeze(2)).squeeze(2)


def test_the_engine_samples_by_the_weights_that_an_update_moved(trainable_engine, make_trainer, tokenizer, tmp_path):
    folder = save_model(tiny_llama(tokenizer, hidden_size=64), tokenizer, tmp_path / "model")
    trainer = make_trainer(
        [all_failed, stepwise()],
        trainer_args={"model": str(folder)},
        failed_groups="prefix",
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
        learning_rate=0.05,  # so large that one update can be seen in every token
        lr_scheduler_type="constant",
        max_steps=2,
    )
    before = parameters(trainer)
    rounds = record_rounds(trainer)
    trainer.train()
    assert_every_parameter_moved(before, trainer)
    first, second = rounds
    for one in (first, second):
        real = one["completion_mask"].bool()
        # Those that the engine sampled by, and those of the policy at that time
        assert one["sampling_per_token_logps"][real].tolist() == pytest.approx(one["logps"][real].tolist(), abs=1e-3)
    old = logps_of(AutoModelForCausalLM.from_pretrained(folder), second)
    difference = (second["sampling_per_token_logps"] - old)[second["completion_mask"].bool()]
    assert difference.abs().mean() > 0.1  # a hundred times what is called equal above
