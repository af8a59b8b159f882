"""Bad input: one line that names the flag and the fix, a non-zero exit, nothing written and nothing lost."""

import gzip
import json
import shutil

import pytest
import tiny_gpt2
from conftest import flags, run, run_here

import eval as evaluation
import skipcoder


def fails(script, capfd, *args) -> str:
    """The one line with which the script ends, before which it writes nothing to stderr."""
    message = run_here(script, *args)
    lines = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert not [line for line in lines if "%|" not in line]  # but progress bars
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    return message


@pytest.fixture
def train_fails(capfd, tiny, tmp_path):
    def train_fails(*changes):
        line = fails(skipcoder, capfd, *flags(tiny, tmp_path / "run", *changes))
        assert not (tmp_path / "run").exists()
        return line

    return train_fails


@pytest.mark.parametrize(
    "flag, value, says",
    [
        ("layer", "six", "invalid int"),
        ("layer", -1, "blocks 0 to 2"),
        ("layer", 3, "blocks 0 to 2"),
        ("model", "no-such-model", "tiny_gpt2.py"),
        ("dataset", "no-such-data", "file or folder"),
        ("dataset", "no-such-data.jsonl", "Unable to find"),
        ("k", 0, "above 0"),
        ("k", -4, "above 0"),
        ("k", "nan", "invalid int"),
        ("k", 257, "256 latents"),
        ("k", 1.5, "invalid int"),
        ("expansion", 0, "above 0"),
        ("expansion", 10**12, "lower it"),
        ("tokens", 0, "above 0"),
        ("tokens", "inf", "above 0"),
        ("tokens", "many", "invalid float"),
        ("ctx-len", 0, "above 0"),
        ("ctx-len", 2, "at least 3"),
        ("ctx-len", 33, "at most 32"),
        ("batch-size", 0, "above 0"),
        ("batch-size", 100_000, "too little text"),
        ("lr", 0, "above 0"),
        ("lr", -1e-3, "above 0"),
        ("lr", "nan", "above 0"),
        ("device", "cuda:99", "use cpu"),
        ("device", "abacus", "use cpu"),
        ("arch", "vae", "sae"),
        ("auxk-alpha", 1, "unrecognized"),
    ],
)
def test_flags(train_fails, flag, value, says):
    line = train_fails(f"--{flag}", value)
    # a batch that is too large for the text is the text's fault
    assert ("--dataset" if says == "too little text" else f"--{flag}") in line and says in line


def test_model_that_is_no_model(train_fails, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    torn = shutil.copytree(tiny, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    for model in (tiny / "config.json", tmp_path / "empty", torn):
        assert f"--model {model}: " in train_fails("--model", model)


LONG = json.dumps({"text": "many words of it " * 400}).encode()


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.txt", b"", ""),
        ("empty.jsonl", b"", ""),
        ("short.txt", b"few words", "too little text"),
        ("latin.txt", "ein schöner Tag\n".encode("latin-1") * 900, "utf-8"),
        ("column.jsonl", b'{"body": "words"}\n' * 100, "text"),
        ("number.jsonl", b'{"text": 7}\n' * 100, ""),
        ("broken.jsonl", b'{"text": "words"}\n{"text": "wor', ""),
        ("broken.parquet", b"PAR1 and no more", "arquet"),
        ("torn.jsonl.gz", gzip.compress(LONG)[:40], ""),
        ("words.docx", b"words", ".parquet"),
    ],
)
def test_data(train_fails, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    line = train_fails("--dataset", tmp_path / name)
    assert f"--dataset {tmp_path / name}: " in line and says in line


def test_folder_without_data(train_fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--dataset" in train_fails("--dataset", tmp_path / "empty")


def test_out(train_fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "--out" in train_fails("--out", tmp_path / "file")
    assert "--out" in train_fails("--out", "/proc/run")  # not even root can write there
    assert (tmp_path / "file").read_text() == "mine"


def test_as_a_user_meets_it(tiny, tmp_path):
    """In a process of its own: one line on stderr and exit code 1; offline, it says how to go on without the hub."""
    hub = ["--model", "no/such", "--layer", 1]
    default = ["--model", tiny, "--layer", 1]
    for args, says in (
        (hub, ["--model no/such", "local folder", "tests/tiny_gpt2.py"]),
        (default, ["--dataset HuggingFaceFW/fineweb", "a file or folder"]),
        (["--model", tiny], ["--layer"]),
    ):
        done = run("skipcoder.py", *args, "--out", tmp_path / "run", HF_HOME=str(tmp_path))
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ") and all(words in done.stderr for words in says), done.stderr


@pytest.fixture
def eval_fails(capfd):
    return lambda *args: fails(evaluation, capfd, *args)


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def test_eval_flags(eval_fails, trained, tmp_path):
    for flag, value in (
        ("--tokens", 0), ("--latents", 0), ("--json", tmp_path), ("--html", "/proc/page.html"), ("--device", "abacus"),
        ("--dataset", "no-such-data"),
    ):  # fmt: skip
        assert flag in eval_fails(trained, flag, value)


def test_eval_runs_that_are_none(eval_fails, copy, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        line = eval_fails(folder)
        assert f"RUN {folder}: " in line and "pass a folder that skipcoder.py wrote" in line
    tensors = copy / "transcoder/h.1.mlp/sae.safetensors"
    whole = tensors.read_bytes()
    for content in (whole[:1000], whole[:-1000], b""):
        tensors.write_bytes(content)
        assert f"RUN {copy}: " in eval_fails(copy)
    tensors.unlink()
    assert "transcoder/h.1.mlp" in eval_fails(copy)
    for content in ('{"arch": ["sae"', "[]", "{}"):
        (copy / "config.json").write_text(content)
        assert f"RUN {copy}: " in eval_fails(copy)


def test_eval_model_gone_or_changed(eval_fails, copy, tmp_path):
    wide, config = tmp_path / "wide", json.loads((copy / "config.json").read_text())
    tiny_gpt2.make(wide, vocab_size=512, layers=2, d=16, heads=2, ctx_len=32, steps=2, max_documents=100)
    (copy / "config.json").write_text(json.dumps(config | {"model": str(wide)}))
    assert "16 wide" in eval_fails(copy, "--tokens", 2000)
    (copy / "config.json").write_text(json.dumps(config | {"model": str(tmp_path / "gone")}))
    line = eval_fails(copy)
    assert "RUN" in line and f"{tmp_path}/gone" in line


def test_eval_data(eval_fails, trained, tmp_path):
    """Of either side of the split there has to be a row."""
    texts = [f"{i} and many words " * 40 for i in range(60)]
    sides = {side: [text for text in texts if skipcoder.in_split(text, side)] for side in (True, False)}
    for name, kept, says in (("a", sides[True], "training documents"), ("b", sides[False], "held-out documents")):
        (tmp_path / name).with_suffix(".txt.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in kept))
        line = eval_fails(trained, "--dataset", tmp_path / f"{name}.txt.jsonl", "--tokens", 100)
        assert "--dataset" in line and says in line
    (tmp_path / "none.jsonl").write_bytes(b'{"body": "words"}\n' * 100)
    assert "text" in eval_fails(trained, "--dataset", tmp_path / "none.jsonl")
