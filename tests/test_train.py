"""Training as a user runs it: what is printed and written, and what an end too early leaves."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from conftest import ALONE, ROOT, contents, flags, read_json, run_here, write_jsonl
from safetensors.torch import load_file

import skipcoder
from skipcoder import ARCHS, Coder, MLPActivations, Trainer, load_run

FOLDER = "h.1.mlp"  # of a coder, in the folder of its name
# In a traceback of ours. (One of a reader may appear: it was just sending rows as all ended.)
OURS = 'skipcoder.py", line'
STEP = 16 * 31  # tokens that count in a step of `flags`


def read_log(out) -> list[dict]:
    return list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))


def check_end(text, out):
    """Check that a run told at its end what was trained, and what to do next."""
    tokens, log = read_json(out / "config.json")["tokens_trained"], read_log(out)
    fvu = log[-1]["fvu"].items() if log else ()
    last = ", ".join(f"{name} {value:.3f}" for name, value in fvu) or "none"
    end = f"saved after {tokens:,} tokens. Last FVU: {last}\n"
    assert end + f"next: python eval.py {out} --html page.html\n" in text


def check_saved(out) -> tuple[dict, dict]:
    """Check that what was saved is a whole run, and return its config and its coders."""
    config, coders = load_run(out)
    for coder in coders.values():
        assert all(p.isfinite().all() for p in coder.parameters())
        if coder.arch == "sae":
            lengths = coder.W_dec.norm(dim=1)
            assert (lengths - 1).abs().max() < 1e-5
    assert not list(out.rglob("*.tmp"))
    return config, coders


# ---- A run that goes well -------------------------------------------------------------------


def test_config_and_log(trained):
    config, _ = check_saved(trained)
    assert config["hookpoint"] == FOLDER and config["arch"] == list(ARCHS)
    assert config["seed"] == 0 and config["k"] == [4]
    assert config["num_latents"] == 256 and config["d"] == 32
    assert config["coders"] == {arch: f"{arch}/{FOLDER}" for arch in ARCHS}
    assert set(config["versions"]) == {"torch", "transformers", "datasets"}
    steps = math.ceil(30_000 / STEP)
    assert config["tokens_trained"] == steps * STEP

    log = read_log(trained)
    assert [line["tokens"] for line in log] == [i * STEP for i in range(1, steps + 1)]
    for line in log:
        assert list(line) == ["tokens", "tokens_per_s", "fvu"]
        assert list(line["fvu"]) == list(ARCHS)
    assert all(0 < fvu < 0.8 for fvu in log[-1]["fvu"].values())
    assert all(fvu > 0.9 for arch, fvu in log[0]["fvu"].items() if arch != "sae")


def test_max_norm_is_that_of_the_first_batch(trained, tiny):
    """eval.py leaves out what is longer, too."""
    lm = skipcoder.load_lm(str(tiny), torch.device("cpu"))
    activations = MLPActivations(lm, skipcoder.find_mlp(lm, 1)[2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    sources = skipcoder.find_sources(tiny / "text.jsonl", None)
    activations(next(skipcoder.token_batches(sources, tokenizer, 32, 16, seed=0)))
    assert read_json(trained / "config.json")["max_norm"] == pytest.approx(activations.max_norm)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_folder_of_a_coder(trained, arch):
    """It is in the format of EleutherAI's sparsify, with one key more."""
    tensors = load_file(trained / arch / FOLDER / "sae.safetensors")
    shapes = {"encoder.weight": (256, 32), "encoder.bias": (256,)}
    shapes |= {"W_dec": (256, 32), "b_dec": (32,)}
    if arch == "skip_transcoder":
        shapes["W_skip"] = (32, 32)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    cfg = {"activation": "topk", "expansion_factor": 8, "num_latents": 256, "k": 4, "d_in": 32}
    cfg |= {"multi_topk": False, "normalize_decoder": arch == "sae", "transcode": arch != "sae"}
    cfg |= {"skip_connection": arch == "skip_transcoder", "arch": arch}
    assert read_json(trained / arch / FOLDER / "cfg.json") == cfg

    coder = load_run(trained)[1][arch]
    assert coder.arch == arch and coder.k == 4
    loaded = [coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec, coder.W_skip]
    for name, parameter in zip(shapes, loaded):
        assert torch.equal(parameter, tensors[name])


