# SPDX-License-Identifier: MIT
"""Say how good the coders of a run are: how well they reconstruct, what the LM loses, how interpretable they are.

    python eval.py runs/gpt2-layer6

On held-out documents, which training never saw, for every coder of the run:

    FVU           sum |y - y_hat|^2 / sum |y - mean(y)|^2 over the whole sample, as in training
    L0, dead %    active latents per token; latents that are never active on the sample
    CE increase   cross-entropy (nats/token) of the LM with y_hat in place of the MLP's output, minus that of the clean
                  LM; CE recovered: the share of the harm done by the constant mean of y that y_hat undoes
    KL            KL(clean || patched) of the next-token distributions, nats/token
    intruder      how often the odd one out of five contexts is found, where four activate the same latent: a proxy of
                  interpretability with no explanation in the loop (see `intruder_trials`)

Baselines say what a number means: the best affine map from x to y for the first ones; the MLP's own neurons, an
untrained transcoder and random tokens for the last. Which positions of a row count for what:

    position      0          1   2   3   ...   T-3   T-2   T-1
    in training   left out   x, y at each of them
    FVU, latents  left out   x, y at each of them
    CE, KL        left out   each predicts the next one    nothing to predict
"""

import argparse
import html
import json
import math
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import skipcoder  # before torch, whose threads it keeps polite
from skipcoder import Coder, blame

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.pytorch_utils import Conv1D

TRIALS = 10  # intruder trials per latent
FIFTHS = 5  # quantiles of a latent's activations that they are spread over
SHOWN = 4  # contexts in a trial on which the latent is active; one more is the intruder
MIN_ACTIVE = 40  # tokens on which a latent has to be active to be scored: 8 in each fifth
CE_TOKENS = 50_000  # CE and KL are measured on so many tokens at most: their errors are small enough, and an LM is slow

# ---- The LM, with and without something in the MLP's place ----------------------------------------------------------


class PatchedLM:
    """The LM with a hook on one MLP. A call leaves x, y, neurons and hidden as attributes, [rows, ctx_len, width]."""

    def __init__(self, lm: nn.Module, layer: int):
        self.lm = lm
        _, _, mlp = skipcoder.find_mlp(lm, layer)
        mlp.register_forward_hook(self.hook)
        # the neurons are what the MLP's last linear layer reads: c_proj in GPT-2, down_proj in Llama and Gemma
        last = [module for module in mlp.modules() if isinstance(module, (nn.Linear, Conv1D))][-1]
        last.register_forward_pre_hook(lambda _, args: setattr(self, "neurons", args[0]))
        lm.base_model.register_forward_hook(lambda _, args, output: setattr(self, "hidden", output.last_hidden_state))
        # the LM head is in fp32, as bf16 logits have steps of 0.1 nats, and runs only where its output counts
        head = lm.get_output_embeddings()
        weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
        head.forward = lambda hidden: nn.functional.linear(hidden[:, 1:-1].float(), weight, bias)

    def hook(self, mlp, args, output):
        self.x, self.y = args[0], output
        return None if self.y_hat is None else self.y_hat.to(output.dtype)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, y_hat: Tensor | None = None, logits: bool = True) -> Tensor | None:
        """log p [rows, ctx_len - 2, vocab] of the tokens from 2 on, with y_hat [rows, ctx_len, d] as the MLP's output."""
        self.y_hat = y_hat
        if logits:
            return self.lm(tokens, use_cache=False).logits.log_softmax(-1)
        self.lm.base_model(tokens, use_cache=False)


