"""Bad input: one clear line on stderr that names the flag and the fix, a non-zero exit, nothing lost."""

import gzip
import json
import shutil

import pytest
from conftest import run, run_here

import eval as evaluation
import skipcoder


def fails(script, capfd, *args) -> str:
    """The one line that the script prints on stderr before it exits with an error."""
    code = run_here(script, *args)
    out, err = capfd.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]  # no bars
    assert code != 0 and len(lines) == 1, err
    assert lines[0].startswith(("skipcoder.py: error: ", "eval.py: error: "))
    return lines[0]


@pytest.fixture
def train_fails(capfd, tiny, tmp_path):
    defaults = {"--model": tiny, "--dataset": tiny / "text.jsonl", "--layer": 1, "--expansion": 8, "--k": 4}
    defaults |= {"--ctx-len": 32, "--tokens": 3000, "--batch-size": 16, "--out": tmp_path / "run"}

    def train_fails(**changes):
        flags = defaults | {"--" + name.replace("_", "-"): value for name, value in changes.items()}
        line = fails(skipcoder, capfd, *[a for f, v in flags.items() if v is not None for a in (f, v)])
        assert not (tmp_path / "run" / "config.json").exists()
        return line

    return train_fails


@pytest.mark.parametrize(
    "flag, value, says",
    [
        ("layer", None, "required"),
        ("layer", "six", "invalid int"),
        ("layer", -1, "blocks 0 to 2"),
        ("layer", 3, "blocks 0 to 2"),
        ("model", "no-such-model", "tiny_gpt2.py"),
        ("dataset", "no-such-data", "local file or folder"),
        ("k", 0, "at least 1"),
        ("k", -4, "at least 1"),
        ("k", "nan", "at least 1"),
        ("k", 257, "256 latents"),
        ("k", 1.5, "at least 1"),
        ("expansion", 0, "at least 1"),
        ("expansion", "1e12", "memory"),
        ("tokens", 0, "at least 1"),
        ("tokens", "inf", "at least 1"),
        ("tokens", "many", "many"),
        ("ctx_len", 0, "at least 1"),
        ("ctx_len", 2, "at least 3"),
        ("ctx_len", 33, "at most 32"),
        ("batch_size", 0, "at least 1"),
        ("batch_size", 100_000, "too little text"),
        ("lr", 0, "above 0"),
        ("lr", -1e-3, "above 0"),
        ("lr", "nan", "above 0"),
        ("auxk_alpha", -1, "above 0"),
        ("device", "cuda:99", "--device"),
        ("device", "abacus", "use cpu"),
        ("arch", "vae", "sae"),
    ],
)
def test_flags(train_fails, flag, value, says):
    line = train_fails(**{flag: value})
    assert "--" + flag.replace("_", "-") in line and says in line


def test_model_that_is_no_model(train_fails, tiny, tmp_path):
    assert "is a file" in train_fails(model=tiny / "config.json")
    (tmp_path / "empty").mkdir()
    assert "--model" in train_fails(model=tmp_path / "empty")
    torn = shutil.copytree(tiny, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    assert "--model" in train_fails(model=torn)


def data(tmp_path, name, content: bytes):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.txt", b"", "empty"),
        ("empty.jsonl", b"", "empty"),
        ("short.txt", b"few words", "too little text"),
        ("column.jsonl", b'{"body": "words"}\n' * 100, "body"),
        ("number.jsonl", b'{"text": 7}\n' * 100, "text"),
        ("broken.jsonl", b'{"text": "words"}\n{"text": "wor', "JSON"),
        ("broken.parquet", b"PAR1 and no more", "Parquet"),
        ("torn.jsonl.gz", gzip.compress(json.dumps({"text": "words" * 1000}).encode())[:40], "ended before"),
        ("words.docx", b"words", ".parquet"),
    ],
)
def test_data(train_fails, tmp_path, name, content, says):
    line = train_fails(dataset=data(tmp_path, name, content))
    assert "--dataset" in line and name in line and says in line


