"""Training as a user runs it: what is printed and written, and what an end too early leaves."""

import contextlib
import gzip
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ALONE, ROOT, change_json, flags, read_json, run, run_here
from safetensors.torch import load_file

import skipcoder
from skipcoder import ARCHS, Coder, Trainer, load_run

FOLDER = "h.1.mlp"  # of a coder, in the folder of its name


def contents(folder) -> dict:
    """Return the content of all files but the log."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != "log.jsonl"}


def read_log(out) -> list[dict]:
    return list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))


def check_end(lines, out):
    """Check the lines with which a run ends: what was trained, by coder, and what to do next."""
    tokens, log = read_json(out / "config.json")["tokens_trained"], read_log(out)
    expected = [f"saved after {tokens:,} tokens"]
    if log:
        fvu, dead = log[-1]["fvu"], log[-1]["dead"]
        expected += [f"  {name}: FVU {fvu[name]:.3f}, dead {dead[name]:.1%}" for name in fvu]
    expected += [f"next: python eval.py {out} --html page.html"]
    assert lines[-len(expected) :] == expected
    return lines[: -len(expected)]


# ---- A run that goes well -------------------------------------------------------------------


def test_config_and_log(trained):
    config = read_json(trained / "config.json")
    assert config["hookpoint"] == FOLDER and config["arch"] == list(ARCHS)
    assert config["seed"] == 0 and config["k"] == [4]
    assert config["num_latents"] == 256 and config["d"] == 32
    assert config["tokens_trained"] >= 30_000
    assert config["coders"] == {arch: f"{arch}/{FOLDER}" for arch in ARCHS}
    assert set(config["versions"]) == {"torch", "transformers", "datasets"}

    log = read_log(trained)
    for line in log:
        assert set(line) == {"tokens", "tokens_per_s", "fvu", "dead"}
        assert set(line["fvu"]) == set(line["dead"]) == set(ARCHS)
    last = log[-1]
    assert last["tokens"] == config["tokens_trained"] and last["tokens_per_s"] > 0
    assert all(0 < fvu < 0.8 for fvu in last["fvu"].values())
    assert all(0 <= share < 1 for share in last["dead"].values())
    assert not list(trained.rglob("*.tmp"))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_folder_of_a_coder(trained, arch):
    """It is in the format of EleutherAI's sparsify, with one key more."""
    tensors = load_file(trained / arch / FOLDER / "sae.safetensors")
    shapes = {
        "encoder.weight": (256, 32),
        "encoder.bias": (256,),
        "W_dec": (256, 32),
        "b_dec": (32,),
    }
    if arch == "skip_transcoder":
        shapes["W_skip"] = (32, 32)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert read_json(trained / arch / FOLDER / "cfg.json") == {
        "activation": "topk",
        "expansion_factor": 8,
        "normalize_decoder": arch == "sae",
        "num_latents": 256,
        "k": 4,
        "multi_topk": False,
        "skip_connection": arch == "skip_transcoder",
        "transcode": arch != "sae",
        "d_in": 32,
        "arch": arch,
    }

    coder = load_run(trained)[1][arch]
    assert coder.arch == arch and coder.k == 4
    loaded = [coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec, coder.W_skip]
    for name, parameter in zip(shapes, loaded):
        assert torch.equal(parameter, tensors[name])
    if arch == "sae":
        lengths = tensors["W_dec"].norm(dim=1)
        assert (lengths - 1).abs().max() < 1e-5


