"""eval.py: its numbers against dense float64 computations, its proxy against planted latents."""

import argparse
import contextlib
import io
import json
import math
import re
import shutil
import statistics
import sys
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import change_json, read_json, run, run_here, write_jsonl
from safetensors.torch import load_file, save_file
from test_coders import dense_forward
from test_page import check_page
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eval as evaluation
from skipcoder import ARCHS, Coder, find_sources, load_run, token_batches

FOLDER = "h.1.mlp"


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """What the command line gives for a run: standard output, the JSON, and what the page shows."""
    folder = tmp_path_factory.mktemp("eval")
    sizes = "--tokens 15000 --latents 40 --device cpu"
    files = f"--json {folder}/e.json --html {folder}/e.html"
    seen_page = mock.patch.object(evaluation, "page", side_effect=evaluation.page)
    with seen_page as page, contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert run_here(evaluation, trained, *sizes.split(), *files.split()) == 0
    shown = page.call_args[0][1:]
    html = (folder / "e.html").read_text(encoding="utf-8")
    return stdout.getvalue(), read_json(folder / "e.json"), html, shown


# ---- The report -----------------------------------------------------------------------------

PROXY = {
    "intruder",
    "intruder_se",
    "intruder_sd",
    "intruder_by_quantile",
    "intruder_histogram",
    "latents_scored",
}
SAME_TOKEN = {"intruder_same_token", "intruder_same_token_se", "latents_same_token"}
FIDELITY = {
    "fvu",
    "fvu_all",
    "ce",
    "ce_increase",
    "ce_increase_se",
    "ce_recovered",
    "kl",
    "kl_se",
}


def test_report(evaluated, trained):
    _, report, _, _ = evaluated
    sums = {"tokens", "run", "clean_ce", "mean_ablated_ce", "zero_ablated_ce", "outliers"}
    assert set(report) == {*sums, "coders", "baselines"}
    assert report["run"]["tokens_trained"] == load_run(trained)[0]["tokens_trained"]
    assert report["run"]["k"] == [4] and report["run"]["hookpoint"] == FOLDER

    of_a_coder = {*PROXY, *SAME_TOKEN, *FIDELITY, "arch", "k", "l0", "dead"}
    for arch, row in report["coders"].items():
        alone = {"fvu_latents_alone", "fvu_skip_alone"}
        assert set(row) == of_a_coder | (alone if arch == "skip_transcoder" else set())
        assert row["arch"] == arch and row["k"] == 4
    keys = {name: set(row) for name, row in report["baselines"].items()}
    assert keys.pop("affine") == FIDELITY
    assert keys.pop("null") == PROXY  # random tokens are of no latent
    assert set(keys) == {"neurons", "untrained", "untrained_sae"}
    assert all(found == PROXY | SAME_TOKEN for found in keys.values())

    # Chance is chance, and its error that of 40 latents with 10 trials each.
    null = report["baselines"]["null"]
    assert abs(null["intruder"] - 0.2) < 3 * null["intruder_se"]
    expected = math.sqrt(0.2 * 0.8 / 400)
    assert null["intruder_se"] == pytest.approx(expected, rel=0.3)


def rounded(number, error) -> str:
    """Return both with two digits of the error."""
    digits = 1 - math.floor(math.log10(error))
    return f"{number:.{digits}f} ± {error:.{digits}f}"


def test_tables(evaluated):
    stdout, report, _, _ = evaluated
    blocks = [block for block in stdout.split("\n\n") if block.startswith("|")]
    losses, scores = (block.splitlines() for block in blocks)
    for lines in (losses, scores):  # each fits a page, and its columns stand in line
        assert len({(len(line), line.count("|")) for line in lines}) == 1
        assert len(lines[0]) <= 100
    names = [line.split()[1] for line in losses[2:]]
    assert names == [*ARCHS, "affine"]
    names = [line.split()[1] for line in scores[2:]]
    assert names == [*ARCHS, "neurons", "untrained", "untrained_sae", "null"]

    sae = report["coders"]["sae"]
    (row,) = [line for line in losses if line.startswith("| sae ")]
    assert f" {sae['fvu']:.4f} " in row and f" {sae['l0']:.1f} " in row
    assert f" {rounded(sae['kl'], sae['kl_se'])} " in row
    assert f" {rounded(sae['ce_increase'], sae['ce_increase_se'])} " in row
    (row,) = [line for line in scores if line.startswith("| sae ")]
    assert f" {rounded(sae['intruder'], sae['intruder_se'])} " in row
    same_token = sae["intruder_same_token"], sae["intruder_same_token_se"]
    assert f" {rounded(*same_token)} " in row
    top, *_, lowest = sae["intruder_by_quantile"]
    assert f" {top:.2f} → {lowest:.2f} " in row
    header, *_, null = [[cell.strip() for cell in line.split("|")] for line in scores]
    assert null[header.index("same token")] == ""
    # Eleven bars, the highest full.
    bars = row.split("|")[-2][-12:-1]
    highest = max(sae["intruder_histogram"])
    full = [share == highest for share in sae["intruder_histogram"]]
    assert all(bar == "█" for bar, is_full in zip(bars, full) if is_full)
    empty = [share == 0 for share in sae["intruder_histogram"]]
    assert [bar == " " for bar in bars] == empty


