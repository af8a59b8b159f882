"""eval.py: its numbers against dense float64 computations, its scores against planted latents."""

import copy
import json
import math
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import change_json, flags, read_json, run, run_here, write_jsonl
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import skipcoder
from skipcoder import ARCHS, Coder, find_sources, load_run, token_batches

FOLDER = "h.1.mlp"
SMALL = ["--tokens=2000", "--latents=10", "--device=cpu"]


@pytest.fixture
def measure(tmp_path, capsys):
    """A function that runs eval.py with little text, and returns the report and what it printed.

    The latter is without white space, as lines are broken anywhere.
    """

    def measure(run, *more):
        assert run_here(evaluation, run, *SMALL, "--json", tmp_path / "m.json", *more) == 0
        return read_json(tmp_path / "m.json"), "".join(capsys.readouterr().out.split())

    return measure


# ---- The report -----------------------------------------------------------------------------

NAMES = "intruder", "one_word", "detection", "intruder_token", "detection_lookup", "detection_fpr"
SCORES = {key + ending for key in NAMES for ending in ("", "_se", "_share")}
SCORES |= {"latents_scored", "eligible", "intruder_sd", "detection_tpr"}
LOSSES = {"fvu", "ce", "ce_increase", "ce_increase_se", "ce_recovered", "kl", "kl_se"}
BASELINES = ["affine", "token", "untrained", "untrained_sae", "neurons", "null"]


def test_report(evaluated, trained):
    report = evaluated.report
    sums = {"tokens", "tokens_asked_for", "run", "clean_ce", "mean_ablated_ce", "zero_ablated_ce"}
    assert set(report) == sums | {"outliers", "coders", "baselines"}
    config = load_run(trained)[0]
    assert report["run"].items() >= config.items() and report["run"]["hookpoint"] == FOLDER
    assert report["tokens"] >= report["tokens_asked_for"] == 15_000
    for arch, row in report["coders"].items():
        assert set(row) == SCORES | LOSSES | {"arch", "k", "num_latents", "l0", "dead"}
        assert row["arch"] == arch and row["k"] == 4 and row["num_latents"] == 256
        assert 0 < row["fvu"] < 0.9 and 0 < row["ce_recovered"] < 1
    keys = {name: set(row) for name, row in report["baselines"].items()}
    assert keys.pop("affine") == keys.pop("token") == LOSSES
    assert keys == dict.fromkeys(BASELINES[2:], SCORES)

    # Chance is chance, and its error that of 40 latents with 10 trials each.
    null = report["baselines"]["null"]
    for key, chance in (("intruder", 0.2), ("one_word", 0.2), ("detection", 0.5)):
        assert abs(null[key] - chance) < 3.5 * null[f"{key}_se"]
    expected = math.sqrt(0.2 * 0.8 / 400)
    assert null["intruder_se"] == pytest.approx(expected, rel=0.3)


def test_table(evaluated):
    """One table: each number with its error, which decides on the digits of its column."""
    short, stdout, report = evaluation.short, evaluated.stdout, evaluated.report
    assert [short(x, 2) for x in (0.123, -0.5, 10.2)] == [".12", "-.50", "10.20"]
    lines = stdout.split("\n\n")[0].splitlines()[-10:]
    assert max(map(len, stdout.splitlines())) <= 100 and len({len(line) for line in lines}) == 1
    rows = report["coders"] | report["baselines"]
    assert [line.split()[0] for line in lines[1:]] == list(rows) == [*ARCHS, *BASELINES]
    for line, row in zip(lines[1:4], rows.values()):
        expected = [short(row["fvu"], 4), short(row["l0"], 1), short(row["dead"], 3)]
        for key in ("ce_increase", "kl", "intruder", "one_word", "detection"):
            errors = [row.get(f"{key}_se") or 0 for row in rows.values()]
            digits = min(5, 1 - math.floor(math.log10(max(errors))))  # two of the largest error
            expected.append(f"{short(row[key], digits)}±{short(row[f'{key}_se'], digits)}")
        assert line.split()[1:] == expected
    affine = lines[1 + len(ARCHS)].split()
    assert len(affine) == 4 and affine[1] == short(rows["affine"]["fvu"], 4)


def test_remarks(evaluated):
    report, text = evaluated.report, "".join(evaluated.stdout.split())
    model, data = report["run"]["model"], report["run"]["dataset"]
    assert f"{FOLDER}of{model},trainedon{data}." in text
    assert f"{report['tokens']:,}held-outtokensof{data}." in text
    for key in ("clean_ce", "mean_ablated_ce", "zero_ablated_ce"):
        assert f"{report[key]:.4f}" in text
    for name, row in report["coders"].items():
        assert f"{name}{evaluation.short(row['intruder_token'], 3)}" in text
    assert "outliers" not in text and "trainingtokens" not in text