def test_folder_without_data(train_fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--dataset" in train_fails(dataset=tmp_path / "empty")


def test_out(train_fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "--out" in train_fails(out=tmp_path / "file")
    assert "--out" in train_fails(out="/proc/run")  # not even root can write there
    assert (tmp_path / "file").read_text() == "mine"


def test_hub_out_of_reach(tiny, tmp_path):
    """As a user meets it, in a process of its own: offline, the last line says how to go on without the network."""
    done = run("skipcoder.py", "--layer", 1, "--model", "no/such", "--out", tmp_path / "run", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--model no/such" in done.stderr and "--dataset" in done.stderr and "tests/tiny_gpt2.py" in done.stderr
    train = f"--layer 1 --model {tiny} --ctx-len 32 --out {tmp_path}/run".split()
    done = run("skipcoder.py", *train, HF_HOME=str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--dataset HuggingFaceFW/fineweb" in done.stderr and "local file or folder" in done.stderr
    assert "tests/tiny_gpt2.py" in done.stderr


@pytest.fixture
def eval_fails(capfd):
    return lambda *args: fails(evaluation, capfd, *args)


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def test_eval_flags(eval_fails, trained, tmp_path):
    assert "--tokens" in eval_fails(trained, "--tokens", 0)
    assert "--latents" in eval_fails(trained, "--latents", 0)
    assert "--json" in eval_fails(trained, "--json", tmp_path)
    assert "--html" in eval_fails(trained, "--html", "/proc/page.html")
    assert "--device" in eval_fails(trained, "--device", "abacus")


def test_eval_too_little_text(eval_fails, trained, tmp_path):
    """The first document is held out, so that a data set of one leaves none for the baselines."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "no more than this. " * 200}) + "\n")
    assert "training documents" in eval_fails(trained, "--dataset", text)
    text.write_text('{"text": "short"}\n' + json.dumps({"text": "no more than this. " * 200}) + "\n")
    assert "held out" in eval_fails(trained, "--dataset", text)


def test_eval_runs_that_are_none(eval_fails, copy, tmp_path):
    assert "no run is there" in eval_fails(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no run is there" in eval_fails(tmp_path / "empty")
    tensors = copy / "transcoder/h.1.mlp/sae.safetensors"
    whole = tensors.read_bytes()
    for content in (whole[:1000], whole[:-1000], b""):
        tensors.write_bytes(content)
        assert "transcoder/h.1.mlp" in eval_fails(copy)
    tensors.unlink()
    assert "transcoder/h.1.mlp" in eval_fails(copy)
    (copy / "config.json").write_text('{"arch": ["sae"')
    assert "config.json" in eval_fails(copy)
    (copy / "config.json").write_text("[]")
    assert "config.json" in eval_fails(copy)


def change(copy, **values):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | values))


def test_eval_model_gone_or_changed(eval_fails, copy, tiny, tmp_path):
    wide = shutil.copytree(tiny, tmp_path / "wide")
    import tiny_gpt2

    tiny_gpt2.make(wide, vocab_size=512, layers=2, d=16, heads=2, ctx_len=32, steps=2, max_documents=100)
    change(copy, model=str(wide))
    assert "16 wide" in eval_fails(copy, "--tokens", 2000)
    change(copy, model=str(tmp_path / "gone"))
    assert "gone" in eval_fails(copy) and "RUN" in eval_fails(copy)


def test_eval_data(eval_fails, trained, tmp_path):
    few = "".join(json.dumps({"text": "many words " * 200 if i % 10 else "few"}) + "\n" for i in range(30))
    assert "held out" in eval_fails(trained, "--dataset", data(tmp_path, "few.jsonl", few.encode()))
    assert "empty" in eval_fails(trained, "--dataset", data(tmp_path, "empty.jsonl", b""))
    assert "text" in eval_fails(trained, "--dataset", data(tmp_path, "none.jsonl", b'{"body": "words"}\n' * 100))