class Losses:
    """What each thing in the MLP's place costs: its squared error, and per row the mean cross-entropy and KL."""

    def __init__(self, d: int):
        self.tokens, self.y, self.y_square = 0, torch.zeros(d, dtype=torch.float64), 0.0  # sums of y [d] and |y|^2
        self.error, self.ce, self.kl = defaultdict(float), defaultdict(list), defaultdict(list)

    def add_y(self, y: Tensor):
        self.tokens += len(y)
        self.y += y.sum(0, dtype=torch.float64).cpu()
        self.y_square += y.square().sum(dtype=torch.float64).item()

    def add_logs(self, name: str, tokens: Tensor, log_p: Tensor, log_q: Tensor):
        """log_p, log_q [rows, ctx_len - 2, vocab]: log-probabilities of the clean LM, and with `name` in place."""
        self.ce[name] += (-log_q.gather(-1, tokens[:, 2:, None])).squeeze(-1).double().mean(1).tolist()
        self.kl[name] += torch.linalg.vecdot(log_p.exp(), log_p - log_q).double().mean(1).tolist()

    def report(self, name: str) -> dict[str, float]:
        variance = self.y_square - self.y.square().sum().item() / self.tokens  # sum |y - mean(y)|^2
        ce, clean, mean, kl = map(torch.tensor, (self.ce[name], self.ce["clean"], self.ce["mean"], self.kl[name]))
        return {
            "fvu": self.error[name] / variance,
            "ce": ce.mean().item(),
            "ce_increase": (ce - clean).mean().item(),
            "ce_increase_se": standard_error(ce - clean),
            "ce_recovered": ((mean - ce).mean() / (mean - clean).mean()).item(),
            "kl": kl.mean().item(),
            "kl_se": standard_error(kl),
        }


def standard_error(a: Tensor) -> float:
    """Of the mean of a [n], whose entries are independent: rows of tokens, or latents."""
    return (a.double().std() / math.sqrt(len(a))).item() if len(a) > 1 else 0.0


