"""What the tests share: a tiny trained GPT-2 with its text, a device, and ways to run the scripts as a user does."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of processes: the CPU and one thread

import skipcoder  # noqa: E402
import tiny_gpt2  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny: threads would wait for one another more than they would work
skipcoder.fast_bfloat16 = lambda device: False  # the numbers are those of float32, on any machine

@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a trained GPT-2 of 3 blocks, d 32, vocabulary 512 and context 32, and its text.jsonl."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_gpt2.make(folder, vocab_size=512, layers=3, d=32, ctx_len=32, steps=300, max_documents=400)
    return folder

def run(*command, **env) -> subprocess.CompletedProcess:
    """Run `python command` in a process of its own."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=ALONE | env, cwd=ROOT, timeout=120)

def run_here(script, *args) -> int | str:
    """Call main() of the module `script`: its exit code, or the message with which it ends. No imports: fast."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
    for reader in multiprocessing.active_children():  # they end with the process, or else 5 s after garbage collection
        reader.terminate()

def flags(tiny, out, *more) -> list[str]:
    """Of a short training run of skipcoder.py; what is in `more` counts."""
    base = f"--model {tiny} --dataset {tiny}/text.jsonl --layer 1 --expansion 8 --k 4 --batch-size 16 --tokens 6000"
    return [*base.split(), "--out", str(out), *map(str, more)]

@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Path:
    """A run directory: all three coders, trained for a moment on layer 1 of the tiny model."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run_here(skipcoder, *flags(tiny, out, "--tokens", 30_000, "--device", "cpu")) == 0
    return out
