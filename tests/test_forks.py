"""Copies of the scripts that are changed: by the README's forks, and by bugs of whoever forks."""

import importlib.util
import re
import shutil
import sys
import traceback

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


# ---- The README's forks ---------------------------------------------------------------------


def forks() -> dict[str, str]:
    """Return the diffs of the section "Fork it", by the words in bold before each."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Fork it")[1].split("\n## ")[0]
    found = re.findall(r"\*\*(.*?)\*\*.*?```diff\n(.*?)```", section, re.DOTALL)
    assert len(found) == section.count("```diff")
    return dict(found)


FORKS = forks()


def hunks(diff: str) -> list[tuple[str, str]]:
    """Return what a diff replaces, and by what.

    Lines that begin with "-" go, those with "+" come, those with a space stay.
    """
    found, old, new = [], [], []
    for line in diff.splitlines():
        sign, content = line[0], line[1:] + "\n"
        if sign != "+" and new and new[-1:] != old[-1:]:  # a hunk ends with what comes
            found.append(("".join(old), "".join(new)))
            old, new = [], []
        if sign in "- ":
            old.append(content)
        if sign in "+ ":
            new.append(content)
    return [*found, ("".join(old), "".join(new))]


def test_hunks():
    diff = " a\n+b\n-c\n-d\n+e\n+f\n g\n+h\n"
    assert hunks(diff) == [("a\n", "a\nb\n"), ("c\nd\n", "e\nf\n"), ("g\n", "g\nh\n")]


def apply(name: str, copies, scripts=("skipcoder.py",)):
    for old, new in hunks(FORKS[name]):
        for script in SCRIPTS:
            if script in scripts:
                change(copies / script, old, new)
            else:
                assert old not in (copies / script).read_text(encoding="utf-8")


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


def test_every_fork_is_tested():
    assert set(FORKS) == {
        "A fourth architecture",
        "ReLU with an L1 penalty",
        "JumpReLU",
        "BatchTopK",
        "An SAE on the MLP's input",
    }


def test_a_fourth_architecture(copies, load, tiny, tmp_path):
    apply("A fourth architecture", copies)
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
    apply("ReLU with an L1 penalty", copies)
    forked = Forked(load, tiny, tmp_path / "run")
    forked.assert_trained("relu")
    for name in ARCHS:
        active = forked.active(name, tiny)
        assert active.unique().numel() > 5 and active.max() > 4
        assert forked.report["coders"][name]["l0"] > 5
    # The scripts as they are refuse it.
    message = run_here(evaluation, forked.out)
    assert message.startswith("error: RUN ") and "activation relu, not topk" in message


def test_jumprelu(copies, load, tiny, tmp_path):
    apply("JumpReLU", copies)
    forked = Forked(load, tiny, tmp_path / "run")
    forked.assert_trained("jumprelu")
    for name, coder in forked.coders.items():
        active = forked.active(name, tiny)
        assert active.unique().numel() > 5 and active.max() > 4
        tensors = load_file(forked.out / name / FOLDER / "sae.safetensors")
        assert tensors["threshold"].shape == (256,)
        assert tensors["threshold"].abs().max() > 1e-3, "it has learned"
        assert torch.equal(coder.threshold, tensors["threshold"])


def test_batchtopk(copies, load, tiny, tmp_path):
    apply("BatchTopK", copies)
    forked = Forked(load, tiny, tmp_path / "run")
    forked.assert_trained("batchtopk")
    for name in ARCHS:
        active = forked.active(name, tiny).double()
        assert active.mean() <= 4.01 and active.max() > 4 and active.min() < 4
        assert 2 < forked.report["coders"][name]["l0"] <= 4.01


def test_batchtopk_with_few_latents(copies, load, tiny, tmp_path):
    """A token may then have all of them, not 4 k."""
    apply("BatchTopK", copies)
    sizes = "--expansion", 1, "--k", 16, "--arch", "sae"
    forked = Forked(load, tiny, tmp_path / "run", *sizes)
    forked.assert_trained("batchtopk", ["sae"])
    assert forked.report["coders"]["sae"]["l0"] <= 16.01


def test_an_sae_on_the_input(copies, load, tiny, tmp_path):
    """The affine map is then perfect, as y is x."""
    apply("An SAE on the MLP's input", copies, SCRIPTS)
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