def test_what_is_printed(tiny, tmp_path, capfd):
    out, text = tmp_path / "run", tmp_path / "text.jsonl"
    # The whole text is less than what is trained on, so that it is repeated.
    text.write_text("\n".join((tiny / "text.jsonl").read_text().splitlines()[:60]))
    assert run_here(skipcoder, *flags(tiny, out, "--dataset", text, "--tokens", 60_000)) == 0
    shown, stderr = capfd.readouterr()
    steps = math.ceil(60_000 / STEP)
    assert shown.splitlines()[:3] == [
        f"--dataset {text}: files read 1, left out 0",
        f"{FOLDER} of {tiny}, 256 latents, cpu x 1",
        f"{steps} steps of 496 tokens, lr 0.0036",
    ]
    assert shown.splitlines()[3].startswith("--dataset is repeated: it has ")
    check_end(shown, out)
    assert len(shown.splitlines()) == 6 and re.search(r"100%\|.*tok/s, FVU \S+ to \S+\]\n$", stderr)


def test_the_log_has_200_lines_at_fixed_steps(tiny, tmp_path, monkeypatch):
    """Whatever time the steps take: here 2 seconds for each line."""
    clock = count(0, 2)
    monkeypatch.setattr(skipcoder, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    out = tmp_path / "run"
    more = "--arch", "sae", "--batch-size", 1, "--tokens", 450 * 31
    assert run_here(skipcoder, *flags(tiny, out, *more)) == 0
    log = read_log(out)
    steps = [math.ceil(i * 450 / 200) for i in range(1, 201)]
    assert [line["tokens"] for line in log] == [31 * step for step in steps]
    # (The clock is read more than once before the first line.)
    speeds = [round(31 * (step - before) / 2) for before, step in pairwise(steps)]
    assert [line["tokens_per_s"] for line in log[1:]] == speeds


def test_the_learning_rate_rises_and_falls(tiny, tmp_path):
    """Over the first 5% of the run, and over its last half, to zero."""
    step = mock.patch.object(Trainer, "step", autospec=True, side_effect=Trainer.step)
    args = flags(tiny, tmp_path / "run", "--arch", "sae", "--tokens", 100 * STEP)
    with step as called:
        assert run_here(skipcoder, *args) == 0
    factors = [call.args[3] for call in called.call_args_list]
    assert len(factors) == 100
    assert factors[:5] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert factors[5:50] == [1] * 45
    assert factors[50:] == pytest.approx([0.99 - 0.02 * i for i in range(50)])


@pytest.mark.parametrize("tokens, lr, step", [("2e6", 1.5e-3, 1024), ("32e6", 7.5e-4, 4096)])
def test_the_recipe(tiny, monkeypatch, tokens, lr, step):
    """The defaults of lr, of the rows in a step by the number of tokens, and of what is written."""
    given = []
    monkeypatch.setattr(skipcoder, "train", given.append)
    args = f"--model {tiny} --dataset {tiny}/text.jsonl --layer 1 --tokens {tokens}"
    assert run_here(skipcoder, *args.split()) == 0
    assert given[0].lr == pytest.approx(lr)
    assert given[0].ctx_len == 32 and given[0].batch_size == step // 32
    assert given[0].out == Path("runs/model-layer1")
    monkeypatch.setattr(skipcoder, "WORLD", 7)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: None)
    assert run_here(skipcoder, *args.split()) == 0
    assert given[1].batch_size == round(step / 32 / 7) * 7


def test_eval_may_be_called_from_another_folder(tiny, tmp_path, monkeypatch):
    """Paths that were relative are absolute in config.json."""
    monkeypatch.chdir(tiny.parent)
    args = flags(tiny.name, tmp_path / "run", "--arch", "sae", "--tokens", 500)
    assert run_here(skipcoder, *args) == 0
    config = read_json(tmp_path / "run/config.json")
    assert config["model"] == str(tiny)
    assert config["dataset"] == str(tiny / "text.jsonl")


@pytest.fixture
def texts(monkeypatch):
    """A list of the batches that are trained on, and of the one before them."""
    texts, call = [], MLPActivations.__call__

    def seen(activations, tokens):
        texts.append(tokens.clone())
        return call(activations, tokens)

    monkeypatch.setattr(MLPActivations, "__call__", seen)
    return texts


def test_seed_and_neighbours(tiny, tmp_path, monkeypatch, texts):
    """The seed decides on the weights and on the text, and the coders trained beside do not."""
    one, runs = ["--arch", "skip_transcoder"], []
    for more in ([], one, [*one, "--seed", 1]):
        out = tmp_path / f"run{len(runs)}"
        with mock.patch.object(skipcoder, "Coder", wraps=Coder) as new:
            assert run_here(skipcoder, *flags(tiny, out, *more)) == 0
        assert {call.args[-1] for call in new.call_args_list} == {int("--seed" in more)}
        end = load_file(out / "skip_transcoder" / FOLDER / "sae.safetensors")
        runs.append((torch.stack(texts), end))
        texts.clear()
    assert not (tmp_path / "run1/sae").exists()
    (beside, end_beside), (alone, end), (other, _) = runs
    assert torch.equal(beside, alone)
    for name, tensor in end.items():
        assert torch.equal(tensor, end_beside[name]), name
    rows, other_rows = ({tuple(row) for row in t.flatten(0, 1).tolist()} for t in (alone, other))
    assert len(rows & other_rows) < 0.5 * len(rows)


