"""eval.py: its numbers against dense float64 computations, its proxy against planted latents, its page."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import run, run_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import skipcoder
from skipcoder import TokenBatches, load_run


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """What the command line gives for a run: standard output, the JSON and the page."""
    folder = tmp_path_factory.mktemp("eval")
    outputs = ["--json", folder / "e.json", "--html", folder / "e.html"]
    done = run("eval.py", trained, *"--tokens 15000 --latents 40".split(), *outputs)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "e.json").read_text()), (folder / "e.html").read_text()


def test_report(evaluated):
    stdout, report, _ = evaluated
    assert set(report) == {"tokens", "clean_ce", "mean_ablated_ce", "zero_ablated_ce", "coders", "baselines"}
    proxy = {"intruder", "intruder_se", "intruder_by_quantile", "latents_scored"}
    losses = {"fvu", "ce", "ce_increase", "ce_recovered", "kl"}
    for row in report["coders"].values():
        assert set(row) == {*proxy, *losses, "l0", "dead"}
        assert len(row["intruder_by_quantile"]) == 5 and row["l0"] <= 4
    assert set(report["baselines"]["affine"]) == losses
    for name in ("neurons", "untrained", "null"):
        assert set(report["baselines"][name]) == proxy
    table = [line for line in stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 + 4 and len({line.count("|") for line in table}) == 1
    assert all(len(line) <= 100 for line in table)
    for name in ("sae", "transcoder", "skip_transcoder", "affine", "neurons", "untrained", "null"):
        assert sum(line.startswith(f"| {name} ") for line in table) == 1
    assert f"{report['coders']['sae']['fvu']:.4f}" in stdout and "0.2" in stdout


def test_fvu_agrees_with_training(tiny, tmp_path):
    """Of a coder that stays as it is, with a learning rate of nearly 0, training and eval.py report the same FVU."""
    train = f"--model {tiny} --dataset {tiny}/text.jsonl --layer 1 --expansion 8 --ctx-len 32 --k 4 --arch sae"
    train += f" --lr 1e-12 --tokens 20000 --batch-size 16 --out {tmp_path}/run"
    assert run_here(skipcoder, *train.split()) == 0
    sizes = "--tokens 20000 --latents 20".split()
    assert run_here(evaluation, tmp_path / "run", *sizes, "--json", tmp_path / "e.json") == 0
    fvu = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["fvu"]["sae"]
    assert 0.1 < fvu < 0.9
    assert json.loads((tmp_path / "e.json").read_text())["coders"]["sae"]["fvu"] == pytest.approx(fvu, rel=0.05)


def test_numbers_equal_a_dense_float64_computation(trained, tiny, device, monkeypatch):
    """Every number of the report for the coders, the affine map and the ablations, written out anew."""
    monkeypatch.setattr(skipcoder, "matmul_dtype", lambda device: torch.float32)
    config, coders = load_run(trained, device)
    args = type("Args", (), dict(run=trained, tokens=6000, latents=20, seed=0, device=device,
                                 dataset=config["dataset"], subset=None))  # fmt: skip
    open_files = []

    def first_rows(*args):
        for batch in original(*args):
            open_files.append(len(os.listdir("/proc/self/fd")))
            yield batch

    original = evaluation.first_rows
    if os.path.exists("/proc/self/fd"):
        monkeypatch.setattr(evaluation, "first_rows", first_rows)
    report, *_ = evaluation.evaluate(config, coders, args)
    assert not open_files or open_files[-1] <= open_files[-3], "a batch that is kept holds a file open"
    # a coder's numbers, the baselines' too, do not depend on which coders are evaluated beside it
    alone, *_ = evaluation.evaluate(config, {"skip_transcoder": coders["skip_transcoder"]}, args)
    assert alone["coders"] == {"skip_transcoder": report["coders"]["skip_transcoder"]}
    assert alone["baselines"] == report["baselines"]

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    lm = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval().to(device)
    mlp = lm.transformer.h[1].mlp

    def sample(rows, **split):
        batches = TokenBatches(config["dataset"], None, tokenizer, 32, 64, once=True, **split)
        return torch.cat([batch for batch, _ in zip(batches, range(-(-rows // 64)))])[:rows].to(device)

    wanted = -(-6000 // 31)
    held_out, training = sample(wanted, held_out=True), sample(wanted)

    @torch.no_grad()
    def run_lm(tokens, replace=None):
        seen = {}

        def hook(module, args, output):
            seen["x"], seen["y"] = args[0][:, 1:], output[:, 1:]
            if replace is not None:
                return torch.cat([output[:, :1], replace.view_as(output[:, 1:])], 1)

        handle = mlp.register_forward_hook(hook)
        logits = lm(tokens).logits
        handle.remove()
        return logits.log_softmax(-1)[:, 1:-1], seen["x"].reshape(-1, 32), seen["y"].reshape(-1, 32)

    clean, x, y = run_lm(held_out)
    assert report["tokens"] == len(x)
    _, x_train, y_train = run_lm(training)
    ones = torch.ones(len(x_train), 1, dtype=torch.float64, device=device)
    affine = torch.linalg.lstsq(torch.cat([x_train, ones], 1), y_train).solution
    y_hats = {"affine": torch.cat([x, torch.ones_like(x[:, :1])], 1) @ affine}
    y_hats["mean"], y_hats["zero"] = y_train.mean(0).expand_as(y), torch.zeros_like(y)
    for arch, coder in coders.items():
        pre = (y - coder.b_dec if arch == "sae" else x) @ coder.encoder.weight.double().T + coder.encoder.bias.double()
        kept = torch.zeros_like(pre).scatter(1, pre.topk(4).indices, 1)
        z = (pre * kept).relu()
        y_hats[arch] = (
            z @ coder.W_dec.double() + coder.b_dec + (x @ coder.W_skip.double().T if arch == "skip_transcoder" else 0)
        )
        assert report["coders"][arch]["l0"] == pytest.approx((z > 0).sum().item() / len(z), rel=1e-3)
        assert report["coders"][arch]["dead"] == pytest.approx((z == 0).all(0).double().mean().item(), abs=0.01)

    def ce(log_probs):
        return torch.nn.functional.nll_loss(log_probs.flatten(0, 1), held_out[:, 2:].flatten()).item()

    patched = {name: run_lm(held_out, y_hat)[0] for name, y_hat in y_hats.items()}
    assert report["clean_ce"] == pytest.approx(ce(clean), rel=1e-5)
    assert report["mean_ablated_ce"] == pytest.approx(ce(patched["mean"]), rel=1e-5)
    assert report["zero_ablated_ce"] == pytest.approx(ce(patched["zero"]), rel=1e-5)
    for name, row in {**report["coders"], "affine": report["baselines"]["affine"]}.items():
        variance = (y - y.mean(0)).square().sum()
        assert row["fvu"] == pytest.approx(((y - y_hats[name]).square().sum() / variance).item(), rel=1e-3)
        increase = ce(patched[name]) - ce(clean)
        assert row["ce"] == pytest.approx(ce(patched[name]), rel=1e-5)
        assert row["ce_increase"] == pytest.approx(increase, abs=1e-4)
        assert row["ce_recovered"] == pytest.approx(1 - increase / (ce(patched["mean"]) - ce(clean)), abs=2e-3)
        kl = (clean.exp() * (clean - patched[name])).sum(-1).mean().item()
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)


# The proxy on hidden states that we make up: 512 token types, whose hidden states are 512 directions and noise.


@pytest.fixture(scope="module")
def planted():
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(512, (60_000,), generator=generator)  # [N] the type of each token
    directions = torch.randn(512, 64, generator=generator)
    hidden = (directions[kind] + 0.5 * torch.randn(len(kind), 64, generator=generator)).bfloat16()
    return kind, hidden, hidden.float().mean(0)


def score(planted, types_per_latent: int) -> dict:
    """The report for latents that each stand for so many token types."""
    kind, hidden, mean = planted
    generator = torch.Generator().manual_seed(1)
    active = {}
    for latent in range(512 // types_per_latent):
        tokens = (kind // types_per_latent == latent).nonzero().flatten()
        active[latent] = (tokens[torch.randperm(len(tokens), generator=generator)], torch.ones(len(tokens)))
    return evaluation.summary(evaluation.intruder_trials(active, hidden, mean, generator))


def test_null_is_at_chance(planted, evaluated):
    _, hidden, mean = planted
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(len(hidden), (300, 10, 5), generator=generator)
    null = evaluation.summary(evaluation.found_last(tokens, hidden, mean))
    for row in (null, evaluated[1]["baselines"]["null"]):
        assert abs(row["intruder"] - 0.2) < 3 * row["intruder_se"]
    assert null["intruder_se"] == pytest.approx((0.2 * 0.8 / 3000) ** 0.5, rel=0.2)


def test_planted_latents_score_near_one_and_merging_lowers_the_score(planted):
    scores = [score(planted, types)["intruder"] for types in (1, 2, 4, 8)]
    assert scores[0] > 0.97
    assert all(high > low + 0.03 for high, low in zip(scores, scores[1:]))


def test_fifths_are_sorted_by_activation(planted):
    """A latent that is clean at the top and fires on anything at the bottom must show that in its fifths."""
    kind, hidden, mean = planted
    generator = torch.Generator().manual_seed(1)
    active = {}
    for latent in range(64):
        clean = (kind == latent).nonzero().flatten()[:60]
        dirty = torch.randperm(len(kind), generator=generator)[:40]
        active[latent] = (torch.cat([clean, dirty]), torch.linspace(9, 1, 100))
    found = evaluation.intruder_trials(active, hidden, mean, generator)
    by_quantile = evaluation.summary(found)["intruder_by_quantile"]
    assert min(by_quantile[:3]) > 0.9 and max(by_quantile[3:]) < 0.5


def test_activity_keeps_what_it_should():
    generator = torch.Generator().manual_seed(0)
    activity = evaluation.Activity(30, 10, seed=0)
    z = torch.rand(2000, 30, generator=generator) * (torch.rand(2000, 30, generator=generator) < 0.05)
    z[:, 3] = 0  # dead
    z[:, 4] = 0
    z[:39, 4] = 1  # too rare
    always = activity.drawn[0].item()
    z[:, always] = 1  # on every token: there is none for an intruder
    for start in range(0, 2000, 25):
        top = z[start : start + 25].topk(10)
        activity.add(top.values, top.indices, start)
    sample = activity.sample()
    assert len(sample) == 10 and not {3, 4, always} & set(sample)
    for latent, (tokens, acts) in sample.items():
        assert set(tokens.tolist()) == set(z[:, latent].nonzero().flatten().tolist())
        torch.testing.assert_close(acts, z[tokens, latent])
        assert (acts.diff() <= 0).all()
    assert torch.equal(activity.count, (z > 0).sum(0))


def test_too_few_tokens_for_the_proxy(trained, tmp_path, capsys):
    """All else is reported, and what is missing is named; also where k is larger than the number of neurons."""
    folder = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"k": 200}))
    outputs = ["--json", tmp_path / "e.json", "--html", tmp_path / "e.html"]
    assert run_here(evaluation, folder, "--tokens", 20, *outputs) == 0
    stdout, report = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    assert report["tokens"] == 31  # one row
    for row in report["coders"].values():
        assert row["intruder"] is row["intruder_se"] is None and row["latents_scored"] == 0
        assert row["fvu"] > 0 and 32 < row["l0"] <= 200
    assert report["baselines"]["null"]["intruder"] is not None
    assert "Without an intruder score" in stdout and "sae, transcoder, skip_transcoder, neurons, untrained" in stdout
    assert "--tokens" in stdout and (tmp_path / "e.html").exists()


def test_page_escapes_what_documents_contain(trained, tiny, tmp_path):
    """A document that contains HTML shows as text: no tag of it stands in the page, and the data can be parsed."""
    evil = '<script>alert(1)</script><b>bold</b> <!-- </script> & "quotes" \x07 \ud7ff é 日本\t\n'
    evil_text = tmp_path / "evil.jsonl"
    evil_text.write_text((json.dumps({"text": evil * 20}) + "\n") * 300)
    sizes = "--tokens 8000 --latents 10".split()
    assert run_here(evaluation, trained, "--dataset", evil_text, *sizes, "--html", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<b>" not in page and "<!--" not in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert any("<" in text for text in data["text"]) and any("↵" in text for text in data["text"])
    assert any(text.startswith("\\x") for text in data["text"])  # a byte of 日, alone


def test_page(evaluated):
    _, report, page = evaluated
    assert len(page) < 3e6
    assert not re.search(r"(src|href)=|url\(|@import|https?://", page)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert set(data["coders"]) == {"sae", "transcoder", "skip_transcoder", "neurons"}
    for name, latents in data["coders"].items():
        row = report["coders"].get(name) or report["baselines"][name]
        assert len(latents) == row["latents_scored"]
        assert sum(latent[1] for latent in latents) / len(latents) == pytest.approx(row["intruder"])
        for _, _, density, top, contexts in latents:
            assert 0 < density < 1 and top > 0 and [c[0] for c in contexts] == [0, 0, 0, 0, 1, 2, 3, 4]
            assert contexts[0][3][contexts[0][1]] == "9"  # the first context holds the largest activation
            for _, peak, tokens, levels in contexts:
                assert len(tokens) == len(levels) and 0 <= peak < len(tokens)
    assert f"{report['coders']['sae']['fvu']:.4f}" in page
