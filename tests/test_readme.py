"""What the README says is so: its flags, its snippets, its commands."""

import json
import re
import runpy

from conftest import ROOT, run_here

import eval as evaluation
import skipcoder

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_flags_are_those_of_help(capsys):
    section = README.split("## Flags")[1].split("\n## ")[0]
    table, of_eval = section.split("`eval.py RUN`")
    listed = {skipcoder: table, evaluation: of_eval.split("\n\n")[0]}
    for script, text in listed.items():
        assert run_here(script, "--help") == 0
        flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert set(re.findall(r"`(--[a-z-]+)", text)) == flags


def block_after(words: str, language="python") -> str:
    """Return the first block of code after these words."""
    rest = README.split(words)[1]
    return re.search(rf"```{language}\n(.*?)```", rest, re.DOTALL)[1]


def run_block(code: str, folder, **names) -> dict:
    """Run a block of code, and return its variables."""
    path = folder / "block.py"
    path.write_text(code, encoding="utf-8")
    return runpy.run_path(str(path), names)


def test_the_block_on_load_run(trained, tiny, tmp_path):
    code = block_after("## Use a coder elsewhere")
    for theirs, ours in {
        "path/to/skipcoder": str(ROOT),
        "runs/gpt2-layer6": str(trained),
        '"gpt2"': repr(str(tiny)),
        "find_mlp(lm, 6)": "find_mlp(lm, 1)",
    }.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    names = run_block(code, tmp_path)
    y, y_hat = names["y"], names["y_hat"]
    error, variance = (y - y_hat).square().sum(), (y - y.mean(0)).square().sum()
    assert y_hat.shape == y.shape and error < 0.9 * variance


def test_the_config_for_coders_of_sparsify():
    """tests/test_eval.py evaluates a run with such a config."""
    config = json.loads(block_after("eval.py measures coders of sparsify", "json"))
    assert set(config) == {"model", "layer", "dataset", "subset", "ctx_len", "coders"}


def test_commands_are_complete():
    """Each script that the README runs exists, and CI runs the tests as it says."""
    scripts = set(re.findall(r"python (\S+\.py)", README))
    assert {"skipcoder.py", "eval.py", "tests/tiny_gpt2.py"} <= scripts
    for script in scripts:
        assert (ROOT / script).exists(), script
    command = "python -m pytest -q tests"
    assert command in README and command in (ROOT / ".ci/run").read_text(encoding="utf-8")
