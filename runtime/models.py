"""Checks of a model's config and tokenizer, in seconds; and its weights, which load_model reads."""

import hashlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError

from tasks import arithmetic

TRIED = ("qwen2", "qwen3", "llama")  # model families whose trees are tested


def open_tokenizer(model: str, train: bool = True):
    """(tokenizer, end-of-text ids of the generation config, context in tokens).

    ValueError when the model cannot be read, or `check_model` refuses it.
    """
    if model == "miniature":
        return arithmetic.make_tokenizer(), [], arithmetic.MODEL["max_position_embeddings"]
    if not Path(model).is_dir():
        skip_unreachable_hub()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        config = read_config(model)
    except Exception as e:  # the parsers of tokenizer.json raise plain Exception
        problem = f"no model directory or hub name that can be read ({first_line(e)})"
        raise ValueError(f"--model {model}: {problem}") from e
    if Path(model).is_dir() and not any(Path(model).glob("*.safetensors")):
        raise ValueError(f"--model {model} has no *.safetensors file: save it by save_pretrained")
    check_model(model, config, len(tokenizer), train)
    try:
        generation = transformers.GenerationConfig.from_pretrained(model, trust_remote_code=False)
        eos = generation.eos_token_id or []
    except OSError:  # a model need not ship one
        eos = []
    return tokenizer, [eos] if isinstance(eos, int) else eos, config.max_position_embeddings


def read_config(model: str):
    return transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)


def without_weights(config):
    """The model on the meta device: names and shapes alone, which take no memory."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_model(model: str, config, vocabulary: int, train: bool):
    """ValueError where a model of this config and tokenizer size cannot be used.

    `train`: also refuse layers that do not see the whole context: the tree mask is for all layers.
    """
    kind = config.model_type
    try:
        empty = without_weights(config)
        _ = empty.get_decoder().layers
    except (ValueError, AttributeError) as e:
        raise ValueError(f"--model {model} is a {kind}: use a decoder-only language model") from e
    if vocabulary > (rows := empty.get_input_embeddings().weight.shape[0]):
        problem = f"its tokenizer has {vocabulary} tokens, its weights only {rows}"
        raise ValueError(f"--model {model}: {problem}: one of them is of another model")
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    layers = set(getattr(config, "layer_types", None) or ["sliding_attention"] * bool(window))
    if train and layers - {"full_attention"}:
        raise ValueError(
            f"--model {model} has layers of {', '.join(sorted(layers))}; trees need full "
            "attention: in config.json set sliding_window null, all layer_types full_attention"
        )
    if train and kind not in TRIED and int(os.environ.get("RANK", 0)) == 0:
        check = "Check that sampler_gap in the first line of metrics.jsonl is small"
        print(f"WARNING --model {model} is a {kind}; tried here: {', '.join(TRIED)}. {check}")


def load_model(path: str, dtype: torch.dtype, attention: str):
    """The model with its weights, on the CPU. `attention`: transformers' attn_implementation.

    ValueError where weights are damaged, missing or of another shape than the config says.
    """
    # Safetensors alone: a pickle can hold code, and model_digest does not cover it.
    settings = {"dtype": dtype, "attn_implementation": attention, "use_safetensors": True}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=False, **settings
        )
        wrong = [*sorted(info["missing_keys"]), *(name for name, *_ in info["mismatched_keys"])]
        if wrong:  # transformers only warns, and fills them with random numbers
            raise ValueError(f"{len(wrong)} weights missing or of another shape ({wrong[0]}, ...)")
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as e:
        raise ValueError(f"{path} does not load ({first_line(e)}): check it or get it again") from e
    return model


def model_digest(model: str) -> str:
    """What a resumed run must find unchanged: a directory's files, or the hub's revision."""
    if model == "miniature":
        return ""  # made from the run's own settings
    if not Path(model).is_dir():
        return getattr(read_config(model), "_commit_hash", None) or ""
    total = hashlib.sha256()
    for path in sorted(Path(model).iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"):
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def skip_unreachable_hub():
    """Use local files alone where the hub cannot be reached: found out here in seconds; the hub's
    client retries every file for minutes."""
    if constants.HF_HUB_OFFLINE or {"https", "all"} & set(getproxies()):
        return
    address = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def first_line(e: Exception) -> str:
    """The first line of a library's error, which may go on for paragraphs."""
    line = str(e).strip().split("\n")[0]
    return f"{type(e).__name__}: {line[:160]}"
