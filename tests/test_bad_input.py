"""Bad input: one line that names the flag and the fix, nothing written and nothing lost."""

import gzip
import re
import shutil
import socket
import time

import pytest
import tiny_gpt2
from conftest import change_json, flags, read_json, run, run_here, write_jsonl

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
        "k": [0, -4, "4 0"],
        "expansion": [0],
        "tokens": [0, "inf", "nan"],
        "ctx-len": [0, 1, 2],
        "batch-size": [0],
        "lr": [0, -1e-3, "nan"],
        "seed": [-1],
    },
    "invalid": {
        "layer": ["six", 1.5],
        "k": ["nan", 1.5, "four"],
        "tokens": ["many"],
        "arch": ["vae"],
    },
    "blocks 0 to 2": {"layer": [-1, 3]},
    "tiny_gpt2.py": {"model": ["no-such-model"]},
    "file or folder": {"dataset": ["no-such-data", "no-such-data.jsonl"]},
    "there are 256 latents": {"k": [257, "4 257"]},
    "each number once": {"k": ["4 8 4"]},
    "lower it": {"expansion": [10**12]},
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


def test_flags_of_eval(capfd, trained, tmp_path):
    assert "at most" in fails(evaluation, capfd, trained, "--tokens", 2e7)
    values = {
        "--tokens": 0,
        "--latents": 0,
        "--seed": -1,
        "--json": tmp_path,
        "--html": "/proc/page.html",
        "--svg": tmp_path,
        "--device": "abacus",
        "--dataset": "no-such-data",
    }
    for flag, value in values.items():
        assert flag in fails(evaluation, capfd, trained, flag, value)


# ---- Models and text ------------------------------------------------------------------------


