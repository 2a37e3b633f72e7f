"""What a model's directory says, read once and checked in seconds; and its weights."""

import hashlib
import re
import socket
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub import constants
from transformers.core_model_loading import revert_weight_conversion

from packing import Tree, pack
from rollout import Request
from tasks import arithmetic

# How far the log-probs of trainer and sampler may be apart: measured are 1e-5 in float32 on CPUs,
# and 0.1 in bfloat16 on a GPU, where their kernels differ.
LARGEST_GAP = {"cpu": 1e-2, "cuda": 1.0}


def open_tokenizer(model: str, train: bool = True):
    """(tokenizer, end-of-text ids, context in tokens).

    ValueError where the model cannot be read or is no decoder-only language model; with `train`,
    also where its weights are quantised.
    """
    if model == "miniature":
        return arithmetic.make_tokenizer(), [], arithmetic.MODEL["max_position_embeddings"]
    check_place(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        config = read_config(model)
    except Exception as e:  # the parsers of tokenizer.json raise plain Exception
        problem = f"no model directory or hub name that can be read ({first_line(e)})"
        raise ValueError(f"{model}: {problem}") from e
    try:
        empty = without_weights(config)
        _ = empty.get_decoder().layers
    except Exception as e:  # whatever the code of a family raises
        kind = f"is a {config.model_type}: use a decoder-only language model"
        raise ValueError(f"{model} {kind} ({first_line(e)})") from e
    if len(tokenizer) > (rows := empty.get_input_embeddings().weight.shape[0]):
        problem = f"its tokenizer has {len(tokenizer)} tokens, its weights only {rows}"
        raise ValueError(f"{model}: {problem}: one of them is of another model")
    if train and (quantisation := getattr(config, "quantization_config", None)):
        method = dict(quantisation).get("quant_method", "unknown")
        fix = "train the model that it was made from, in full precision"
        raise ValueError(f"{model} has quantised weights ({method}): {fix}")
    return tokenizer, end_of_text(model, config, tokenizer), config.max_position_embeddings


def check_place(model: str):
    """ValueError where a path holds no model, naming the one that was probably meant."""
    path, problem = Path(model), ""
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model)  # of the hub: name or owner/name
    if not path.is_dir():
        if is_name and (path.parent == Path() or not path.parent.is_dir()):
            return skip_unreachable_hub()
        beside = ", ".join(sorted(p.name for p in path.parent.glob("*/"))[:8])
        problem = "does not exist" + f" ({path.parent} has {beside})" * bool(beside)
    elif (path / "model" / "config.json").exists():
        problem = f"is the directory of a run: its model is {path / 'model'}"
    elif (path / "run.json").exists():
        problem = "is a checkpoint: go on from it with --resume; its run saves the model at its end"
    elif (path / "adapter_config.json").exists():
        problem = "is an adapter (LoRA): merge it into its base model first, by merge_and_unload()"
    elif not (path / "config.json").exists():
        problem = "has no config.json: save it by save_pretrained"
    elif not any(path.glob("*.safetensors")):
        problem = "has no *.safetensors file: save it by save_pretrained"
    if problem:
        raise ValueError(f"{model} {problem}")


def read_config(model: str):
    """The config with what training needs in it: our attention instead of its own, no dropout."""
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    config._attn_implementation = "sdpa"
    for name, value in vars(config).items():
        if name.endswith(("dropout", "pdrop", "dropout_prob", "layerdrop")) and value:
            setattr(config, name, 0.0)  # the log-probs of two forwards must agree
    return config


def end_of_text(model: str, config, tokenizer) -> list[int]:
    """The ids that end a text: the generation config's, else the config's; numbers or texts."""
    try:
        settings = transformers.GenerationConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError):  # a model need not ship one, or has one that is damaged
        settings = config
    ids = getattr(settings, "eos_token_id", None)
    ids = config.eos_token_id if ids is None else ids
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return [tokenizer.convert_tokens_to_ids(i) if isinstance(i, str) else i for i in ids]


def without_weights(config):
    """The model on the meta device: names and shapes alone, which take no memory."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def as_saved(model, weights: Iterable[tuple[str, torch.Tensor]]):
    """(name, tensor) of a state_dict as the model's files have them, a layer at a time.

    Transformers holds the experts of some models as one tensor, or under other names.
    """
    for _, layer in groupby(weights, key=lambda item: re.findall(r"\.\d+\.", item[0])[:1]):
        yield from revert_weight_conversion(model, dict(layer)).items()


def load_model(path: str, dtype: torch.dtype, attention: str):
    """The model with its weights, on the CPU. `attention`: transformers' attn_implementation.

    ValueError where weights are damaged, missing, not finite, or of another shape than the config
    says.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # a log file is no place for bars
    # Safetensors alone: a pickle can hold code, and model_digest does not cover it.
    settings = {"dtype": dtype, "attn_implementation": attention, "use_safetensors": True}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=read_config(path), trust_remote_code=False, **settings
        )
        wrong = [*sorted(info["missing_keys"]), *(name for name, *_ in info["mismatched_keys"])]
        if wrong:  # transformers only warns, and fills them with random numbers
            raise ValueError(f"{len(wrong)} weights missing or of another shape ({wrong[0]}, ...)")
        wrong = [name for name, p in model.named_parameters() if not p.isfinite().all()]
        if wrong:
            raise ValueError(f"{len(wrong)} weights with nan or infinity ({wrong[0]}, ...)")
    except Exception as e:  # whatever damaged files, or packages that they need, lead to
        raise ValueError(
            f"{path} does not load ({first_line(e)}): check it, or delete it and get it again"
        ) from e
    repair_generation_config(model)
    return model


def repair_generation_config(model):
    """Keep the token ids alone of a generation config that transformers would refuse to save."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        ids = {k: v for k, v in model.generation_config.to_dict().items() if k.endswith("token_id")}
        model.generation_config = transformers.GenerationConfig(**ids)


@torch.no_grad()
def check_numbers(engine, model, longest: int, device: torch.device):
    """ValueError where the trainer's log-probs are not the sampler's.

    Four tokens are sampled at the first positions of a run and four at its last, and go as trees of
    one row through what training uses; `packing.check_model` also compares with the plain sequence.
    `model` None: only whether the sampler's are numbers.
    """
    trees = {}
    for length in (4, longest - 4):
        prompt = tuple(1 + i % 29 for i in range(length))
        engine.add(Request(f"check-{length}", prompt, 4, stop=(), seed=length, temperature=1.0))
        trees[f"check-{length}"] = Tree(list(prompt), [], [])
    while engine.has_work():
        for out in engine.step():
            trees[out.id].thinking += out.tokens
            trees[out.id].sampler_logp += out.logp
    row = pack([*trees.values()], multiple=128).to(device)
    sampled = row.sampler_logp[row.trained]
    logp = sampled if model is None else model.token_logprobs(row)[row.trained]
    if hasattr(model, "reshard"):
        model.reshard()  # without a backward FSDP leaves the root's weights gathered
    gap = float((logp - sampled).abs().max())
    if not gap < LARGEST_GAP[device.type]:  # nan is refused as well
        raise ValueError(
            f"the log-probs of trainer and sampler differ by {gap:.2g} for sequences of up to "
            f"{longest} tokens: this kind of model (its rotary scaling, for one) cannot be "
            "trained, or not with this --engine"
        )


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
