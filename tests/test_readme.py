"""What the README says is so: its flags, its snippets, its commands, its files."""

import importlib
import json
import re
import runpy

import pytest
from conftest import ROOT, run_here

import eval as evaluation
import skipcoder

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_flags_are_those_of_help(capsys):
    section = README.split("## Flags")[1].split("\n## ")[0]
    of_training, of_eval = section.split("`eval.py RUN`")
    listed = {skipcoder: of_training, evaluation: of_eval.split("\n\n")[0]}
    for script, text in listed.items():
        assert run_here(script, "--help") == 0
        flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert set(re.findall(r"`(--[a-z-]+)", text)) == flags


def block_after(words: str, language="python") -> str:
    """Return the first block of code after these words."""
    rest = README.split(words)[1]
    return re.search(rf"```{language}\n(.*?)```", rest, re.DOTALL)[1]


def test_the_block_on_load_run(trained, tiny, tmp_path, capsys):
    """It ends by printing the strongest latents of each token."""
    code = block_after("## Use a coder elsewhere")
    for theirs, ours in {
        "path/to/skipcoder": str(ROOT),
        "runs/gpt2-layer6": str(trained),
        '"gpt2"': repr(str(tiny)),
        "find_mlp(lm, 6)": "find_mlp(lm, 1)",
    }.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "block.py"))
    y, y_hat = names["y"], names["y_hat"]
    error, variance = (y - y_hat).square().sum(), (y - y.mean(0)).square().sum()
    assert y_hat.shape == y.shape and error < 0.9 * variance
    printed = set(re.findall(r"\d+", capsys.readouterr().out))
    strongest = names["indices"].gather(1, names["acts"].argmax(1, keepdim=True))
    assert {str(latent) for latent in strongest.flatten().tolist()} <= printed


def test_the_config_for_coders_of_sparsify():
    """tests/test_eval.py evaluates a run with such a config."""
    config = json.loads(block_after("## Use a coder elsewhere", "json"))
    assert set(config) == {"model", "layer", "dataset", "subset", "ctx_len", "coders"}


def test_two_lines_do_all():
    """Each is one paste: a new environment, then the demo or the tests. CI runs these lines."""
    lines = re.findall(r"^    (python3 -m venv .*)", README, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert "pip install -r requirements.txt" in line and "#" not in line
    assert lines[0].endswith("python tests/demo.py")
    assert lines[1].endswith("python -m pytest -q tests")
    assert "grep '^    python3 -m venv' README.md" in (ROOT / ".ci/run").read_text("utf-8")


@pytest.mark.parametrize("kind", [r"python3? (\S+\.py)", r'src="([^"]+)"', r"\]\(([\w./]+)\)"])
def test_what_is_named_is_there(kind):
    """Each script that README runs, each picture, each file that it links to."""
    found = set(re.findall(kind, README))
    assert found
    for name in found:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", ["bench", "demo", "frontier", "real_lm", "skip_study"])
def test_the_scripts_beside_the_tests_find_one_another(script):
    importlib.import_module(script)
