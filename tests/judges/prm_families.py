"""Tiny process reward models of every family, saved the way the real ones lie on the Hub, with a naive reference each."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import toys
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from toys import CHATML
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
)

from trl_sgpo.judges.prm.models import Qwen2ForProcessRewardModel


# Trims every message, as Llama 3's does
LLAMA3 = "<|bos|>{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # else all scores would be one half
}


def byte_tokenizer(template=CHATML, special=("<extra_0>",), added=("<tool_call>",)) -> PreTrainedTokenizerFast:
    """One token per byte, so that pieces and the whole text have the same ids; BOS, chat tokens, a step tag."""
    chat = ("<|end|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>")
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return toys.byte_tokenizer(template, (*chat, *special), added, **names)


def prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: a space before every text, and `▁ки`, `▁+`, `▁-` as tokens."""
    letters = [chr(i) for i in range(33, 127)] + ["к", "и", "▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "▁к", "▁ки", "▁+", "▁-"]
    merges = [("▁", "к"), ("▁к", "и"), ("▁", "+"), ("▁", "-")]
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@dataclass
class Family:
    """A saved model; `prefix(problem, steps)` is its text up to the last score, `score(ids)` the score read there."""

    folder: Path
    preset: str
    tokenizer: PreTrainedTokenizerFast
    prefix: callable
    score: callable

    def reference(self, problem, steps):
        """One forward pass per prefix, over the text tokenised as a whole."""
        return [self._score(self._ids(self.prefix(problem, steps[:n]))) for n in range(1, len(steps) + 1)]

    def reference_letter_by_letter(self, problem, steps):
        """
        The same with problem and steps tokenised one letter at a time, so that no control token can arise in them.
        `<tool_call>` controls nothing in any of the layouts: it is the one token that a word of the text may become.
        """
        texts = [problem, *steps]
        marks = [chr(0xE000 + i) for i in range(len(texts))]
        scores = []
        for n in range(1, len(steps) + 1):
            rest, ids = self.prefix(marks[0], marks[1 : n + 1]), []
            for mark, text in zip(marks, texts[: n + 1], strict=False):
                layout, rest = rest.split(mark)
                ids += self._ids(layout) + [
                    id for letter in re.findall("<tool_call>|.", text, re.DOTALL) for id in self._ids(letter)
                ]
            scores.append(self._score(ids + self._ids(rest)))
        return scores

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _score(self, ids):
        with torch.no_grad():
            return self.score(torch.tensor([ids]))


def save(model, tokenizer, folder, **config):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def make_family(name: str, root: Path, **sizes) -> Family:
    torch.manual_seed(0)
    return {
        "qwen2.5-math-prm": _qwen,
        "trl": _trl,
        "math-shepherd": _math_shepherd,
        "rlhflow": _rlhflow,
        "skywork": _skywork,
    }[name](root, {**SIZES, **sizes})


def _qwen(root, sizes):
    tokenizer = byte_tokenizer()
    model = Qwen2ForProcessRewardModel(Qwen2Config(vocab_size=len(tokenizer), **sizes)).eval()
    folder = save(
        model,
        tokenizer,
        root / "Qwen2.5-Math-PRM-7B",
        # As on the Hub; the files that it names are not there, so nothing can run them
        auto_map={
            "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
            "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
        },
    )
    system = "Please reason step by step, and put your final answer within \\boxed{}."

    def prefix(problem, steps):
        return (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
            + "".join(f"{step}<extra_0>" for step in steps)
        )

    def score(ids):
        hidden = model.model(ids).last_hidden_state[0, -1]
        return model.score(hidden).softmax(-1)[1].item()

    return Family(folder, "qwen2.5-math-prm", tokenizer, prefix, score)


def _trl(root, sizes):
    tokenizer = byte_tokenizer()
    folder = root / "my-model"
    model = Qwen2ForTokenClassification(Qwen2Config(vocab_size=len(tokenizer), num_labels=2, **sizes))
    save(model, tokenizer, folder)
    model = AutoModelForTokenClassification.from_pretrained(folder)
    return Family(
        folder,
        "trl",
        tokenizer,
        lambda problem, steps: "<|bos|>" + problem + "".join(f"{step}\n" for step in steps),
        lambda ids: model(ids).logits[0, -1].softmax(-1)[1].item(),
    )


def _math_shepherd(root, sizes):
    tokenizer = prefix_space_tokenizer()
    folder = root / "math-shepherd-mistral-7b-prm"
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), **sizes))
    save(model, tokenizer, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    # How the model card finds the tokens: what stands after a space
    verdicts = tokenizer.convert_tokens_to_ids(["▁+", "▁-"])
    return Family(
        folder,
        "math-shepherd",
        tokenizer,
        lambda problem, steps: (
            f"<s>{problem} " + "\n".join(f"Step {i}: {step} ки" for i, step in enumerate(steps, start=1))
        ),
        lambda ids: model(ids).logits[0, -1, verdicts].softmax(-1)[0].item(),
    )


def _rlhflow(root, sizes):
    tokenizer = byte_tokenizer(template=LLAMA3)
    folder = root / "RLHFlow" / "Llama3.1-8B-PRM-Deepseek-Data"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    save(model, tokenizer, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    verdicts = tokenizer.convert_tokens_to_ids(["+", "-"])

    def prefix(problem, steps):
        first, *others = steps
        turns = [f"{problem} {first}", *others]
        # Up to the end of the assistant's header: the position that predicts the verdict
        return "<|bos|>" + "+<|eot|>".join(
            f"<|header|>user<|/header|>\n\n{turn}<|eot|><|header|>assistant<|/header|>\n\n" for turn in turns
        )

    return Family(
        folder,
        "rlhflow",
        tokenizer,
        prefix,
        lambda ids: model(ids).logits[0, -1, verdicts].softmax(-1)[0].item(),
    )


def _skywork(root, sizes, prefix="", shards=False, binary=False):
    tokenizer = byte_tokenizer()
    folder = root / "Skywork-o1-Open-PRM-Qwen-2.5-1.5B"
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes)).eval()
    head = torch.nn.Linear(sizes["hidden_size"], 1)
    save(model, tokenizer, folder, architectures=["Qwen2ForPrmModel"])
    file = folder / "model.safetensors"
    weights = {prefix + name: tensor for name, tensor in load_file(file).items()}
    values = {"v_head.summary.weight": head.weight.data, "v_head.summary.bias": head.bias.data}
    file.unlink()
    if binary:
        torch.save({**weights, **values}, folder / "pytorch_model.bin")
    elif shards:
        parts = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": values}
        for part, tensors in parts.items():
            save_file(tensors, folder / part, metadata={"format": "pt"})
        weight_map = {name: part for part, tensors in parts.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file({**weights, **values}, file, metadata={"format": "pt"})

    def score(ids):
        return head(model.model(ids).last_hidden_state[0, -1]).sigmoid().item()

    return Family(
        folder,
        "skywork",
        tokenizer,
        lambda problem, steps: f"<|bos|>{problem}\n" + "".join(f"{step}\n" for step in steps),
        score,
    )


FAMILIES = ("qwen2.5-math-prm", "trl", "math-shepherd", "rlhflow", "skywork")
