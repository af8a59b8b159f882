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
from safetensors.torch import load_file

import eval as evaluation
from skipcoder import ARCHS

SCRIPTS = "skipcoder.py", "eval.py"
FOLDER = "h.1.mlp"


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
    """A function that imports both copies in the place of the scripts, and returns them."""

    def load():
        modules = []
        for path in [copies / name for name in SCRIPTS]:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, path.stem, module)
            spec.loader.exec_module(module)
            modules.append(module)
        modules[0].fast_bfloat16 = lambda device: False
        return modules

    return load


def change(path, old: str, new: str):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new), encoding="utf-8")


# ---- The forks of README --------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def apply(name: str, copies):
    """As the README does it."""
    patch = f"tests/forks/{name}.diff"
    assert f"git apply {patch}" in README or f"`{name}`" in README
    # The copies may lie in a folder of some other repository.
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(copies.parent)}
    subprocess.run(["git", "apply", ROOT / patch], cwd=copies, env=alone, check=True)


def test_each_fork_is_in_readme_and_tested():
    forks = {path.stem for path in (ROOT / "tests/forks").iterdir()}
    section = README.split("## Fork it")[1].split("\n## ")[0]
    in_readme = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    tested = set(re.findall(r'apply\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert forks == in_readme == tested


class Forked:
    """A fork that was trained and evaluated."""

    def __init__(self, load, tiny, out, *more):
        self.out, (self.skipcoder, self.evaluation) = out, load()
        args = flags(tiny, out, "--tokens", 15_000, "--device", "cpu", *more)
        assert run_here(self.skipcoder, *args) == 0
        files = f"--json {out}/e.json --html {out}/e.html --svg {out}/e.svg"
        sizes = "--tokens 4000 --latents 20 --device cpu"
        assert run_here(self.evaluation, out, *sizes.split(), *files.split()) == 0
        self.report = read_json(out / "e.json")
        self.coders = self.skipcoder.load_run(out)[1]

    def cfg(self, name) -> dict:
        return read_json(self.out / name / FOLDER / "cfg.json")

    def assert_trained(self, activation, names=tuple(ARCHS)):
        """All coders have learned something, and say what they are."""
        assert list(self.report["coders"]) == list(names)
        for name in names:
            row = self.report["coders"][name]
            assert 0 < row["fvu"] < 0.9 and row["latents_scored"] > 2
            assert row["ce_recovered"] > 0
            assert self.cfg(name)["activation"] == activation

    def active(self, name, tiny) -> torch.Tensor:
        """Return the number of active latents of each token of some text: [N]."""
        lm = self.skipcoder.load_lm(str(tiny), torch.device("cpu"))
        mlp = self.skipcoder.find_mlp(lm, 1)[2]
        tokens = torch.randint(500, (8, 32), generator=torch.Generator().manual_seed(0))
        x, y = self.skipcoder.MLPActivations(lm, mlp)(tokens)
        _, acts, _ = self.coders[name](x, y)
        return (acts > 0).sum(1)

    def assert_number_of_active_latents_is_free(self, tiny):
        """It differs between tokens, and is more than k at some."""
        for name in ARCHS:
            active = self.active(name, tiny)
            assert active.unique().numel() > 5 and active.max() > 4


def test_a_fourth_architecture(copies, load, tiny, tmp_path):
    apply("fourth_architecture", copies)
    names = ["tied_transcoder", *ARCHS]
    # Rows of W_enc are directions of x, so as W_dec they start far from what y needs.
    forked = Forked(load, tiny, tmp_path / "run", "--tokens", 40_000)
    forked.assert_trained("topk", names)
    cfg = forked.cfg("tied_transcoder")
    assert cfg["arch"] == "tied_transcoder"
    assert cfg["transcode"] and cfg["normalize_decoder"] and not cfg["skip_connection"]

    coder = forked.coders["tied_transcoder"]
    assert coder.reads == "x" and coder.W_skip is None
    lengths = coder.W_dec.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert forked.report["coders"]["tied_transcoder"]["arch"] == "tied_transcoder"
    start = forked.skipcoder.Coder("tied_transcoder", 32, 256, 4)
    assert torch.equal(start.W_dec, start.W_enc)


def test_relu(copies, load, tiny, tmp_path, capfd):
    apply("relu_l1", copies)
    forked = Forked(load, tiny, tmp_path / "run")
    forked.assert_trained("relu")
    forked.assert_number_of_active_latents_is_free(tiny)
    for name in ARCHS:
        assert forked.report["coders"][name]["l0"] > 5
    # The scripts as they are refuse it.
    message = run_here(evaluation, forked.out)
    assert message.startswith("error: RUN ") and "activation relu, not topk" in message


def test_jumprelu(copies, load, tiny, tmp_path):
    apply("jumprelu", copies)
    forked = Forked(load, tiny, tmp_path / "run")
    forked.assert_trained("jumprelu")
    forked.assert_number_of_active_latents_is_free(tiny)
    for name, coder in forked.coders.items():
        tensors = load_file(forked.out / name / FOLDER / "sae.safetensors")
        assert tensors["threshold"].shape == (256,)
        assert tensors["threshold"].abs().max() > 1e-3, "it has learned"
        assert torch.equal(coder.threshold, tensors["threshold"])


def test_gated(copies, load, tiny, tmp_path):
    apply("gated", copies)
    forked = Forked(load, tiny, tmp_path / "run")
    forked.assert_trained("gated")
    forked.assert_number_of_active_latents_is_free(tiny)
    for name in ARCHS:
        tensors = load_file(forked.out / name / FOLDER / "sae.safetensors")
        for parameter in ("log_scale", "b_magnitude"):
            assert tensors[parameter].shape == (256,)
            assert tensors[parameter].abs().max() > 1e-3, "it has learned"


def test_the_loss_of_gated(copies, load):
    """With gradients of the gate alone from the second prediction, whose decoder is fixed."""
    apply("gated", copies)
    module, _ = load()
    x, y = torch.randn(2, 50, 8)
    coder = module.Coder("skip_transcoder", 8, 32, 4)
    trainer = module.Trainer(coder, x, y, 0.0, 1e9)
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter)
    trainer.step(x, y, 0.0)

    W_enc, b_enc, magnitude, scale, W_dec, b_dec, W_skip = (
        p.detach().double().requires_grad_()
        for p in (
            coder.W_enc,
            coder.b_enc,
            coder.b_magnitude,
            coder.log_scale,
            coder.W_dec,
            coder.b_dec,
            coder.W_skip,
        )
    )
    x, y = x.double(), y.double()
    gate = (x @ W_enc.T + b_enc).relu()
    z = ((x @ W_enc.T) * scale.exp() + magnitude).relu() * (gate > 0)
    y_hat = z @ W_dec + b_dec + x @ W_skip.T
    fixed = gate @ W_dec.detach() + (b_dec + x @ W_skip.T).detach()
    variance = (y - y.mean(0)).square().sum()
    errors = (y - y_hat).square().sum() + (y - fixed).square().sum()
    loss = errors / variance + 1e-3 * gate.sum(1).mean()
    loss.backward()
    pairs = (W_enc, coder.W_enc), (b_enc, coder.b_enc), (scale, coder.log_scale)
    for ours, theirs in (*pairs, (W_dec, coder.W_dec), (b_dec, coder.b_dec)):
        torch.testing.assert_close(theirs.grad.double(), ours.grad, rtol=1e-3, atol=1e-5)


def test_a_frozen_encoder(copies, load, tiny, tmp_path):
    apply("frozen_encoder", copies)
    forked = Forked(load, tiny, tmp_path / "run", "--tokens", 40_000)
    forked.assert_trained("topk")
    for coder in forked.coders.values():
        start = forked.skipcoder.Coder(coder.arch, 32, 256, 4)
        assert torch.equal(coder.W_enc, start.W_enc)
        assert not torch.equal(coder.W_dec, start.W_dec)


def test_a_frozen_encoder_under_torchrun(copies, load, monkeypatch):
    """What has no gradient is not added up over processes."""
    apply("frozen_encoder", copies)
    module, _ = load()
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: summed.append(tensor.shape))
    module.WORLD = 2
    x, y = torch.randn(2, 50, 8)
    trainer = module.Trainer(module.Coder("transcoder", 8, 32, 4), x, y, 0.01, 1e9)
    trainer.step(x, y, 1)
    # The errors, the acts, and the gradients of b_enc, W_dec and b_dec.
    assert summed == [(2,), (32,), (32,), (32, 8), (8,)]