def test_several_k_are_several_runs_in_one(tiny, tmp_path, capfd):
    """Bit for bit, from one stream; sorted, each in the folder of its name."""
    for out, ks in {"two": (2,), "eight": (8,), "both": (8, 2)}.items():
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
            assert both[name].k == k and both[name].arch == arch
            assert fvu[arch] == fvu_of_both[name]
            pair = contents(tmp_path / "both" / name), contents(tmp_path / out / arch)
            assert set(pair[0].values()) == set(pair[1].values())

    # A bar has to fit in 80 columns with any number of coders.
    last = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    values = fvu_of_both.values()
    assert f"FVU {min(values):.3f} to {max(values):.3f}" in last and len(last) <= 80


# ---- A run that ends too early --------------------------------------------------------------


def receive_signals():
    """Let no signal be ignored, as those of a terminal are if the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tiny, tmp_path):
    """A function that starts a long `python skipcoder.py`, which prints to the file `screen`."""
    processes, out = [], tmp_path / "run"
    args = sys.executable, "skipcoder.py", *flags(tiny, out, "--tokens", 20_000 * STEP)
    options = {"cwd": ROOT, "start_new_session": True, "preexec_fn": receive_signals}

    def start(*before, screen="screen", **env):
        with (tmp_path / screen).open("w") as file:
            options.update(stdout=file, stderr=file, env=ALONE | env)
            processes.append(subprocess.Popen([*before, *args], **options))
        return processes[-1]

    yield start
    for process in processes:  # none outlives the test
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_lines(number, out, process):
    """Wait until the log has so many lines, of 100 steps each."""
    deadline = time.time() + 60
    while not (out / "log.jsonl").exists() or len(read_log(out)) < number:
        assert time.time() < deadline and process.poll() is None, "it did not come so far"
        time.sleep(0.02)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "nohup"])
def test_signals_save_what_there_is(tmp_path, start, end):
    """Sent to every process of the group, as a terminal and `timeout` do.

    The shell sees 130, and no traceback. Under nohup, SIGHUP is ignored.
    """
    out = tmp_path / "run"
    process = start(*(["nohup"] if end == "nohup" else []))
    wait_for_lines(1, out, process)
    if end == "nohup":
        os.killpg(process.pid, signal.SIGHUP)
        wait_for_lines(len(read_log(out)) + 2, out, process)
    assert not (out / "config.json").exists()
    os.killpg(process.pid, signal.SIGTERM if end == "nohup" else end)
    assert process.wait(30) == 130
    screen = (tmp_path / "screen").read_text()
    check_end(screen, out)
    assert OURS not in screen
    config, coders = check_saved(out)
    assert set(coders) == set(ARCHS)
    assert read_log(out)[-1]["tokens"] <= config["tokens_trained"] < 20_000 * STEP


def at_call(monkeypatch, call, owner, name, action, before=False):
    """Do something in this call of a function: after it, or before it does anything."""
    calls, function = count(1), getattr(owner, name)

    def changed(*args, **more):
        now = next(calls) == call
        if now and before:
            action(*args)
        result = function(*args, **more)
        if now and not before:
            action(*args)
        return result

    monkeypatch.setattr(owner, name, changed)


PLACES = [  # each with one coder; the third item is in which call
    (torch.optim.Adam, "step", 4, False),  # W_dec's rows are no longer of length 1
    (Trainer, "step", 5, True),
    (Trainer, "pop_fvu", 4, False),
    (MLPActivations, "__call__", 6, True),  # the first call is the start
    (skipcoder.Path, "replace", 3 * 3 + 2, True),  # in the fourth save, between renames
]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_an_interrupt_or_an_error_may_come_anywhere(tiny, tmp_path, monkeypatch, place, error):
    """In a step, in a log line, in a save: what was trained is saved, with rows of length 1."""
    monkeypatch.setattr(skipcoder, "SAVE_EVERY", -1 if place[1] == "replace" else 1e9)
    owner, name, call, before = place
    at_call(monkeypatch, call, owner, name, mock.Mock(side_effect=error), before)
    out = tmp_path / "run"
    with pytest.raises(RuntimeError) if error is RuntimeError else contextlib.nullcontext():
        assert run_here(skipcoder, *flags(tiny, out, "--arch", "sae", "--lr", 0.1)) == 130
    config, _ = check_saved(out)
    assert config["tokens_trained"] in (3 * STEP, 4 * STEP)


def test_signals_do_not_interrupt_the_save(tiny, tmp_path, monkeypatch):
    """Neither a second one, nor that of a reader that is killed: DataLoader would raise.

    (A signal to the process group does not reach readers, which have groups of their own.)
    """
    handling = torch.utils.data._utils.signal_handling
    monkeypatch.setattr(handling, "_SIGCHLD_handler_set", False)
    write, readers = skipcoder.write, []

    def disturbed(contents):
        for number in skipcoder.STOP:
            os.kill(os.getpid(), number)
        for reader in multiprocessing.active_children():
            readers.append(os.getpgid(reader.pid))
            os.kill(reader.pid, signal.SIGKILL)
        time.sleep(0.2)
        write(contents)

    monkeypatch.setattr(skipcoder, "write", disturbed)
    at_call(monkeypatch, 4, Trainer, "step", mock.Mock(side_effect=KeyboardInterrupt))
    out = tmp_path / "run"
    assert run_here(skipcoder, *flags(tiny, out, "--arch", "sae", "--tokens", "1e9")) == 130
    assert readers and os.getpgrp() not in readers
    assert check_saved(out)[0]["tokens_trained"] == 3 * STEP


def test_a_reader_that_is_killed_ends_the_run_with_what_was_trained(tiny, tmp_path, monkeypatch):
    """As by the system when memory is short. It is told by an error, which one depends."""

    def kill_readers(*_):
        for reader in multiprocessing.active_children():
            os.kill(reader.pid, signal.SIGKILL)

    at_call(monkeypatch, 4, Trainer, "step", kill_readers)
    out = tmp_path / "run"
    with pytest.raises((RuntimeError, EOFError, OSError)):
        run_here(skipcoder, *flags(tiny, out, "--arch", "sae", "--tokens", "1e7"))
    assert 3 * STEP < check_saved(out)[0]["tokens_trained"] < 1e7


@pytest.mark.parametrize("call, value", [(1, 0), (4, math.nan)])
def test_a_run_that_is_worth_nothing_is_not_saved(
    trained, tiny, tmp_path, monkeypatch, capsys, call, value
):
    """It ended in the first step, or it is not finite, which is seen between log lines, too."""
    out = shutil.copytree(trained, tmp_path / "run")
    before = contents(out)

    def spoil(trainer, *_):
        trainer.coder.b_enc.data[3] += value
        raise KeyboardInterrupt

    at_call(monkeypatch, call, Trainer, "step", spoil)
    assert run_here(skipcoder, *flags(tiny, out, "--overwrite")) == 130
    assert contents(out) == before and "saved" not in capsys.readouterr().out


def test_text_that_breaks_off_saves_what_was_trained(tiny, tmp_path, monkeypatch, capfd):
    """And is told in one line.

    The pool of rows is small enough for the end of the text to be read after some steps.
    """
    monkeypatch.setattr(skipcoder, "SHUFFLE_ROWS", 16)
    out, path = tmp_path / "run", tmp_path / "text.jsonl"
    write_jsonl(path, [f"{i} is the number of it" for i in range(900)])
    path.write_text(path.read_text()[:-9])
    args = flags(tiny, out, "--dataset", path, "--tokens", "1e7", "--arch", "sae")
    message = run_here(skipcoder, *args)
    assert message.startswith(f"error: --dataset {path}: text.jsonl: line 900 ")
    shown, stderr = capfd.readouterr()
    check_end(shown, out)
    assert "Traceback" not in stderr
    assert 2000 < check_saved(out)[0]["tokens_trained"] < 50_000


# ---- Files, whole or not at all -------------------------------------------------------------


def test_a_save_that_is_killed_leaves_the_old_run_or_none_or_the_new_one(
    trained, tmp_path, monkeypatch
):
    """Wherever the kill comes: never new coders beside old ones, or under the old config.json."""
    config, new = load_run(trained)
    old = {name: coder.b_enc.clone() for name, coder in new.items()}
    for coder in new.values():
        coder.b_enc += 1
    calls = count()

    class Killed(BaseException):
        """Ends all: after a kill no `finally` does anything."""

    def until_killed(function):
        def called(*args, **more):
            if next(calls) >= dies_at:
                raise Killed
            return function(*args, **more)

        return called

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, until_killed(getattr(Path, name)))
    outcomes = []
    for dies_at in range(9):  # config.json is deleted, then come 7 renames
        calls, out = count(), tmp_path / str(dies_at)
        shutil.copytree(trained, out)
        with contextlib.suppress(Killed):
            skipcoder.save_run(config | {"out": out}, new)
        outcomes.append("none")
        if (out / "config.json").exists():
            _, found = load_run(out)
            shifts = {(found[name].b_enc - old[name]).mean().round().item() for name in old}
            assert shifts in ({0}, {1})
            outcomes[-1] = "new" if shifts == {1} else "old"
    assert outcomes == ["old"] + 7 * ["none"] + ["new"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    """And nothing beside it. All is written before anything is replaced."""
    contents = {tmp_path / "a.safetensors": {"a": torch.ones(3)}, tmp_path / "b.json": "new"}
    for path in contents:
        path.write_text("old")
    full = mock.Mock(side_effect=OSError("no space left"))
    at_call(monkeypatch, 1, Path, "write_text", full, before=True)
    with pytest.raises(OSError, match="no space left"):
        skipcoder.write(contents)
    assert sorted(tmp_path.iterdir()) == sorted(contents)
    assert all(path.read_text() == "old" for path in contents)


def test_an_existing_run_is_replaced_only_when_told_to(trained, tiny, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    other = out / "mine" / FOLDER / "cfg.json"  # of something else
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    before, log = contents(out), read_log(out)

    message = run_here(skipcoder, *flags(tiny, out))
    assert message == f"error: --out {out} holds a run: pass --overwrite, or another --out"
    assert before == contents(out) and log == read_log(out)

    assert run_here(skipcoder, *flags(tiny, out, "--arch", "sae", "--seed", 3, "--overwrite")) == 0
    config, coders = load_run(out)
    assert config["seed"] == 3 and set(coders) == {"sae"}
    assert other.read_text() == "{}" and len(read_log(out)) == 13


def test_of_two_runs_with_one_out_the_later_one_fails(tiny, tmp_path, monkeypatch):
    """Also if both find the folder empty as they start: the first one to train has it."""
    out, load_lm = tmp_path / "run", skipcoder.load_lm

    def load_while_the_other_starts(*args):
        out.mkdir()
        (out / "log.jsonl").write_text("of the other\n")
        return load_lm(*args)

    monkeypatch.setattr(skipcoder, "load_lm", load_while_the_other_starts)
    with pytest.raises(FileExistsError, match="log.jsonl"):
        run_here(skipcoder, *flags(tiny, out))
    assert (out / "log.jsonl").read_text() == "of the other\n"
    assert [path.name for path in out.iterdir()] == ["log.jsonl"]


# ---- Several processes ----------------------------------------------------------------------


def test_each_process_trains_on_its_own_half(tiny, tmp_path, monkeypatch, capsys, texts):
    """Under torchrun. Both start from the first one's first batch, and only that one talks."""
    runs, first = [], []

    def broadcast(tokens, source):
        first.append(tokens.clone())
        tokens.copy_(first[source])

    monkeypatch.setattr(skipcoder, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    for rank in (0, 1):
        monkeypatch.setattr(skipcoder, "RANK", rank)
        out = tmp_path / str(rank)
        assert run_here(skipcoder, *flags(tiny, out, "--tokens", 10 * STEP)) == 0
        told = capsys.readouterr().out
        assert ("cpu x 2" in told) == ("saved after 4,960 tokens" in told) == (rank == 0)
        assert (out / "config.json").exists() == out.exists() == (rank == 0)
        runs.append(texts[:])
        texts.clear()
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(*first)
    rows = []
    for batches in runs:
        assert len(batches) == 11 and all(tokens.shape == (8, 32) for tokens in batches)
        rows.append({tuple(row) for row in torch.cat(batches[1:]).tolist()})
    assert not rows[0] & rows[1]


def test_a_signal_to_two_processes_leaves_a_whole_run(tmp_path, start):
    """As torchrun sends it to both. One of them may wait for the other just then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    torchrun["WORLD_SIZE"] = "2"
    both = [start(screen=f"screen{rank}", RANK=str(rank), **torchrun) for rank in (0, 1)]
    wait_for_lines(1, tmp_path / "run", both[0])
    for process in both:
        os.killpg(process.pid, signal.SIGTERM)
    assert all(process.wait(30) for process in both)
    assert "cpu x 2" in (tmp_path / "screen0").read_text()
    config, _ = check_saved(tmp_path / "run")
    assert config["tokens_trained"] % STEP == 0 < config["tokens_trained"] < 20_000 * STEP
