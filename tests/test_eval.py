"""eval.py: its numbers against dense float64 computations, its proxy against planted latents, its page; README.md."""

import argparse
import contextlib
import io
import json
import math
import re
import shutil
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, run_here
from test_coders import dense_forward
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import skipcoder
from skipcoder import ARCHS, load_run, token_batches


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """What the command line gives for a run: standard output, the JSON, the page, and the latents on that page."""
    folder = tmp_path_factory.mktemp("eval")
    sizes = (
        f"--tokens 15000 --latents 40 --device cpu --json {folder}/e.json --html {folder}/e.html"
    )
    with mock.patch.object(evaluation, "page", side_effect=evaluation.page) as page:
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            assert run_here(evaluation, trained, *sizes.split()) == 0
    shown = page.call_args[0][1:]
    return (
        stdout.getvalue(),
        json.loads((folder / "e.json").read_text()),
        (folder / "e.html").read_text(),
        shown,
    )


PROXY = {
    "intruder",
    "intruder_se",
    "intruder_sd",
    "intruder_by_quantile",
    "intruder_histogram",
    "latents_scored",
}
LOSSES = {"fvu", "fvu_all", "ce", "ce_increase", "ce_increase_se", "ce_recovered", "kl", "kl_se"}


def test_report(evaluated, trained):
    stdout, report, *_ = evaluated
    sums = {"tokens", "run", "clean_ce", "mean_ablated_ce", "zero_ablated_ce", "outliers"}
    assert set(report) == {*sums, "coders", "baselines"}
    assert report["run"]["tokens_trained"] == load_run(trained)[0]["tokens_trained"]
    assert all(
        set(row) == {*PROXY, *LOSSES, "arch", "k", "l0", "dead"}
        for row in report["coders"].values()
    )
    keys = {name: set(row) for name, row in report["baselines"].items()}
    assert keys == {"affine": LOSSES, "neurons": PROXY, "untrained": PROXY, "null": PROXY}
    null = report["baselines"]["null"]
    assert abs(null["intruder"] - 0.2) < 3 * null["intruder_se"]
    assert null["intruder_se"] == pytest.approx(
        (0.2 * 0.8 / 400) ** 0.5, rel=0.3
    )  # 40 latents, 10 trials each
    table = [line for line in stdout.splitlines() if line.startswith("|")]
    assert len({(len(line), line.count("|")) for line in table}) == 1
    assert [line.split()[1] for line in table[2:]] == [*ARCHS, *keys]
    sae = report["coders"]["sae"]
    assert f"{sae['fvu']:.4f}" in stdout and f"{sae['kl']:.5f} ± {sae['kl_se']:.5f}" in stdout
    assert (
        f"{report['tokens']:,} held-out tokens" in stdout and f"{report['clean_ce']:.4f}" in stdout
    )
    assert "stopped early" not in stdout and "fewer held-out tokens" not in stdout


