"""Copies of the scripts that are changed: by tests/forks, and by bugs of whoever forks."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, read_json, run_here
from torch.testing import assert_close

import eval as evaluation
from skipcoder import ARCHS

SCRIPTS = "skipcoder.py", "eval.py"
FOLDER = "h.1.mlp"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def copies(tmp_path):
    """A folder with copies of both scripts."""
    folder = tmp_path / "fork"
    folder.mkdir()
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def load(copies, monkeypatch):
    """A function that imports both copies, or a fork of them, in the place of the scripts."""

    def load(fork=None):
        if fork is not None:  # as README does it, with copies that are in no other repository
            alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(copies.parent)}
            patch = ROOT / f"tests/forks/{fork}.diff"
            subprocess.run(["git", "apply", patch], cwd=copies, env=alone, check=True)
        modules = []
        for path in [copies / name for name in SCRIPTS]:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            modules.append(importlib.util.module_from_spec(spec))
            monkeypatch.setitem(sys.modules, path.stem, modules[-1])
            spec.loader.exec_module(modules[-1])
        modules[0].fast_bfloat16 = lambda device: False
        return modules

    return load


# ---- The forks of README --------------------------------------------------------------------


@pytest.fixture
def fork(load, tiny, tmp_path):
    """A function that trains and evaluates a fork."""
    return lambda name, *more: Forked(*load(name), tiny, tmp_path / "run", *more)


def test_each_fork_is_in_readme_and_tested():
    forks = {path.stem for path in (ROOT / "tests/forks").iterdir()}
    section = README.split("## Fork it")[1].split("\n## ")[0]
    in_readme = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    tested = set(re.findall(r' fork\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    tested |= set(PENALISED)
    assert forks == in_readme == tested
    assert re.search(r"git apply tests/forks/\w+\.diff", section)


class Forked:
    """A fork that was trained and evaluated."""

    def __init__(self, skipcoder, evaluation, tiny, out, *more):
        self.skipcoder, self.tiny, self.out = skipcoder, tiny, out
        args = flags(tiny, out, "--tokens", 15_000, "--device", "cpu", *more)
        assert run_here(skipcoder, *args) == 0
        files = f"--json {out}/e.json --html {out}/e.html"
        sizes = "--tokens 4000 --latents 20 --device cpu"
        assert run_here(evaluation, out, *sizes.split(), *files.split()) == 0
        self.report = read_json(out / "e.json")
        self.coders = skipcoder.load_run(out)[1]

    def cfg(self, name) -> dict:
        return read_json(self.out / name / FOLDER / "cfg.json")

    def assert_trained(self, activation, names=tuple(ARCHS)):
        """All coders have learned something, and say what they are."""
        assert list(self.report["coders"]) == list(names)
        for name in names:
            row = self.report["coders"][name]
            assert 0 < row["fvu"] < 0.9 and row["latents_scored"] > 2
            assert self.cfg(name)["activation"] == activation

    def active(self, name) -> torch.Tensor:
        """Return the number of active latents of each token of some text: [N]."""
        lm = self.skipcoder.load_lm(str(self.tiny), torch.device("cpu"))
        mlp = self.skipcoder.find_mlp(lm, 1)[2]
        tokens = torch.randint(500, (8, 32), generator=torch.Generator().manual_seed(0))
        x, y = self.skipcoder.MLPActivations(lm, mlp)(tokens)
        _, acts, _ = self.coders[name](x, y)
        return (acts > 0).sum(1)


def test_a_fourth_architecture(fork):
    """An autoencoder whose W_dec is as free as a transcoder's."""
    forked = fork("fourth_architecture", "--tokens", 30_000)
    forked.assert_trained("topk", [*ARCHS, "free_sae"])
    cfg = forked.cfg("free_sae")
    assert cfg["arch"] == "free_sae" and not cfg["transcode"] and not cfg["normalize_decoder"]
    coder = forked.coders["free_sae"]
    assert coder.reads == "y" and coder.W_skip is None and coder.W_dec.norm(dim=1).std() > 0.01
    assert forked.skipcoder.Coder("free_sae", 32, 256, 4).W_dec.count_nonzero() == 0


# ---- A sparsity penalty in place of TopK

PENALISED = {"relu_l1": "relu", "jumprelu": "jumprelu", "gated": "gated"}  # its activation
LEARNED = {"relu_l1": (), "jumprelu": ("threshold",), "gated": ("log_scale", "b_magnitude")}


@pytest.mark.parametrize("name", PENALISED)
def test_a_penalty(fork, name):
    """Its weight adapts until k latents are active on average, whatever the architecture."""
    # (Small steps, so that there are enough of them: 480.)
    forked = fork(name, "--batch-size", 2, "--tokens", 30_000, "--lr", 0.002)
    forked.assert_trained(PENALISED[name])
    for arch, coder in forked.coders.items():
        assert 2.5 < forked.report["coders"][arch]["l0"] < 6.5
        active = forked.active(arch)
        assert active.unique().numel() > 5 and active.max() > 4, "no TopK of each token"
        for parameter in LEARNED[name]:
            values = getattr(coder, parameter)
            assert values.shape == (256,) and values.abs().max() > 1e-3, "it has learned"
    # The scripts as they are refuse it.
    message = run_here(evaluation, forked.out)
    assert message.startswith("error: RUN ") and f"activation {PENALISED[name]} " in message


