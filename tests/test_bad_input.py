"""Bad input: one line that names the flag and the fix, a non-zero exit, nothing written and nothing lost."""

import gzip
import json
import re
import shutil

import pytest
import tiny_gpt2
from conftest import flags, run, run_here

import eval as evaluation
import skipcoder


def fails(script, capfd, *args) -> str:
    """The one line with which the script ends, before which it writes nothing to stderr but progress bars."""
    message, stderr = run_here(script, *args), capfd.readouterr().err
    assert all("%|" in line for line in stderr.replace("\r", "\n").splitlines() if line.strip()), (
        stderr
    )
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, (
        message
    )
    return message


@pytest.fixture
def train_fails(capfd, tiny, tmp_path):
    def train_fails(*changes):
        line = fails(skipcoder, capfd, *flags(tiny, tmp_path / "run", *changes))
        assert not (tmp_path / "run").exists()
        return line

    return train_fails


FLAGS = {  # what the line says, for which flag and values
    "above 0": {
        "k": [0, -4, "4 0"],
        "expansion": [0],
        "tokens": [0, "inf"],
        "ctx-len": [0],
        "batch-size": [0],
        "lr": [0, -1e-3, "nan"],
    },
    "invalid": {"layer": ["six"], "k": ["nan", 1.5], "tokens": ["many"], "arch": ["vae"]},
    "blocks 0 to 2": {"layer": [-1, 3]},
    "tiny_gpt2.py": {"model": ["no-such-model"]},
    "file or folder": {"dataset": ["no-such-data"]},
    "Unable to find": {"dataset": ["no-such-data.jsonl"]},
    "there are 256 latents": {"k": [257, "4 257"]},
    "each number once": {"k": ["4 8 4"]},
    "lower it": {"expansion": [10**12]},
    "at least 3": {"ctx-len": [2, 33]},
    "from 0 on": {"seed": [-1]},
    "use cpu": {"device": ["cuda:99", "abacus"]},
}


@pytest.mark.parametrize("says", FLAGS)
def test_flags(train_fails, says):
    for flag, value in ((flag, value) for flag, values in FLAGS[says].items() for value in values):
        line = train_fails(f"--{flag}", *str(value).split())
        assert f"--{flag}" in line and says in line


def test_model_that_is_no_model(train_fails, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    torn = shutil.copytree(tiny, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    for model in (tiny / "config.json", tmp_path / "empty", torn):
        assert f"--model {model}: " in train_fails("--model", model)


DATA = {  # content of a file, and what the line says
    "empty.txt": (b"", ""),
    "empty.jsonl": (b"", ""),
    "short.txt": (b"few words", "too little text"),
    "latin.txt": ("ein schöner Tag\n".encode("latin-1") * 900, "utf-8"),
    "column.jsonl": (b'{"body": "words"}\n' * 100, "text"),
    "number.jsonl": (b'{"text": 7}\n' * 100, "int"),
    "broken.jsonl": (b'{"text": "words"}\n{"text": "wor', "JSON"),
    "broken.parquet": (b"PAR1 and no more", "arquet"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "many words"}' * 99)[:40], "ended before"),
    "words.docx": (b"words", ".parquet"),
    "folder": (None, "any data files"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(train_fails, tmp_path, name):
    path, (content, says) = tmp_path / name, DATA[name]
    path.mkdir() if content is None else path.write_bytes(content)
    line = train_fails("--dataset", path)
    assert f"--dataset {path}: " in line and says in line


def test_out(train_fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "--out" in train_fails("--out", tmp_path / "file")
    assert "--out" in train_fails("--out", "/proc/run")  # not even root can write there
    assert (tmp_path / "file").read_text() == "mine"


def test_as_a_user_meets_it(tiny, tmp_path):
    """In a process of its own: one line on stderr and exit code 1; offline, it says how to go on without the hub."""
    assert run_here(skipcoder) == "error: the following arguments are required: --layer"
    for args, says in (
        (
            ["--model", "no/such", "--layer", 1],
            "error: --model no/such: .* local folder, as tests/tiny_gpt2.py",
        ),
        (
            ["--model", tiny, "--layer", 1],
            "error: --dataset HuggingFaceFW/fineweb: .* or a file or folder",
        ),
    ):
        done = run("skipcoder.py", *args, "--out", tmp_path / "run", HF_HOME=str(tmp_path))
        assert (
            done.returncode == 1
            and len(done.stderr.splitlines()) == 1
            and re.match(says, done.stderr)
        ), done.stderr


def test_eval_flags(capfd, trained, tmp_path):
    values = {
        "--tokens": 0,
        "--latents": 0,
        "--json": tmp_path,
        "--html": "/proc/page.html",
        "--svg": tmp_path,
    }
    for flag, value in (values | {"--device": "abacus", "--dataset": "no-such-data"}).items():
        assert flag in fails(evaluation, capfd, trained, flag, value)


def test_eval_runs_that_are_none(capfd, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        line = fails(evaluation, capfd, folder)
        assert f"RUN {folder}: " in line and "pass a folder that skipcoder.py wrote" in line
    tensors = copy / "transcoder/h.1.mlp/sae.safetensors"
    whole = tensors.read_bytes()
    for content in (whole[:1000], whole[:-1000], b""):
        tensors.write_bytes(content)
        assert f"RUN {copy}: " in fails(evaluation, capfd, copy)
    tensors.unlink()
    assert "transcoder/h.1.mlp" in fails(evaluation, capfd, copy)
    for content in ('{"arch": ["sae"', "[]", "{}"):
        (copy / "config.json").write_text(content)
        assert f"RUN {copy}: " in fails(evaluation, capfd, copy)


def test_eval_model_gone_or_changed(capfd, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    wide, config = tmp_path / "wide", json.loads((copy / "config.json").read_text())
    tiny_gpt2.make(wide, vocab_size=512, layers=2, d=16, ctx_len=32, steps=2, max_documents=100)
    (copy / "config.json").write_text(json.dumps(config | {"model": str(wide)}))
    assert "16 wide" in fails(evaluation, capfd, copy, "--tokens", 2000)
    (copy / "config.json").write_text(json.dumps(config | {"model": str(tmp_path / "gone")}))
    line = fails(evaluation, capfd, copy)
    assert "RUN" in line and f"{tmp_path}/gone" in line


def test_eval_data(capfd, trained, tmp_path):
    """Of either side of the split there has to be a row."""
    texts, path = [f"{i} and many words " * 40 for i in range(60)], tmp_path / "text.jsonl"
    for side, says in ((True, "training documents"), (False, "held-out documents")):
        kept = [json.dumps({"text": text}) for text in texts if skipcoder.in_split(text, side)]
        path.write_text("\n".join(kept))
        line = fails(evaluation, capfd, trained, "--dataset", path, "--tokens", 100)
        assert "--dataset" in line and says in line
