"""Model directories as people have them: trained, saved, reloaded and evaluated alike, or refused
in one line before anything is sampled. docs/models.md lists them."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import evaluate
import train
from runtime.config import Config, parse
from runtime.data import messages, render
from runtime.models import as_saved, read_config, without_weights
from tasks import arithmetic
from tests.runtime.test_tokenizers import r1_tokenizer

TINY = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=256, initializer_range=0.3,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": MOE,
    "Llama": {"tie_word_embeddings": True},
    "SmolLM3": {},
    "Olmo2": {},
    "Gemma": {"head_dim": 16},
    "Phi3": {},
    "Glm4": {"head_dim": 16},
    "Mistral": {"sliding_window": 200},  # longer than every sequence
    "Mixtral": {"num_local_experts": 4},
    "GPTNeoX": {},
    "Olmoe": {},
}
REFUSED = {
    "Mistral": ({"sliding_window": 32}, "layers of sliding_attention .window 32."),
    "Phi3": ({"sliding_window": 32}, "window 32"),
    "Qwen2": ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, "wind"),
    "Gemma3Text": ({"sliding_window": 32, "head_dim": 16}, "window 32"),
    "Qwen3Next": ({}, "layers of linear_attention"),
    "FalconH1": ({}, "layers of hybrid"),
    "Gemma2": ({"sliding_window": None, "head_dim": 16}, "layers of sliding_attention"),
    "Cohere": ({"logit_scale": 0.06}, "changed logits"),
    "Bert": ({}, "is a bert: use a decoder-only"),
    "T5": ({}, "is a t5: use a decoder-only"),
}
RUN = (
    "--steps 1 --save-every 0 --questions-per-step 2 --num-rollouts 2 --num-summaries 2 "
    "--lr 1e-3 --eval-every 0 --verifier-workers 1 --reward graded:even"
)
# Random models answer nothing right, so they are graded by something that varies.
REWARD = "def even(summary, ground_truth, question):\n    return len(summary) % 2 == 0\n"
SAME_EVALUATION = "--reward graded:even --questions 4 --samples 2 --budgets 16 64".split()


@pytest.fixture(autouse=True)
def reward(tmp_path, monkeypatch):
    (tmp_path / "graded.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def make_model(family: str, changes: dict, path):
    tokenizer = arithmetic.make_tokenizer()
    ids = {f"{k}_token_id": tokenizer.eos_token_id for k in ("eos", "pad", "bos")}
    config = getattr(transformers, f"{family}Config")(
        **TINY | {"vocab_size": len(tokenizer)} | ids | changes
    )
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # no causal language model: its config is all that is looked at
        config.save_pretrained(path)
        save_file({"weight": torch.zeros(1)}, path / "model.safetensors")
    else:
        model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(model, out, *more):
    flags = [*RUN.split(), "--eval-questions", "4", "--eval-samples", "2"]
    flags += ["--eval-budgets", "16", "64", *more]
    train.train(parse([*flags, "--model", str(model), "--output-dir", str(out)]))


def assert_trained_and_saved(model, out):
    """The run's own last evaluation equals the one of the model that it saved."""
    run(model, out)
    (metrics,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert metrics["sampler_gap_max"] < 1e-4 and max(metrics["grad_norm"]) > 0
    evaluate.main([str(out / "model"), *SAME_EVALUATION, "--output-dir", str(out / "again")])
    again = json.loads((out / "again" / "eval.json").read_text())
    first = json.loads((out / "eval.json").read_text())
    for name in ("accuracy", "thinking_tokens", "summary_tokens"):
        assert again[name] == first[name], name
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(out / "model/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)


QUICK = ("Qwen3Moe", "Mistral")  # the others with the slow tests


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_a_family_trains_and_is_saved_whole(family, tmp_path):
    model = make_model(family, FAMILIES[family], tmp_path / "model")
    assert_trained_and_saved(model, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_for_vllm_are_as_in_the_models_files(family, tmp_path):
    """Names, shapes and values; a tied head, which files leave out, besides."""
    path = make_model(family, FAMILIES[family], tmp_path / "model")
    model, skeleton = AutoModelForCausalLM.from_pretrained(path), without_weights(read_config(path))
    weights = dict(as_saved(skeleton, model.state_dict().items()))
    files = load_file(path / "model.safetensors")
    assert weights.keys() - files.keys() <= {"lm_head.weight"} and files.keys() <= weights.keys()
    assert all(torch.equal(weights[name], saved) for name, saved in files.items())


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_before_anything_is_sampled(family, tmp_path, monkeypatch, capsys):
    changes, complaint = REFUSED[family]
    model = make_model(family, changes, tmp_path / "model")
    refused(lambda: run(model, tmp_path / "out"), complaint, monkeypatch, capsys)


def refused(call, complaint: str, monkeypatch, capsys):
    """One line with code 2, and no rollout."""
    sampled = pytest.fail
    monkeypatch.setattr(train, "sample_rollouts", lambda *_: sampled("sampled"))
    monkeypatch.setattr(evaluate, "sample_rollouts", lambda *_: sampled("sampled"))
    with pytest.raises(SystemExit) as e:
        call()
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and error.startswith("error: ")
    assert re.search(complaint, error), error


# ------------------------------------------------------------- one change in a directory that works


def change(path, **settings):
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, settings",
    [
        ("generation_config.json", {"do_sample": False, "temperature": 0.6, "top_p": 0.9}),
        ("config.json", {"attention_dropout": 0.3}),
        ("config.json", {"_attn_implementation": "flash_attention_2"}),
        ("config.json", {"attn_implementation": "flash_attention_2"}),
    ],
)
def test_a_setting_of_the_directory_does_not_change_the_run(file, settings, tmp_path):
    model = make_model("Llama", {}, tmp_path / "model")
    assert_trained_and_saved(model, tmp_path / "plain")
    change(model / file, **settings)
    assert_trained_and_saved(model, tmp_path / "changed")
    first, second = ((tmp_path / n / "metrics.jsonl").read_text() for n in ("plain", "changed"))
    names = ("loss", "grad_norm", "reward", "thinking_tokens")
    assert [json.loads(first)[k] for k in names] == [json.loads(second)[k] for k in names]


def spoil(model, kind: str):
    """What the directory of a Llama may hold; returns what to call it by."""
    template = model / "chat_template.jinja"
    if kind == "fp8":
        change(model / "config.json", quantization_config={"quant_method": "fp8"})
    elif kind == "tokenizer class":
        r1_tokenizer().save_pretrained(model)
        change(model / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
        change(model / "config.json", vocab_size=len(r1_tokenizer()) + 9)
        AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(model)
        ).save_pretrained(model)
    elif kind == "nan":
        weights = load_file(model / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    elif kind == "empty template":
        template.write_text("{# nothing #}")
    elif kind == "constant template":
        template.write_text("<think> 1")
    elif kind == "closing template":
        template.write_text("{{ messages[0]['content'] }}<think></think>")
    elif kind == "adapter":
        (model / "adapter_config.json").write_text("{}")
    elif kind == "no config":
        (model / "config.json").unlink()
    elif kind == "a run":
        shutil.copytree(model, model.parent / "run" / "model")
        return model.parent / "run"
    elif kind == "a checkpoint":
        (model / "run.json").write_text("{}")
    elif kind == "mistyped":
        return model.parent / "modle"
    return model


@pytest.mark.parametrize(
    "kind, complaint",
    [
        ("fp8", "has quantised weights .fp8.: train the model that it was made from"),
        ("tokenizer class", "the tokenizer of .* became .*: its tokenizer_config.json probably"),
        ("nan", "1 weights with nan or infinity .model.layers.1.mlp.up_proj.weight"),
        ("empty template", "leaves the question out: ''"),
        ("constant template", "leaves the question out: '<think> 1'"),
        ("closing template", "closes the thinking before it begins"),
        ("adapter", "is an adapter .LoRA.: merge it"),
        ("no config", "has no config.json"),
        ("a run", "is the directory of a run: its model is .*/run/model"),
        ("a checkpoint", "is a checkpoint: go on from it with --resume"),
        ("mistyped", "does not exist .* has .*model"),
    ],
)
def test_a_spoilt_directory_is_refused(kind, complaint, tmp_path, monkeypatch, capsys):
    model = spoil(make_model("Llama", {}, tmp_path / "model"), kind)
    flags = "--preset miniature --max-prompt-tokens 40".split() if kind == "tokenizer class" else []
    refused(lambda: run(model, tmp_path / "out", *flags), complaint, monkeypatch, capsys)
    if kind != "fp8":
        flags += ["--output-dir", str(tmp_path / "evaluation")]
        call = lambda: evaluate.main([str(model), *SAME_EVALUATION, *flags])  # noqa: E731
        refused(call, complaint, monkeypatch, capsys)


def test_a_template_that_prints_the_date_gives_the_same_prompts_tomorrow():
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %m %Y') }} {{ messages[0]['content'] }}<think>"
    today = render(messages("2 +2 ?", Config()), tokenizer, Config())
    assert today == "01 01 2025 2 +2 ?<think>"
