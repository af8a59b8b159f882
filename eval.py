# SPDX-License-Identifier: MIT
"""Say how good the coders of a run are: how well they reconstruct, what the LM loses, how interpretable they are.

    python eval.py runs/gpt2-layer6

On held-out documents, which training never saw, for every coder of the run:

    FVU           sum |y - y_hat|^2 / sum |y - mean(y)|^2 over the whole sample, as in training
    L0, dead      active latents per token; latents that are never active on the sample
    CE increase   cross-entropy (nats/token) of the LM with y_hat in place of the MLP's output, minus that of the clean
                  LM; CE recovered: the share of the harm done by the constant mean of y that y_hat undoes
    KL            KL(clean || patched) of the next-token distributions, nats/token
    intruder      how often the odd one out of five contexts is found, where four activate the same latent: a proxy of
                  interpretability with no explanation in the loop (see `intruder_trials`)

Baselines say what a number means: the best affine map from x to y for the first ones; the MLP's own neurons, an
untrained transcoder and random tokens for the last. What counts in a row of T tokens, of which 0 is an attention sink:

    position            0    1    2   ...   T-2   T-1
    x, y, latents            *    *   ...    *     *
    predicts position        2    3   ...   T-1

Outliers, tokens whose |y| is over the run's max_norm, do not count either. A patched LM keeps its y there and at 0.
"""

import argparse
import html
import json
import math
import re
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import skipcoder
from skipcoder import Coder, blame

TRIALS = 10  # intruder trials per latent
FIFTHS = 5  # quantiles of a latent's activations that they are spread over
SHOWN = 4  # contexts in a trial on which the latent is active; one more is the intruder
MIN_ACTIVE = 40  # tokens on which a latent has to be active to be scored: 8 in each fifth
IN_REPORT = "model hookpoint layer k num_latents seed dataset tokens tokens_trained versions".split()  # of config.json
CE_TOKENS = 20_000  # about so many tokens give CE and KL: each thing in the MLP's place costs a pass through the LM

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
        """log p [rows, ctx_len - 2, vocab] of tokens 2 to T - 1, with y_hat [rows, ctx_len, d] as the MLP's output."""
        self.y_hat = y_hat
        out = (self.lm if logits else self.lm.base_model)(tokens, use_cache=False)
        return out.logits.log_softmax(-1) if logits else None

class Losses:
    """What each thing in the MLP's place costs: squared error, and by row the mean CE and KL of all its predictions."""
    def __init__(self):
        self.tokens, self.y = 0, 0  # how many there are [2], and the sum of their y [2, d]: those that count, all but 0
        self.error, self.ce, self.kl = defaultdict(int), defaultdict(list), defaultdict(list)  # errors are [2], too

    def add_errors(self, counts: Tensor, y: Tensor, y_hats: dict[str, Tensor]):
        """y and each y_hat [N, d]; counts [2, N]: which of these tokens do."""
        counts = counts.double()
        self.tokens += counts.sum(1)
        self.y += counts @ y.double()
        for name, y_hat in y_hats.items():
            self.error[name] += counts @ (y - y_hat).square().sum(1, dtype=torch.float64)

    def add_predictions(self, name: str, tokens: Tensor, log_p: Tensor, log_q: Tensor):
        """log_p, log_q [rows, ctx_len - 2, vocab]: log-probabilities of the clean LM, and with `name` in place."""
        self.ce[name] += (-log_q.gather(-1, tokens[:, 2:, None])).squeeze(-1).double().mean(1).tolist()
        self.kl[name] += torch.linalg.vecdot(log_p.exp(), log_p - log_q).double().mean(1).tolist()

    def variance(self) -> Tensor:
        return self.error["zero"] - self.y.square().sum(1) / self.tokens  # [2]: sum |y|^2 - n |mean(y)|^2

    def report(self, name: str) -> dict[str, float]:
        fvu, fvu_all = (self.error[name] / self.variance()).tolist()
        rows = self.ce[name], self.ce["clean"], self.ce["mean"], self.kl[name]
        ce, clean, mean, kl = (torch.tensor(numbers, dtype=torch.float64) for numbers in rows)
        row = {"fvu": fvu, "fvu_all": fvu_all, "ce": ce.mean().item(), "ce_increase": (ce - clean).mean().item()}
        row |= {"ce_increase_se": standard_error(ce - clean), "kl": kl.mean().item(), "kl_se": standard_error(kl)}
        return row | {"ce_recovered": ((mean - ce).mean() / (mean - clean).mean()).item()}