def test_models_that_are_none(train_fails, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    torn = shutil.copytree(tiny, tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for model in (tiny / "config.json", tmp_path / "empty", torn):
        assert f"--model {model}: " in train_fails("--model", model)


def test_a_model_without_a_tokenizer(train_fails, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    for path in model.glob("*token*"):
        path.unlink()
    line = train_fails("--model", model)
    assert f"--model {model}: " in line and "tokenizer" in line


DATA = {  # content of a file, and what the line says
    "empty.txt": (b"", "too little text"),
    "empty.jsonl": (b"", "too little text"),
    "short.txt": (b"few words", "too little text"),
    "latin.txt": ("ein schöner Tag\n".encode("latin-1") * 900, "utf-8"),
    "column.jsonl": (b'{"body": "words"}\n' * 100, "there is no column 'text'"),
    "number.jsonl": (b'{"text": 7}\n' * 100, "int"),
    "list.jsonl": (b'{"text": ["a"]}\n' * 100, "list"),
    "string.json": (b'"words"', "too little text"),  # a string by itself is a text
    "number.json": (b"7", "a text is of type int"),
    "broken.jsonl": (b'{"text": "words"}\n{"text": "wor', "Unterminated"),
    "broken.parquet": (b"PAR1 and no more", "arquet"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "many words"}' * 99)[:40], "ended before"),
    "words.docx": (b"words", ".parquet"),
    "words.csv": (b"text\nwords", "convert it"),
    "words.jsonl.zst": (b"\x28\xb5\x2f\xfd", "zstd -d"),
    "folder": (None, "no text to read"),
}


@pytest.mark.parametrize("name", DATA)
def test_text(train_fails, tmp_path, name):
    path, (content, says) = tmp_path / name, DATA[name]
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    line = train_fails("--dataset", path)
    assert f"--dataset {path}: " in line and says in line


def test_text_of_eval(capfd, trained, tmp_path):
    """Of either side of the split there has to be a row."""
    texts = [f"{i} and many words " * 40 for i in range(60)]
    for held_out in (True, False):
        kept = [text for text in texts if skipcoder.is_held_out(text) == held_out]
        path = write_jsonl(tmp_path / "text.jsonl", kept)
        line = fails(evaluation, capfd, trained, "--dataset", path, "--tokens", 100)
        missing = "training documents" if held_out else "held-out documents"
        assert "--dataset" in line and missing in line


# ---- Runs -----------------------------------------------------------------------------------


def test_out(train_fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "--out" in train_fails("--out", tmp_path / "file")
    assert "--out" in train_fails("--out", "/proc/run")  # not even root can write there
    assert (tmp_path / "file").read_text() == "mine"


def test_runs_that_are_none(capfd, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        line = fails(evaluation, capfd, folder)
        assert f"RUN {folder}: " in line
        assert "pass a folder that skipcoder.py wrote" in line


def test_runs_that_are_broken(capfd, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    folder = copy / "transcoder/h.1.mlp"

    # A coder's cfg.json: text that is none, a key that is missing, an activation of someone else.
    cfg = (folder / "cfg.json").read_text()
    for content in ('{"k": 4', "{}", cfg.replace("topk", "groupmax")):
        (folder / "cfg.json").write_text(content)
        assert f"RUN {copy}: " in fails(evaluation, capfd, copy)
    (folder / "cfg.json").write_text(cfg)

    # Its weights.
    tensors = folder / "sae.safetensors"
    whole = tensors.read_bytes()
    for content in (whole[:1000], whole[:-1000], b""):
        tensors.write_bytes(content)
        assert f"RUN {copy}: " in fails(evaluation, capfd, copy)
    tensors.unlink()
    assert "transcoder/h.1.mlp" in fails(evaluation, capfd, copy)

    # The run's config.json.
    for content in ('{"arch": ["sae"', "{}"):
        (copy / "config.json").write_text(content)
        assert f"RUN {copy}: " in fails(evaluation, capfd, copy)


def test_a_config_that_is_no_object(capfd, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "config.json").write_text("[]")
    assert f"RUN {copy}: " in fails(evaluation, capfd, copy)


@pytest.mark.parametrize("key", ["model", "layer", "dataset", "subset", "ctx_len"])
def test_a_config_written_by_hand_that_lacks_a_key(capfd, trained, tmp_path, key):
    copy = shutil.copytree(trained, tmp_path / "copy")
    change_json(copy / "config.json", [key])
    line = fails(evaluation, capfd, copy, "--tokens", 2000)
    assert f"RUN {copy}: " in line and key in line


def test_a_model_that_is_gone_or_changed(capfd, trained, tmp_path):
    copy, wide = shutil.copytree(trained, tmp_path / "copy"), tmp_path / "wide"
    size = {"vocab_size": 512, "layers": 2, "d": 16, "ctx_len": 32}
    tiny_gpt2.make(wide, **size, steps=2, max_documents=100)
    capfd.readouterr()
    change_json(copy / "config.json", model=str(wide))
    assert "16 wide" in fails(evaluation, capfd, copy, "--tokens", 2000)
    change_json(copy / "config.json", model=str(tmp_path / "gone"))
    line = fails(evaluation, capfd, copy)
    assert "--model" in line and f"{tmp_path}/gone" in line
    assert read_json(copy / "config.json")["model"] == f"{tmp_path}/gone"


# ---- As a user meets it ---------------------------------------------------------------------


def test_a_missing_flag():
    line = "error: the following arguments are required: --layer"
    assert run_here(skipcoder) == line


def test_a_model_of_the_hub_offline(train_fails):
    line = train_fails("--model", "no/such")
    assert re.match(
        "error: --model no/such: .* local folder, as written by tests/tiny_gpt2.py", line
    )


def test_a_data_set_of_the_hub_offline(tiny, tmp_path):
    """In a process of its own: one line, exit code 1, and how to go on without the hub."""
    args = ["--model", tiny, "--layer", 1, "--out", tmp_path / "run"]
    done = run("skipcoder.py", *args, HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    says = "error: --dataset HuggingFaceFW/fineweb: .* or a file or folder"
    assert re.match(says, done.stderr), done.stderr


def test_a_hub_out_of_reach_is_said_at_once(train_fails, monkeypatch):
    """With how to go on without it. At this port nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        constants = skipcoder.huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        start = time.time()
        line = train_fails("--dataset", "user/data")
    assert time.time() < start + 10
    assert line.startswith(f"error: --dataset user/data: no http://127.0.0.1:{port}: ")
    assert "refused" in line
    assert "tests/tiny_gpt2.py" in line and "runs/tiny-gpt2/text.jsonl" in line
