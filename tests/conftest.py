"""What the tests share: a tiny trained GPT-2 with its text, and ways to run the scripts."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
# Other processes, too, run on the CPU with one thread.
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import demo
import torch
import transformers

import eval as evaluation
import skipcoder

torch.set_num_threads(1)  # the tensors are tiny: threads would wait more than they work
skipcoder.fast_bfloat16 = lambda device: False  # numbers are those of float32, on any machine


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a trained GPT-2 of 3 blocks, d 32, vocabulary 512, context 32, and its text."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    size = {"vocab_size": 512, "layers": 3, "d": 32, "ctx_len": 32}
    demo.make(folder, **size, steps=300, max_documents=400)
    return folder


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Path:
    """A run directory: all three coders, trained for a moment on layer 1 of the tiny model."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run_here(skipcoder, *flags(tiny, out, "--tokens", 30_000, "--device", "cpu")) == 0
    return out


@pytest.fixture(scope="session")
def evaluated(trained, tmp_path_factory):
    """An evaluation of `trained`: what it prints and writes, and what the page is made of."""
    folder = tmp_path_factory.mktemp("eval")
    flags = f"--tokens 15000 --latents 40 --json {folder}/e.json --html {folder}/e.html"
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    page = mock.patch.object(evaluation, "page", wraps=evaluation.page)
    with page as made, contextlib.redirect_stdout(out):
        assert run_here(evaluation, trained, "--device=cpu", *flags.split()) == 0
    stdout, page = out.buffer.getvalue().decode(), (folder / "e.html").read_text("utf-8")
    report = read_json(folder / "e.json")
    return SimpleNamespace(stdout=stdout, report=report, page=page, made_of=made.call_args[0])


@pytest.fixture
def broken_model(tiny, tmp_path):
    """A function that writes the tiny LM with one number of its weights replaced."""

    def broken_model(name, value, at=5):
        lm = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        lm.get_parameter(name).data.view(-1)[at] = value
        folder = shutil.copytree(tiny, tmp_path / "broken")
        lm.save_pretrained(folder)
        return folder

    return broken_model


def run(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """Run `python command` in a process of its own."""
    command = [sys.executable, *map(str, command)]
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    options = {"capture_output": True, "encoding": encoding, "timeout": 120}
    return subprocess.run(command, check=False, env=ALONE | env, cwd=cwd, **options)


def run_here(script, *args) -> int | str:
    """Call main() of the module `script`: faster than `run`, since nothing is imported.

    Return its exit code, or the message with which it ends.
    """
    changed = *skipcoder.STOP, signal.SIGCHLD
    handlers = {number: signal.getsignal(number) for number in changed}
    with mock.patch.object(sys, "argv", [script.__name__, *map(str, args)]):
        try:
            return script.main() or 0
        except SystemExit as exit_info:
            return exit_info.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            end_readers()


def end_readers():
    """End reader processes now. By themselves they end 5 s after garbage collection."""
    for reader in multiprocessing.active_children():
        reader.terminate()


def flags(tiny, out, *more) -> list[str]:
    """Return the flags of a short training run of skipcoder.py; those in `more` come last."""
    base = f"--model {tiny} --dataset {tiny}/text.jsonl --layer 1 --expansion 8 --k 4"
    base += f" --batch-size 16 --tokens 6000 --out {out}"
    return [*base.split(), *map(str, more)]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder) -> dict:
    """Return the content of all files but the log, which is opened as training begins."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != "log.jsonl"}


def change_json(path, remove=(), **changes):
    """Set keys of a JSON file, and remove others."""
    content = read_json(path) | changes
    for key in remove:
        del content[key]
    path.write_text(json.dumps(content), encoding="utf-8")


def write_jsonl(path, texts):
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