def fit_affine(activations: skipcoder.MLPActivations, batches, device, dataset: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best affine map from x to y in the least-squares sense: A [d, d] and b [d] of y_hat = x A + b, and the means.

    From covariances summed in float64. That of x is singular (a layer norm takes a dimension away), so 1e-6 of its mean
    diagonal is added to the diagonal: FVU moves by less than 1e-5.
    """
    sums = 0
    for tokens in batches:
        x, y = (a.double() for a in activations(tokens.to(device)))
        ones = torch.ones_like(x[:, :1])
        sums = sums + torch.cat([x, ones], 1).T @ torch.cat([x, y, ones], 1)  # [d + 1, 2 d + 1]
    if isinstance(sums, int):
        sys.exit(f"error: --dataset {dataset}: too little text, its training documents fill no row of tokens")
    d = len(sums) - 1
    xx, xy, n = sums[:d, :d], sums[:d, d:-1], sums[-1, -1]
    x_mean, y_mean = sums[-1, :d] / n, sums[-1, d:-1] / n
    covariance = xx / n - x_mean.outer(x_mean)
    covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(d, device=device)
    A = torch.linalg.solve(covariance, xy / n - x_mean.outer(y_mean))
    return A.float(), (y_mean - x_mean @ A).float(), x_mean.float(), y_mean.float()


# ---- The intruder proxy ---------------------------------------------------------------------------------------------


class Activity:
    """On how many tokens each of M latents is active; and for those that may be scored, on which, and how much."""

    def __init__(self, num_latents: int, wanted: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)  # its own: no coder's score depends on the others
        self.wanted = wanted  # which latents are active often enough is known at the end: draw four times as many
        self.drawn = torch.randperm(num_latents, generator=self.generator)[: 4 * wanted]
        self.count = torch.zeros(num_latents, dtype=torch.int64)  # [M]
        self.triples = []  # (latent, token, activation), each [n]

    def add(self, acts: Tensor, indices: Tensor, start: int):
        """acts, indices [N, k] of the tokens start to start + N of the sample."""
        acts, indices = acts.cpu(), indices.cpu()
        token, slot = (acts > 0).nonzero(as_tuple=True)
        latent = indices[token, slot]
        self.count += latent.bincount(minlength=len(self.count))
        kept = torch.isin(latent, self.drawn)
        self.triples.append((latent[kept].int(), (token[kept] + start).int(), acts[token, slot][kept].float()))

    def sample(self, n: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Per scored latent the tokens it is active on, of n, and its activations there, [count] each, largest first."""
        latent, token, act = map(torch.cat, zip(*self.triples))
        count = self.count[self.drawn]
        scored = self.drawn[(count >= MIN_ACTIVE) & (count < n)][: self.wanted]  # one on all tokens has no intruder
        active = {}
        for j in scored.tolist():
            acts, order = act[latent == j].sort(descending=True, stable=True)
            active[j] = token[latent == j][order].long(), acts
        return active


def intruder_trials(active: dict[int, tuple[Tensor, Tensor]], hidden: Tensor, mean: Tensor, generator) -> Tensor:
    """For each latent of `active` and each of 10 trials, whether the intruder was found: bool [latents, 10].

    Intruder detection (Paulo & Belrose 2025, arXiv 2507.08473) with the LM under study as the judge. If a latent stands
    for one thing, the contexts on which it is active resemble one another, and one on which it is not stands out. A
    context is a token, represented by the LM's last hidden state there (`hidden` [N, d]) less the mean over the sample.
    The tokens of a latent, sorted by activation, are cut into fifths; trial t shows 4 tokens of fifth t mod 5 (0 is the
    top fifth) and one token on which the latent is not active. Chance is 1/5.
    """
    shown = torch.empty(len(active), TRIALS, SHOWN + 1, dtype=torch.int64)
    for trials, (tokens, _) in zip(shown, active.values()):
        silent = torch.ones(len(hidden), dtype=torch.bool)
        silent[tokens] = False
        silent = silent.nonzero().flatten()
        fifths = tokens.tensor_split(FIFTHS)
        for t in range(TRIALS):
            fifth = fifths[t % FIFTHS]
            trials[t, :SHOWN] = fifth[torch.randperm(len(fifth), generator=generator)[:SHOWN]]
            trials[t, SHOWN] = silent[torch.randint(len(silent), (), generator=generator)]
    return intruder_found(shown, hidden, mean)


def intruder_found(shown: Tensor, hidden: Tensor, mean: Tensor) -> Tensor:
    """Whether of the tokens [latents, trials, 5] the last is least like the others: bool [latents, trials].

    That is the one whose summed cosine similarity to the others is smallest (to itself it is 1 for all).
    """
    found = []
    for tokens in shown:  # [trials, 5]
        unit = nn.functional.normalize(hidden[tokens].float() - mean, dim=-1)  # [trials, 5, d]
        found.append((unit @ unit.mT).sum(-1).argmin(-1) == SHOWN)  # [trials, 5, 5] -> [trials]
    return torch.stack(found) if found else torch.empty(0, TRIALS, dtype=torch.bool)


def summary(found: Tensor) -> dict:
    """Score, its error, spread over latents and by fifth, from bool [latents, trials]; None for fewer than two."""
    if len(found) < 2:
        names = "intruder", "intruder_se", "intruder_sd", "intruder_by_quantile"
        return dict.fromkeys(names) | {"latents_scored": len(found)}
    scores = found.double().mean(1)  # [latents]
    return {
        "intruder": scores.mean().item(),
        "intruder_se": standard_error(scores),
        "intruder_sd": scores.std().item(),
        "intruder_by_quantile": [found[:, q::FIFTHS].double().mean().item() for q in range(FIFTHS)],
        "latents_scored": len(scores),
    }


# ---- One pass over training tokens, one over held-out tokens --------------------------------------------------------


def first_rows(batches, rows: int, what: str):
    """Yield batches until there were so many rows (or no more), with a progress bar."""
    with tqdm(total=rows, desc=what, unit="row", leave=False) as bar:
        while rows > 0 and (batch := next(batches, None)) is not None:
            yield batch[:rows]
            rows -= len(batch)
            bar.update(len(batch))


def evaluate(config: dict, coders: dict[str, Coder], args) -> tuple[dict, tuple]:
    """Return the report and what --html shows: the tokens [rows, ctx_len] and the scored latents by coder."""
    device, ctx_len, d, k = args.device, config["ctx_len"], config["d"], config["k"]
    rows = math.ceil(args.tokens / (ctx_len - 1))  # position 0 does not count
    rows_to_fit = max(rows, math.ceil(100 * d / (ctx_len - 1)))  # fewer tokens would overfit the affine map by over 1%
    with blame(f"RUN {args.run}: its model {config['model']}", skipcoder.MODEL):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config["model"])
        source = args.dataset, args.subset, tokenizer, ctx_len, max(1, 2048 // ctx_len)  # log p over the vocabulary
        training, held_out = (skipcoder.token_batches(*source, held_out=side) for side in (False, True))  # is large
        lm = skipcoder.load_lm(config["model"], device)
    width = lm.config.get_text_config().hidden_size
    if width != d:
        sys.exit(f"error: RUN {args.run}: {config['model']} is {width} wide, the coders {d}: it is another model")

    # training documents give the affine map, the mean for mean-ablation, and where an untrained coder starts
    _, blocks, mlp = skipcoder.find_mlp(lm, config["layer"])
    later = blocks[config["layer"] + 1 :]
    del blocks[config["layer"] + 1 :]  # they need not run for this
    batches = first_rows(training, rows_to_fit, "affine map")
    A, b, x_mean, y_mean = fit_affine(skipcoder.MLPActivations(lm, mlp), batches, device, args.dataset)
    blocks.extend(later)
    untrained = Coder("transcoder", d, config["num_latents"], k, seed=args.seed + 1).to(device).requires_grad_(False)
    untrained.b_enc.data = -(untrained.W_enc @ x_mean)  # [M, d] @ [d] -> [M]

    patched, losses, activity = PatchedLM(lm, config["layer"]), Losses(d), {}
    seen, n = torch.empty(0, ctx_len, dtype=torch.int32), 0  # the rows read, and how many of their tokens count
    hidden = torch.empty(rows * (ctx_len - 1), d, dtype=torch.bfloat16)  # [n, d] the last hidden states
    for tokens in first_rows(held_out, rows, "held-out"):
        seen, tokens = torch.cat([seen, tokens.int()]), tokens.to(device)
        predicts = len(losses.ce["clean"]) * (ctx_len - 1) < CE_TOKENS
        log_p = patched(tokens, logits=predicts)
        x, y, neurons, h = (
            a[:, 1:].flatten(0, 1).float() for a in (patched.x, patched.y, patched.neurons, patched.hidden)
        )  # [N, width] each
        true_y = patched.y
        hidden[n : n + len(h)] = h.cpu()
        losses.add_y(y)
        if predicts:
            losses.add_logs("clean", tokens, log_p, log_p)

        with torch.autocast(device.type, torch.bfloat16, enabled=skipcoder.fast_bfloat16(device)):
            coded = {name: coder(x, y) for name, coder in (coders | {"untrained": untrained}).items()}
        active = {name: (acts, indices) for name, (_, acts, indices) in coded.items()}
        active["neurons"] = neurons.topk(min(k, neurons.shape[1]), sorted=False)
        for name, (acts, indices) in active.items():
            if name not in activity:
                num_latents = neurons.shape[1] if name == "neurons" else config["num_latents"]
                activity[name] = Activity(num_latents, args.latents, args.seed)
            activity[name].add(acts, indices, n)
        n += len(y)

        y_hats = {name: coded[name][0] for name in coders}
        y_hats |= {"affine": x @ A + b, "mean": y_mean.expand_as(y), "zero": torch.zeros_like(y)}
        for name, y_hat in y_hats.items():
            losses.error[name] += (y - y_hat).square().sum(dtype=torch.float64).item()
            if predicts:  # position 0 keeps its true output
                in_place = torch.cat([true_y[:, :1], y_hat.view_as(true_y[:, 1:]).to(true_y.dtype)], 1)
                losses.add_logs(name, tokens, log_p, patched(tokens, in_place))
    if n == 0:
        sys.exit(f"error: --dataset {args.dataset}: too little text, its held-out documents fill no row of {ctx_len}")

    hidden, latents, found = hidden[:n], {}, {}
    mean = hidden.float().mean(0)
    for name, a in activity.items():
        latents[name] = a.sample(n)
        found[name] = intruder_trials(latents[name], hidden, mean, a.generator)
    random = torch.Generator().manual_seed(args.seed)
    found["null"] = intruder_found(torch.randint(n, (args.latents, TRIALS, SHOWN + 1), generator=random), hidden, mean)

    report = {"tokens": n, "run": {key: config[key] for key in RUN_KEYS} | {"tokens_asked_for": args.tokens}}
    report |= {f"{name}_ce": losses.report(key)["ce"] for name, key in ABLATIONS.items()}
    density = {name: a.count.double() / n for name, a in activity.items()}  # [M] share of tokens
    report["coders"] = {
        name: losses.report(name)
        | {"l0": density[name].sum().item(), "dead": (density[name] == 0).double().mean().item()}
        | summary(found[name])
        for name in coders
    }
    report["baselines"] = {"affine": losses.report("affine")}
    report["baselines"] |= {name: summary(found[name]) for name in ("neurons", "untrained", "null")}
    return report, (seen, {name: (latents[name], found[name], density[name]) for name in (*coders, "neurons")}, tokenizer)


# ---- The report as text ---------------------------------------------------------------------------------------------
RUN_KEYS = "model hookpoint layer k num_latents seed dataset tokens tokens_trained versions".split()
ABLATIONS = {"clean": "clean", "mean_ablated": "mean", "zero_ablated": "zero"}
COLUMNS = {
    "FVU": lambda row: f"{row['fvu']:.4f}",
    "L0": lambda row: f"{row['l0']:.1f}",
    "dead": lambda row: f"{row['dead']:.1%}",
    "CE increase": lambda row: f"{row['ce_increase']:.4f} ± {row['ce_increase_se']:.4f}",
    "recovered": lambda row: f"{row['ce_recovered']:.1%}",
    "KL": lambda row: f"{row['kl']:.4f} ± {row['kl_se']:.4f}",
    "intruder": lambda row: f"{row['intruder']:.3f} ± {row['intruder_se']:.3f}",
    "top to lowest fifth": lambda row: f"{row['intruder_by_quantile'][0]:.2f} → {row['intruder_by_quantile'][-1]:.2f}",
}


def table(report: dict) -> list[list[str]]:
    """Header and rows of cells; empty where a baseline has no such number, or there was nothing to score."""

    def cell(column, row: dict) -> str:
        try:
            return column(row)
        except (KeyError, TypeError):
            return ""

    rows = {**report["coders"], **report["baselines"]}
    return [["", *COLUMNS]] + [[name, *(cell(column, row) for column in COLUMNS.values())] for name, row in rows.items()]


def markdown(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in cells]
    lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headline(report: dict) -> str:
    run, versions = report["run"], ", ".join(" ".join(pair) for pair in report["run"]["versions"].items())
    lines = [
        f"{run['hookpoint']} of {run['model']}: M {run['num_latents']:,}, k {run['k']}, seed {run['seed']}, trained on"
        f" {run['tokens_trained']:,} tokens of {run['dataset']} ({versions})",
        f"{report['tokens']:,} held-out tokens; cross-entropy clean {report['clean_ce']:.4f}, with the mean of y in the"
        f" MLP's place {report['mean_ablated_ce']:.4f}, with zero {report['zero_ablated_ce']:.4f} nats/token",
    ]
    if run["tokens_trained"] < run["tokens"]:
        lines.append(f"The run was stopped early: {run['tokens']:,} tokens were asked for.")
    if report["tokens"] < run["tokens_asked_for"]:
        lines.append(f"There are fewer held-out tokens than --tokens {run['tokens_asked_for']:,} asked for.")
    return "\n".join(lines)


def notes(report: dict) -> list[str]:
    """How to read the table, in plain words."""
    lines = [
        "FVU: share of the variance of the MLP's output that is missed (0 is perfect, predicting the mean is 1). CE"
        " increase: nats/token that the LM loses with the prediction in the MLP's place; the mean in its place recovers"
        " 0%. ±: standard error, over rows of text or over latents; what differs by less than two is not different.",
        "Intruder: how often the odd one out of five contexts is found; chance is 0.2, which null should be within 3"
        " standard errors of. Compare coders with neurons and untrained.",
    ]
    scored = {**report["coders"], **report["baselines"]}
    if too_few := [name for name, row in scored.items() if row.get("latents_scored", 2) < 2]:
        lines.append(
            f"Without an intruder score, for want of two latents that are active on {MIN_ACTIVE} tokens:"
            f" {', '.join(too_few)}. Raise --tokens or --latents."
        )
    closed = {name: 1 - row["fvu"] for name, row in scored.items() if "fvu" in row}  # of the gap to the mean's FVU of 1
    if "transcoder" in closed:
        others = {name: f"{name} {share / closed['transcoder']:.1%}" for name, share in closed.items()}
        others = ", ".join(others[name] for name in ("affine", "skip_transcoder") if name in others)
        lines.append(f"Of the transcoder's distance to the mean's FVU of 1 it closes 100%, {others}.")
    return lines


# ---- The page: the table, and the scored latents with their contexts ------------------------------------------------
BEFORE, AFTER = 14, 6  # tokens shown around the peak
MOST_ON_PAGE = 300  # latents per coder: the page stays under 3 MB
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # byte-level BPE writes each byte as one character


def legible(tokenizer, token: int) -> str:
    """A token as text in which line ends, control characters and torn UTF-8 can be seen."""
    text = tokenizer.decode([token])
    if "\ufffd" in text:  # part of a character: show its bytes
        return "".join(f"\\x{BYTES[c]:02x}" if c in BYTES else c for c in tokenizer.convert_ids_to_tokens(token))
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == " " else f"\\u{ord(c):04x}" for c in text) or "∅"


