"""The README says what is so: its Python runs, and the flags it lists are those that the scripts have."""

import re

import torch
from conftest import ROOT, run_here

import eval as evaluation
import skipcoder
from skipcoder import load_run

README = (ROOT / "README.md").read_text()

def test_flags_are_those_of_help(capsys):
    section = README.split("## Flags")[1].split("\n## ")[0]
    table, eval_part = section.split("`eval.py RUN`")
    for script, listed in ((skipcoder, table), (evaluation, eval_part.split("\n\n")[0])):
        assert run_here(script, "--help") == 0
        flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert set(re.findall(r"`(--[a-z-]+)", listed)) == flags

def test_plain_pytorch_block_gives_our_y_hat(trained):
    block = re.search(r"```python\n(.*?)```", README.split("In plain PyTorch")[1], re.DOTALL)[1]
    block = re.sub(r"runs/[\w.-]+/skip_transcoder/[\w.]+\.mlp", str(trained / "skip_transcoder/h.1.mlp"), block)
    x, y = torch.randn(2, 20, 32)
    names = {"x": x}
    exec(re.sub(r"topk\(\d+", "topk(4", block), names)
    torch.testing.assert_close(names["y_hat"], load_run(trained)[1]["skip_transcoder"](x, y)[0])

def test_commands_are_complete():
    """Each command of the README names files that exist and flags that the scripts know."""
    for script in set(re.findall(r"python (\S+\.py)", README)):
        assert (ROOT / script).exists(), script
    assert "python -m pytest -q tests" in (ROOT / ".ci/run").read_text()
