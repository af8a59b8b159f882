"""Bad input: one line that names the flag and the fix, nothing written and nothing lost."""

import gzip
import re
import shutil
import socket
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import change_json, contents, flags, run_here, write_jsonl

import eval as evaluation
import skipcoder


def fails(script, capfd, *args) -> str:
    """Return the one line with which the script ends.

    Before it nothing but progress bars goes to stderr.
    """
    message, stderr = run_here(script, *args), capfd.readouterr().err
    for line in stderr.replace("\r", "\n").splitlines():
        assert "%|" in line or not line.strip(), stderr
    assert isinstance(message, str) and message.startswith("error: "), message
    assert "\n" not in message
    return message


@pytest.fixture
def train_fails(capfd, tiny, tmp_path):
    def train_fails(*changes):
        out = tmp_path / "run"
        line = fails(skipcoder, capfd, *flags(tiny, out, *changes))
        assert not out.exists()
        return line

    return train_fails


# ---- Flags ----------------------------------------------------------------------------------

FLAGS = {  # what the line says, for which flag and values
    "is below": {
        "k": [0, "4 0"],
        "expansion": [0],
        "tokens": [0, "nan"],
        "ctx-len": [2],
        "batch-size": [0],
        "lr": [0, "nan"],
        "seed": [-1],
    },
    "invalid": {"layer": ["six"], "k": [1.5], "tokens": ["many"], "arch": ["vae"]},
    "blocks 0 to 2": {"layer": [-1, 3]},
    "python tests/demo.py": {"dataset": ["no-such-data"]},
    "local folder": {"model": ["no-such-model", "no/such"]},
    "file or folder": {"dataset": ["no-such-data.jsonl"]},
    "there are 256 latents": {"k": [257, "4 257"]},
    "at most 32 tokens": {"ctx-len": [33]},
    "use cpu": {"device": ["cuda:99", "abacus"]},
}
CASES = []
for says, values_of_flags in FLAGS.items():
    for flag, values in values_of_flags.items():
        CASES += [(flag, str(value), says) for value in values]


@pytest.mark.parametrize("flag, value, says", CASES)
def test_flags(train_fails, flag, value, says):
    line = train_fails(f"--{flag}", *value.split())
    assert f"--{flag}" in line and says in line


def test_a_batch_that_cannot_be_divided_between_processes(train_fails, monkeypatch):
    """It would be of another size than what was asked for."""
    monkeypatch.setattr(skipcoder, "WORLD", 3)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: None)
    line = train_fails("--batch-size", 16)
    assert line == "error: --batch-size 16: pass a multiple of the 3 processes"


def test_flags_of_eval(capfd, trained):
    values = {
        "--tokens": 0,
        "--latents": 0,
        "--seed": -1,
        "--device": "abacus",
        "--dataset": "no-such-data",
    }
    for flag, value in values.items():
        assert str(value) in fails(evaluation, capfd, trained, flag, value)


# ---- Models and text ------------------------------------------------------------------------