def test_batchtopk(copies, load, tiny, tmp_path):
    apply("batchtopk", copies)
    forked = Forked(load, tiny, tmp_path / "run")
    forked.assert_trained("batchtopk")
    for name in ARCHS:
        active = forked.active(name, tiny).double()
        assert active.mean() <= 4.01 and active.max() > 4 and active.min() < 4
        assert 2 < forked.report["coders"][name]["l0"] <= 4.01


def test_batchtopk_with_few_latents(copies, load, tiny, tmp_path):
    """A token may then have all of them, not 4 k."""
    apply("batchtopk", copies)
    sizes = "--expansion", 1, "--k", 16, "--arch", "sae"
    forked = Forked(load, tiny, tmp_path / "run", *sizes)
    forked.assert_trained("batchtopk", ["sae"])
    assert forked.report["coders"]["sae"]["l0"] <= 16.01


def test_an_sae_on_the_input(copies, load, tiny, tmp_path):
    """The affine map is then perfect, as y is x."""
    apply("sae_on_x", copies)
    forked = Forked(load, tiny, tmp_path / "run", "--arch", "sae")
    assert 0 < forked.report["coders"]["sae"]["fvu"] < 0.9
    assert forked.report["baselines"]["affine"]["fvu"] < 1e-3


# ---- A bug in a fork ------------------------------------------------------------------------