@pytest.mark.parametrize("penalty", ["relu_l1", "gated"])
def test_the_loss_with_a_penalty(load, penalty):
    """Against autograd in float64. Acts count by the length of what they add to y_hat.

    In gated, gradients of a second prediction, whose decoder is fixed, reach the gate alone.
    """
    module, _ = load(penalty)
    x, y = torch.randn(2, 50, 8)
    coder = module.Coder("skip_transcoder", 8, 32, 4)
    trainer = module.Trainer(coder, x, y, 0.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    weight = trainer.sparsity = 0.7
    p = {name: p.detach().double().requires_grad_() for name, p in coder.named_parameters()}
    trainer.step(x, y, 0.0)

    x, y = x.double(), y.double()
    pre = x @ p["W_enc"].T + p["b_enc"]
    rest = p["b_dec"] + x @ p["W_skip"].T
    penalised, W_dec = pre.relu(), p["W_dec"]
    errors = 0
    if penalty == "relu_l1":
        z = penalised
    else:
        z = ((pre - p["b_enc"]) * p["log_scale"].exp() + p["b_magnitude"]).relu() * (pre > 0)
        errors = (y - penalised @ W_dec.detach() - rest.detach()).square().sum()
    errors = errors + (y - z @ W_dec - rest).square().sum()
    lengths = penalised @ W_dec.detach().norm(dim=1)
    spread = (y - y.mean(0)).square().sum(1).mean().sqrt()
    loss = errors / (y - y.mean(0)).square().sum() + weight * lengths.mean() / spread
    loss.backward()
    for name, parameter in coder.named_parameters():
        assert_close(parameter.grad.double(), p[name].grad, rtol=1e-3, atol=1e-5)
    # More than k are active.
    assert (z > 0).sum(1).double().mean() > 4 and trainer.sparsity > weight
    trainer.coder.k, before = 30, trainer.sparsity
    trainer.step(x.float(), y.float(), 0.0)
    assert trainer.sparsity < before


# ---- Others


def test_a_frozen_encoder(fork, monkeypatch):
    forked = fork("frozen_encoder", "--tokens", 40_000)
    forked.assert_trained("topk")
    for coder in forked.coders.values():
        start = forked.skipcoder.Coder(coder.arch, 32, 256, 4)
        assert torch.equal(coder.W_enc, start.W_enc)
        assert not torch.equal(coder.W_dec, start.W_dec)

    # Under torchrun, what has no gradient is not added up over processes.
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: summed.append(tensor.shape))
    forked.skipcoder.WORLD = 2
    x, y = torch.randn(2, 50, 8)
    coder = forked.skipcoder.Coder("transcoder", 8, 32, 4)
    forked.skipcoder.Trainer(coder, x, y, 0.01).step(x, y, 1)
    assert summed == [(32,), (32, 8), (8,)]


def test_batchtopk(fork):
    forked = fork("batchtopk")
    forked.assert_trained("batchtopk")
    for name in ARCHS:
        active = forked.active(name).double()
        assert active.mean() <= 4.01 and active.max() > 4 and active.min() < 4
        assert 2 < forked.report["coders"][name]["l0"] <= 4.01
    # With few latents a token may have all of them, not 4 k.
    coder = forked.skipcoder.Coder("transcoder", 8, 16, 10)
    _, acts, _ = coder(torch.randn(50, 8), torch.randn(50, 8))
    assert acts.shape == (50, 16)


def test_an_sae_on_the_input(fork):
    """The affine map is then perfect, as y is x."""
    forked = fork("sae_on_x", "--arch", "sae")
    assert 0 < forked.report["coders"]["sae"]["fvu"] < 0.9
    assert forked.report["baselines"]["affine"]["fvu"] < 1e-3


# ---- A bug in a fork ------------------------------------------------------------------------

BUGS = {  # script, a line, what stands there instead, and the error
    "Coder": ("skipcoder.py", "return top.relu(), indices", "return top.rellu()", AttributeError),
    "Trainer.step": ("skipcoder.py", "loss = squared_error /", "loss = {}['x'] /", KeyError),
    "MLPActivations": ("skipcoder.py", "norm = y.norm(dim=1)", "norm = int('x')", ValueError),
    "train": ("skipcoder.py", "bar.update(new)", "open('no such file')", OSError),
    "PatchedLM": ("eval.py", "self.neurons = args[0]", "self.neurons = args[7]", IndexError),
    "losses": ("eval.py", '"ce_increase": increase,', '"ce_increase": {}["x"],', KeyError),
}


def change_line(copies, script, old, new):
    """Change a line, and return its number."""
    path = copies / script
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {script}"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return 1 + text.split(old)[0].count("\n") + new.rstrip("\n").count("\n")


@pytest.mark.parametrize("place", BUGS)
def test_a_bug_is_a_traceback_with_the_line(copies, load, tiny, trained, tmp_path, place):
    """Whatever its class: our own code may raise what libraries raise for bad input, too."""
    script, old, new, error = BUGS[place]
    number = change_line(copies, script, old, new)
    skipcoder, evaluation = load()
    with pytest.raises(error) as caught:
        if script == "skipcoder.py":
            run_here(skipcoder, *flags(tiny, tmp_path / "run"))
        else:
            run_here(evaluation, trained, "--tokens", 2000, "--latents", 5, "--device", "cpu")
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert (str(copies / script), number) in [(f.filename, f.lineno) for f in frames]


@pytest.mark.parametrize("error", ["{}['x']", "int('x')", "no_name"])
def test_a_bug_in_a_reader_process_is_a_traceback(copies, load, tiny, tmp_path, error):
    """It is raised anew in the main process, with what the reader's traceback was."""
    old = "    texts, tokens = iter(texts), []\n"
    number = change_line(copies, "skipcoder.py", old, f"{old}    {error}\n")
    skipcoder, _ = load()
    with pytest.raises(Exception) as caught:
        run_here(skipcoder, *flags(tiny, tmp_path / "run"))
    assert not isinstance(caught.value, skipcoder.DataError)
    told = str(caught.value)
    assert "Traceback" in told and f'skipcoder.py", line {number}, in pack' in told