def screen(text: str) -> list[str]:
    """Return the lines that a terminal shows: after a carriage return a line is overwritten."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


@pytest.fixture
def run_on_a_terminal(tmp_path, monkeypatch):
    """A function that runs skipcoder.py with both streams in one, and returns the screen."""

    def run_on_a_terminal(*args) -> list[str]:
        path = tmp_path / "terminal"
        with path.open("w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "stderr", stream)
            message = run_here(skipcoder, *args)
            if isinstance(message, str):  # as Python ends after sys.exit(message)
                print(message, file=sys.stderr)
            monkeypatch.undo()
        return screen(path.read_bytes().decode())

    return run_on_a_terminal


def test_what_is_printed(tiny, tmp_path, run_on_a_terminal):
    """Each message on a line of its own, also while the bar is open."""
    out, text = tmp_path / "run", tmp_path / "text"
    text.mkdir()
    # The whole text is less than what is trained on, so that it is repeated.
    lines = (tiny / "text.jsonl").read_text().splitlines()
    (text / "a.jsonl").write_text("\n".join(lines[:30]))
    (text / "b.JSONL").write_text("\n".join(lines[30:60]))
    (text / "notes.md").write_text("not read")
    args = flags(tiny, out, "--dataset", text, "--tokens", 60_000)
    shown = run_on_a_terminal(*args)
    steps = -(-60_000 // (16 * 31))
    assert read_json(out / "config.json")["tokens_trained"] == steps * 16 * 31

    # Before the loop.
    start = "\n".join(shown[:3])
    words = "sae, transcoder, skip_transcoder", "k 4", "M 256", FOLDER, str(tiny), "cpu x 1"
    assert all(word in start for word in words), start
    assert f"{steps:,} steps of 496 tokens" in start and "lr 0.0" in start
    assert f"--dataset {text}: 2 .jsonl files" in start and "notes.md" in start

    # In the loop, and at its end.
    repeated = [line for line in shown if "is repeated" in line]
    assert len(repeated) == 1 and repeated[0].startswith("--dataset is repeated: it has ")
    *shown, nothing = shown
    assert nothing == "" and len(read_log(out)[-1]["fvu"]) == 3
    *_, bar = check_end(shown, out)
    assert bar.startswith("100%|") and "tok/s" in bar and "FVU" in bar
    assert sum("%|" in line for line in shown) == 1, "the bar is shown once"


def test_a_bar_fits_80_columns_with_12_coders(tiny, tmp_path, capfd):
    out = tmp_path / "run"
    assert run_here(skipcoder, *flags(tiny, out, "--k", 1, 2, 3, 4, "--tokens", 2000)) == 0
    last = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    fvu = read_log(out)[-1]["fvu"].values()
    assert len(fvu) == 12 and len(last) <= 80
    assert f"FVU {min(fvu):.3f} to {max(fvu):.3f}" in last


def test_text_without_a_held_out_document_is_said_at_the_start(tiny, tmp_path, capfd):
    """Training accepts what evaluation cannot use."""
    text = tmp_path / "text.txt"
    text.write_text("a line of a small text, all of it one document\n" * 90)
    assert not skipcoder.is_held_out(text.read_text())
    args = flags(tiny, tmp_path / "run", "--dataset", text, "--tokens", 500, "--batch-size", 2)
    assert run_here(skipcoder, *args) == 0
    stdout = capfd.readouterr().out
    line = f"--dataset {text}: too few documents to keep one in ten for eval.py. Cut the text"
    assert stdout.splitlines()[0].startswith(line)


def test_the_learning_rate_rises_and_falls(tiny, tmp_path, monkeypatch):
    """Over the first 5% of the run, and over its last half, to zero."""
    factors, step = [], Trainer.step

    def seen(trainer, x, y, lr_factor):
        factors.append(lr_factor)
        step(trainer, x, y, lr_factor)

    monkeypatch.setattr(Trainer, "step", seen)
    args = flags(tiny, tmp_path / "run", "--arch", "sae", "--tokens", 100 * 16 * 31)
    assert run_here(skipcoder, *args) == 0
    assert len(factors) == 100
    assert factors[:5] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert factors[5:50] == [1] * 45
    assert factors[50:] == pytest.approx([0.99 - 0.02 * i for i in range(50)])


@pytest.mark.parametrize("tokens, lr, step", [("2e6", 1.5e-3, 1024), ("32e6", 7.5e-4, 4096)])
def test_the_recipe(tiny, tmp_path, monkeypatch, tokens, lr, step):
    """The defaults of lr and of the rows in a step, by the number of tokens."""
    given = []
    monkeypatch.setattr(skipcoder, "train", given.append)
    args = f"--model {tiny} --dataset {tiny}/text.jsonl --layer 1 --tokens {tokens}"
    assert run_here(skipcoder, *args.split(), "--out", tmp_path / "run") == 0
    assert given[0].lr == pytest.approx(lr)
    assert given[0].ctx_len == 32 and given[0].batch_size == step // 32


def test_ctrl_c_before_training_ends_the_program_at_once(tiny, tmp_path, monkeypatch):
    """Without a traceback: there is nothing to save yet."""
    handlers = []
    monkeypatch.setattr(
        skipcoder, "train", lambda args: handlers.append(signal.getsignal(signal.SIGINT))
    )
    assert run_here(skipcoder, *flags(tiny, tmp_path / "run")) == 0
    assert handlers == [signal.SIG_DFL]


def test_eval_may_be_called_from_another_folder(tiny, tmp_path, monkeypatch):
    """Paths that were relative are absolute in config.json."""
    monkeypatch.chdir(tiny.parent)
    args = flags(tiny.name, tmp_path / "run", "--arch", "sae", "--tokens", 500)
    assert run_here(skipcoder, *args) == 0
    config = read_json(tmp_path / "run/config.json")
    assert config["model"] == str(tiny)
    assert config["dataset"] == str(tiny / "text.jsonl")


def test_a_coder_does_not_depend_on_its_neighbours(tiny, tmp_path):
    """The same seed and data give the same weights, whichever coders are trained beside it."""
    weights = {}
    one = ["--arch", "skip_transcoder"]
    for name, more in {"beside": [], "alone": one, "other": [*one, "--seed", 1]}.items():
        out = tmp_path / name
        assert run_here(skipcoder, *flags(tiny, out, *more)) == 0
        weights[name] = load_file(out / "skip_transcoder" / FOLDER / "sae.safetensors")
    folders = [path.name for path in (tmp_path / "alone").iterdir() if path.is_dir()]
    assert folders == ["skip_transcoder"]
    for name, tensor in weights["alone"].items():
        assert torch.equal(tensor, weights["beside"][name]), name
    assert not torch.equal(weights["alone"]["W_dec"], weights["other"]["W_dec"])


def test_several_k_are_several_runs_in_one(tiny, tmp_path):
    """Bit for bit, from one stream; sorted, each in the folder of its name."""
    for out, ks in {"both": (8, 2), "two": (2,), "eight": (8,)}.items():
        assert run_here(skipcoder, *flags(tiny, tmp_path / out, "--k", *ks)) == 0
    config, both = load_run(tmp_path / "both")
    assert config["k"] == [8, 2]
    assert list(both) == [f"{arch}-k{k}" for arch in ARCHS for k in (2, 8)]
    fvu_of_both = read_log(tmp_path / "both")[-1]["fvu"]

    for k, out in ((2, "two"), (8, "eight")):
        config, alone = load_run(tmp_path / out)
        assert config["k"] == [k] and list(alone) == list(ARCHS)
        fvu = read_log(tmp_path / out)[-1]["fvu"]
        for arch in ARCHS:
            name = f"{arch}-k{k}"
            assert both[name].k == alone[arch].k == k
            assert both[name].arch == arch
            assert fvu[arch] == fvu_of_both[name]
            assert read_json(tmp_path / "both" / name / FOLDER / "cfg.json")["k"] == k
            for p, q in zip(both[name].parameters(), alone[arch].parameters()):
                assert torch.equal(p, q)


@pytest.mark.parametrize("ks", [[4], [2, 4]])
def test_runs_of_earlier_versions_are_read(tiny, tmp_path, ks):
    """In them a single k is a number, config.json names no coders, and cfg.json no arch."""
    out = tmp_path / "run"
    assert run_here(skipcoder, *flags(tiny, out, "--k", *ks, "--tokens", 500)) == 0
    _, before = load_run(out)
    change_json(out / "config.json", ["coders"], k=ks if len(ks) > 1 else ks[0])
    for name in before:
        change_json(out / name / FOLDER / "cfg.json", ["arch"])
    _, after = load_run(out)
    assert list(after) == list(before)
    for name, coder in after.items():
        assert coder.arch == before[name].arch and coder.k == before[name].k
        for p, q in zip(coder.parameters(), before[name].parameters()):
            assert torch.equal(p, q)


# ---- A run that ends too early --------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_save_what_there_is(tiny, tmp_path, number):
    """Sent to every process of the group, as a terminal does. After SIGKILL files are whole."""
    out, deadline = tmp_path / "run", time.time() + 90
    # It saves at each step.
    code = "import skipcoder; skipcoder.LOG_EVERY = skipcoder.SAVE_EVERY = 0; skipcoder.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags(tiny, out, "--tokens", "1e9")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ALONE,
        cwd=ROOT,
        start_new_session=True,
    )
    last_files = "config.json", f"skip_transcoder/{FOLDER}/sae.safetensors"
    while not all((out / name).exists() for name in last_files):
        assert time.time() < deadline and process.poll() is None, "training did not start"
        time.sleep(0.05)
    time.sleep(0.31)  # several saves later
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=30)

    config, coders = load_run(out)
    trained = config["tokens_trained"]
    assert set(coders) == set(ARCHS) and 0 < trained < 1e9
    for coder in coders.values():
        assert all(p.isfinite().all() for p in coder.parameters())
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in stderr, stderr
        before = check_end(stdout.splitlines(), out)
        assert before.count("stopping after this step; once more to stop at once") == 1
        assert not list(out.rglob("*.tmp"))


def stop_in_step(monkeypatch, number: int, action):
    """Do something within step `number` of the one coder that is trained."""
    calls, step = [], Trainer.step

    def stopping(trainer, *args):
        calls.append(trainer)
        step(trainer, *args)
        if len(calls) == number:
            action()

    monkeypatch.setattr(Trainer, "step", stopping)
    return calls


@pytest.mark.parametrize("number, times", [(3, 1), (4, 1), (3, 2)])
def test_one_signal_ends_the_run_after_a_step_and_a_second_one_in_it(
    tiny, tmp_path, monkeypatch, number, times
):
    """A second one need not wait for the step. What was trained is saved by both."""

    def interrupt():
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        ended.append("step")

    ended = []
    calls = stop_in_step(monkeypatch, number, interrupt)
    out = tmp_path / "run"
    assert run_here(skipcoder, *flags(tiny, out, "--arch", "sae")) == 130
    assert len(calls) == number and len(ended) == 2 - times
    config, _ = load_run(out)
    assert config["tokens_trained"] == (number + 1 - times) * 16 * 31


def test_a_signal_to_a_reader_process_does_not_end_the_run(tiny, tmp_path, monkeypatch):
    """Readers ignore SIGINT, and a signal to the process group does not reach them."""

    def interrupt_readers():
        for reader in multiprocessing.active_children():
            readers.append(reader.pid)
            assert os.getpgid(reader.pid) != os.getpgrp()
            os.kill(reader.pid, signal.SIGINT)
        time.sleep(0.2)
        alive.extend(reader.pid for reader in multiprocessing.active_children())

    readers, alive = [], []
    calls = stop_in_step(monkeypatch, 3, interrupt_readers)
    out = tmp_path / "run"
    args = flags(tiny, out, "--arch", "sae", "--tokens", 60 * 16 * 31)
    assert run_here(skipcoder, *args) == 0
    assert readers and sorted(alive) == sorted(readers)
    assert len(calls) == 60
    assert read_json(out / "config.json")["tokens_trained"] == 60 * 16 * 31


def test_an_error_of_any_kind_in_the_middle_saves_what_was_trained(tiny, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("the device is gone")

    stop_in_step(monkeypatch, 4, fail)
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the device is gone"):
        run_here(skipcoder, *flags(tiny, out, "--arch", "sae"))
    config, coders = load_run(out)
    assert config["tokens_trained"] == 3 * 16 * 31
    assert list(coders) == ["sae"]


def test_what_is_not_finite_is_not_saved_between_logs_either(tiny, tmp_path, monkeypatch):
    def diverge():
        calls[0].sums.fill_(math.nan)
        raise RuntimeError("interrupted")

    monkeypatch.setattr(skipcoder, "LOG_EVERY", 1e9)
    calls = stop_in_step(monkeypatch, 4, diverge)
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="interrupted"):
        run_here(skipcoder, *flags(tiny, out, "--arch", "sae"))
    assert not (out / "config.json").exists()


WHOLE = "".join(
    json.dumps({"text": f"{i} is the number of it"}) + "\n" for i in range(900)
).encode()
TORN = {  # content of a file, and what is said of it
    "torn.jsonl": (WHOLE[:-9], "Unterminated string"),
    "torn.jsonl.gz": (gzip.compress(WHOLE)[:-9], "ended before"),
    "number.jsonl": (WHOLE + b'{"text": 7}', "a text is of type int"),
}


@pytest.mark.parametrize("name", TORN)
def test_text_that_breaks_off_saves_what_was_trained(tiny, tmp_path, monkeypatch, capfd, name):
    """And is told in one line.

    The pool of rows is small enough for the end of the text to be read after some steps.
    """
    monkeypatch.setattr(skipcoder, "SHUFFLE_ROWS", 16)
    out, path = tmp_path / "run", tmp_path / name
    content, says = TORN[name]
    path.write_bytes(content)
    args = flags(tiny, out, "--dataset", path, "--tokens", "1e7", "--arch", "sae")
    message = run_here(skipcoder, *args)
    assert message.startswith(f"error: --dataset {path}: {name}: ")
    assert says in message and "\n" not in message

    config, coders = load_run(out)
    trained = config["tokens_trained"]
    assert list(coders) == ["sae"] and 2000 < trained < 50_000
    stdout, stderr = capfd.readouterr()
    check_end(stdout.splitlines(), out)
    assert "Traceback" not in stderr and "error" not in stderr


def test_an_error_starts_on_a_line_of_its_own(tiny, tmp_path, monkeypatch, run_on_a_terminal):
    """While the bar is open, after what was done."""
    path, out = tmp_path / "text.jsonl", tmp_path / "run"
    path.write_bytes(WHOLE + b"{")
    monkeypatch.setattr(skipcoder, "SHUFFLE_ROWS", 16)
    args = flags(tiny, out, "--dataset", path, "--tokens", "1e7", "--arch", "sae")
    shown = run_on_a_terminal(*args)
    *shown, error, nothing = shown
    *_, bar = check_end(shown, out)
    assert "%|" in bar and nothing == ""
    assert error.startswith(f"error: --dataset {path}: text.jsonl: ")


def test_a_first_save_that_is_cut_short_leaves_no_broken_run(tmp_path, monkeypatch):
    """Killed between two renames: config.json, which makes a folder a run, comes last."""
    config = {
        "out": tmp_path / "run",
        "coders": {"sae": f"sae/{FOLDER}"},
        "expansion": 2,
        "num_latents": 16,
        "d": 8,
    }
    replace, renamed = skipcoder.Path.replace, []

    def seen(path, to):
        renamed.append(to.name)
        replace(path, to)

    monkeypatch.setattr(skipcoder.Path, "replace", seen)
    skipcoder.save_run(config, {"sae": Coder("sae", 8, 16, 4)})
    assert sorted(renamed) == ["cfg.json", "config.json", "sae.safetensors"]
    assert renamed[-1] == "config.json"


def test_a_full_disk_loses_nothing(trained, tiny, tmp_path):
    """A limit on the size of a file stands in for it: one line, and the run is as it was."""
    resource = pytest.importorskip("resource")
    out = shutil.copytree(trained, tmp_path / "run")
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # weights take 65 kB
    try:
        message = run_here(skipcoder, *flags(tiny, out, "--overwrite"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"error: --out {out}: ")
    assert "make room" in message and "\n" not in message
    assert before == contents(out)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    """And nothing beside it."""

    def fail(path, to):
        raise OSError("no space left")

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(skipcoder.Path, "replace", fail)
    for content in ("new", {"a": torch.ones(3)}):
        with pytest.raises(SystemExit, match="error: --out run: no space left"):
            skipcoder.write(path, content, "--out run")
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_text() == "old"


def test_an_existing_run_is_replaced_only_when_told_to_and_by_a_finite_one(trained, tiny, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    other = out / "mine" / FOLDER / "cfg.json"  # of something else
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    before = contents(out)

    assert "pass --overwrite" in run_here(skipcoder, *flags(tiny, out))
    message = run_here(skipcoder, *flags(tiny, out, "--overwrite", "--lr", "1e30"))
    assert message.startswith("error: --lr 1e+30: the loss is not finite")
    assert before == contents(out)

    assert run_here(skipcoder, *flags(tiny, out, "--arch", "sae", "--seed", 3, "--overwrite")) == 0
    config, coders = load_run(out)
    assert config["seed"] == 3 and set(coders) == {"sae"}
    assert other.read_text() == "{}"


# ---- Several processes ----------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TWO = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import skipcoder
from skipcoder import *

skipcoder.fast_bfloat16 = lambda device: False

# 1. A run: what it leaves on this rank is what it leaves on the other one.
trainers, init = [], Trainer.__init__

def seen(self, *args):
    trainers.append(self)
    init(self, *args)

Trainer.__init__ = seen
main()
Trainer.__init__ = init
for trainer in trainers:
    for p in (*trainer.coder.parameters(), trainer.silent):
        both = [torch.empty_like(p.data) for _ in range(2)]
        torch.distributed.all_gather(both, p.data)
        assert torch.equal(*both)

# 2. A step of both ranks is one of Adam's on the sum of both halves' gradients.
numbers = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0))
start, x, y = numbers * 3 + 1
halves = slice(0, 20), slice(20, 64)  # of different sizes, as where outliers are left out

def new_trainer(arch):
    trainer = Trainer(Coder(arch, 8, 40, 5), start, start * 2, 1e-2, dead_after=2)
    trainer.coder.b_enc.data[7] -= 100  # a dead latent
    return trainer

def step_of_both(one, arch):  # in one process
    one.optimizer.zero_grad()
    active = torch.zeros(40, dtype=torch.bool)
    for half in halves:
        y_hat, acts, indices = one.coder(x[half], y[half])
        active[indices[acts > 0]] = True
        error = (y[half] - y_hat).square().sum()
        variance = (y[half] - y[half].mean(0)).square().sum()
        (error / variance).backward()
        one.sums += torch.stack([error.detach(), variance])
    for group in one.optimizer.param_groups:
        group["lr"] = 1e-2 * group["scale"]
    W = one.coder.W_dec
    if arch == "sae":
        W.grad -= (W.grad * W.data).sum(1, keepdim=True) * W.data
    one.optimizer.step()
    if arch == "sae":
        W.data = F.normalize(W.data)
    one.silent = torch.where(active, 0, one.silent + 1)
    one.coder.b_enc.data += WAKE * one.s_z * (one.silent >= 2)

for arch in ARCHS:
    trainer, one = new_trainer(arch), new_trainer(arch)
    for _ in range(4):
        trainer.step(x[halves[RANK]], y[halves[RANK]], 1)
        step_of_both(one, arch)
    assert one.silent[7] == 4
    fvu, fvu_of_one = trainer.pop_fvu(), one.pop_fvu()
    assert abs(fvu / fvu_of_one - 1) < 1e-5, "what is logged is the FVU of both"
    torch.testing.assert_close(trainer.silent, one.silent)
    for p, q in zip(trainer.coder.parameters(), one.coder.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
print("equal")
torch.distributed.destroy_process_group()
"""