def test_which_text_is_read(trained, tiny, tmp_path, monkeypatch):
    """That of the run, with its subset, if no other is given. FineWeb has one by default."""
    folder = shutil.copytree(trained, tmp_path / "run")
    change_json(folder / "config.json", dataset="someone/text", subset="their-own")
    find = mock.Mock(side_effect=SystemExit)
    monkeypatch.setattr(skipcoder, "find_sources", find)
    fineweb, default = "HuggingFaceFW/fineweb", "sample-10BT"
    for more, expected in (
        ([], ("someone/text", "their-own")),
        (["--subset", "b"], ("someone/text", "b")),
        (["--dataset", "other"], ("other", None)),
        (["--dataset", "other", "--subset", "b"], ("other", "b")),
        (["--dataset", fineweb], (fineweb, default)),
        (["--dataset", fineweb, "--subset", "b"], (fineweb, "b")),
    ):
        run_here(evaluation, folder, "--device=cpu", *more)
        assert find.call_args[0] == expected
    run_here(skipcoder, *flags(tiny, tmp_path / "new", "--dataset", fineweb))
    assert find.call_args[0] == (fineweb, default) and find.call_count == 7


def test_seed(trained, measure):
    """It chooses the latents and contexts, and nothing else."""
    zero, one = (measure(trained, "--seed", seed)[0] for seed in (0, 1))
    for name in ("sae", "transcoder"):
        changed = {key for key in SCORES if zero["coders"][name][key] != one["coders"][name][key]}
        assert len(changed) > 8
        assert all(zero["coders"][name][key] == one["coders"][name][key] for key in LOSSES)
    assert zero["baselines"]["null"] != one["baselines"]["null"]
    assert measure(trained, "--seed", 1)[0] == one


# ---- What goes wrong ------------------------------------------------------------------------