def test_remarks(evaluated):
    stdout, report, _, _ = evaluated
    text = " ".join(stdout.split())
    assert f"{report['tokens']:,} held-out tokens" in text
    for key in ("clean_ce", "mean_ablated_ce", "zero_ablated_ce"):
        assert f"{report[key]:.4f}" in text
    row = report["coders"]["skip_transcoder"]
    for key in ("fvu_latents_alone", "fvu_skip_alone"):
        assert f"{row[key]:.4f}" in text
    assert "stopped early" not in text and "fewer held-out tokens" not in text
    notes = stdout.split("wrote ")[0].splitlines()
    assert max(map(len, notes)) <= 100


def test_a_page_of_a_run(evaluated):
    """What the page says of a latent is what the report counted and what the text holds."""
    _, report, html, (seen, where, scores, promotes, tokenizer) = evaluated
    data = check_page(html)
    assert len(html) < 3e6 and f"{report['coders']['sae']['fvu']:.4f}" in html
    assert set(data["coders"]) == {*ARCHS, "neurons"}
    assert set(promotes) == set(ARCHS)
    for name, on_page in data["coders"].items():
        row = report["coders"].get(name) or report["baselines"][name]
        assert len(on_page) == row["latents_scored"] > 10
        mean = statistics.mean(latent[1] for latent in on_page)
        assert mean == pytest.approx(row["intruder"])
        same_token = [latent[4] for latent in on_page if latent[4] is not None]
        assert len(same_token) == row["latents_same_token"] > 10
        mean = statistics.mean(same_token)
        assert mean == pytest.approx(row["intruder_same_token"])
        judged = scores[name]
        for i, (shown, about) in enumerate(zip(judged.latents, on_page)):
            latent, score, density, largest, same_token, contexts, promoted = about
            places = judged.active.places[latent]
            acts = judged.active.acts[latent]
            assert latent == shown and score == judged.found[i].double().mean()
            assert density == pytest.approx(len(places) / report["tokens"])
            assert largest == acts.max()
            if judged.has_same_token[i]:
                assert same_token == judged.found_same_token[i].double().mean()
            else:
                assert same_token is None
            top = [] if name == "neurons" else promotes[name][i].tolist()
            assert len(top) == (0 if name == "neurons" else 5)
            words = [evaluation.legible(tokenizer, [token])[0] for token in top]
            words = [word for word in words if can_be_seen(word)]
            assert [data["text"][word] for word in promoted] == words
            check_contexts(contexts, where[places], acts, data["text"], seen, tokenizer)


def can_be_seen(word) -> bool:
    rest = re.sub(r"\\u[0-9a-f]{4}|[ ↵⇥]", "", word)
    return rest != "" and "�" not in rest


def check_contexts(contexts, active, acts, text, seen, tokenizer):
    """Check all that a page says of one latent, which is active at these indices of the text."""
    width = seen.shape[1]
    n = len(active)
    digits = (acts / acts.max() * 9).ceil()
    digit_at = dict(zip(active.tolist(), digits.tolist()))
    ranks = [0, 1, 2, 3]
    for share in (0.3, 0.5, 0.7, 0.9):
        ranks.append(int(share * n))
    assert len(contexts) == len(ranks)
    for rank, (peak, words, levels) in zip(ranks, contexts):
        assert len(words) == len(levels) <= 25
        row, column = divmod(active[rank].item(), width)
        legible = evaluation.legible(tokenizer, seen[row].tolist())
        start = column - peak
        assert start == max(0, column - 12)
        assert [text[word] for word in words] == legible[start : column + 13]
        for i, level in enumerate(levels):
            assert int(level) == digit_at.get(row * width + start + i, 0)
    assert contexts[0][2][contexts[0][0]] == "9"


# ---- Numbers against dense ones in float64 --------------------------------------------------


class Dense:
    """The LM in float64, and the MLP of block 1 with something in its place."""

    def __init__(self, folder, device):
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.lm = lm.eval().to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, tokens, y_hat=None, counted=None):
        """Return log p [rows, 30, vocabulary], and x, y and hidden [rows, 31, d].

        With y_hat [rows, 31, d] in place of y where counted [rows, 31].
        """

        def hook(module, args, output):
            seen.extend([args[0], output.clone()])
            if y_hat is not None:
                output[:, 1:][counted] = y_hat[counted]
            return output

        seen = []
        handle = self.lm.transformer.h[1].mlp.register_forward_hook(hook)
        output = self.lm(tokens.to(self.device), output_hidden_states=True)
        handle.remove()
        log_p = output.logits.log_softmax(-1)[:, 1:-1]
        x, y = seen
        return log_p, x[:, 1:], y[:, 1:], output.hidden_states[-1][:, 1:]


def mean_and_error(values, counted):
    """Return the mean of the counted values [rows, n], and its error over rows.

    The mean is a ratio of two sums over rows. Its error is that of the residuals of the ratio.
    """
    sums = torch.where(counted, values, 0).sum(1)
    numbers = counted.double().sum(1)
    mean = sums.sum() / numbers.sum()
    residuals = sums - mean * numbers
    error = residuals.std() * math.sqrt(len(values)) / numbers.sum()
    return mean.item(), error.item()


def sum_of_squares(a) -> float:
    return a.square().sum().item()


def variance(a) -> float:
    return sum_of_squares(a - a.mean(0))


def with_one(x):
    return F.pad(x, (0, 1), value=1)