def test_two_processes(tiny, tmp_path):
    """Under torchrun."""
    (tmp_path / "two.py").write_text(TWO)
    done = run(*TORCHRUN, tmp_path / "two.py", ROOT, *flags(tiny, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2
    assert done.stdout.count("cpu x 2") == 1
    config, coders = load_run(tmp_path / "run")
    assert config["tokens_trained"] == 13 * 16 * 31  # the first multiple of a step over 6000
    assert coders["skip_transcoder"].W_skip.any()


# Each process says which one it is. It saves at each step. With "0" or "1" this process alone gets
# a signal while it asks the other one whether to stop, in step 5. 0, which saves, takes its time.
SAVING = """
import os, signal, sys, time, torch
print("pid", os.getpid(), flush=True)
reached = sys.argv.pop(1)
sys.path.insert(0, sys.argv.pop(1))
import skipcoder
skipcoder.LOG_EVERY = skipcoder.SAVE_EVERY = 0
all_reduce, asked = torch.distributed.all_reduce, []

def interrupted(tensor):
    all_reduce(tensor)
    if tensor.ndim == 0:
        asked.append(tensor)
        if len(asked) == 5:
            os.kill(os.getpid(), signal.SIGINT if reached == "1" else signal.SIGTERM)

def slowly(*args):
    time.sleep(3 * (len(asked) > 5))
    save_run(*args)

if reached == str(skipcoder.RANK):
    torch.distributed.all_reduce = interrupted
if reached == "0" == str(skipcoder.RANK):
    save_run, skipcoder.save_run = skipcoder.save_run, slowly
skipcoder.main()
"""


@pytest.mark.parametrize("reached", ["0", "1", "torchrun"])
def test_a_signal_under_torchrun_saves_and_ends_both_processes(tiny, tmp_path, reached):
    """SIGTERM reaches torchrun, which sends it to both, or a signal reaches one of them alone.

    If the other one left before all is saved, torchrun would send SIGTERM once more.
    """
    (tmp_path / "saving.py").write_text(SAVING)
    out, deadline = tmp_path / "run", time.time() + 90
    args = [*TORCHRUN, tmp_path / "saving.py", reached, ROOT]
    args += flags(tiny, out, "--tokens", "1e9")
    process = subprocess.Popen(
        [sys.executable, *map(str, args), "--arch=sae"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ALONE,
        start_new_session=True,
    )
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert all(lines), process.communicate()[1]
    pids = [int(line.split()[1]) for line in lines]
    if reached == "torchrun":
        while not (out / "config.json").exists():
            assert time.time() < deadline and process.poll() is None, "training did not start"
            time.sleep(0.05)
        time.sleep(0.3)
        process.terminate()
    try:
        stdout, stderr = process.communicate(timeout=40)
    except subprocess.TimeoutExpired:
        for pid in (process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise

    assert process.returncode != 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    config, coders = load_run(out)
    trained = config["tokens_trained"]
    assert trained % (16 * 31) == 0 < trained < 1e9
    if reached != "torchrun":
        assert trained == 5 * 16 * 31
    assert all(p.isfinite().all() for p in coders["sae"].parameters())
    check_end([line for line in stdout.splitlines() if line[:5] != "error"], out)
    assert stdout.count("saved after") == 1, "only one process saves"
    assert 'skipcoder.py", line' not in stderr, stderr