def standard_error(a: Tensor) -> float:
    """Of the mean of a [n], whose entries are independent: rows of tokens, or latents."""
    return (a.std() / math.sqrt(len(a))).item() if len(a) > 1 else 0.0

def fit_affine(activations: skipcoder.MLPActivations, batches, device: torch.device) -> tuple[Tensor, ...]:
    """The best affine map from x to y in the least-squares sense: A [d, d] and b [d] of y_hat = x A + b, and the means.

    From products summed in float64. Those of x are singular (a layer norm takes a dimension away), so 1e-6 of the mean
    of their diagonal is added to it: FVU moves by less than 1e-5.
    """
    sums = 0
    for tokens in batches:
        x, y = (a.double() for a in activations(tokens.to(device)))
        x = nn.functional.pad(x, (0, 1), value=1)  # [N, d + 1]
        sums = sums + x.T @ torch.cat([x, y], 1)  # [d + 1, 2 d + 1]
    xx, xy = sums.split([len(sums), len(sums) - 1], 1)
    ridge = 1e-6 * xx.diagonal().mean() * torch.eye(len(xx), device=device)
    A = torch.linalg.solve(xx + ridge, xy).float()  # [d + 1, d]
    x_mean, y_mean = (sums[-1] / xx[-1, -1]).float().split([len(xx), len(xx) - 1])
    return A[:-1], A[-1], x_mean[:-1], y_mean

# ---- The intruder proxy ---------------------------------------------------------------------------------------------
def active_tokens(acts: Tensor, indices: Tensor, num_latents: int, wanted: int, generator) -> tuple[dict, Tensor]:
    """From acts, indices [n, k] of the sample draw `wanted` latents that can be scored. Return by latent the tokens it
    is active on and its activations there, [m] each, largest first; and of all latents the share of tokens, [M]."""
    token, slot = (acts > 0).nonzero(as_tuple=True)  # [pairs] each
    latent, act = indices[token, slot], acts[token, slot]
    count, active = latent.bincount(minlength=num_latents), {}  # [M]
    drawn = torch.randperm(num_latents, generator=generator)
    can_be_scored = (count[drawn] >= MIN_ACTIVE) & (count[drawn] < len(acts))  # one on all tokens has no intruder
    for j in drawn[can_be_scored][:wanted].tolist():
        mine = (latent == j).nonzero().flatten()
        order = act[mine].argsort(descending=True, stable=True)
        active[j] = token[mine][order], act[mine][order]
    return active, count.double() / len(acts)

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
        silent = torch.ones(len(hidden)).index_fill(0, tokens, 0).nonzero().flatten()
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
    unit = nn.functional.normalize(hidden[shown].float() - mean, dim=-1)  # [latents, trials, 5, d]
    return (unit @ unit.mT).sum(-1).argmin(-1) == SHOWN  # [latents, trials, 5, 5] -> [latents, trials]

def summary(found: Tensor) -> dict:
    """Score, its error, spread over latents and by fifth, from bool [latents, trials]; None for fewer than two."""
    names = "intruder", "intruder_se", "intruder_sd", "intruder_by_quantile", "intruder_histogram"
    if len(found) < 2:
        return dict.fromkeys(names) | {"latents_scored": len(found)}
    scores = found.double().mean(1)  # [latents]
    by_fifth = [found[:, q::FIFTHS].double().mean().item() for q in range(FIFTHS)]
    histogram = found.sum(1).bincount(minlength=TRIALS + 1) / len(scores)  # share of latents by right guesses, 0 to 10
    numbers = scores.mean().item(), standard_error(scores), scores.std().item(), by_fifth, histogram.tolist()
    return dict(zip(names, numbers)) | {"latents_scored": len(scores)}