@pytest.fixture
def by_hand(trained, tiny, device, monkeypatch):
    """An evaluation with outliers, what it read, and the text and the LM for dense numbers.

    Its max_norm is such that one token in twenty is an outlier.
    """
    config, coders = load_run(trained, device)
    args = argparse.Namespace(run=trained, tokens=6000, latents=20, seed=0, device=device)
    args.dataset = config["dataset"]
    args.subset = None
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sources = find_sources(config["dataset"], None)
    kept = torch.cat([*token_batches(sources, tokenizer, 32, 32, held_out=False)])
    held_out = torch.cat([*token_batches(sources, tokenizer, 32, 32, held_out=True)])
    held_out = held_out[:224]  # the first multiple of 32 rows with 6000 tokens
    assert held_out[:, 1:].numel() >= 6000 > held_out[32:, 1:].numel()

    # A limit half way from one |y| to the next.
    dense = Dense(tiny, device)
    y_rows = dense(held_out)[2]
    norm = y_rows.norm(dim=-1).flatten().sort().values
    two = norm[len(norm) * 19 // 20 :][:2]
    config["max_norm"] = two.mean().item()

    # Keep what the affine map is fitted on, and what contexts are judged by.
    seen = argparse.Namespace(training=[], judged=[])
    fit = evaluation.fit_affine
    judge = evaluation.intruder_found

    def fit_affine(patched, batches, *more):
        seen.training = list(batches)
        return fit(patched, seen.training, *more)

    def intruder_found(trials, hidden, mean):
        seen.judged.append((hidden, mean))
        return judge(trials, hidden, mean)

    read = evaluation.read_held_out

    def read_held_out(patched, batches, coders, baselines, max_norm):
        seen.untrained = baselines["untrained"]
        seen.sample = read(patched, batches, coders, baselines, max_norm)
        return seen.sample

    monkeypatch.setattr(evaluation, "read_held_out", read_held_out)
    monkeypatch.setattr(evaluation, "fit_affine", fit_affine)
    monkeypatch.setattr(evaluation, "intruder_found", intruder_found)
    monkeypatch.setattr(evaluation, "CE_TOKENS", 3000)
    seen.report, seen.shown = evaluation.evaluate(config, coders, args)
    seen.training = torch.cat(seen.training)
    return argparse.Namespace(
        config=config,
        coders=coders,
        args=args,
        kept=kept,
        held_out=held_out,
        dense=dense,
        seen=seen,
    )


def test_numbers_equal_a_dense_float64_computation(by_hand):
    """Every number of the report for the coders, the affine map and the ablations, anew."""
    report = by_hand.seen.report
    dense = by_hand.dense
    held_out = by_hand.held_out
    limit = by_hand.config["max_norm"]

    # Which tokens count.
    clean, x_rows, y_rows, hidden = dense(held_out)
    counted = y_rows.norm(dim=-1) < limit  # [rows, 31]
    x, y = x_rows[counted], y_rows[counted]  # [n, d]
    n = len(y)
    of_all = counted.numel()
    assert report["tokens"] == n < 0.96 * of_all
    tokens_read, places, scores, promotes, _ = by_hand.seen.shown
    assert torch.equal(tokens_read.flatten()[places], held_out[:, 1:][counted.cpu()])
    all_y = y_rows.flatten(0, 1)
    share = 1 - variance(y) / variance(all_y)
    expected = {"tokens": 1 - n / of_all, "variance": share}
    assert report["outliers"] == pytest.approx(expected, rel=1e-4)

    # What the affine map and the mean are fitted on: counted tokens of training text.
    training = by_hand.seen.training
    assert torch.equal(training, by_hand.kept[: len(training)])
    assert training.numel() >= 200 * 32
    _, x_train, y_train, _ = dense(training)
    fits = y_train.norm(dim=-1) < limit
    x_train, y_train = x_train[fits], y_train[fits]
    affine = torch.linalg.lstsq(with_one(x_train), y_train).solution

    # y_hat of each, [rows, 31, d].
    y_hats = {"affine": with_one(x_rows) @ affine}
    y_hats["mean"] = y_train.mean(0).expand_as(y_rows)
    y_hats["zero"] = torch.zeros_like(y_rows)
    for arch, coder in by_hand.coders.items():
        y_hat, z = dense_forward(coder.double(), x_rows.flatten(0, 1), all_y, k=4)
        y_hats[arch] = y_hat.view_as(y_rows)
        z = z[counted.flatten()]  # [n, M]

        # Which latents are active, and how much.
        row = report["coders"][arch]
        shares = (z > 0).double().mean(0).cpu()  # of the tokens
        dead = (shares == 0).double().mean().item()
        assert row["l0"] == pytest.approx(shares.sum().item(), rel=1e-3)
        assert row["dead"] == pytest.approx(dead, abs=0.01)
        active = scores[arch].active
        assert_close(active.density, shares, atol=1e-3, rtol=0)
        assert len(scores[arch].latents) == row["latents_scored"] == 20
        directions = coder.W_dec[scores[arch].latents]
        top = evaluation.promoted(dense.lm, directions)
        assert (promotes[arch].cpu() != top.cpu()).double().mean() < 0.05  # near ties may differ
        for latent in scores[arch].latents:
            tokens = active.places[latent]
            acts = active.acts[latent]
            fires = z[:, latent].nonzero().flatten().tolist()
            assert len(set(tokens.tolist()) ^ set(fires)) <= 1  # ties may fall either way
            assert_close(acts.double(), z[tokens, latent].cpu(), rtol=1e-2, atol=1e-3)

        # The skip transcoder's parts alone, each with the best constant.
        if coder.W_skip is not None:
            skip = x @ coder.W_skip.T
            without = y - (y_hats[arch][counted] - skip)
            alone = row["fvu_latents_alone"], row["fvu_skip_alone"]
            expected = variance(without) / variance(y), variance(y - skip) / variance(y)
            assert alone == pytest.approx(expected, rel=1e-3)

    # What contexts are judged by.
    for judged, mean in by_hand.seen.judged:
        assert_close(judged.double(), hidden[counted].cpu(), rtol=0.01, atol=0.01)
        assert_close(mean.double(), hidden[counted].mean(0).cpu(), rtol=0.01, atol=0.01)

    # FVU, of counted tokens and of all.
    rows = report["coders"] | {"affine": report["baselines"]["affine"]}
    for name, row in rows.items():
        error = y_rows - y_hats[name]
        fvu = sum_of_squares(error[counted]) / variance(y)
        assert row["fvu"] == pytest.approx(fvu, rel=1e-3)
        fvu_all = sum_of_squares(error) / variance(all_y)
        assert row["fvu_all"] == pytest.approx(fvu_all, rel=1e-3)

    # CE and KL: of the first batches of 32 rows that make 3000 predictions, of counted tokens.
    held_out, clean = held_out[:128], clean[:128]
    following = held_out[:, 2:, None].to(clean.device)
    predicting = counted[:128, :-1]
    assert not predicting.all()
    ce = {"clean": -clean.gather(-1, following).squeeze(-1)}
    kl = {}
    for name, y_hat in y_hats.items():
        log_p, *_ = dense(held_out, y_hat[:128], counted[:128])
        ce[name] = -log_p.gather(-1, following).squeeze(-1)
        kl[name] = (clean.exp() * (clean - log_p)).sum(-1)
    keys = {"clean": "clean_ce", "mean": "mean_ablated_ce", "zero": "zero_ablated_ce"}
    for name, key in keys.items():
        mean, _ = mean_and_error(ce[name], predicting)
        assert report[key] == pytest.approx(mean, rel=1e-5)
    harm, _ = mean_and_error(ce["mean"] - ce["clean"], predicting)
    for name, row in rows.items():
        increase, error = mean_and_error(ce[name] - ce["clean"], predicting)
        mean, _ = mean_and_error(ce[name], predicting)
        assert row["ce"] == pytest.approx(mean, rel=1e-5)
        assert row["ce_increase"] == pytest.approx(increase, abs=1e-4)
        assert row["ce_increase_se"] == pytest.approx(error, rel=1e-2)
        assert row["ce_recovered"] == pytest.approx(1 - increase / harm, abs=2e-3)
        mean, error = mean_and_error(kl[name], predicting)
        assert row["kl"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert row["kl_se"] == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("name", ["untrained", "untrained_sae"])
def test_untrained_coders(by_hand, name):
    """Each is a coder at its start, but not at that of the run's, and reads what its kind reads.

    That is x for a transcoder. An autoencoder reads y, without its mean.
    """
    assert set(by_hand.seen.untrained) == {"untrained", "untrained_sae"}
    coder = by_hand.seen.untrained[name]
    arch = "sae" if name == "untrained_sae" else "transcoder"
    assert coder.arch == arch and coder.k == 4
    start = Coder(arch, 32, 256, 4, seed=0)
    assert coder.W_enc.shape == start.W_enc.shape
    assert (coder.W_enc.cpu() - start.W_enc).abs().mean() > 0.1
    assert_close(coder.W_enc.norm(dim=1).cpu(), torch.ones(256))

    def read(tokens):
        """Return which tokens count [rows, 31], and x, y of these."""
        _, x_rows, y_rows, _ = by_hand.dense(tokens)
        counted = y_rows.norm(dim=-1) < by_hand.config["max_norm"]
        return counted.cpu(), x_rows[counted], y_rows[counted]

    # On training text, its pre-activations have mean zero. The biases say so.
    _, x, y = read(by_hand.seen.training)
    W_enc = coder.W_enc.double()
    b_enc = coder.b_enc.double()
    y_mean = y.mean(0)
    pre = F.linear(y - y_mean if arch == "sae" else x, W_enc, b_enc)
    assert pre.mean(0).abs().max() < 1e-3 * pre.std()
    assert_close(coder.b_dec.double(), y_mean, rtol=1e-3, atol=1e-5)

    # Its active latents on held-out text are the four largest.
    counted, x, y = read(by_hand.held_out)
    pre = F.linear(y - y_mean if arch == "sae" else x, W_enc, b_enc)
    largest = pre.topk(4).indices
    kept = torch.zeros_like(pre).scatter(1, largest, 1)
    z = (kept * pre).relu().cpu()
    entries = by_hand.seen.sample.active[name]
    places, latents, acts = map(torch.cat, zip(*entries))
    found = torch.zeros_like(z)
    found[places, latents] = acts.double()
    fires = found > 0
    expected = z > 0
    assert (fires != expected).sum() <= 10  # ties may fall either way
    both = fires & expected
    assert_close(found[both], z[both], rtol=1e-2, atol=1e-3)

    # The row of the report is about these latents.
    tokens = by_hand.held_out[:, 1:][counted]
    hidden = torch.cat(by_hand.seen.sample.hidden)
    mean = hidden.float().mean(0)
    scores = evaluation.Scores(entries, 256, tokens, hidden, mean, wanted=20, seed=0)
    assert by_hand.seen.report["baselines"][name] == scores.row()


def test_a_coder_is_evaluated_alone_as_beside_others(by_hand):
    """Its numbers, and the baselines', do not depend on which coders are there."""
    one = {"skip_transcoder": by_hand.coders["skip_transcoder"]}
    alone, _ = evaluation.evaluate(by_hand.config, one, by_hand.args)
    together = by_hand.seen.report
    assert alone["coders"] == {"skip_transcoder": together["coders"]["skip_transcoder"]}
    assert alone["baselines"] == together["baselines"]


# ---- The proxy on hidden states that we make up ---------------------------------------------


def score(types: int, shared: float = 0, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the score of latents that each stand for so many of 512 token types.

    The hidden state of a type is a direction and noise; `shared` is the size of what all have.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    kind = torch.randint(512, (60_000,), generator=generator)  # [N] the type of each token
    directions = random(512, 64) + shared * random(64)
    hidden = (directions[kind] + 0.5 * random(len(kind), 64)).to(dtype)
    latent = kind // types
    tokens = [(latent == j).nonzero().flatten() for j in range(512 // types)]
    trials, _ = evaluation.intruder_trials(tokens, kind, generator)
    found = evaluation.intruder_found(trials, hidden, hidden.float().mean(0))
    return evaluation.summary(found)["intruder"]


def test_planted_latents_score_near_one_and_merging_lowers_the_score():
    scores = [score(types) for types in (1, 2, 4, 8)]
    assert scores[0] > 0.97
    for high, low in pairwise(scores):
        assert high > low + 0.03


def test_contexts_are_centred():
    """What all hidden states share is taken away: it would hide what distinguishes them."""
    assert score(1, shared=1e5, dtype=torch.float32) > 0.95


SAME_TOKEN_OR_NOT = pytest.mark.parametrize("same_token", [False, True])


@SAME_TOKEN_OR_NOT
def test_trials_show_four_tokens_of_a_fifth_and_one_on_which_the_latent_is_silent(same_token):
    """Each latent is active on most tokens: an intruder drawn from all would be an active one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (600,), generator=generator)
    of_latents = [torch.randperm(600, generator=generator)[:500] for _ in range(20)]
    trials, possible = evaluation.intruder_trials(of_latents, tokens, generator, same_token)
    assert trials.shape == (20, 10, 5) and possible.tolist() == [True] * 20
    for of_latent, places in zip(trials, of_latents):
        for t, (*shown, intruder) in enumerate(of_latent.tolist()):
            start = 100 * (t % 5)
            fifth = places[start : start + 100].tolist()
            assert len(set(shown)) == 4 and set(shown) <= set(fifth)
            assert intruder not in places.tolist()
    # Intruders are drawn anew in each trial, and from all tokens on which it is silent.
    assert len(trials[..., 4].unique()) > 100


def shares_of_intruders(active, tokens, same_token) -> list:
    """Return the probability of each place to be the intruder, counted one by one."""
    active, tokens = set(active.tolist()), tokens.tolist()
    weights = []
    for place, token in enumerate(tokens):
        weight = 0 if place in active else 1
        if same_token and weight:
            occurrences = {i for i, other in enumerate(tokens) if other == token}
            fires = occurrences & active
            silent = occurrences - active
            weight = len(fires) / len(silent)
        weights.append(weight)
    return [weight / sum(weights) for weight in weights]


def active_on_some():
    """Text of ten tokens, and where a latent is active: often on some, always on one, never on two.

    Return the places and the tokens [400].
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, (400,), generator=generator)
    share = torch.tensor([1, 0, 0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1])
    fires = torch.rand(400, generator=generator) < share[tokens]
    places = fires.nonzero().flatten()
    order = torch.randperm(len(places), generator=generator)
    return places[order], tokens


@SAME_TOKEN_OR_NOT
def test_weights_of_intruders(same_token):
    """Against counts in plain Python."""
    active, tokens = active_on_some()
    weights = evaluation.intruder_weights(active, tokens, same_token)
    shares = weights.double() / weights.double().sum()
    expected = shares_of_intruders(active, tokens, same_token)
    assert shares.tolist() == pytest.approx(expected, rel=1e-5)

    # By token: all silent places alike, or as often as the latent is active on the token.
    of_token = torch.zeros(10).double().index_add_(0, tokens, shares)
    number = tokens.bincount(minlength=10)
    number_active = tokens[active].bincount(minlength=10)
    of_interest = number - number_active
    if same_token:
        of_interest = number_active.clone()
        of_interest[0] = 0  # the latent is active wherever it occurs
    assert_close(of_token, of_interest / of_interest.sum().double())


@SAME_TOKEN_OR_NOT
def test_intruders_are_drawn_by_their_weights(same_token):
    """20,000 draws for one latent, within five standard deviations of what is expected."""
    active, tokens = active_on_some()
    generator = torch.Generator().manual_seed(0)
    trials, possible = evaluation.intruder_trials([active] * 2000, tokens, generator, same_token)
    assert possible.all()
    drawn = trials[..., 4].flatten().bincount(minlength=400).double()
    expected = 20_000 * torch.tensor(shares_of_intruders(active, tokens, same_token)).double()
    assert ((drawn - expected).abs() <= 5 * expected.sqrt()).all()  # and never what has none
    # Also by token.
    drawn = torch.zeros(10).double().index_add_(0, tokens, drawn)
    expected = torch.zeros(10).double().index_add_(0, tokens, expected)
    assert ((drawn - expected).abs() <= 5 * expected.sqrt()).all()
    if same_token:
        assert drawn[:3].tolist() == [0, 0, 0]  # always or never active


def test_a_latent_that_is_active_on_every_occurrence_has_no_trials_of_the_same_token():
    """It has no part in their mean, and is not counted among the latents that have."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, (2000,), generator=generator)
    hidden = torch.randn(2000, 8, generator=generator)
    half = torch.rand(2000, generator=generator) < 0.5
    low = half & (tokens < 5)
    high = half & (tokens > 2)
    fires = [tokens == 0, low, tokens < 3, high, tokens == 9]
    entries = []
    for latent, of_latent in enumerate(fires):
        places = of_latent.nonzero().flatten()
        acts = torch.ones(len(places))
        entries.append((places, torch.full_like(places, latent), acts))
    mean = hidden.float().mean(0)
    scores = evaluation.Scores(entries, 5, tokens, hidden, mean, wanted=5, seed=0)
    assert sorted(scores.latents) == [0, 1, 2, 3, 4]
    has_some = [latent in (1, 3) for latent in scores.latents]
    assert scores.has_same_token.tolist() == has_some

    row = scores.row()
    assert row["latents_scored"] == 5 and row["latents_same_token"] == 2
    assert row["intruder"] == pytest.approx(scores.found.double().mean().item())
    kept = scores.found_same_token[has_some].double().mean(1)
    assert row["intruder_same_token"] == pytest.approx(kept.mean().item())
    error = (kept[0] - kept[1]).abs().item() / 2
    assert row["intruder_same_token_se"] == pytest.approx(error)

    # Where it is so for all but one, there is no score, as with one latent.
    of_one = [entry for latent, entry in enumerate(entries) if latent != 3]
    row = evaluation.Scores(of_one, 5, tokens, hidden, mean, wanted=5, seed=0).row()
    assert row["latents_scored"] == 4 and row["latents_same_token"] == 1
    assert row["intruder_same_token"] is row["intruder_same_token_se"] is None
    assert row["intruder"] is not None


def scores_in_context(share, types) -> tuple:
    """Return the scores, plain and with the same token, of latents for some of 256 token types.

    A token is of one of four contexts, and its hidden state is the sum of a direction of its type,
    one of its context, and noise. Each latent is active on a quarter of the occurrences of its
    types: where the context is the first, or with chance 1 - `share` anywhere.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    kind = torch.randint(256, (80_000,), generator=generator)  # [N]
    context = torch.randint(4, kind.shape, generator=generator)
    anywhere = torch.rand(kind.shape, generator=generator) > share
    other = torch.randint(4, kind.shape, generator=generator)
    fires = torch.where(anywhere, other, context) == 0
    noise = 0.5 * random(len(kind), 64)
    hidden = random(256, 64)[kind] + 0.7 * random(4, 64)[context] + noise
    places = fires.nonzero().flatten()
    acts = torch.rand(len(places), generator=generator)
    entries = [(places, kind[places] // types, acts)]
    mean = hidden.float().mean(0)
    scores = evaluation.Scores(entries, 256 // types, kind, hidden, mean, wanted=256, seed=0)
    row = scores.row()
    assert row["latents_scored"] == row["latents_same_token"] == 256 // types
    return row["intruder"], row["intruder_same_token"]


@pytest.mark.parametrize("types", [1, 2])
def test_random_occurrences_of_some_tokens_score_at_chance_against_the_same_token(types):
    """Such a latent stands for nothing but its tokens, and the plain score does not tell."""
    plain, same_token = scores_in_context(0, types)
    assert plain > 0.5
    error = math.sqrt(0.2 * 0.8 / 10 / (256 // types))
    assert abs(same_token - 0.2) < 4 * error


def test_a_token_in_one_kind_of_context_scores_high_in_both_kinds_of_trials():
    """The fewer occurrences outside of this context, the higher the harder score."""
    scores = [scores_in_context(share, types=1) for share in (0, 0.4, 0.7, 1)]
    assert all(plain > 0.9 for plain, _ in scores)
    for (_, low), (_, high) in pairwise(scores):
        assert high > low + 0.1
    assert scores[-1][1] > 0.9


def test_the_intruder_is_the_context_with_the_smallest_sum_of_similarities():
    """Planted by hand: four directions that are near one another, and one that is not."""
    near = [[1, 0.1], [1, 0], [1, -0.1], [0.9, 0.2]]
    states = torch.tensor([*near, [-1, 1], [1, 0.5]])
    trials = torch.tensor([[[0, 1, 2, 3, 4], [0, 1, 2, 4, 3], [0, 1, 2, 3, 5]]])
    found = evaluation.intruder_found(trials, states + 7, torch.full((2,), 7.0))
    assert found.tolist() == [[True, False, True]]
    # Its length does not matter.
    states[4] *= 9
    found = evaluation.intruder_found(trials, states, 0)
    assert found.tolist() == [[True, False, True]]


def test_summary():
    """The trials of a latent, in columns, take the fifths in turn; errors are over latents."""
    found = [[1, 1, 1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1, 1, 1, 0, 0]]
    row = evaluation.summary(torch.tensor(found).bool())
    assert row.pop("intruder_by_quantile") == [1, 0.75, 0.5, 0.25, 0]
    assert row.pop("intruder_histogram") == [0, 0, 0, 0, 0.5, 0, 0.5, 0, 0, 0, 0]
    expected = {"intruder": 0.5, "intruder_se": 0.1, "intruder_sd": math.sqrt(0.02)}
    assert row == pytest.approx(expected | {"latents_scored": 2})


def test_active_tokens():
    """Where each is active, and how much, largest first, from the entries of two batches."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(2000, 30, generator=generator)
    z *= torch.rand(2000, 30, generator=generator) < 0.05
    entries = []
    first = 0
    for part in z.split(1200):
        acts, indices = part.topk(12)
        entries.append(evaluation.active_entries(acts, indices, first))
        first += len(part)
    assert sum(len(token) for token, _, _ in entries) == (z > 0).sum()

    active = evaluation.ActiveTokens(entries, 30, 2000)
    assert torch.equal(active.count, (z > 0).sum(0))
    assert torch.equal(active.density, (z > 0).double().mean(0))
    for j in range(30):
        tokens = active.places[j]
        acts = active.acts[j]
        assert set(tokens.tolist()) == set(z[:, j].nonzero().flatten().tolist())
        assert_close(acts, z[tokens, j])
        assert (acts.diff() <= 0).all()


def test_latents_that_are_drawn_can_be_scored():
    """They are active on 40 tokens at least, and not on all."""

    def draw(number, counts):
        entries = []
        for latent, count in enumerate(counts):
            token = torch.arange(count)
            entries.append((token, torch.full((count,), latent), torch.ones(count)))
        active = evaluation.ActiveTokens(entries, len(counts), 2000)
        return active.draw(number, torch.Generator().manual_seed(0))

    order = draw(30, [100] * 30)
    assert sorted(order) == list(range(30)) != order
    dead, rare, enough, always = order[:4]  # they would be the first to be scored
    counts = [100] * 30
    counts[dead] = 0
    counts[rare] = 39
    counts[enough] = 40
    counts[always] = 2000
    assert draw(10, counts) == [enough, *order[4:13]]


def test_promoted_tokens(tiny):
    """Those with the largest products of the unembedding and the direction, centred.

    And times the final norm's weight.
    """
    lm = AutoModelForCausalLM.from_pretrained(tiny)
    W = torch.randn(7, 32)
    norm = lm.transformer.ln_f
    norm.weight.data = torch.rand(32) + 0.5
    norm.bias.data = 100 * torch.randn(32)
    centred = W - W.mean(1, keepdim=True)
    logits = centred * norm.weight @ lm.lm_head.weight.T
    assert torch.equal(evaluation.promoted(lm, W), logits.topk(5).indices)


# ---- Sentences ------------------------------------------------------------------------------

# (KL, score, its error) of one or two k, in numbers that we make up.
LINES = {
    "sae": [(0.04, 0.7, 0.01), (0.01, 0.6, 0.05)],
    "transcoder": [(0.02, 0.8, 0.02), (0.002, 0.8, 0.04)],
    "skip_transcoder": [(1e-3, 0.9, 0.02)],
}


def made_up() -> dict:
    rows = {}
    for arch, line in LINES.items():
        for k, (kl, score, error) in zip((8, 64), line):
            row = {"arch": arch, "k": k, "kl": kl, "intruder": score, "intruder_se": error}
            row |= {"intruder_same_token": score / 2, "intruder_same_token_se": 0.0}
            rows[f"{arch}-k{k}"] = row
    return {"coders": rows, "baselines": {}}


def test_scores_are_compared_at_equal_kl():
    """Where the lines overlap, from .01 to .02.

    The SAE's is .6 to .65 there, and .625 in the mean over log KL.
    """
    report = made_up()
    (sentence,) = evaluation.compare(report, "transcoder", "sae")
    numbers = map(float, re.findall(r"[-+]?\d*\.\d+", sentence))
    low, high, difference, error, harder, no_error = numbers
    assert (low, high) == (0.01, 0.02) and ", transcoder minus sae: intruder +" in sentence
    assert difference == pytest.approx(0.175, abs=1e-3)
    assert harder == pytest.approx(0.175 / 2, abs=1e-3) and no_error == 0

    # Both lines are straight there, so the mean is the score in the middle of the overlap. That
    # lies at these shares of the way from the lower to the higher point.
    of_sae = 0.25
    of_transcoder = 1 - math.log(2) / 2 / math.log(10)
    variance = (of_sae * 0.01) ** 2 + ((1 - of_sae) * 0.05) ** 2
    variance += (of_transcoder * 0.02) ** 2 + ((1 - of_transcoder) * 0.04) ** 2
    assert error == pytest.approx(math.sqrt(variance), rel=0.1)

    (sentence,) = evaluation.compare(report, "sae", "transcoder")
    assert "sae minus transcoder: intruder -0.175" in sentence
    assert evaluation.compare(report, "skip_transcoder", "transcoder") == []  # one k is no line
    for k in (8, 64):  # without two points of a score, there is no line either
        report["coders"][f"sae-k{k}"]["intruder_same_token"] = None
        assert evaluation.compare(report, "transcoder", "sae") == []


EVIL = '<script>alert(1)</script><b>bold</b> <!-- </script> & "quotes" \x07 é 日本\t\n'


def test_what_is_missing_is_said(trained, tmp_path, capsys, monkeypatch):
    """A run that was stopped, a k above the number of neurons, little text, no latent scored.

    And what documents contain is escaped on the page.
    """
    folder = shutil.copytree(trained, tmp_path / "run")
    # As in runs of before there was a max_norm.
    change_json(folder / "config.json", ["max_norm"], tokens=1_000_000)
    for arch in ARCHS:
        change_json(folder / arch / FOLDER / "cfg.json", k=200)
    text = write_jsonl(tmp_path / "evil.jsonl", [f"{i} {EVIL}" * 10 for i in range(100)])
    args = f"{folder} --dataset {text} --latents 10 --device cpu --tokens 123456"
    args += f" --json {tmp_path}/e.json --html {tmp_path}/e.html"

    assert run_here(evaluation, *args.split()) == 0
    stdout = " ".join(capsys.readouterr().out.split())
    assert "stopped early" in stdout and "1,000,000" in stdout
    assert "fewer held-out tokens" in stdout and "123,456" in stdout
    words = check_page((tmp_path / "e.html").read_text(encoding="utf-8"))["text"]
    assert any("<" in word for word in words) and any("↵" in word for word in words)
    assert "\\u0007" in words

    monkeypatch.setattr(evaluation, "MIN_ACTIVE", 10**9)
    assert run_here(evaluation, *args.split()) == 0
    stdout = " ".join(capsys.readouterr().out.split())
    assert "sae, transcoder, skip_transcoder, neurons, untrained, untrained_sae" in stdout
    report = read_json(tmp_path / "e.json")
    for row in report["coders"].values():
        assert row["intruder"] is row["intruder_se"] is row["intruder_sd"] is None
        assert row["latents_scored"] == 0
        assert row["fvu"] > 0 and 32 < row["l0"] <= 200
    assert report["baselines"]["null"]["intruder"] is not None
    data = check_page((tmp_path / "e.html").read_text(encoding="utf-8"))
    assert not any(data["coders"].values())


def check_files(folder, stdout):
    """Check the three files of an evaluation in the folder."""
    for ending in ("json", "html", "svg"):
        assert f"wrote {folder}/e.{ending}" in stdout
    assert read_json(folder / "e.json")["tokens"] >= 1000
    html = (folder / "e.html").read_text(encoding="utf-8")
    assert "↵" in "".join(check_page(html)["text"])
    svg = (folder / "e.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg") and "(← better)" in svg and "(↑ better)" in svg


SMALL = ["--tokens=2000", "--latents=10", "--device=cpu"]


def all_files(folder):
    return [f"--{ending}={folder}/e.{ending}" for ending in ("json", "html", "svg")]


def test_a_console_that_lacks_characters_costs_nothing(trained, tmp_path):
    """Files are written in UTF-8, and printing cannot fail, in a locale that knows ASCII only."""
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ascii_only["PYTHONIOENCODING"] = "ascii"
    done = run("eval.py", trained, *SMALL, *all_files(tmp_path), **ascii_only)
    assert done.returncode == 0, done.stderr
    check_files(tmp_path, done.stdout)
    assert " ? " in done.stdout
    # It said what it did.
    for phase in ("affine map", "held-out text", "intruder trials"):
        assert phase in done.stderr


def test_a_console_of_windows_costs_nothing(trained, tmp_path, monkeypatch):
    """It has "±", and neither "→" nor bars."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert run_here(evaluation, trained, *SMALL, *all_files(tmp_path)) == 0
    sys.stdout.flush()
    stdout = written.getvalue().decode("cp1252")
    check_files(tmp_path, stdout)
    assert " ± " in stdout and "top ? lowest" in stdout and "→" not in stdout


# ---- Coders of others -----------------------------------------------------------------------


def as_sparsify_writes(folder, tensors, **cfg):
    """Write a coder as EleutherAI's sparsify does; 0 latents means expansion_factor x d_in."""
    folder.mkdir(parents=True)
    defaults = {
        "activation": "topk",
        "expansion_factor": 8,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": 4,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": 32,
    }
    (folder / "cfg.json").write_text(json.dumps(defaults | cfg))
    save_file(tensors, folder / "sae.safetensors")


def llama(folder, tiny):
    """Write a tiny Llama with random weights, and the tokenizer of the tiny GPT-2."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("hookpoint", ["h.1.mlp", "layers.1.mlp"])
def test_a_run_of_sparsify(trained, tiny, tmp_path, capsys, hookpoint):
    """Its folders need a config.json of six keys, written by hand. Names are free."""
    run = tmp_path / "run"
    kinds = {"theirs": "sae", "t": "transcoder", "skip": "skip_transcoder"}
    folders = {"theirs": hookpoint, "t": f"t/{hookpoint}", "skip": f"skip/{hookpoint}"}
    for name, arch in kinds.items():
        tensors = load_file(trained / arch / FOLDER / "sae.safetensors")
        as_sparsify_writes(
            run / folders[name],
            tensors,
            transcode=arch != "sae",
            skip_connection=arch == "skip_transcoder",
        )
    model = tiny if hookpoint == FOLDER else llama(tmp_path / "llama", tiny)
    config = {
        "model": str(model),
        "layer": 1,
        "dataset": str(tiny / "text.jsonl"),
        "subset": None,
        "ctx_len": 32,
        "coders": folders,
    }
    (run / "config.json").write_text(json.dumps(config))

    assert run_here(evaluation, run, *SMALL, *all_files(tmp_path)) == 0
    stdout = capsys.readouterr().out
    check_files(tmp_path, stdout)
    assert "M 256, k 4.\n" in stdout
    report = read_json(tmp_path / "e.json")
    assert report["outliers"]["tokens"] == 0
    assert {name: row["arch"] for name, row in report["coders"].items()} == kinds
    if model == tiny:  # then the numbers are those of the run that we took the weights from
        assert run_here(evaluation, trained, *SMALL, *all_files(tmp_path)) == 0
        ours = read_json(tmp_path / "e.json")["coders"]
        for name, arch in kinds.items():
            assert report["coders"][name] == ours[arch]