def test_models_that_are_none(train_fails, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    torn = shutil.copytree(tiny, tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for model in (tmp_path / "empty", torn):
        assert f"--model {model}: " in train_fails("--model", model)


COLUMN = pa.BufferOutputStream()
pq.write_table(pa.table({"body": ["words"]}), COLUMN)
DATA = {  # content of a file, and what the line says
    "empty.txt": (b"", "too little text, .*32 tokens"),
    "short.jsonl": (b'{"text": "few words"}', "too little text"),
    "latin.txt": ("ein schöner Tag\n".encode("latin-1") * 900, "utf-8"),
    "column.jsonl": (b'{"body": "words"}\n' * 100, "column.jsonl: line 1 .*body"),
    "list.jsonl": (b'["words"]\n' * 100, "list.jsonl: line 1 .*words"),
    "torn.jsonl": (b'{"text": "words"}\n\n{"text": "wor', "torn.jsonl: line 3 .*wor'"),
    "python.jsonl": (b'{"text": "a"}\n' * 700 + b"{'text': 1}\n", "line 701 .*'text': 1"),
    "long.jsonl": (b'{"body": "' + b"long " * 999 + b'"}', r"long.jsonl: line 1 .{,120} \("),
    "column.parquet": (COLUMN.getvalue().to_pybytes(), "column.parquet: .*text"),
    "broken.parquet": (b"PAR1 and no more", "broken.parquet: .*arquet"),
    "two_files.jsonl.zip": (b"PK", "no text to read"),  # fsspec would read one of them
    "torn.jsonl.gz": (gzip.compress(b'{"text": "many words"}' * 99)[:40], "ended before"),
    "words.csv": (b"text\nwords", "no text to read"),
    "folder": (None, "no text to read"),
}


@pytest.mark.parametrize("name", DATA)
def test_text(train_fails, tmp_path, name):
    """The reader process has found it, and its traceback is not shown."""
    path, (content, says) = tmp_path / name, DATA[name]
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    line = train_fails("--dataset", path)
    assert re.match(f"error: --dataset {path}: .*{says}", line), line
    assert line.endswith(f" ({skipcoder.DATA_HINT})") and "Traceback" not in line


def test_a_message_of_a_library_is_told_whole(train_fails, monkeypatch):
    """In one line. Where it says what helps is often the last one."""

    def load_dataset(*args, **more):
        raise ValueError("Config name is missing.\nPick one of:\n\t['en',\n\t 'de']")

    monkeypatch.setattr(skipcoder.datasets, "load_dataset", load_dataset)
    line = train_fails("--dataset", "user/data")
    whole = "Config name is missing. Pick one of: ['en', 'de']"
    assert line == f"error: --dataset user/data: {whole} ({skipcoder.DATA_HINT})"


def test_text_of_eval(capfd, trained, tmp_path):
    """Of either side of the split there has to be a row."""
    texts = [f"{i} and many words " * 40 for i in range(60)]
    for held_out in (True, False):
        kept = [text for text in texts if skipcoder.is_held_out(text) == held_out]
        path = write_jsonl(tmp_path / "text.jsonl", kept)
        line = fails(evaluation, capfd, trained, "--dataset", path, "--tokens", 100)
        missing = "training documents" if held_out else "held-out documents"
        assert "--dataset" in line and missing in line


def test_a_hub_out_of_reach_is_said_at_once(train_fails, monkeypatch):
    """With how to go on without it. At this port nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        hub = skipcoder.huggingface_hub
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.hf_api.api, "endpoint", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        start = time.time()
        line = train_fails("--dataset", "user/data")
    assert time.time() < start + 10
    assert re.match("error: --dataset user/data: .*refused.*python tests/demo.py", line)


def test_the_default_data_set_offline(capfd, tiny, tmp_path):
    args = ["--model", tiny, "--layer", 1, "--out", tmp_path / "run"]
    line = fails(skipcoder, capfd, *args)
    assert re.match("error: --dataset HuggingFaceFW/fineweb: .*python tests/demo.py", line)


# ---- What is not finite ---------------------------------------------------------------------


@pytest.fixture
def keeps_the_old_run(capfd, trained, tiny, tmp_path):
    """A function that trains with --overwrite, fails, and has the old run's files as they were."""

    def keeps_the_old_run(*changes):
        out = shutil.copytree(trained, tmp_path / "run")
        before = contents(out)
        line = fails(skipcoder, capfd, *flags(tiny, out, "--overwrite", *changes))
        assert contents(out) == before
        return line

    return keeps_the_old_run


BROKEN = [  # block 1 is coded, and token 0 is BOS
    ("transformer.h.0.mlp.c_fc.weight", "nan"),
    ("transformer.h.0.mlp.c_fc.weight", "inf"),
    ("transformer.h.1.mlp.c_proj.bias", "nan"),
    ("transformer.wte.weight", "nan"),
]


@pytest.mark.parametrize("name, value", BROKEN)
def test_activations_that_are_not_finite(broken_model, keeps_the_old_run, name, value):
    """As of a merge that went wrong."""
    line = keeps_the_old_run("--model", broken_model(name, float(value)))
    assert line == "error: --model: the MLP's input or output is not finite"


def test_activations_that_are_finite_at_first(broken_model, keeps_the_old_run, tiny, tmp_path):
    """A token that breaks the LM may come late."""
    (rare,) = transformers.AutoTokenizer.from_pretrained(tiny)("~")["input_ids"]
    texts = [f"{i} and some words " * 9 for i in range(700)] + [f"{i} ~" * 9 for i in range(200)]
    text = write_jsonl(tmp_path / "text.jsonl", texts)
    model = broken_model("transformer.wte.weight", float("nan"), rare * 32)
    line = keeps_the_old_run("--model", model, "--dataset", text, "--tokens", 60_000)
    assert line == "error: --model: the MLP's output is not finite"


@pytest.mark.parametrize("lr", ["1e+30", "1e+12"])
def test_a_learning_rate_that_is_too_high(keeps_the_old_run, lr):
    line = keeps_the_old_run("--lr", lr)
    assert line == f"error: --lr {lr}: the loss is not finite any more, lower it"


# ---- Runs -----------------------------------------------------------------------------------


def test_runs_that_are_none(capfd, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        line = fails(evaluation, capfd, folder)
        assert f"RUN {folder}: " in line
        assert "pass a folder that skipcoder.py wrote" in line


def test_runs_that_are_broken(capfd, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    cfg, weights = copy / "transcoder/h.1.mlp/cfg.json", copy / "transcoder/h.1.mlp/sae.safetensors"
    of_another, tensors = cfg.read_bytes().replace(b"topk", b"groupmax"), weights.read_bytes()
    for path, broken in {
        cfg: [b'{"k": 4', b"{}", of_another],
        weights: [tensors[:1000], tensors[:-1000], b""],
        copy / "config.json": [b'{"arch": ["sae"', b"{}"],
    }.items():
        whole = path.read_bytes()
        for content in broken:
            path.write_bytes(content)
            assert f"RUN {copy}: " in fails(evaluation, capfd, copy)
        path.write_bytes(whole)
    weights.unlink()
    assert "transcoder/h.1.mlp" in fails(evaluation, capfd, copy)


def test_a_model_that_is_gone_or_changed(capfd, trained, tiny, tmp_path):
    copy, wide = shutil.copytree(trained, tmp_path / "copy"), tmp_path / "wide"
    shutil.copytree(tiny, wide)
    config = transformers.AutoConfig.from_pretrained(wide, n_embd=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(wide)
    change_json(copy / "config.json", model=str(wide))
    assert "16 wide" in fails(evaluation, capfd, copy, "--tokens", 2000)
    change_json(copy / "config.json", model=str(tmp_path / "gone"))
    line = fails(evaluation, capfd, copy)
    assert f"--model {tmp_path}/gone: " in line and "edit its config.json" in line