def page(report: dict, seen: Tensor, latents: dict, tokenizer) -> str:
    """One self-contained HTML page. Per latent eight contexts, four of the largest activations and a random one of each
    lower fifth, each [fifth, position of the peak, tokens, activations on a scale of 0 to 9]."""
    vocabulary, random, width = {}, torch.Generator().manual_seed(0), seen.shape[1] - 1
    data = {name: [] for name in latents}
    for name, (active, found, density) in latents.items():
        for (latent, (tokens, acts)), right in list(zip(active.items(), found))[:MOST_ON_PAGE]:
            level = dict(zip(tokens.tolist(), (acts / acts.max() * 9).round().int().tolist()))
            fifths, contexts = tokens.tensor_split(FIFTHS), []
            for q in (0, 0, 0, 0, 1, 2, 3, 4):
                i = len(contexts) if q == 0 else torch.randint(len(fifths[q]), (), generator=random)
                row, column = divmod(fifths[q][i].item(), width)  # the sample counts from position 1 of each row
                first, last = max(column - BEFORE, -1), min(column + AFTER, width - 1)
                words = [vocabulary.setdefault(t, len(vocabulary)) for t in seen[row, first + 1 : last + 2].tolist()]
                levels = [level.get(row * width + c, 0) if c >= 0 else 0 for c in range(first, last + 1)]
                contexts.append([q, column - first, words, "".join(map(str, levels))])
            entry = [latent, right.double().mean().item(), density[latent].item(), acts.max().item(), contexts]
            data[name].append(entry)
    data = {"text": [legible(tokenizer, token) for token in vocabulary], "coders": data}
    rows = ["".join(f"<td>{html.escape(cell)}" for cell in row) for row in table(report)]
    parts = {"TITLE": html.escape(f"{Path(report['run']['model']).name} {report['run']['hookpoint']}")}
    parts["RESULTS"] = "<tr>" + "<tr>".join(rows)
    parts["DATA"] = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag of a document's is one
    parts["NOTES"] = "".join(f"<p>{html.escape(line)}" for line in [*headline(report).splitlines(), *notes(report)])
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fdfdfc; --faint: #62626c; --line: #d9d9de; --hot: 234 120 20 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --paper: #16161a; --faint: #a0a0ac; --line: #37373f; --hot: 240 130 30 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 0 auto; padding: 1rem }
h1 { font-size: 1.3rem; margin: 0 } p { margin: .4rem 0; color: var(--faint); overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .8rem 0; font-size: 14px }
td { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) } tr:first-child { font-weight: bold }
form { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .5rem 0; display: flex; flex-wrap: wrap;
  gap: .3rem 1rem; align-items: center; border-bottom: 1px solid var(--line) }