BUGS = {  # script, a line, what stands there instead, and the error
    "Coder": (
        "skipcoder.py",
        "return top.relu(), indices",
        "return top.rellu(), indices",
        AttributeError,
    ),
    "Coder.start": (
        "skipcoder.py",
        "self.b_dec.copy_(y.mean(0))",
        "self.b_dec.copy_()",
        TypeError,
    ),
    "Trainer": ("skipcoder.py", "loss = squared_error / variance", "loss = {}['loss']", KeyError),
    "Trainer.step": ("skipcoder.py", "self.sums += sums", "self.sums += int('x')", ValueError),
    "MLPActivations": ("skipcoder.py", "return x[normal], y[normal]", "return x[y]", IndexError),
    "train": ("skipcoder.py", "bar.update(step_tokens)", "open('no such file')", OSError),
    "save_run": ("skipcoder.py", '"k": coder.k,', '"k": coder.no_such_k,', AttributeError),
    "PatchedLM": ("eval.py", "self.neurons = args[0]", "self.neurons = args[7]", IndexError),
    "read_held_out": ("eval.py", "sample.y.add(y - y_mean)", "sample.y.add()", TypeError),
    "losses": ("eval.py", '"ce_increase": increase,', '"ce_increase": {}["x"],', KeyError),
    "cell": ("eval.py", 'error = row[f"{key}_se"]', "error = max([])", ValueError),
}


def change_line(copies, script, old, new):
    """Change a line, and return its number."""
    change(copies / script, old, new)
    before, _ = (copies / script).read_text(encoding="utf-8").split(new)
    return 1 + before.count("\n")


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


@pytest.mark.parametrize("error", ["x.y", "{}['x']", "int('x')", "[][0]", "len(7)", "no_name"])
def test_a_bug_in_a_reader_process_is_a_traceback(copies, load, tiny, tmp_path, error):
    """It is raised anew in the main process, with what the reader's traceback was."""
    old = "    texts, tokens = iter(texts), []\n"
    # The main process runs pack, too, before there are readers.
    new = f"{old}    x = len if torch.utils.data.get_worker_info() is None else {error}\n"
    number = change_line(copies, "skipcoder.py", old, new) + 1
    skipcoder, _ = load()
    with pytest.raises(Exception) as caught:
        run_here(skipcoder, *flags(tiny, tmp_path / "run"))
    assert not isinstance(caught.value, skipcoder.DataError)
    told = str(caught.value)
    assert "Traceback" in told and f'skipcoder.py", line {number}, in pack' in told