def test_numbers_equal_a_dense_float64_computation(trained, tiny, device, monkeypatch):
    """Every number of the report for the coders, the affine map and the ablations, written out anew.

    With a max_norm over which one token in twenty is an outlier.
    """
    config, coders = load_run(trained, device)
    args = argparse.Namespace(run=trained, tokens=6000, latents=20, seed=0, device=device)
    args.dataset, args.subset = config["dataset"], None
    training, judged, fit, trials = [], [], evaluation.fit_affine, evaluation.intruder_trials
    keep = lambda f, batches, *more: fit(f, training.extend(batches) or training, *more)  # noqa: E731
    monkeypatch.setattr(evaluation, "fit_affine", keep)
    monkeypatch.setattr(
        evaluation, "intruder_trials", lambda *seen: judged.append(seen) or trials(*seen)
    )
    monkeypatch.setattr(evaluation, "CE_TOKENS", 3000)
    ce_rows = 128  # of 31 tokens each, in batches of 32 rows: the first ones that make 3000

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    lm = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval().to(device)
    kept, held_out = (
        torch.cat([*token_batches(config["dataset"], None, tokenizer, 32, 32, side)])
        for side in (0, 1)
    )
    held_out = held_out[:224]  # the first multiple of 32 rows with 6000 tokens

    @torch.no_grad()
    def run_lm(tokens, y_hat=None):
        """log p, and x, y and the last hidden states [N, d], with y_hat in place of y."""

        def hook(module, args, output):
            seen.extend((args[0], output))
            if y_hat is not None:
                whole = output[:, 1:]
                output[:, 1:] = torch.where(
                    counts.view(len(tokens), 31, 1), y_hat.view_as(whole), whole
                )
            return output

        seen, handle = [], lm.transformer.h[1].mlp.register_forward_hook(hook)
        output = lm(tokens.to(device), output_hidden_states=True)
        handle.remove()
        seen = [a[:, 1:].reshape(-1, 32) for a in (*seen, output.hidden_states[-1])]
        return output.logits.log_softmax(-1)[:, 1:-1], *seen

    clean, x, y, hidden = run_lm(held_out)
    norm = y.norm(dim=1).sort().values[len(y) * 19 // 20 :][:2]
    config["max_norm"] = limit = norm.mean().item()  # half way from one to the next
    counts = y.norm(dim=1) < limit  # [N]
    report, (seen, places, *_) = evaluation.evaluate(config, coders, args)
    n = counts.sum().item()
    assert torch.equal(seen.flatten()[places].long(), held_out[:, 1:].flatten()[counts.cpu()])
    assert report["tokens"] == n < 0.96 * len(y) and len(held_out) == 224
    assert (
        torch.equal(torch.cat(training), kept[: sum(map(len, training))])
        and sum(map(len, training)) >= 103
    )
    pairs = []
    for batch in training:
        here = list(zip(*run_lm(batch)[1:3]))
        last = next(pair for pair in here if pair[1].norm() < limit)
        for pair in here:  # in place of an outlier, the last one before it that is none, or else the first after it
            last = pair if pair[1].norm() < limit else last
            pairs.append(last)
    x_train, y_train = map(torch.stack, zip(*pairs))
    with_one = lambda x: torch.nn.functional.pad(x, (0, 1), value=1)  # noqa: E731
    y_hats = {"affine": with_one(x) @ torch.linalg.lstsq(with_one(x_train), y_train).solution}
    y_hats |= {"mean": y_train.mean(0).expand_as(y), "zero": torch.zeros_like(y)}
    for (arch, coder), (active, judged_hidden, mean, _) in zip(coders.items(), judged):
        y_hats[arch], z = dense_forward(coder.double(), x, y, k=4)
        coder.float()
        z = z[counts]
        assert report["coders"][arch]["l0"] == pytest.approx(
            (z > 0).sum().item() / len(z), rel=1e-3
        )
        assert report["coders"][arch]["dead"] == pytest.approx(
            (z == 0).all(0).double().mean().item(), abs=0.01
        )
        for latent, (tokens, acts) in active.items():
            assert len(set(tokens.tolist()) ^ set(z[:, latent].nonzero().flatten().tolist())) <= 1
            torch.testing.assert_close(acts.double(), z[tokens, latent].cpu(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(
            judged_hidden.double(), hidden[counts].cpu(), rtol=0.01, atol=0.01
        )
        torch.testing.assert_close(
            mean.double().cpu(), hidden[counts].mean(0).cpu(), rtol=0.01, atol=0.01
        )

    patched = {name: run_lm(held_out, y_hat)[0] for name, y_hat in y_hats.items()}
    targets = held_out[:ce_rows, 2:, None].to(device)
    ce = {
        name: -log_p[:ce_rows].gather(-1, targets).squeeze(-1).mean(1)
        for name, log_p in patched.items()
    }  # of rows
    clean_ce = -clean[:ce_rows].gather(-1, targets).squeeze(-1).mean(1)
    for key, of_rows in (
        ("clean_ce", clean_ce),
        ("mean_ablated_ce", ce["mean"]),
        ("zero_ablated_ce", ce["zero"]),
    ):
        assert report[key] == pytest.approx(of_rows.mean().item(), rel=1e-5)

    def variance(y):
        return (y - y.mean(0)).square().sum().item()

    shares = {"tokens": 1 - n / len(y), "variance": 1 - variance(y[counts]) / variance(y)}
    assert report["outliers"] == pytest.approx(shares, rel=1e-4)
    for name, row in {**report["coders"], "affine": report["baselines"]["affine"]}.items():
        errors = (y - y_hats[name]).square().sum(1)
        assert row["fvu_all"] == pytest.approx(errors.sum().item() / variance(y), rel=1e-3)
        increase, harm = ce[name] - clean_ce, ce["mean"] - clean_ce
        kl = (clean.exp() * (clean - patched[name])).sum(-1).mean(1)[:ce_rows]
        assert row["fvu"] == pytest.approx(
            errors[counts].sum().item() / variance(y[counts]), rel=1e-3
        )
        assert row["ce"] == pytest.approx(ce[name].mean().item(), rel=1e-5)
        assert row["ce_increase"] == pytest.approx(increase.mean().item(), abs=1e-4)
        assert row["ce_increase_se"] == pytest.approx(
            increase.std().item() / ce_rows**0.5, rel=1e-2
        )
        assert row["ce_recovered"] == pytest.approx(
            1 - (increase.mean() / harm.mean()).item(), abs=2e-3
        )
        assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-5)
        assert row["kl_se"] == pytest.approx(kl.std().item() / ce_rows**0.5, rel=1e-2)

    # a coder's numbers, the baselines' too, do not depend on which coders are evaluated beside it
    training.clear()
    alone, *_ = evaluation.evaluate(config, {"skip_transcoder": coders["skip_transcoder"]}, args)
    assert alone["coders"] == {"skip_transcoder": report["coders"]["skip_transcoder"]}
    assert alone["baselines"] == report["baselines"]


# The proxy on hidden states that we make up: 512 token types, whose hidden states are 512 directions and noise.


def score(types: int, shared: float = 0, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of latents that each stand for so many token types, and the size of what all hidden states share."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(512, (60_000,), generator=generator)  # [N] the type of each token
    directions = torch.randn(512, 64, generator=generator) + shared * torch.randn(
        64, generator=generator
    )
    hidden = (directions[kind] + 0.5 * torch.randn(len(kind), 64, generator=generator)).to(dtype)
    active = {j: ((kind // types == j).nonzero().flatten(), None) for j in range(512 // types)}
    found = evaluation.intruder_trials(active, hidden, hidden.float().mean(0), generator)
    return evaluation.summary(found)["intruder"]


def test_planted_latents_score_near_one_and_merging_lowers_the_score():
    scores = [score(types) for types in (1, 2, 4, 8)]
    assert scores[0] > 0.97
    assert all(high > low + 0.03 for high, low in zip(scores, scores[1:]))


def test_contexts_are_centred():
    """What all hidden states share is taken away: it would hide what distinguishes them."""
    assert score(1, shared=1e5, dtype=torch.float32) > 0.95


def test_trials_show_four_tokens_of_a_fifth_and_an_intruder_on_which_the_latent_is_silent(
    monkeypatch,
):
    """Each latent is active on most tokens, so that an intruder drawn from all would be an active one."""
    generator = torch.Generator().manual_seed(0)
    active = {
        j: (torch.randperm(600, generator=generator)[:500], torch.linspace(9, 1, 500))
        for j in range(20)
    }
    monkeypatch.setattr(evaluation, "intruder_found", lambda shown, hidden, mean: shown)
    shown = evaluation.intruder_trials(active, torch.zeros(600, 64), torch.zeros(64), generator)
    assert shown.shape == (20, 10, 5)
    for trials, (tokens, _) in zip(shown, active.values()):
        for t, trial in enumerate(trials.tolist()):
            fifth = set(tokens[100 * (t % 5) : 100 * (t % 5 + 1)].tolist())
            assert len(set(trial[:4])) == 4 and set(trial[:4]) <= fifth
            assert trial[4] not in set(tokens.tolist())


def test_summary():
    """The trials of a latent, in columns, take the fifths in turn; errors are over latents."""
    found = torch.tensor([[1, 1, 1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1, 1, 1, 0, 0]]).bool()
    row = evaluation.summary(found)
    assert row.pop("intruder_by_quantile") == [1, 0.75, 0.5, 0.25, 0]
    assert row.pop("intruder_histogram") == [0, 0, 0, 0, 0.5, 0, 0.5, 0, 0, 0, 0]
    assert row == pytest.approx(
        {"intruder": 0.5, "intruder_se": 0.1, "intruder_sd": 0.02**0.5, "latents_scored": 2}
    )


def test_active_tokens():
    """Of latents that are active on enough tokens and not on all; where, and how much, largest first."""
    draw = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    z = torch.rand(2000, 30, generator=draw()) * (torch.rand(2000, 30, generator=draw()) < 0.05)
    drawn = torch.randperm(30, generator=draw()).tolist()
    first, second, third = drawn[:3]  # they would be the first to be scored
    z[:, first] = 0  # dead
    z[:, second] = 0
    z[:39, second] = 1  # too rare
    z[:, third] = 1  # on every token: there is none for an intruder
    active, density = evaluation.active_tokens(*z.topk(12), 30, 10, draw())
    assert list(active) == drawn[3:13]
    for latent, (tokens, acts) in active.items():
        assert set(tokens.tolist()) == set(z[:, latent].nonzero().flatten().tolist())
        torch.testing.assert_close(acts, z[tokens, latent])
        assert (acts.diff() <= 0).all()
    assert torch.equal(density, (z > 0).double().mean(0))


EVIL = '<script>alert(1)</script><b>bold</b> <!-- </script> & "quotes" \x07 \ud7ff é 日本\t\n'


def check_page(page) -> dict:
    """The data of a page on which nothing that it shows is a tag."""
    assert (
        page.count("<script") == 2
        and page.count("</script") == 2
        and "<b>" not in page
        and "<!--" not in page
    )
    assert not re.search(
        r"(src|href)=|url\(|@import|https?://(?!www.w3.org/2000/svg)", page
    )  # that is but a name
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_what_is_missing_is_said_and_the_page_escapes_what_documents_contain(
    trained, tmp_path, capsys, monkeypatch
):
    """A run that was stopped, a k above the number of neurons, little text, no latent scored; HTML in the text."""
    folder = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    del config["max_norm"]  # as in runs of before there was one
    (folder / "config.json").write_text(json.dumps(config | {"k": 200, "tokens": 1_000_000}))
    (tmp_path / "evil.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} {EVIL}" * 20}) for i in range(100))
    )
    evaluate = f"{folder} --dataset {tmp_path}/evil.jsonl --latents 10 --device cpu --tokens 123456"
    evaluate += f" --json {tmp_path}/e.json --html {tmp_path}/e.html"
    assert run_here(evaluation, *evaluate.split()) == 0
    stdout = capsys.readouterr().out
    assert "stopped early" in stdout and "1,000,000" in stdout
    assert "fewer held-out tokens" in stdout and "123,456" in stdout
    text = check_page((tmp_path / "e.html").read_text())["text"]
    assert any("<" in word for word in text) and any("↵" in word for word in text)
    assert all(word.isprintable() for word in text) and "\\u0007" in text

    monkeypatch.setattr(evaluation, "MIN_ACTIVE", 10**9)
    assert run_here(evaluation, *evaluate.split()) == 0
    stdout, report = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    for row in report["coders"].values():
        assert (
            row["intruder"] is row["intruder_se"] is row["intruder_sd"] is None
            and row["latents_scored"] == 0
        )
        assert row["fvu"] > 0 and 32 < row["l0"] <= 200
    assert report["baselines"]["null"]["intruder"] is not None
    assert "sae, transcoder, skip_transcoder, neurons, untrained" in stdout
    assert not any(check_page((tmp_path / "e.html").read_text())["coders"].values())


def test_page_escapes_tokens_that_are_tags(evaluated):
    """With a tokenizer whose tokens are what could end a script, each as a whole."""
    _, report, _, (seen, places, latents, _) = evaluated
    evil = ["</script", "</SCRIPT>", "<!--", "<script", "<b>", "&lt;", '"', "\\", "@DATA@", "]]>"]
    tokenizer = mock.Mock(decode=lambda tokens: evil[tokens[0] % len(evil)])
    assert set(
        check_page(evaluation.page(report, seen, places, latents, tokenizer))["text"]
    ) == set(evil)


def test_page(evaluated):
    _, report, page, (seen, places, latents, tokenizer) = evaluated
    data = check_page(page)
    assert len(page) < 3e6 and f"{report['coders']['sae']['fvu']:.4f}" in page
    assert set(data["coders"]) == {*ARCHS, "neurons"}
    for name, on_page in data["coders"].items():
        row = report["coders"].get(name) or report["baselines"][name]
        assert len(on_page) == row["latents_scored"] > 10
        assert sum(latent[1] for latent in on_page) / len(on_page) == pytest.approx(row["intruder"])
        for (_, _, density, top, contexts, promoted), (tokens, acts) in zip(
            on_page, latents[name][0].values()
        ):
            assert density == pytest.approx(len(tokens) / report["tokens"]) and top == acts.max()
            assert [c[0] for c in contexts] == [0, 0, 0, 0, 1, 2, 3, 4]
            assert len(promoted) == (0 if name == "neurons" else 5)
            _, peak, words, levels = contexts[0]  # it holds the largest activation
            token = seen.flatten()[places[tokens[0]]]
            assert levels[peak] == "9" and data["text"][words[peak]] == evaluation.legible(
                tokenizer, token
            )
            for fifth, peak, words, levels in contexts:
                assert len(words) == len(levels) and 0 <= peak < len(words)


def test_promoted_tokens(tiny):
    """Those with the largest products of the unembedding and the direction, centred, times the final norm's weight."""
    lm, W = AutoModelForCausalLM.from_pretrained(tiny), torch.randn(7, 32)
    norm = lm.transformer.ln_f
    norm.weight.data, norm.bias.data = torch.rand(32) + 0.5, 100 * torch.randn(32)
    logits = (W - W.mean(1, keepdim=True)) * norm.weight @ lm.lm_head.weight.T
    assert torch.equal(evaluation.promoted(lm, W), logits.topk(5).indices)


# A line through the k of each architecture, in numbers that we make up: (CE increase, score) of two or three k.
LINES = {
    "sae": [(0.04, 0.7), (0.01, 0.6)],
    "transcoder": [(0.02, 0.8), (0.002, 0.8)],
    "skip_transcoder": [(1e-3, 0.9)],
}


def made_up() -> dict:
    number = dict.fromkeys(
        "fvu fvu_all l0 dead ce ce_increase_se ce_recovered kl kl_se intruder_sd".split(), 0.5
    )
    number |= {
        "intruder_by_quantile": [0.5] * 5,
        "intruder_histogram": [0.2, 0.8],
        "latents_scored": 300,
    }
    rows = {}
    for arch, line in LINES.items():
        for k, (ce_increase, score) in zip((8, 64), line):
            rows[f"{arch}-k{k}"] = number | {
                "arch": arch,
                "k": k,
                "ce_increase": ce_increase,
                "intruder": score,
            }
            rows[f"{arch}-k{k}"]["intruder_se"] = 0.02
    return {"coders": rows, "baselines": {}}


def test_scores_are_compared_at_equal_ce_increase():
    """Where the lines overlap, from .01 to .02: the SAE's is .6 to .65 there, and .625 in the mean over log CE."""
    report = made_up()
    (sentence,) = evaluation.compare(report, "transcoder", "sae")
    low, high, difference, error = map(float, re.findall(r"[-+]?\d*\.\d+", sentence))
    assert (low, high, difference) == (
        0.01,
        0.02,
        pytest.approx(0.175, abs=1e-3),
    ) and " above " in sentence
    shares = (
        0.25,
        math.log(2) / 2 / math.log(10),
    )  # of the way between the points: where the middle of the overlap is
    variance = sum(share**2 + (1 - share) ** 2 for share in shares) * 0.02**2
    assert error == pytest.approx(variance**0.5, abs=1e-3)
    assert evaluation.compare(report, "skip_transcoder", "transcoder") == []  # one k is no line
    report["coders"]["transcoder-k8"]["intruder"] = report["coders"]["transcoder-k64"][
        "intruder"
    ] = 0.625
    assert "no different from" in evaluation.compare(report, "transcoder", "sae")[0]


def test_picture():
    """A point is where the marks of the axes, whose numbers stand there, put it: on a log scale and a linear one."""
    report = made_up()
    svg = ElementTree.fromstring(
        evaluation.chart(report, "ce_increase", "intruder").replace(' xmlns="', ' ns="')
    )
    texts = [(float(t.get("x")), float(t.get("y")), t.text) for t in svg.findall("text")]
    across = {float(word): x for x, y, word in texts if y == 266}
    down = {float(word): y - 4 for x, y, word in texts if x == 44}
    assert sorted(t.text for t in svg.findall("g/text")) == [
        "64",
        "64",
        *"8 8 8 sae skip_transcoder transcoder".split(),
    ]
    assert {0.001, 0.01} <= set(across) and {0.6, 0.9} <= set(down) and len(across) + len(down) < 16
    points = {}
    for group in svg.iter("g"):
        if (title := group.find("title")) is not None:
            arch, k = re.match(r"(\w+), k (\d+): CE increase", title.text).groups()
            marker = group.findall("path")[1].get("transform")
            points[arch, int(k)] = [float(number) for number in re.findall(r"[\d.]+", marker)]
    for row in report["coders"].values():
        x, y = points[row["arch"], row["k"]]
        share = math.log10(row["ce_increase"] / 0.001)  # of the way from .001 to .01
        assert x == pytest.approx(across[0.001] + share * (across[0.01] - across[0.001]), abs=0.3)
        share = (row["intruder"] - 0.6) / 0.3
        assert y == pytest.approx(down[0.6] + share * (down[0.9] - down[0.6]), abs=0.3)
    assert "no latents" in evaluation.chart({"coders": {}}, "ce_increase", "intruder")


# What the README says is so.

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
    block = re.sub(
        r"runs/[\w.-]+/skip_transcoder/[\w.]+\.mlp", str(trained / "skip_transcoder/h.1.mlp"), block
    )
    x, y = torch.randn(2, 20, 32)
    names = {"x": x}
    exec(re.sub(r"topk\(\d+", "topk(4", block), names)
    torch.testing.assert_close(names["y_hat"], load_run(trained)[1]["skip_transcoder"](x, y)[0])


def test_commands_are_complete():
    """Each script that the README runs exists, and CI runs the tests as it says."""
    for script in set(re.findall(r"python (\S+\.py)", README)):
        assert (ROOT / script).exists(), script
    assert "python -m pytest -q tests" in (ROOT / ".ci/run").read_text()
