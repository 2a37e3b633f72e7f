"""Models that cannot be used: refused in one line that names them, before anything is sampled."""

import ast
import json
import shutil
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import train
from runtime.config import Config, parse
from runtime.data import load_rows, make_questions
from runtime.models import load_model, model_digest, open_tokenizer
from runtime.startup import open_model
from tests.conftest import ROOT


def test_open_tokenizer_reads_what_a_run_needs(tiny_model_path):
    tokenizer, eos, context = open_tokenizer(str(tiny_model_path))
    assert eos == [tokenizer.eos_token_id] and context == 256
    assert open_tokenizer("miniature")[1:] == ([], 256)
    with pytest.raises(ValueError, match="context of 256"):
        open_model(str(tiny_model_path), Config(), longest_thinking=250)


def change_config(model, **settings):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def break_model(model, kind: str):
    weights = model / "model.safetensors"
    if kind in ("no weights", "weights in a pickle"):
        tensors = AutoModelForCausalLM.from_pretrained(model).state_dict()
        weights.unlink()
        if kind == "weights in a pickle":
            torch.save(tensors, model / "pytorch_model.bin")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "no header":
        weights.write_bytes(b"\xff" * 100)
    elif kind in ("shard missing", "index damaged"):
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="100KB")
        weights.unlink(missing_ok=True)
        if kind == "shard missing":
            min(model.glob("model-*.safetensors")).unlink()
        else:
            (model / "model.safetensors.index.json").write_text('{"weight')
    elif kind == "layer missing":
        change_config(model, num_hidden_layers=4, layer_types=None)
    elif kind == "vocabulary":
        change_config(model, vocab_size=999)
    elif kind == "small vocabulary":
        change_config(model, vocab_size=20)
    elif kind in ("bert", "t5"):
        AutoConfig.for_model(kind).save_pretrained(model)
    elif kind == "tokenizer":
        (model / "tokenizer.json").write_text('{"version": ')
    elif kind == "config":
        (model / "config.json").write_text("[")


@pytest.mark.parametrize(
    "kind, complaint",
    [
        ("small vocabulary", "weights only 20"), ("bert", "is a bert: use a decoder-only"),
        ("t5", "is a t5: use a decoder-only"), ("config", "can be read"),
        ("tokenizer", "no model directory or hub name that can be read"),
        ("no weights", "has no *.safetensors"), ("weights in a pickle", "has no *.safetensors"),
    ],
)  # fmt: skip
def test_a_bad_model_directory_is_refused_before_weights_are_read(
    kind, complaint, tiny_model_path, tmp_path
):
    model = shutil.copytree(tiny_model_path, tmp_path / "model")
    break_model(model, kind)
    with pytest.raises(ValueError) as e:
        open_tokenizer(str(model))
    assert str(model) in str(e.value) and complaint in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "kind, complaint",
    [
        ("truncated", "SafetensorError"), ("no header", "SafetensorError"),
        ("shard missing", "model-00001-of"), ("index damaged", "JSONDecodeError"),
        ("layer missing", "12 weights missing or of another shape (model.layers.3."),
        ("vocabulary", "1 weights missing or of another shape (model.embed_tokens"),
    ],
)  # fmt: skip
def test_bad_weights_are_refused_when_they_are_loaded(kind, complaint, tiny_model_path, tmp_path):
    """transformers itself fills what is missing with random numbers, and goes on."""
    model = shutil.copytree(tiny_model_path, tmp_path / "model")
    load_model(str(model), torch.float32, "sdpa")  # the good one loads
    break_model(model, kind)
    open_tokenizer(str(model))
    with pytest.raises(ValueError) as e:
        load_model(str(model), torch.float32, "sdpa")
    assert str(model) in str(e.value) and complaint in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["tokenizer", "truncated", "layer missing"])
def test_a_run_with_a_bad_model_ends_with_one_line_and_code_2(
    kind, tiny_model_path, tmp_path, monkeypatch, capsys
):
    def sampled(*_):
        raise AssertionError("sampled with a bad model")

    monkeypatch.setattr(train, "sample_rollouts", sampled)
    monkeypatch.setattr(evaluate, "sample_rollouts", sampled)
    model, out = shutil.copytree(tiny_model_path, tmp_path / "model"), str(tmp_path / "out")
    break_model(model, kind)
    for run in (
        lambda: train.train(parse(["--model", str(model), "--output-dir", out])),
        lambda: evaluate.main([str(model), "--output-dir", out]),
    ):
        with pytest.raises(SystemExit) as e:
            run()
        *_, error = capsys.readouterr().err.strip().splitlines()
        assert e.value.code == 2 and error.startswith("error: ") and str(model) in error
    assert not (tmp_path / "out" / "config.json").exists()  # no run was started


def test_a_bad_chat_template_is_refused(tiny_model_path, tmp_path):
    model = shutil.copytree(tiny_model_path, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% if %}")
    tokenizer, _, _ = open_tokenizer(str(model))
    with pytest.raises(ValueError, match=f"the chat template of {model} does not work .*: repair"):
        make_questions([("1 +1 ?", "2")], tokenizer, Config())


@pytest.mark.parametrize("kind", ["mine", "qwen2"])
def test_code_of_a_model_directory_is_not_run(kind, tiny_model_path, tmp_path):
    model = shutil.copytree(tiny_model_path, tmp_path / "model")
    classes = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}
    change_config(model, model_type=kind, auto_map=classes)
    (model / "mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'planted')!r})")
    if kind == "mine":
        with pytest.raises(ValueError, match="no model directory or hub name"):
            open_tokenizer(str(model))
        with pytest.raises(ValueError, match="does not load"):
            load_model(str(model), torch.float32, "sdpa")
    else:  # transformers has this class itself
        open_tokenizer(str(model))
        load_model(str(model), torch.float32, "sdpa")
    assert not (tmp_path / "planted").exists()


def test_every_call_that_loads_from_a_directory_refuses_its_code():
    calls = [
        (path.name, node)
        for path in [*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("tasks/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert len(calls) >= 4
    for name, call in calls:
        assert "trust_remote_code=False" in ast.unparse(call), name


def test_the_digest_of_a_model_is_of_the_files_that_matter(tiny_model_path, tmp_path):
    model = shutil.copytree(tiny_model_path, tmp_path / "model")
    (model / "README.md").write_text("text")
    assert model_digest(str(model)) == model_digest(str(tiny_model_path))
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert model_digest(str(model)) != model_digest(str(tiny_model_path))
    assert model_digest("miniature") == ""


def test_an_unreachable_hub_is_one_line_in_seconds(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr("runtime.models.getproxies", dict)
    start = time.time()
    with pytest.raises(ValueError, match="^org/name: no model directory or hub name"):
        open_tokenizer("org/name")
    with pytest.raises(ValueError, match="cannot fetch"):
        load_rows("deepscaler")
    assert time.time() - start < 10 and constants.HF_HUB_OFFLINE