def test_other_text_and_too_little_of_it_for_baselines(trained, tiny, tmp_path, measure):
    """The affine map and the token's mean need 100 tokens for each entry of x, here 3,200.

    The report tells which text was read, also where it is another one than in training.
    """
    lines = (tiny / "text.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    training = [text for text in texts if not skipcoder.is_held_out(text)]
    held_out = [text for text in texts if skipcoder.is_held_out(text)]
    for number, enough in ((4, False), (60, True)):
        text = write_jsonl(tmp_path / "t.jsonl", training[:number] + held_out)
        report, told = measure(trained, "--dataset", text)
        assert report["run"]["evaluated_on"] == str(text) != report["run"]["dataset"]
        assert report["run"]["evaluated_subset"] is None
        assert f"trainedon{tiny / 'text.jsonl'}." in told and f"held-outtokensof{text}." in told
        trained_on = report["run"]["baselines_tokens"]
        assert (trained_on > 3200) == enough
        remark = f"Only{trained_on:,}trainingtokens:noaffineandtokenmap." in told
        assert remark != enough and ("affine." in told) == enough
        for name in ("affine", "token"):
            assert (report["baselines"][name] is not None) == enough
        for row in report["coders"].values():
            assert (row["ce_recovered"] is not None) == enough and row["fvu"] > 0


def test_recovered_is_null_where_the_harm_is_noise():
    """It is a quotient by the harm of the mean: null if that is within three errors of zero."""
    rows = torch.randn(50, dtype=torch.float64)
    rows = (rows - rows.mean()) / rows.std() * 50**0.5  # of mean 0, with an error of 1
    for harm, recovered in ((2.9, None), (3.1, pytest.approx(1 - 1 / 3.1))):
        sample = evaluation.Sample()
        for moments in (sample.y, sample.y_all):
            moments.add(torch.randn(9, 4))
        sample.num_predictions = [torch.ones(50)]
        sample.ce = {"clean": [0 * rows], "mean": [harm + rows], "sae": [1 + 0 * rows]}
        sample.kl["sae"] = [rows]
        assert evaluation.losses(sample, "sae")["ce_recovered"] == recovered


WEIGHTS = {"transformer.h.2.mlp.c_fc.bias": math.nan, "transformer.ln_f.weight": math.inf}


@pytest.mark.parametrize("name, value", WEIGHTS.items())
def test_an_lm_that_is_not_finite(trained, tmp_path, capsys, broken_model, name, value):
    """It is one line, which names --model, and no number, even if the MLP's y is fine."""
    folder = shutil.copytree(trained, tmp_path / "run")
    change_json(folder / "config.json", model=str(broken_model(name, value)))
    files = f"--json={tmp_path}/e.json", f"--html={tmp_path}/e.html"
    message = run_here(evaluation, folder, *SMALL, *files)
    assert re.match("error: --model.* not finite", message) and "\n" not in message
    assert not list(tmp_path.glob("e.*")) and "FVU" not in capsys.readouterr().out


def test_an_mlp_that_training_refuses(trained, monkeypatch):
    """Coders for it may come from another library."""
    load_lm = skipcoder.load_lm

    def load_loop(*args):
        lm = load_lm(*args)
        lm.transformer.h[0] = lm.transformer.h[1]  # runs twice for a token
        return lm

    monkeypatch.setattr(skipcoder, "load_lm", load_loop)
    message = run_here(evaluation, trained, "--tokens", 2000, "--device", "cpu")
    assert "runs more than once" in message


def test_files_are_whole_or_not_there(trained, tmp_path, capsys, monkeypatch):
    """A folder that is missing is told before any work. The table comes before the files."""
    out = tmp_path / "e.json"
    with mock.patch.object(skipcoder, "load_lm", side_effect=SystemExit) as load:
        for flag in ("--json", "--html"):
            message = run_here(evaluation, trained, *SMALL, flag, tmp_path / "no" / "e.json")
            assert message.startswith("error:") and f"{tmp_path}/no" in message
        assert not load.called
        run_here(evaluation, trained, *SMALL, "--json", out)
        assert load.called and not out.exists()

    # A failure later on keeps the file that is there, and what was computed.
    out.write_text("an older one")
    full = mock.patch.object(skipcoder, "write", side_effect=OSError("disk full"))
    with full, pytest.raises(OSError, match="disk full"):
        run_here(evaluation, trained, *SMALL, "--json", out)
    assert out.read_text() == "an older one" and "\nsae " in capsys.readouterr().out


def test_a_console_that_lacks_characters_costs_nothing(trained, tmp_path):
    """Files are written in UTF-8, and printing cannot fail, in a locale that knows ASCII only."""
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ascii_only["PYTHONIOENCODING"] = "ascii"
    files = f"--json={tmp_path}/e.json", f"--html={tmp_path}/e.html"
    done = run("eval.py", trained, *SMALL, *files, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout.split("\nsae ")[1].splitlines()[0]
    assert read_json(tmp_path / "e.json")["tokens"] >= 1000
    assert "±" in (tmp_path / "e.html").read_text(encoding="utf-8")


# ---- Numbers against dense ones in float64 --------------------------------------------------


class Dense:
    """The LM in float64, and the MLP of block 1 with something in its place."""

    def __init__(self, folder, device):
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.lm, self.device = lm.eval().to(device), device

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


def dense_forward(coder, x, y):
    """Return y_hat [N, d] and z [N, M] by the equations at the top of skipcoder.py."""
    pre = F.linear(y - coder.b_dec if coder.arch == "sae" else x, coder.W_enc, coder.b_enc)
    kept = torch.zeros_like(pre).scatter(1, pre.topk(coder.k).indices, 1)
    z = (kept * pre).relu()
    skip = 0 if coder.W_skip is None else x @ coder.W_skip.T
    return z @ coder.W_dec + skip + coder.b_dec, z


def mean_and_error(values, counted):
    """Return the mean of the counted values [rows, n], and its error: a jackknife over rows."""
    sums = torch.where(counted, values, 0).sum(1)
    numbers = counted.double().sum(1)
    without = (sums.sum() - sums) / (numbers.sum() - numbers)  # the mean without each row
    n = len(without)
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return (sums.sum() / numbers.sum()).item(), error.item()


def variance(a) -> float:
    return (a - a.mean(0)).square().sum().item()


def spies(patch):
    """Keep how read_held_out and Contexts are called, and the Sample that is collected."""
    read, contexts = evaluation.read_held_out, evaluation.Contexts
    read, contexts = mock.Mock(wraps=read), mock.Mock(wraps=contexts)
    patch.setattr(evaluation, "read_held_out", read)
    patch.setattr(evaluation, "Contexts", contexts)
    sample = evaluation.Sample()
    patch.setattr(evaluation, "Sample", lambda: sample)
    return read, contexts, sample


@pytest.fixture(scope="module")
def by_hand(trained, tiny, device):
    """An evaluation with outliers, how it was called, and what is dense on the text that it read.

    Its max_norm is such that one token in twenty is an outlier. Logits are computed for 7 positions
    at a time, and every second of 7 batches has CE and KL.
    """
    config, coders = load_run(trained, device)
    args = SimpleNamespace(run=trained, tokens=6000, latents=20, seed=0, device=device)
    args.dataset, args.subset = config["dataset"], None
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sources = find_sources(config["dataset"], None)
    sides = [token_batches(sources, tokenizer, 32, 32, held_out) for held_out in (False, True)]
    # The first multiples of 32 rows with 200 d and 6000 tokens: 7 batches of each.
    training, held_out = (torch.cat(list(batches)[:7]) for batches in sides)
    new = SimpleNamespace(coders=coders, training=training, held_out=held_out)

    # The limit is half way from one |y| to the next.
    new.dense = Dense(tiny, device)
    new.clean, new.x, new.y, new.hidden = new.dense(held_out)
    norm = new.y.norm(dim=-1).flatten().sort().values
    config["max_norm"] = norm[len(norm) * 19 // 20 :][:2].mean().item()
    new.counted = new.y.norm(dim=-1) < config["max_norm"]  # [rows, 31]
    _, x, y, _ = new.dense(training)
    fits = y.norm(dim=-1) < config["max_norm"]
    new.x_train, new.y_train, new.ids_train = x[fits], y[fits], training[:, 1:][fits.cpu()]

    head, new.logits = evaluation.PatchedLM.head, []

    def counting_head(patched, hidden):
        logits = head(patched, hidden)
        new.logits.append(logits.numel())
        return logits

    with pytest.MonkeyPatch.context() as patch:
        new.read_held_out, new.contexts, new.sample = spies(patch)
        patch.setattr(evaluation.PatchedLM, "head", counting_head)
        patch.setattr(evaluation, "CE_TOKENS", 3000)
        patch.setattr(evaluation, "LOGITS", 7 * 32 * 512)
        new.report, new.for_page = evaluation.evaluate(config, coders, args)
    return new


def test_numbers_equal_a_dense_float64_computation(by_hand):
    """Every number of the report for the coders, the baselines and the ablations, anew."""
    report, dense, held_out = by_hand.report, by_hand.dense, by_hand.held_out
    x_rows, y_rows, counted = by_hand.x, by_hand.y, by_hand.counted

    # Which tokens count.
    y, all_y = y_rows[counted], y_rows.flatten(0, 1)
    n, of_all = len(y), counted.numel()
    assert report["tokens"] == n < 0.96 * of_all
    tokens_read, where, shown, _ = by_hand.for_page
    of_places = held_out[:, 1:][counted.cpu()]
    assert torch.equal(tokens_read.flatten()[where], of_places)
    expected = {"tokens": 1 - n / of_all, "variance": 1 - variance(y) / variance(all_y)}
    assert report["outliers"] == pytest.approx(expected, rel=1e-4)

    # What baselines are fitted on: counted tokens of 200 d tokens of training text.
    assert report["run"]["baselines_tokens"] == by_hand.training[:, 1:].numel() >= 6400
    x_train, y_train, ids = by_hand.x_train, by_hand.y_train, by_hand.ids_train
    y_mean = y_train.mean(0)
    affine = torch.linalg.lstsq(F.pad(x_train, (0, 1), value=1), y_train).solution
    token_map = {}
    for token in held_out.unique().tolist():
        of_token = y_train[ids == token]
        token_map[token] = (of_token.sum(0) + 5 * y_mean) / (len(of_token) + 5)
    unseen = set(held_out[:, 1:].unique().tolist()) - set(ids.tolist())
    assert unseen and all(torch.allclose(token_map[token], y_mean) for token in unseen)

    # y_hat of each, [rows, 31, d].
    by_token = torch.stack([token_map[token] for token in held_out[:, 1:].flatten().tolist()])
    y_hats = {"affine": F.pad(x_rows, (0, 1), value=1) @ affine, "token": by_token.view_as(y_rows)}
    y_hats |= {"mean": y_mean.expand_as(y_rows), "zero": torch.zeros_like(y_rows)}
    for arch, coder in by_hand.coders.items():
        y_hat, z = dense_forward(copy.deepcopy(coder).double(), x_rows.flatten(0, 1), all_y)
        y_hats[arch] = y_hat.view_as(y_rows)
        z = z[counted.flatten()].cpu()  # [n, M]
        # Which latents are active, and how much.
        row = report["coders"][arch]
        assert row["l0"] == pytest.approx((z > 0).sum().item() / n, rel=1e-3)
        assert row["dead"] == pytest.approx((z == 0).all(0).double().mean().item(), abs=0.01)
        active, judged = shown[arch]
        assert len(judged) == row["latents_scored"] == 20
        for latent in (scores["latent"] for scores in judged):
            tokens, acts = active.places[latent], active.acts[latent]
            fires = z[:, latent].nonzero().flatten().tolist()
            assert len(set(tokens.tolist()) ^ set(fires)) <= 1  # ties may fall either way
            assert_close(acts.double(), z[tokens, latent], rtol=1e-2, atol=1e-3)

    # What contexts are judged by: last hidden states, and words by their embeddings.
    judged_by, ids, embedding = by_hand.contexts.call_args[0]
    assert_close(judged_by.double(), by_hand.hidden[counted].cpu(), rtol=0.01, atol=0.01)
    assert torch.equal(ids, of_places)
    assert_close(embedding.cpu().double(), dense.lm.transformer.wte.weight.cpu())
    contexts, static = evaluation.Contexts(judged_by, ids, embedding), embedding[ids].float().cpu()
    static = F.normalize(static - static.mean(0), dim=1)
    assert_close(contexts.static[contexts.words], static, atol=1e-4, rtol=0)
    states = F.normalize(judged_by.float() - judged_by.float().mean(0), dim=1)
    assert_close(contexts.states, states)

    # FVU, of counted tokens.
    rows = report["coders"] | {name: report["baselines"][name] for name in ("affine", "token")}
    for name, row in rows.items():
        error = (y_rows - y_hats[name]).square().sum(-1)
        fvu = error[counted].sum().item() / variance(y)
        assert row["fvu"] == pytest.approx(fvu, rel=1e-3)

    # CE and KL: of every second batch of 32 rows, which makes 3000 predictions.
    spread = torch.arange(224).view(7, 32)[::2].flatten()
    following = held_out[spread, 2:, None].to(by_hand.clean.device)
    clean, predicting = by_hand.clean[spread], counted[spread, :-1]
    assert not predicting.all()
    ce, kl = {"clean": -clean.gather(-1, following).squeeze(-1)}, {}
    for name, y_hat in y_hats.items():
        log_p, *_ = dense(held_out[spread], y_hat[spread], counted[spread])
        ce[name] = -log_p.gather(-1, following).squeeze(-1)
        kl[name] = (clean.exp() * (clean - log_p)).sum(-1)
    keys = {"clean": "clean_ce", "mean": "mean_ablated_ce", "zero": "zero_ablated_ce"}
    for name, key in keys.items():
        assert report[key] == pytest.approx(mean_and_error(ce[name], predicting)[0], rel=1e-5)
    harm, _ = mean_and_error(ce["mean"] - ce["clean"], predicting)
    for name, row in rows.items():
        increase, error = mean_and_error(ce[name] - ce["clean"], predicting)
        assert row["ce"] == pytest.approx(mean_and_error(ce[name], predicting)[0], rel=1e-5)
        assert row["ce_increase"] == pytest.approx(increase, abs=1e-4)
        assert row["ce_increase_se"] == pytest.approx(error, rel=0.02)
        assert row["ce_recovered"] == pytest.approx(1 - increase / harm, abs=2e-3)
        mean, error = mean_and_error(kl[name], predicting)
        assert row["kl"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert row["kl_se"] == pytest.approx(error, rel=0.02)
    # No more logits at a time than allowed.
    assert max(by_hand.logits) == 7 * 30 * 512


@pytest.mark.parametrize("name, arch", [("untrained", "transcoder"), ("untrained_sae", "sae")])
def test_untrained_coders(by_hand, name, arch):
    """Each is a coder at its start, but not at that of the run's, and reads what its kind reads.

    That is x for a transcoder. An autoencoder reads y, without its mean.
    """
    coder = copy.deepcopy(by_hand.read_held_out.call_args[0][3][name]).double()
    assert coder.arch == arch and coder.k == 4
    start = Coder(arch, 32, 256, 4, seed=0)
    assert (coder.W_enc.cpu() - start.W_enc).abs().mean() > 0.1
    assert_close(coder.W_enc.norm(dim=1).cpu(), torch.ones(256, dtype=torch.float64))

    # On training text, its pre-activations have mean zero. The biases say so.
    x, y = by_hand.x_train, by_hand.y_train
    pre = F.linear(y - y.mean(0) if arch == "sae" else x, coder.W_enc, coder.b_enc)
    assert pre.mean(0).abs().max() < 1e-3 * pre.std()
    assert_close(coder.b_dec, y.mean(0), rtol=1e-3, atol=1e-5)

    # Its active latents on held-out text are the four largest.
    _, z = dense_forward(coder, by_hand.x[by_hand.counted], by_hand.y[by_hand.counted])
    places, latents, acts = map(torch.cat, zip(*by_hand.sample.active[name]))
    found = torch.zeros_like(z.cpu())
    found[places, latents] = acts.double()
    differ = (found - z.cpu()).abs() > 1e-3 + 0.01 * z.cpu()
    assert differ.sum() <= 10  # ties may fall either way


def test_rows_of_different_lengths():
    """A row counts by its number of tokens, in the mean and in its error."""
    generator = torch.Generator().manual_seed(0)
    counted = torch.rand(400, 30, generator=generator) < torch.rand(400, 1, generator=generator)
    values = torch.randn(400, 30, generator=generator) + torch.randn(400, 1, generator=generator)
    sums, numbers = (values * counted).double().sum(1), counted.double().sum(1)
    expected = mean_and_error(values.double(), counted)
    assert evaluation.mean_over_rows(sums, numbers) == pytest.approx(expected, rel=0.01)


def test_logits_of_an_lm_in_bfloat16_are_float32(tiny, device):
    """In bfloat16 they have steps of up to 0.1 nats. A bias of the head counts, too."""
    lm = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    lm.lm_head.weight = torch.nn.Parameter(8 * lm.lm_head.weight.data)
    lm.lm_head.bias = torch.nn.Parameter(torch.randn(512).bfloat16())
    patched = evaluation.PatchedLM(lm.to(device), 1)
    tokens = torch.randint(500, (4, 32), generator=torch.Generator().manual_seed(0)).to(device)
    log_p = patched(tokens)
    head = lm.lm_head
    logits = F.linear(patched.hidden[:, 1:-1].double(), head.weight.double(), head.bias.double())
    assert_close(log_p.double(), logits.log_softmax(-1), atol=1e-4, rtol=0)
    assert_close(patched(tokens, patched.y.clone()), log_p)


# ---- The scores -----------------------------------------------------------------------------


def test_active_tokens():
    """Where each is active, and how much, largest first, from the entries of two batches."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(2000, 30, generator=generator)
    z *= torch.rand(2000, 30, generator=generator) < torch.linspace(0, 0.05, 30)
    z[:1990, 7] = 1
    entries, first = [], 0
    for part in z.split(1200):
        acts, indices = part.topk(15)
        entries.append(evaluation.active_entries(acts, indices, first))
        first += len(part)
    active = evaluation.ActiveTokens(entries, 30, 2000)
    assert torch.equal(active.count, (z > 0).sum(0)) and active.count.sum() == (z > 0).sum()
    for j in range(30):
        tokens, acts = active.places[j], active.acts[j]
        assert set(tokens.tolist()) == set(z[:, j].nonzero().flatten().tolist())
        assert_close(acts, z[tokens, j])
        assert (acts.diff() <= 0).all()
    # A latent is scored if it is active at 40 places, and silent at as many.
    eligible = ((z > 0).sum(0) >= 40) & ((z > 0).sum(0) <= 1960)
    assert torch.equal(active.eligible, eligible) and 5 < eligible.sum() < 25
    # Of a large sample, it is 1 place in 2,500.
    large = evaluation.ActiveTokens(entries, 30, 2500 * 60)
    assert torch.equal(large.eligible, (z > 0).sum(0) >= 60)


def make_contexts(words, states=None):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(words), 8, generator=generator) if states is None else states
    embedding = torch.randn(int(words.max()) + 1, 8, generator=generator)
    return evaluation.Contexts(states, words, embedding)


def test_intruder_trials():
    """Four places of a fifth of the activations, and one where the latent is silent."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(600, generator=generator)
    active, silent = order[:500], order[500:]
    intruders = set()
    for _ in range(40):
        trials = evaluation.intruder_trials(active, silent, generator)
        assert trials.shape == (10, 5)
        for t, (*shown, intruder) in enumerate(trials.tolist()):
            fifth = active[100 * (t % 5) :][:100].tolist()
            assert len(set(shown)) == 4 and set(shown) <= set(fifth)
            assert intruder in silent.tolist()
            intruders.add(intruder)
    assert len(intruders) > 90, "they are drawn from all silent places"


def test_one_word_trials():
    """Four active places of one word, and a silent one of the same word.

    The word is drawn by how often the latent is active on it, if it allows trials at all.
    """
    generator = torch.Generator().manual_seed(0)
    # word: 0 is always active, 1 never, 2 at 3 places only, 3 at 10 and 4 at 30 of 50.
    words = torch.arange(5).repeat_interleave(50)[torch.randperm(250, generator=generator)]
    is_active = torch.zeros(250, dtype=torch.bool)
    for word, number in ((0, 50), (2, 3), (3, 10), (4, 30)):
        is_active[(words == word).nonzero().flatten()[:number]] = True
    contexts = make_contexts(words)
    active = is_active.nonzero().flatten()
    drawn = torch.zeros(5)
    for _ in range(200):
        trials = evaluation.one_word_trials(active, is_active, contexts, generator)
        assert trials.shape == (10, 5)
        assert (words[trials] == words[trials][:, :1]).all()
        assert is_active[trials[:, :4]].all() and not is_active[trials[:, 4]].any()
        assert all(len(set(row)) == 5 for row in trials.tolist())
        drawn += words[trials[:, 0]].bincount(minlength=5)
    assert drawn[:3].tolist() == [0, 0, 0]
    assert drawn[4] / 2000 == pytest.approx(0.75, abs=0.05)
    # No word has both four active places and a silent one.
    is_active = (words == 0) | ((words == 2) & is_active)
    active = is_active.nonzero().flatten()
    assert evaluation.one_word_trials(active, is_active, contexts, generator) is None


def test_the_guess_is_the_context_with_the_smallest_sum_of_similarities():
    near = F.normalize(torch.tensor([[1, 0.1], [1, 0], [1, -0.1], [0.9, 0.2]]), dim=1)
    far, between = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    right = torch.cat([near, far[None]])
    wrong = torch.stack([*near[:3], far, between])
    assert evaluation.found(torch.stack([right] * 10)) == 1
    assert evaluation.found(torch.stack([right] * 7 + [wrong] * 3)) == pytest.approx(0.7)
    # Of equals, each is the guess with the same chance.
    tied = torch.stack([*near[:3], far, far])
    assert evaluation.found(torch.stack([tied] * 10)) == 0.5
    assert evaluation.found(torch.stack([near[0]] * 5).repeat(10, 1, 1)) == pytest.approx(0.2)


def made_up_text(n=8000):
    """Return words [n], kinds of context [n], and states [n, 64] that are made of both."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    words = torch.randint(40, (n,), generator=generator)
    kinds = torch.randint(40, (n,), generator=generator)
    states = random(40, 64)[words] + random(40, 64)[kinds] + 0.7 * random(n, 64) + 3 * random(64)
    return words, kinds, states


def test_detection_equals_a_slow_computation(monkeypatch):
    """With all silent places, of which detect draws so many here that the noise is small."""
    monkeypatch.setattr(evaluation, "SILENT", 400_000)
    words, kinds, states = made_up_text(6000)
    contexts = make_contexts(words, states)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(6000, generator=generator)
    fires = (words < 8) & (kinds % 2 == 0) & (noise < 0.9) | (noise > 0.99)
    active = fires.nonzero().flatten()
    active = active[torch.randperm(len(active), generator=generator)]
    silent = (~fires).nonzero().flatten()
    found = evaluation.detect(active, silent, contexts, generator)

    unit = F.normalize(states.double() - states.double().mean(0), dim=1)
    first = [place for place in active.tolist() if place < 3000]
    second = [place for place in active.tolist() if place >= 3000]

    def similar(place):
        return sorted((unit[place] @ unit[first[:10]].T).tolist())[-3:]

    similarity = {place: sum(similar(place)) / 3 for place in range(6000)}
    lookup = {}
    for word in range(40):
        occurs = [place for place in range(3000) if words[place] == word]
        lookup[word] = sum(fires[place].item() for place in occurs) / len(occurs)
    quiet = [place for place in silent.tolist() if place >= 3000]
    wins = [similarity[a] > similarity[s] for a in second for s in quiet]
    assert found["detection"] == pytest.approx(sum(wins) / len(wins), abs=3e-3)
    shares = [(lookup[words[a].item()], lookup[words[s].item()]) for a in second for s in quiet]
    wins = [(a > s) + (a == s) / 2 for a, s in shares]
    assert found["detection_lookup"] == pytest.approx(sum(wins) / len(wins), abs=3e-3)
    before = sorted(similarity[place] for place in silent.tolist() if place < 3000)
    threshold = before[int(0.95 * len(before))]
    fifths = torch.tensor(second).tensor_split(5)
    passed = [[similarity[p] > threshold for p in fifth.tolist()] for fifth in fifths]
    expected = [sum(fifth) / len(fifth) for fifth in passed]
    assert found["detection_tpr"] == pytest.approx(expected, abs=0.05)
    half = sorted(similarity[place] for place in second)[(len(second) - 1) // 2]
    false = sum(similarity[place] >= half for place in quiet) / len(quiet)
    assert found["detection_fpr"] == pytest.approx(false, abs=3e-3)


def test_detection_needs_ten_places_in_each_half():
    contexts = make_contexts(torch.zeros(200, dtype=torch.long))
    generator = torch.Generator().manual_seed(0)
    silent = torch.arange(50, 150)
    for few, enough in ((9, False), (10, True)):
        for active in ([*range(40), *range(160, 160 + few)], [*range(few), *range(160, 190)]):
            found = evaluation.detect(torch.tensor(active), silent, contexts, generator)
            assert (found is not None) == enough


def score_of(fires, latents=None):
    """Return the row of latents, by which [n, latents] they are active, and those of `judged`."""
    place, latent = fires.nonzero(as_tuple=True)
    acts = torch.rand(len(place), generator=torch.Generator().manual_seed(0))
    active = evaluation.ActiveTokens([(place, latent, acts)], fires.shape[1], len(fires))
    words, _, states = made_up_text(len(fires))
    return evaluation.score(active, make_contexts(words, states), latents or fires.shape[1], 0)


def planted(kind, merged=1, n=8000):
    words, kinds, _ = made_up_text(n)
    noise = torch.rand(n, 40, generator=torch.Generator().manual_seed(1))
    if kind == "word":  # anywhere on it
        fires = F.one_hot(words, 40).bool() & (noise < 0.7)
    elif kind == "context":
        fires = F.one_hot(kinds, 40).bool() & (noise < 0.9)
    else:
        fires = noise < 0.03
    return score_of(fires.view(n, -1, merged).any(2))[0]


def test_planted_latents():
    """Each score finds what it is about, and nothing else."""
    word, context, chance = map(planted, ("word", "context", "random"))
    for row in (word, context, chance):
        assert row["latents_scored"] == 40 and row["eligible"] == 1
    assert word["intruder"] > 0.9 and word["intruder_token"] > 0.95
    assert word["detection"] > 0.9 and word["detection_lookup"] > 0.95
    # With the word fixed, such a latent is active by chance.
    assert abs(word["one_word"] - 0.2) < 3.5 * word["one_word_se"]
    assert context["intruder"] > 0.9 and context["one_word"] > 0.85 and context["detection"] > 0.9
    assert abs(context["intruder_token"] - 0.2) < 3.5 * context["intruder_token_se"]
    assert abs(context["detection_lookup"] - 0.5) < 4 * context["detection_lookup_se"]
    assert context["detection_fpr"] < 0.05 and min(context["detection_tpr"]) > 0.8
    for key, value in {"intruder": 0.2, "one_word": 0.2, "detection": 0.5}.items():
        assert abs(chance[key] - value) < 3.5 * chance[f"{key}_se"]
    assert chance["detection_tpr"] == pytest.approx([0.05] * 5, abs=0.03)
    assert chance["detection_fpr"] == pytest.approx(0.5, abs=0.05)


def test_merged_latents_score_lower():
    """Latents that stand for 1, 2, 4 or 8 kinds of contexts."""
    rows = [planted("context", merged) for merged in (1, 2, 4, 8)]
    for key in ("intruder", "one_word", "detection"):
        for high, low in pairwise(row[key] for row in rows):
            assert high > low + 0.005, key


def test_a_row_summarises_its_latents():
    """Means and errors over latents that have the score; the spread without the trials' noise."""
    words, kinds, _ = made_up_text()
    columns = [(kinds == j) & (words < 4 + 9 * j) for j in range(5)]
    noise = torch.rand(8000, 3, generator=torch.Generator().manual_seed(2)) < 0.02
    columns += [
        *noise.T,
        words == 7,
        words == 8,
        torch.zeros(8000).bool(),
        (words == 9) & (kinds == 0),
    ]
    fires = torch.stack(columns, 1)
    row, judged = score_of(fires)
    eligible = [j for j in range(12) if fires[:, j].sum() >= 40]
    assert sorted(scores["latent"] for scores in judged) == eligible and 11 not in eligible
    assert row["latents_scored"] == len(eligible)
    assert row["eligible"] == pytest.approx(len(eligible) / 11)  # of those ever active
    # Latents of all occurrences of a word have no trials of one word.
    for scores in judged:
        assert ("one_word" in scores) == (scores["latent"] < 8)
    for key in NAMES:
        values = torch.DoubleTensor([scores[key] for scores in judged if key in scores])
        assert row[key] == pytest.approx(values.mean().item())
        error = math.sqrt(values.var().item() / len(values))
        assert row[f"{key}_se"] == pytest.approx(error, abs=1e-9)
        assert row[f"{key}_share"] == pytest.approx(len(values) / len(judged))
    shares = [scores["intruder"] for scores in judged]
    noise = sum(share * (1 - share) / 9 for share in shares) / len(shares)
    spread = torch.tensor(shares).double().var().item() - noise
    assert spread > 0.01 and row["intruder_sd"] == pytest.approx(math.sqrt(spread))
    # As many as are wanted, drawn at random. With one there is no error, so no score.
    row, (only,) = score_of(fires, latents=1)
    assert only["latent"] in eligible and row["latents_scored"] == 1
    assert row["intruder"] is row["intruder_se"] is row["intruder_sd"] is None
    chosen = [score_of(planes, 5)[1] for planes in (fires.repeat(1, 6), fires.repeat(1, 6))]
    assert [s["latent"] for s in chosen[0]] == [s["latent"] for s in chosen[1]] != eligible[:5]


# ---- Coders of several sizes, and of others -------------------------------------------------


def copy_coder(trained, arch, folder, k, latents=256, remove=()):
    """Write a coder of the run as another one: with another k, the first latents, fewer keys."""
    folder.mkdir(parents=True)
    tensors = load_file(trained / arch / FOLDER / "sae.safetensors")
    short = {name: tensor[:latents] for name, tensor in tensors.items() if len(tensor) == 256}
    save_file(tensors | short, folder / "sae.safetensors")
    shutil.copy(trained / arch / FOLDER / "cfg.json", folder)
    change_json(folder / "cfg.json", ["arch", *remove], k=k)


def write_config(folder, tiny, coders):
    """Write a config.json of six keys by hand, as README says."""
    config = {"model": str(tiny), "layer": 1, "dataset": str(tiny / "text.jsonl")}
    config |= {"subset": None, "ctx_len": 32, "coders": coders}
    (folder / "config.json").write_text(json.dumps(config))


def test_coders_of_several_k_and_sizes(trained, tiny, tmp_path, capsys, monkeypatch):
    """Baselines of the scores have the median k, and the size of that coder."""
    folder, ks = tmp_path / "run", {2: 200, 5: 100, 128: 256}
    names = [f"skip_transcoder-k{k}" for k in ks]
    for name, (k, latents) in zip(names, ks.items()):
        copy_coder(trained, "skip_transcoder", folder / name, k, latents)
    write_config(folder, tiny, {name: name for name in names})
    read, _, sample = spies(monkeypatch)
    assert run_here(evaluation, folder, *SMALL, "--json", tmp_path / "e.json") == 0
    stdout, report = capsys.readouterr().out, read_json(tmp_path / "e.json")

    assert report["run"]["baselines_k"] == 5 and "k5." in "".join(stdout.split())
    assert max(map(len, stdout.split("\n\n")[0].splitlines()[1:])) <= 100
    for (k, latents), row in zip(ks.items(), report["coders"].values()):
        assert row["arch"] == "skip_transcoder" and row["k"] == k
        assert row["num_latents"] == latents and k / 3 < row["l0"] <= k
    untrained = read.call_args[0][3]
    assert [(coder.k, len(coder.W_dec)) for coder in untrained.values()] == [(5, 100)] * 2
    # Of the neurons those are active that are positive and among the five largest.
    place, _, _ = map(torch.cat, zip(*sample.active["neurons"]))
    assert place.bincount().max() == 5 and place.max() + 1 == report["tokens"]


def test_a_run_of_sparsify(trained, tiny, tmp_path, measure):
    """Its folders need a config.json of six keys. Names are free.

    In 2024 its cfg.json had no activation, transcode and skip_connection: it was an autoencoder.
    """
    folder = tmp_path / "run"
    kinds = {"theirs": "sae", "of-2024": "sae", "t": "transcoder", "skip": "skip_transcoder"}
    for name, arch in kinds.items():
        old = ["activation", "transcode", "skip_connection", "multi_topk"]
        copy_coder(
            trained, arch, folder / name / FOLDER, 4, remove=old if name == "of-2024" else ()
        )
    write_config(folder, tiny, {name: f"{name}/{FOLDER}" for name in kinds})
    report, _ = measure(folder)
    assert report["outliers"]["tokens"] == 0 and report["run"]["hookpoint"] == FOLDER
    assert {name: row["arch"] for name, row in report["coders"].items()} == kinds
    # The numbers are those of the run that we took the weights from, whatever stands beside.
    ours, _ = measure(trained)
    assert report["baselines"] == ours["baselines"]
    for name, arch in kinds.items():
        assert report["coders"][name] == ours["coders"][arch]