# ---- One pass over training tokens, one over held-out tokens --------------------------------------------------------
def evaluate(config: dict, coders: dict[str, Coder], args) -> tuple[dict, tuple]:
    """Return the report and, for the page, the tokens [rows, ctx_len], where those that count are [n], and latents."""
    device, ctx_len, d, M = args.device, config["ctx_len"], config["d"], config["num_latents"]
    max_norm = config.get("max_norm", math.inf)
    k = sorted(coder.k for coder in coders.values())[len(coders) // 2]  # of the baselines: the middle one of several
    rows = max(1, 1024 // ctx_len)  # in a batch: log-probabilities over the vocabulary are large
    batches = math.ceil(args.tokens / rows / (ctx_len - 1))  # position 0 does not count
    to_fit = max(batches, math.ceil(100 * d / rows / ctx_len))  # fewer would overfit the affine map by over 1%
    with blame(f"RUN {args.run}: its model {config['model']}", skipcoder.MODEL):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config["model"])
        source = args.dataset, args.subset, tokenizer, ctx_len, rows
        training, held_out = (skipcoder.token_batches(*source, held_out=side) for side in (False, True))
        lm = skipcoder.load_lm(config["model"], device)
    if (width := lm.config.get_text_config().hidden_size) != d:
        sys.exit(f"error: RUN {args.run}: {config['model']} is {width} wide, the coders {d}: it is another model")

    # training documents give the affine map, the mean for mean-ablation, and where an untrained coder starts
    _, blocks, mlp = skipcoder.find_mlp(lm, config["layer"])
    later = blocks[config["layer"] + 1 :]
    del blocks[config["layer"] + 1 :]  # they need not run for this
    training = tqdm(islice(training, to_fit), "affine map", to_fit, leave=False)
    A, b, x_mean, y_mean = fit_affine(skipcoder.MLPActivations(lm, mlp, max_norm), training, device)
    blocks.extend(later)
    untrained = Coder("transcoder", d, M, k, seed=args.seed + 1).to(device).requires_grad_(False)
    untrained.b_enc.data = -(untrained.W_enc @ x_mean)  # [M, d] @ [d] -> [M]

    patched, losses, used = PatchedLM(lm, config["layer"]), Losses(), defaultdict(list)
    seen, kept, hidden = [], [], []  # rows read, which of their tokens count, and the last hidden states of those
    for tokens in tqdm(islice(held_out, batches), "held-out", batches, leave=False):
        predicts = len(losses.ce["clean"]) * (ctx_len - 1) < CE_TOKENS
        seen.append(tokens.int())
        tokens = tokens.to(device)
        log_p = patched(tokens, logits=predicts)
        x, y, neurons, h = (a.flatten(0, 1).float() for a in (patched.x, patched.y, patched.neurons, patched.hidden))
        no_sink = torch.arange(len(y), device=device) % ctx_len > 0  # [N], N = rows * ctx_len; x is [N, d]
        counts = no_sink & (y.norm(dim=1) <= max_norm)
        kept.append(counts.cpu())
        hidden.append(h[counts].bfloat16().cpu())

        with torch.autocast(device.type, torch.bfloat16, enabled=skipcoder.fast_bfloat16(device)):
            coded = {name: coder(x, y) for name, coder in (coders | {"untrained": untrained}).items()}
        coded["neurons"] = None, *neurons.topk(min(k, neurons.shape[1]), sorted=False)
        for name, (_, acts, indices) in coded.items():
            used[name].append((acts[counts].float().cpu(), indices[counts].int().cpu()))
        y_hats = {name: coded[name][0] for name in coders}
        y_hats |= {"affine": x @ A + b, "mean": y_mean.expand_as(y), "zero": torch.zeros_like(y)}
        losses.add_errors(torch.stack([counts, no_sink]), y, y_hats)
        if predicts:
            losses.add_predictions("clean", tokens, log_p, log_p)
            for name, y_hat in y_hats.items():
                in_place = torch.where(counts[:, None], y_hat, y).view_as(patched.y)
                losses.add_predictions(name, tokens, log_p, patched(tokens, in_place))

    hidden, latents, density, found = torch.cat(hidden), {}, {}, {}
    n, mean = len(hidden), hidden.float().mean(0)
    for name, parts in used.items():
        random = torch.Generator().manual_seed(args.seed)  # its own: no coder's score depends on the others
        acts, indices = map(torch.cat, zip(*parts))  # [n, k]
        size = neurons.shape[1] if name == "neurons" else M
        latents[name], density[name] = active_tokens(acts, indices, size, args.latents, random)
        found[name] = intruder_trials(latents[name], hidden, mean, random)
    random = torch.Generator().manual_seed(args.seed)
    found["null"] = intruder_found(torch.randint(n, (args.latents, TRIALS, SHOWN + 1), generator=random), hidden, mean)
    run = {key: config[key] for key in IN_REPORT} | {"tokens_asked_for": args.tokens, "baselines_k": k}
    keys = {"clean": "clean_ce", "mean": "mean_ablated_ce", "zero": "zero_ablated_ce"}
    report = {"tokens": n, "run": run} | {key: losses.report(name)["ce"] for name, key in keys.items()}
    both = {"tokens": losses.tokens, "variance": losses.variance()}  # [2] each: what counts, and with outliers
    report["outliers"] = {key: 1 - (part / whole).item() for key, (part, whole) in both.items()}  # shares left out
    report["coders"] = {name: losses.report(name) | summary(found[name]) for name in coders}
    for name, row in report["coders"].items():
        row |= {"arch": coders[name].arch, "k": coders[name].k}
        row |= {"l0": density[name].sum().item(), "dead": (density[name] == 0).double().mean().item()}
    report["baselines"] = {"affine": losses.report("affine")}
    report["baselines"] |= {name: summary(found[name]) for name in ("neurons", "untrained", "null")}
    tops = {name: promoted(lm, coder.W_dec.cpu()[[*latents[name]]].to(device)) for name, coder in coders.items()}
    tops["neurons"] = torch.empty(len(latents["neurons"]), 0)  # what they write is not looked up
    shown = {name: (latents[name], found[name], density[name], top) for name, top in tops.items()}
    return report, (torch.cat(seen), torch.cat(kept).nonzero().flatten(), shown, tokenizer)

@torch.no_grad()
def promoted(lm: nn.Module, W: Tensor) -> Tensor:
    """The five tokens [n, 5] that directions W [n, d] promote most, through the weights of final norm and LM head."""
    norm = [module for module in lm.base_model.modules() if "Norm" in type(module).__name__][-1]
    head = lm.get_output_embeddings().weight
    return ((norm(W.to(head.dtype)) - norm(torch.zeros_like(W, dtype=head.dtype))) @ head.T).topk(5).indices

# ---- The report as text ---------------------------------------------------------------------------------------------
COLUMNS = {  # of the table, by the number of the report that each is about
    "fvu": ("FVU", "{fvu:.4f}"),
    "l0": ("L0", "{l0:.1f}"),
    "dead": ("dead", "{dead:.1%}"),
    "ce_increase": ("CE increase", "{ce_increase:.4f} ± {ce_increase_se:.4f}"),
    "ce_recovered": ("recovered", "{ce_recovered:.1%}"),
    "kl": ("KL", "{kl:.5f} ± {kl_se:.5f}"),
    "intruder": ("intruder", "{intruder:.3f} ± {intruder_se:.3f}"),
    "intruder_by_quantile": ("top → lowest", "{intruder_by_quantile[0]:.2f} → {intruder_by_quantile[4]:.2f}"),
    "intruder_histogram": ("scores 0…1", "{bars}"),  # how many latents have each
}

def table(report: dict) -> list[list[str]]:
    """Header and rows of cells, empty where a baseline has no such number or there was nothing to score."""
    cells = [["", *(head for head, _ in COLUMNS.values())]]
    for name, row in (report["coders"] | report["baselines"]).items():
        shares = row.get("intruder_histogram") or [1]
        row = row | {"bars": "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * share / max(shares))] for share in shares)}
        cells.append([name, *("" if row.get(key) is None else c.format(**row) for key, (_, c) in COLUMNS.items())])
    return cells

def markdown(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in cells]
    lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def compare(report: dict, above: str, below: str) -> list[str]:
    """A sentence on the scores of two architectures at equal CE increase: their mean difference over log CE increase
    where the lines through all k overlap, with a standard error from those of the scores. No overlap, no sentence."""
    lines, means = [], []
    for arch in (above, below):
        rows = [row for row in report["coders"].values() if row["arch"] == arch and row["intruder"] is not None]
        points = [(math.log(r["ce_increase"]), r["intruder"], r["intruder_se"]) for r in rows if r["ce_increase"] > 0]
        lines.append(sorted(points) or [(math.inf, 0, 0)])
    low, high = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    if low >= high:
        return []
    for line in lines:
        x, score, error = map(np.array, zip(*line))
        # the mean of a line over the overlap is linear in its scores: that of a unit vector is the weight of one score
        weights = [np.interp(np.linspace(low, high, 101), x, point).mean() for point in np.eye(len(x))]
        means.append((weights @ score, np.linalg.norm(weights * error)))
    difference, error = means[0][0] - means[1][0], math.hypot(means[0][1], means[1][1])
    word = "no different from" if abs(difference) < 2 * error else "above" if difference > 0 else "below"
    where = f"At equal CE increase, from {math.exp(low):.2g} to {math.exp(high):.2g} nats"
    return [f"{where}, the score of {above} is {word} that of {below}: {difference:+.3f} ± {error:.3f}."]

def remarks(report: dict) -> list[str]:
    """What was evaluated, on what, how to read the table, and what is missing."""
    run, versions = report["run"], ", ".join(map(" ".join, report["run"]["versions"].items()))
    rows, left_out = report["coders"] | report["baselines"], report["outliers"]
    too_few = [name for name, row in rows.items() if row.get("latents_scored", 2) < 2]
    lines = [
        f"{run['hookpoint']} of {run['model']}: M {run['num_latents']:,}, k {run['k']} (baselines {run['baselines_k']})"
        f", seed {run['seed']}, trained on {run['tokens_trained']:,} tokens of {run['dataset']} with {versions}.",
        f"{report['tokens']:,} held-out tokens; cross-entropy clean {report['clean_ce']:.4f}, with the mean of y in the"
        f" MLP's place {report['mean_ablated_ce']:.4f}, with zero {report['zero_ablated_ce']:.4f} nats/token.",
        "Good is a low FVU (predicting the mean gives 1), CE increase and KL (nats/token), and a high CE recovered (0%"
        " with the mean in the MLP's place) and intruder score (chance is 0.2, which null should be within 3 errors of;"
        " compare with neurons and untrained). ±: standard error, over rows of text or over latents.",
    ]
    lines += compare(report, "transcoder", "sae") + compare(report, "skip_transcoder", "transcoder")
    if left_out["tokens"] > 0:
        fvu_all = ", ".join(f"{name} {row['fvu_all']:.4f}" for name, row in rows.items() if "fvu_all" in row)
        share = f"{left_out['tokens']:.2%} of the tokens, which hold {left_out['variance']:.1%} of the variance of y"
        lines.append(f"Left out as outliers: {share}. FVU with them: {fvu_all}.")
    if run["tokens_trained"] < run["tokens"]:
        lines.append(f"The run was stopped early: {run['tokens']:,} tokens were asked for.")
    if round(report["tokens"] / (1 - left_out["tokens"])) < run["tokens_asked_for"]:
        lines.append(f"There are fewer held-out tokens than --tokens {run['tokens_asked_for']:,} asked for.")
    if too_few:
        lines.append(f"Raise --tokens or --latents: fewer than 2 latents could be scored in {', '.join(too_few)}.")
    return lines

# ---- Flags ----------------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", type=Path, help="run directory that skipcoder.py wrote")
    flag("--tokens", type=float, default=2e5, help="held-out tokens to evaluate on (default %(default)s)")
    flag("--latents", type=int, default=300, help="latents scored per coder (default %(default)s)")
    flag("--json", type=Path, help="write all numbers to this file")
    flag("--html", type=Path, help="write a page with pictures and the scored latents to this file")
    flag("--svg", type=Path, help="write the first of its pictures, interpretability against loss, to this file")
    flag("--seed", type=int, default=0, help="seed of the choice of latents and contexts (default 0)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    flag("--dataset", help="data set to evaluate on (default: the run's)")
    flag("--subset", help="configuration of that data set (default: the run's)")
    args = skipcoder.parse(parser)
    config, coders = skipcoder.load_run(args.run, args.device)
    if args.dataset is None:
        args.dataset, args.subset = config["dataset"], args.subset or config["subset"]
    for name, path in (("--json", args.json), ("--html", args.html), ("--svg", args.svg)):
        with blame(f"{name} {path}", "pass the name of a file that can be written"):
            path and path.open("a").close()
    report, shown = evaluate(config, coders, args)
    print(markdown(table(report)), *remarks(report), sep="\n\n")
    files = {args.json: json.dumps(report, indent=2) + "\n", args.html: args.html and page(report, *shown)}
    files[args.svg] = chart(report, "ce_increase", "intruder") + "\n"
    skipcoder.write("--json, --html or --svg", {path: text for path, text in files.items() if path})

# ---- Pictures and the page: from here on nothing is measured --------------------------------------------------------
# of the architectures: a colour that the colour-blind can tell from the others, a marker, and where beside it k stands
LOOKS = [("#d55e00", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", 7, -6, "start"),
         ("#0080c6", "M-4-4h8v8h-8z", 7, 14, "start"), ("#009e73", "M0-5l5 9h-10z", -7, -6, "end")]
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 440 285" fill="currentColor">
<style>svg { color: #1b1b1f; background: #fdfdfc } text { font: 12px system-ui, sans-serif; stroke: none }
@media (prefers-color-scheme: dark) { svg { color: #e6e6ea; background: #16161a } }</style>"""

def axis(numbers: list[float], start: int, end: int):
    """Where a number lies between the pixels start and end, and round numbers to mark; a log scale from factor 6 on."""
    log = 0 < 6 * min(numbers) < max(numbers)
    f = math.log10 if log else float
    low, high = f(min(numbers)), f(max(numbers))
    margin = 0.08 * (high - low) or 0.1
    low, high = low - margin, high + margin
    marks = [m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5)]
    if not log:
        step = next(mark for mark in marks if 6 * mark >= high - low)
        marks = [step * i for i in range(int(low / step) - 1, int(high / step) + 2)]
    marks = [mark for mark in marks if low <= f(mark) <= high]
    return lambda number: round(start + (f(number) - low) / (high - low) * (end - start), 1), marks

def chart(report: dict, x: str, y: str) -> str:
    """An SVG of two columns of the table: a line per architecture through its k, with error bars of two errors of y."""
    rows = [row | {"error": 2 * row.get(f"{y}_se", 0)} for row in report["coders"].values() if row[y] is not None]
    if not rows:
        return SVG + '<text x="5" y="14">no latents could be scored</text></svg>'
    x_at, x_marks = axis([row[x] for row in rows], 50, 425)
    y_at, y_marks = axis([row[y] + sign * row["error"] for row in rows for sign in (-1, 1)], 250, 30)
    text = '<text x="{}" y="{}" text-anchor="{}">{}</text>'.format
    grid = "".join([f"M{x_at(m)} 30V250" for m in x_marks] + [f"M50 {y_at(m)}H425" for m in y_marks])
    out = [SVG, f'<path stroke="currentColor" opacity=".15" d="{grid}"/>']
    out += [text(5, 14, "start", COLUMNS[y][0]), *(text(44, y_at(m) + 4, "end", f"{m:.6g}") for m in y_marks)]
    out += [text(425, 282, "end", COLUMNS[x][0]), *(text(x_at(m), 266, "middle", f"{m:.6g}") for m in x_marks)]
    for i, arch in enumerate(dict.fromkeys(row["arch"] for row in rows)):
        (color, marker, dx, dy, anchor), line = LOOKS[i % len(LOOKS)], [row for row in rows if row["arch"] == arch]
        left, path = 100 + 95 * i, "L".join(f"{x_at(row[x])} {y_at(row[y])}" for row in line)
        out.append(f'<g fill="{color}" stroke="{color}"><path fill="none" stroke-width="1.5" d="M{path}"/>')
        out += [f'<path transform="translate({left} 10)" d="{marker}"/>', text(left + 8, 14, "start", arch)]
        for row in line:  # what a title says is shown on pointing
            px, py, ends = x_at(row[x]), y_at(row[y]), [y_at(row[y] + sign * row["error"]) for sign in (1, -1)]
            about = ", ".join(f"{COLUMNS[key][0]} {COLUMNS[key][1].format(**row)}" for key in (x, y))
            out.append(f'<g><title>{arch}, k {row["k"]}: {about}</title><path d="M{px} {ends[0]}V{ends[1]}"/>')
            out.append(f'<path transform="translate({px} {py})" d="{marker}"/></g>')
            out.append(text(px + dx, py + dy, anchor, row["k"]))
        out.append("</g>")
    return "".join([*out, "</svg>"])

MOST, BEFORE, AFTER = 3000, 14, 6  # latents shown in all (the page stays under 4 MB), and tokens around each peak

def legible(tokenizer, token: int) -> str:
    """A token as text in which line ends and control characters can be seen."""
    text = tokenizer.decode([token]).replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text) or "∅"

def page(report: dict, seen: Tensor, places: Tensor, latents: dict, tokenizer) -> str:
    """One self-contained HTML page. Per latent eight contexts, four of the largest activations and a random one of each
    lower fifth, as [fifth, position of the peak, tokens, activations on a scale of 0 to 9]."""
    vocabulary, random, width = {}, torch.Generator().manual_seed(0), seen.shape[1]
    coders, number = {name: [] for name in latents}, lambda token: vocabulary.setdefault(token, len(vocabulary))
    for name, (active, found, density, promotes) in latents.items():
        for (latent, (tokens, acts)), right, most in list(zip(active.items(), found, promotes))[: MOST // len(latents)]:
            tokens = places[tokens]
            level = dict(zip(tokens.tolist(), (acts / acts.max() * 9).ceil().int().tolist()))
            fifths, contexts = tokens.tensor_split(FIFTHS), []
            for q in (0, 0, 0, 0, 1, 2, 3, 4):
                i = len(contexts) if q == 0 else torch.randint(len(fifths[q]), (), generator=random)
                row, column = divmod(fifths[q][i].item(), width)
                first, last = max(column - BEFORE, 0), min(column + AFTER, width - 1)
                words = [number(t) for t in seen[row, first : last + 1].tolist()]
                levels = [level.get(row * width + c, 0) for c in range(first, last + 1)]
                contexts.append([q, column - first, words, "".join(map(str, levels))])
            numbers = [latent, right.double().mean().item(), density[latent].item(), acts.max().item()]
            coders[name].append([*numbers, contexts, [number(t) for t in most.tolist()]])
    data = {"text": [legible(tokenizer, token) for token in vocabulary], "coders": coders}
    parts = {"DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")}  # no document's text is a tag
    parts["TITLE"] = html.escape(f"{Path(report['run']['model']).name} {report['run']['hookpoint']}")
    parts["RESULTS"] = "".join(f"<tr><td>{'<td>'.join(map(html.escape, row))}" for row in table(report))
    parts["PLOTS"] = "".join(chart(report, x, "intruder") for x in ("ce_increase", "kl")) + chart(report, "l0", "fvu")
    parts["NOTES"] = "".join(f"<p>{html.escape(line)}" for line in remarks(report))
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE)

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title><style>
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fdfdfc; --faint: #62626c; --line: #ddd; --hot: 237 125 25 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --paper: #16161a; --faint: #a0a0ac; --line: #444 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 13px; white-space: pre }
td { text-align: right; padding: .15rem .4rem } td:first-child, tr:first-child { font-weight: 600 }
td:first-child { text-align: left } td, article { border-bottom: thin solid var(--line) }
#pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem }
main { scroll-margin-top: 9rem } td:last-child { font-family: monospace }
nav { position: sticky; top: 0; background: var(--paper); padding: .5rem 0; display: flex; flex-flow: wrap; gap: 1rem }
select, input { font: inherit; max-width: 100% } article { padding: .6rem 0 } article:empty { min-height: 14rem }
article div { display: grid; grid-template-columns: 3rem 1fr; white-space: pre-wrap; font: 13px/1.7 monospace }
span > * { background: rgb(var(--hot) / calc(var(--level) / 10)) } b { box-shadow: inset 0 -2px rgb(var(--hot)) }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 0 } p, small { color: var(--faint); font-weight: normal }
</style><h1>@TITLE@</h1><div id="pictures">@PLOTS@</div><table>@RESULTS@</table>@NOTES@
<p>Below: the scored latents. A line is a context from one fifth of the latent's active tokens, sorted by activation (1
the top fifth, 5 the lowest). Shading: activation, relative to the latent's largest; underlined: the token drawn.
<nav><label>coder <select id="coder"></select></label>
<label>sort by <select id="sort"><option value="-1">score, high first<option value="1">score, low first
<option value="-2">density, high first<option value="2">density, low first<option value="0">number</select></label>
<label>fires on <input id="token" type="search"></label><span id="count"></span></nav>
<main id="latents"></main><script id="data" type="application/json">@DATA@</script><script>
const get = id => document.getElementById(id), {text, coders} = JSON.parse(get("data").textContent);
const add = (parent, tag, textContent = "", more = {}) =>  // as text, what a document holds is shown and never run
  parent.appendChild(Object.assign(document.createElement(tag), {textContent, ...more}));
for (const name in coders) add(get("coder"), "option", name);
function fill(card, [latent, score, density, top, contexts, promoted]) {
  const title = add(card, "h2"), about = ` score ${score.toFixed(1)} · active on ${+(100 * density).toPrecision(2)}%`;
  add(title, "a", `latent ${latent}`, {href: `#${get("coder").value}/${latent}`});
  add(title, "small", `${about} of tokens · largest activation ${+top.toPrecision(3)}`);
  if (promoted.length) add(card, "small", "promotes " + promoted.map(token => `“${text[token]}”`).join(" "));
  for (const [fifth, peak, tokens, levels] of contexts) {
    const line = add(card, "div"), words = (add(line, "small", fifth + 1 + "/5"), add(line, "span"));
    tokens.forEach((t, i) => add(words, i == peak ? "b" : "span", text[t], {style: "--level: " + levels[i]}));
  }
}
const onSight = new IntersectionObserver(  // a card is filled when it is scrolled to
  cards => cards.filter(c => c.isIntersecting && !c.target.firstChild).forEach(c => fill(c.target, c.target.latent)),
  {rootMargin: "600px"});
function show() {
  const sort = +get("sort").value, key = Math.abs(sort), token = get("token").value;
  const opened = latent => latent[0] == location.hash.split("/")[1];  // the one in the address comes first
  const fires = ([, , tokens, levels]) => tokens.some((t, i) => levels[i] > 0 && text[t].includes(token));
  const chosen = coders[get("coder").value].filter(latent => opened(latent) || !token || latent[4].some(fires));
  chosen.sort((a, b) => opened(b) - opened(a) || (sort < 0 ? -1 : 1) * (a[key] - b[key]) || a[0] - b[0]);
  get("count").textContent = chosen.length + " latents";
  get("latents").replaceChildren();
  for (const latent of chosen) onSight.observe(add(get("latents"), "article", "", {latent}));
}
onhashchange = () => {  // open what the address names, as in #transcoder/1234
  const name = location.hash.slice(1).split("/")[0];
  if (name in coders) get("coder").value = name;
  show();
  if (name) get("latents").scrollIntoView();
};
document.querySelector("nav").oninput = () => (history.replaceState(null, "", "#" + get("coder").value), show());
onhashchange();
</script>
"""

if __name__ == "__main__":
    main()
