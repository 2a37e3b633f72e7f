"""Which models can be trained here? Checked from their small files, before any weight is loaded."""

import hashlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from tasks import arithmetic

TRIED = ("qwen2", "qwen3", "llama")  # model families whose trees are tested


def open_tokenizer(model: str):
    """(tokenizer, end-of-text ids of the generation config, tokens of the model's context).

    No weight is loaded. Raises ValueError when the model cannot be found or trained.
    """
    if model == "miniature":
        tokenizer, eos = arithmetic.make_tokenizer(), None
        context = arithmetic.MODEL["max_position_embeddings"]
    else:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        if not Path(model).is_dir():
            skip_unreachable_hub()
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        except Exception as e:  # the parsers of tokenizer.json raise plain Exception
            raise ValueError(
                f"--model {model}: no model directory or hub name that can be read "
                f"({first_line(e)})"
            ) from e
        check_weights(model, config, len(tokenizer))
        context = config.max_position_embeddings
        try:
            eos = GenerationConfig.from_pretrained(model, trust_remote_code=False).eos_token_id
        except OSError:  # a model need not ship one
            eos = None
    return tokenizer, [eos] if isinstance(eos, int) else eos or [], context


def check_weights(model: str, config, vocabulary: int):
    """ValueError where a model cannot be trained here, or its files are not those of its config.

    From headers alone: transformers fills weights that are missing with random ones, and goes on.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # names and shapes only
            made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _ = made.get_decoder().layers
    except (ValueError, AttributeError):
        raise ValueError(
            f"--model {model} is a {config.model_type}: use a decoder-only language "
            "model (Qwen, Llama, ...)"
        ) from None
    rows = made.get_input_embeddings().weight.shape[0]
    if vocabulary > rows:
        raise ValueError(
            f"--model {model}: its tokenizer has {vocabulary} tokens, its weights "
            f"only {rows}: one of them is of another model"
        )
    if not Path(model).is_dir():
        return
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"--model {model} has no *.safetensors file: save the model with "
            "save_pretrained, or download it again"
        )
    shapes = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:  # checks the file's length too
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (SafetensorError, OSError) as e:
            raise ValueError(
                f"{path} is truncated or damaged ({first_line(e)}): get it again"
            ) from None
    tied = set(getattr(made, "all_tied_weights_keys", None) or ())
    wanted = {name: tuple(p.shape) for name, p in made.named_parameters(remove_duplicate=False)}
    wrong = [
        name
        for name, shape in wanted.items()
        if shapes.get(name, None if name not in tied else shape) != shape
    ]
    if wrong:
        raise ValueError(
            f"--model {model}: {len(wrong)} weights are missing or have another shape "
            f"than config.json says ({wrong[0]}, ...): get the model again"
        )


def check_attention(model: str):
    """ValueError where a layer does not see the whole context: the tree mask is for all layers."""
    if model == "miniature":
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"] * bool(window))
    if kinds - {"full_attention"}:
        raise ValueError(
            f"--model {model} has layers of {', '.join(sorted(kinds))}; trees train "
            "with full attention alone: use another model, or turn windows off in its "
            "config.json (sliding_window null, all layer_types full_attention)"
        )
    if config.model_type not in TRIED and int(os.environ.get("RANK", 0)) == 0:
        print(
            f"WARNING --model {model} is a {config.model_type}; tried here: {', '.join(TRIED)}. "
            "Check that sampler_gap in the first line of metrics.jsonl is small"
        )


def model_digest(model: str) -> str:
    """What a resumed run must find unchanged: a directory's files, or the hub's revision."""
    if model == "miniature":
        return ""  # made from the run's own settings
    if not Path(model).is_dir():
        from transformers import AutoConfig

        return (
            getattr(
                AutoConfig.from_pretrained(model, trust_remote_code=False), "_commit_hash", None
            )
            or ""
        )
    total = hashlib.sha256()
    for path in sorted(p for p in Path(model).iterdir() if p.is_file()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"):
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def skip_unreachable_hub():
    """Use only what is on this machine where the hub cannot be reached: found out here in seconds,
    by the hub's client in minutes of retries for every file."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if constants.HF_HUB_OFFLINE or any(os.environ.get(p) for p in proxies):
        return
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def first_line(e: Exception) -> str:
    """Of libraries' errors, which go on for paragraphs."""
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:160] if str(e).strip() else ''}"