select, input { font: inherit; max-width: 100% } input { width: 4.5rem }
article { padding: .6rem 0; border-bottom: 1px solid var(--line); content-visibility: auto }
h2 { font-size: 1rem; margin: 0 } small { font-weight: normal; color: var(--faint) }
.context { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; display: grid;
  grid-template-columns: 2.6rem 1fr }
i { font-style: normal; color: var(--faint) } b { box-shadow: inset 0 -2px rgb(var(--hot)) }
@media (max-width: 40rem) { tr { display: grid; grid-template-columns: 1fr 1fr; padding: .3rem 0; border-bottom: 2px solid }
  tr:first-child { display: none } td { display: flex; justify-content: space-between; gap: 1rem; border: 0; white-space: normal }
  td:first-child { grid-column: span 2; font-weight: bold; position: static } td:empty { display: none } }
</style>
<h1>@TITLE@</h1><div class="wide"><table>@RESULTS@</table></div>@NOTES@
<p>Below: the scored latents. Each line is a context from one fifth of the latent's active tokens, sorted by activation
(1 the top fifth, 5 the lowest). Shading is the activation relative to the latent's largest; underlined is the token at
which the context was drawn.
<form onsubmit="return false"><label>coder <select id="coder"></select></label>
<label>sort by <select id="sort"><option value="-1">score, high first<option value="1">score, low first
<option value="-2">density, high first<option value="2">density, low first<option value="0">number</select></label>
<label>score from <input id="low" type="number" min="0" max="1" step="0.1" value="0"></label>
<label>to <input id="high" type="number" min="0" max="1" step="0.1" value="1"></label><span id="count"></span></form>
<main id="latents"></main>
<script id="data" type="application/json">@DATA@</script>
<script>
const {text, coders} = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id), [head, ...body] = [...document.querySelectorAll("tr")];
const add = (parent, tag, content) => {  // textContent: whatever a document holds is shown, never run
  const node = parent.appendChild(document.createElement(tag));
  if (content !== undefined) node.textContent = content;
  return node;
};
for (const name in coders) add(get("coder"), "option", name);
function fill(card, [latent, score, density, top, contexts]) {
  const about = `score ${score.toFixed(1)} · active on ${(100 * density).toPrecision(2)}% of tokens`;
  add(add(card, "h2", `latent ${latent} `), "small", `${about} · largest activation ${top.toPrecision(3)}`);
  for (const [fifth, peak, tokens, levels] of contexts) {
    const line = add(card, "div");
    line.className = "context";
    add(line, "i", fifth + 1 + "/5");
    const words = add(line, "span");
    tokens.forEach((token, i) => {
      const word = add(words, i == peak ? "b" : "span", text[token]);
      if (levels[i] > 0) word.style.background = `rgb(var(--hot) / ${levels[i] / 12 + 0.1})`;
    });
  }
}
const onSight = new IntersectionObserver(entries => {  // cards are filled when they are scrolled to
  for (const {target, isIntersecting} of entries)
    if (isIntersecting) { onSight.unobserve(target); target.style.minHeight = ""; fill(target, target.latent); }
}, {rootMargin: "600px"});
function show() {
  const sort = +get("sort").value, key = Math.abs(sort), number = (id, or) => get(id).value == "" ? or : +get(id).value;
  const chosen = coders[get("coder").value].filter(l => l[1] >= number("low", 0) - 1e-9 && l[1] <= number("high", 1) + 1e-9);
  chosen.sort((a, b) => (sort < 0 ? -1 : 1) * (a[key] - b[key]) || a[0] - b[0]);
  get("count").textContent = chosen.length + " latents";
  onSight.disconnect();
  get("latents").replaceChildren();
  for (const latent of chosen) {
    const card = Object.assign(add(get("latents"), "article"), {latent});
    card.style.minHeight = "14rem";
    onSight.observe(card);
  }
}
for (const id of ["coder", "sort", "low", "high"]) get(id).addEventListener("input", show);
show();
</script>
"""


def main():
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", type=Path, help="run directory that skipcoder.py wrote")
    flag("--tokens", type=float, default=2e5, help="held-out tokens to evaluate on (default %(default)s)")
    flag("--latents", type=int, default=300, help="latents scored per coder (default %(default)s)")
    flag("--json", type=Path, help="write all numbers to this file")
    flag("--html", type=Path, help="write a page to look at the scored latents to this file")
    flag("--seed", type=int, default=0, help="seed of the choice of latents and contexts (default 0)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    flag("--dataset", help="data set to evaluate on (default: the run's)")
    flag("--subset", help="configuration of that data set (default: the run's)")
    args = skipcoder.parse(parser)
    config, coders = skipcoder.load_run(args.run, args.device)
    if args.dataset is None:
        args.dataset, args.subset = config["dataset"], args.subset or config["subset"]
    for name, path in (("--json", args.json), ("--html", args.html)):
        with blame(f"{name} {path}", "pass the name of a file in a folder that can be written to"):
            if path and path.is_dir():
                raise IsADirectoryError("it is a folder")
            tempfile.TemporaryFile(dir=path and path.parent).close()
    report, shown = evaluate(config, coders, args)
    print(headline(report), markdown(table(report)), *notes(report), sep="\n\n")
    if args.json:
        skipcoder.write("--json", {args.json: json.dumps(report, indent=2) + "\n"})
    if args.html:
        skipcoder.write("--html", {args.html: page(report, *shown)})


if __name__ == "__main__":
    main()
