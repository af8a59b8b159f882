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
untrained transcoder and random tokens for the last.
"""

import html
import json
import math
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.pytorch_utils import Conv1D

import skipcoder
from skipcoder import Coder, Flags, InputError, TokenBatches

TRIALS = 10  # intruder trials per latent
FIFTHS = 5  # quantiles of a latent's activations that they are spread over
SHOWN = 4  # contexts in a trial on which the latent is active; one more is the intruder
MIN_ACTIVE = 40  # tokens on which a latent has to be active to be scored: 8 in each fifth

# ---------------------------------------------------------------------------------------------------------------------
# The LM, with and without something in the MLP's place
# ---------------------------------------------------------------------------------------------------------------------


class PatchedLM:
    """The LM with a tap on one MLP. A call without `y_hat` is clean and leaves x, y, neurons and hidden as attributes.

    All of them are [rows, ctx_len - 1, width]: as in training, position 0 is left out. Calls with `y_hat` are for the
    same tokens.
    """

    def __init__(self, lm: nn.Module, layer: int, dtype: torch.dtype):
        self.lm, self.dtype, self.device, self.y_hat = lm, dtype, lm.device, None
        _, blocks, mlp = skipcoder.find_mlp(lm, layer)
        for block in blocks[:layer]:
            block.forward = self.replayed(block.forward)
        mlp.register_forward_hook(self.hook)
        # the neurons are what the MLP's last linear layer reads: c_proj in GPT-2, down_proj in Llama and Gemma
        output_layer = [module for module in mlp.modules() if isinstance(module, (nn.Linear, Conv1D))][-1]
        output_layer.register_forward_pre_hook(lambda _, args: self.keep("neurons", args[0]))
        lm.base_model.register_forward_hook(lambda _, args, output: self.keep("hidden", output.last_hidden_state))
        # the LM head stays in fp32, as bf16 logits have steps of 0.1 nats, and runs only where its output counts:
        # position 0 is left out, and the last one has no next token
        head = lm.get_output_embeddings()
        forward = head.forward
        head.forward = torch.autocast(self.device.type, enabled=False)(lambda hidden: forward(hidden[:, 1:-1].float()))

    def replayed(self, forward):
        """`forward` of a block before the MLP: patched runs, where it would do the same again, get its last output."""
        output = None

        def replay(*args, **kwargs):
            nonlocal output
            if self.y_hat is None:
                output = forward(*args, **kwargs)
            return output

        return replay

    def keep(self, name: str, value: Tensor):
        if self.y_hat is None:
            setattr(self, name, value[:, 1:].float())

    def hook(self, mlp, args, output):
        self.keep("x", args[0])
        self.keep("y", output)
        if self.y_hat is not None:
            return torch.cat([output[:, :1], self.y_hat.to(output.dtype)], 1)  # position 0 keeps its true output

    @torch.no_grad()
    def __call__(self, tokens: Tensor, y_hat: Tensor | None = None) -> Tensor:
        """Logits [rows, ctx_len - 2, vocab] at positions 1 to ctx_len - 2 of tokens [rows, ctx_len]."""
        self.y_hat = y_hat
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.lm(tokens, use_cache=False).logits.float()


class Losses:
    """Sums over the sample, for each thing in the MLP's place, of squared error, cross-entropy and KL."""

    def __init__(self, d: int, device: torch.device):
        self.error, self.ce, self.kl = Counter(), Counter(), Counter()
        self.tokens = self.predicted = 0  # tokens that count; those among them whose next token is predicted
        self.y = torch.zeros(d, dtype=torch.float64, device=device)  # sum of y
        self.y_square = 0.0  # sum of |y|^2

    def start(self, tokens: Tensor, logits: Tensor, y: Tensor):
        """A new batch: tokens [rows, ctx_len], the clean LM's logits [rows, ctx_len - 2, vocab], the MLP's y [N, d]."""
        log_p = logits.log_softmax(-1)  # [rows, ctx_len - 2, vocab]
        self.next, self.p = tokens[:, 2:, None], log_p.exp()
        self.negative_entropy = torch.linalg.vecdot(self.p, log_p)  # [rows, ctx_len - 2]
        self.tokens += len(y)
        self.predicted += self.next.numel()
        self.y += y.sum(0, dtype=torch.float64)
        self.y_square += total(y.square())
        self.ce["clean"] -= total(log_p.gather(-1, self.next))

    def add(self, name: str, squared_error: Tensor, logits: Tensor):
        """What `name` made of the batch: squared error [N, d], logits [rows, ctx_len - 2, vocab] with it in place."""
        log_q = logits.log_softmax(-1)
        self.error[name] += total(squared_error)
        self.ce[name] -= total(log_q.gather(-1, self.next))
        self.kl[name] += total(self.negative_entropy - torch.linalg.vecdot(self.p, log_q))  # sum p (log p - log q)

    def report(self, name: str) -> dict[str, float]:
        variance = self.y_square - self.y.square().sum().item() / self.tokens  # sum |y - mean(y)|^2
        ce, clean, mean = (self.ce[key] / self.predicted for key in (name, "clean", "mean"))
        return {
            "fvu": self.error[name] / variance,
            "ce": ce,
            "ce_increase": ce - clean,
            "ce_recovered": (mean - ce) / (mean - clean),
            "kl": self.kl[name] / self.predicted,
        }


def total(a: Tensor) -> float:
    return a.sum(dtype=torch.float64).item()


class Affine:
    """The best affine map from x to y in the least-squares sense, from covariances summed over batches in float64.

    The covariance of x is singular (a layer norm takes a dimension away), so 1e-6 of its mean diagonal is added to the
    diagonal: FVU moves by less than 1e-5.
    """

    def __init__(self, d: int, device: torch.device):
        self.n = 0
        self.x, self.y = (torch.zeros(d, dtype=torch.float64, device=device) for _ in range(2))  # sums [d]
        self.xx, self.xy = (torch.zeros(d, d, dtype=torch.float64, device=device) for _ in range(2))  # sums [d, d]

    def add(self, x: Tensor, y: Tensor):
        """x, y [N, d]"""
        x, y = x.double(), y.double()
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def solve(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [d, d] and b [d] of y_hat = x A + b, and the means [d] of x and y, in fp32."""
        x, y = self.x / self.n, self.y / self.n
        covariance = self.xx / self.n - x.outer(x)
        covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(len(x), device=x.device)
        A = torch.linalg.solve(covariance, self.xy / self.n - x.outer(y))
        return A.float(), (y - x @ A).float(), x.float(), y.float()


# ---------------------------------------------------------------------------------------------------------------------
# Which latents are active where
# ---------------------------------------------------------------------------------------------------------------------


class Activity:
    """Counts for all M latents of a coder, and for a random part of them the tokens on which they are active."""

    def __init__(self, num_latents: int, wanted: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)  # its own, so that no coder's score depends on the others
        # Which latents are active often enough to be scored is known only at the end, and keeping every activation
        # would take memory without bound: keep a random part of the latents, enough to find the wanted number among.
        self.drawn = torch.randperm(num_latents, generator=self.generator)[: 4 * wanted]  # the first are preferred
        self.kept = torch.zeros(num_latents, dtype=torch.bool)
        self.kept[self.drawn] = True
        self.count = torch.zeros(num_latents, dtype=torch.int64)  # [M] tokens on which each latent is active
        # (latent, token, activation) of each pair, on disk: kept as many small tensors they would fragment the heap
        self.pairs = tempfile.NamedTemporaryFile()
        self.tokens, self.wanted = 0, wanted

    def add(self, acts: Tensor, indices: Tensor, start: int):
        """acts, indices [N, k] of the tokens start to start + N of the sample."""
        token, slot = (acts > 0).nonzero(as_tuple=True)
        latent, act = indices[token, slot].cpu(), acts[token, slot].cpu()
        self.count += latent.bincount(minlength=len(self.count))
        kept = self.kept[latent]
        pairs = [latent[kept].int(), (token.cpu()[kept] + start).int(), act[kept].float().view(torch.int32)]
        self.pairs.write(torch.stack(pairs, 1).numpy())  # [n, 3]
        self.tokens = start + len(acts)
        # once enough latents drawn earlier can be scored, a latent need not be kept any more
        ready = self.ready().int()
        ready_before = ready.cumsum(0) - ready
        self.kept[self.drawn[ready_before >= self.wanted]] = False

    def ready(self) -> Tensor:
        """Which of the drawn latents can be scored: often active, but not on every token, which leaves no intruder."""
        count = self.count[self.drawn]
        return (count >= MIN_ACTIVE) & (count < self.tokens)

    def sample(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Per scored latent the tokens it is active on [n] and its activations there [n], the largest first."""
        scored = self.drawn[self.ready()][: self.wanted].tolist()
        if not scored:
            self.pairs.close()
            return {}
        is_scored = torch.zeros_like(self.kept)
        is_scored[scored] = True
        with self.pairs as file:  # deleted at the end
            file.flush()
            size = Path(file.name).stat().st_size // 4
            pairs = torch.from_file(file.name, size=size, dtype=torch.int32).view(-1, 3)
            latent, token, act = pairs[is_scored[pairs[:, 0].long()]].unbind(1)
        by_latent = latent.argsort(stable=True)
        latent, token, act = latent[by_latent], token[by_latent], act[by_latent].view(torch.float32)
        active = {}
        for j in scored:
            first, end = torch.searchsorted(latent, torch.tensor([j, j + 1], dtype=torch.int32)).tolist()
            acts, by_act = act[first:end].sort(descending=True, stable=True)
            active[j] = token[first:end][by_act], acts
        return active


# ---------------------------------------------------------------------------------------------------------------------
# The intruder proxy
# ---------------------------------------------------------------------------------------------------------------------


def odd_one_out(contexts: Tensor) -> Tensor:
    """Index [...] of the one of the contexts [..., 5, d] whose summed cosine similarity to the others is smallest."""
    unit = nn.functional.normalize(contexts.float(), dim=-1)
    similarity = unit @ unit.transpose(-1, -2)  # [..., 5, 5]
    return similarity.sum(-1).argmin(-1)  # a context's similarity to itself is 1 for all


def intruder_trials(active: dict[int, tuple[Tensor, Tensor]], hidden: Tensor, mean: Tensor, generator) -> Tensor:
    """For each latent of `active` and each of 10 trials, whether the intruder was found: bool [latents, 10].

    Intruder detection (Paulo & Belrose 2025, arXiv 2507.08473) with the LM under study as the judge. If a latent stands
    for one thing, the contexts on which it is active resemble one another, and one on which it is not stands out. A
    context is a token, represented by the LM's last hidden state there (`hidden` [N, d]) less the mean over the sample.
    The tokens of a latent, sorted by activation, are cut into fifths; trial t shows 4 tokens of fifth t mod 5 (0 is the
    top fifth) and one token on which the latent is not active. Chance is 1/5.
    """
    if not active:
        return torch.empty(0, TRIALS, dtype=torch.bool)
    shown = []
    for tokens, _ in active.values():
        silent = torch.ones(len(hidden), dtype=torch.bool)
        silent[tokens] = False
        silent = silent.nonzero().flatten()
        fifths = tokens.tensor_split(FIFTHS)
        for trial in range(TRIALS):
            fifth = fifths[trial % FIFTHS]
            four = fifth[torch.randperm(len(fifth), generator=generator)[:SHOWN]]
            intruder = silent[torch.randint(len(silent), (1,), generator=generator)]
            shown.append(torch.cat([four, intruder]))
    return found_last(torch.stack(shown).view(len(active), TRIALS, SHOWN + 1), hidden, mean)


def found_last(tokens: Tensor, hidden: Tensor, mean: Tensor) -> Tensor:
    """Whether the last of the tokens [latents, trials, 5] is the odd one out: bool [latents, trials]."""
    return torch.stack([odd_one_out(hidden[row] - mean) == SHOWN for row in tokens])


def summary(found: Tensor) -> dict:
    """Score, standard error over latents and score by fifth, from bool [latents, trials]; None for fewer than two."""
    if len(found) < 2:
        nothing = {"intruder": None, "intruder_se": None, "intruder_by_quantile": None}
        return nothing | {"latents_scored": len(found)}
    scores = found.double().mean(1)  # [latents]
    return {
        "intruder": scores.mean().item(),
        "intruder_se": (scores.std() / math.sqrt(len(scores))).item(),
        "intruder_by_quantile": [found[:, q::FIFTHS].double().mean().item() for q in range(FIFTHS)],
        "latents_scored": len(scores),
    }


# ---------------------------------------------------------------------------------------------------------------------
# One pass over training tokens, one over held-out tokens
# ---------------------------------------------------------------------------------------------------------------------


def first_rows(batches, rows: int, what: str):
    """Yield batches until there were so many rows (or no more), with a progress bar."""
    with tqdm(total=rows, desc=what, unit="row", leave=False) as bar:
        while rows > 0 and (batch := next(batches, None)) is not None:
            batch = batch[:rows]
            rows -= len(batch)
            yield batch
            bar.update(len(batch))


def fit_affine(lm: nn.Module, layer: int, batches, d: int, dtype: torch.dtype) -> Affine:
    """The best affine map on batches [rows, ctx_len] of tokens; the blocks after the MLP do not run for it."""
    _, blocks, mlp = skipcoder.find_mlp(lm, layer)
    activations = skipcoder.MLPActivations(lm, mlp, dtype)
    affine = Affine(d, lm.device)
    later = blocks[layer + 1 :]
    del blocks[layer + 1 :]
    for tokens in batches:
        affine.add(*activations(tokens.to(lm.device)))
    blocks.extend(later)
    return affine


def evaluate(config: dict, coders: dict[str, Coder], args) -> tuple[dict, tuple]:
    """Return the report and what --html shows: the tokens, the scored latents and the tokenizer."""
    device, ctx_len, d, k = args.device, config["ctx_len"], config["d"], config["k"]
    dtype = skipcoder.matmul_dtype(device)
    model = f"RUN {args.run}: its model"
    tokenizer = skipcoder.from_pretrained(AutoTokenizer, config["model"], model)
    rows = max(1, 2048 // ctx_len)  # log-probabilities over the vocabulary are large: few at a time
    rows_wanted = math.ceil(args.tokens / (ctx_len - 1))  # position 0 does not count
    source = (args.dataset, args.subset, tokenizer, ctx_len, rows)
    training = skipcoder.read_ahead(TokenBatches(*source, once=True))
    held_out = skipcoder.read_ahead(TokenBatches(*source, held_out=True, once=True))
    lm = skipcoder.load_lm(config["model"], device, dtype, model)
    width = lm.config.get_text_config().hidden_size
    if width != d:
        raise InputError(f"{model} {config['model']} is {width} wide, the coders are {d} wide: it is another model")

    # training documents give the affine baseline, the mean for mean-ablation, and where an untrained coder starts
    rows_to_fit = max(rows_wanted, math.ceil(100 * d / (ctx_len - 1)))  # fewer tokens would overfit by over 1%
    batches = first_rows(training, rows_to_fit, "affine map")
    affine = fit_affine(lm, config["layer"], batches, d, dtype)
    if affine.n == 0:
        raise InputError(f"--dataset {args.dataset}: too little text, its training documents fill no row of {ctx_len}")
    A, b, x_mean, y_mean = affine.solve()
    untrained = Coder("transcoder", d, config["num_latents"], k, seed=args.seed + 1).to(device).requires_grad_(False)
    untrained.start_at(x_mean, y_mean)
    for coder in (*coders.values(), untrained):
        coder.matmul_dtype = dtype

    patched = PatchedLM(lm, config["layer"], dtype)
    losses = Losses(d, device)
    activity = {}
    seen = torch.empty(rows_wanted, ctx_len, dtype=torch.int32)
    with tempfile.NamedTemporaryFile() as file:
        # the last hidden state of every token, on disk: 1.5 GB for 1M tokens of GPT-2
        size = rows_wanted * (ctx_len - 1) * d
        hidden = torch.from_file(file.name, shared=True, size=size, dtype=torch.bfloat16).view(-1, d)  # [N, d]
        hidden_sum = torch.zeros(d, dtype=torch.float64)
        for tokens in first_rows(held_out, rows_wanted, "held-out"):
            tokens = tokens.to(device)
            logits = patched(tokens)
            x, y, neurons, h = (a.flatten(0, 1) for a in (patched.x, patched.y, patched.neurons, patched.hidden))
            start = losses.tokens  # before this batch
            losses.start(tokens, logits, y)
            del logits  # [rows, ctx_len - 2, vocab], as large as all else
            row = start // (ctx_len - 1)
            seen[row : row + len(tokens)] = tokens.cpu()
            hidden[start : start + len(h)] = h.cpu()
            hidden_sum += h.sum(0, dtype=torch.float64).cpu()

            coded = {name: coder(x, y) for name, coder in coders.items()}
            active = {name: (c.acts, c.indices) for name, c in coded.items()}
            active["neurons"] = neurons.topk(min(k, neurons.shape[1]), sorted=False)
            _, *active["untrained"] = untrained(x, y)
            for name, (acts, indices) in active.items():
                if name not in activity:
                    num_latents = neurons.shape[1] if name == "neurons" else config["num_latents"]
                    activity[name] = Activity(num_latents, args.latents, args.seed)
                activity[name].add(acts, indices, start)

            y_hats = {name: c.y_hat for name, c in coded.items()}
            y_hats |= {"affine": x @ A + b, "mean": y_mean.expand_as(y), "zero": torch.zeros_like(y)}
            for name, y_hat in y_hats.items():
                losses.add(name, (y - y_hat).square(), patched(tokens, y_hat.view_as(patched.y)))

        n = losses.tokens
        if n == 0:
            raise InputError(
                f"--dataset {args.dataset}: every 10th document is held out, and they fill no row of {ctx_len} tokens"
            )
        sampled, found = {}, {}
        mean = (hidden_sum / n).float()
        for name, a in activity.items():
            sampled[name] = a.sample()
            found[name] = intruder_trials(sampled[name], hidden[:n], mean, a.generator)
        generator = torch.Generator().manual_seed(args.seed)
        random_tokens = torch.randint(n, (args.latents, TRIALS, SHOWN + 1), generator=generator)
        found["null"] = found_last(random_tokens, hidden, mean)

    density = {name: a.count.double() / n for name, a in activity.items()}  # [M] share of tokens
    scored = {name: (sampled[name], found[name], density[name]) for name in (*coders, "neurons")}
    return assemble(list(coders), losses, density, found), (seen, scored, tokenizer)


def assemble(coders: list[str], losses: Losses, density: dict[str, Tensor], found: dict[str, Tensor]) -> dict:
    """The report: what --json writes."""
    report = {"tokens": losses.tokens}
    for name, key in (("clean", "clean_ce"), ("mean", "mean_ablated_ce"), ("zero", "zero_ablated_ce")):
        report[key] = losses.report(name)["ce"]
    report["coders"] = {
        name: losses.report(name)
        | {"l0": density[name].sum().item(), "dead": (density[name] == 0).double().mean().item()}
        | summary(found[name])
        for name in coders
    }
    report["baselines"] = {"affine": losses.report("affine")}
    report["baselines"] |= {name: summary(found[name]) for name in ("neurons", "untrained", "null")}
    return report


def table(report: dict) -> str:
    """The report as a Markdown table, under 100 columns wide."""
    columns = {
        "FVU": "{fvu:.4f}",
        "L0": "{l0:.1f}",
        "dead %": "{dead:.1%}",
        "CE increase": "{ce_increase:.4f}",
        "CE recovered": "{ce_recovered:.1%}",
        "KL": "{kl:.4f}",
        "intruder": "{intruder:.3f} ± {intruder_se:.3f}",
    }

    def cell(template: str, row: dict) -> str:
        try:
            return template.format(**row)
        except (KeyError, TypeError):  # a baseline that has no such number, or no latents to score
            return ""

    rows = {**report["coders"], **report["baselines"]}
    lines = [["", *columns]]
    lines += [[name, *(cell(template, row) for template in columns.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in lines]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def title(config: dict) -> str:
    return f"{Path(config['model']).name} {config['hookpoint']}"


def headline(config: dict, report: dict) -> str:
    return (
        f"{report['tokens']:,} held-out tokens, trained on {config['tokens_trained']:,}; cross-entropy clean"
        f" {report['clean_ce']:.4f}, with the mean of y in the MLP's place {report['mean_ablated_ce']:.4f}, with zero"
        f" {report['zero_ablated_ce']:.4f} nats/token"
    )


def notes(report: dict) -> list[str]:
    """How to read the table, in plain words."""
    rows = {**report["coders"], "affine": report["baselines"]["affine"]}
    closed = {name: 1 - row["fvu"] for name, row in rows.items()}  # of the gap to the mean, whose FVU is 1
    lines = [
        "FVU: share of the variance of the MLP's output that is missed (0 is perfect, predicting the mean is 1). CE"
        " increase: nats/token that the LM loses with the prediction in the MLP's place; the mean in its place recovers"
        " 0%.",
        "Intruder: how often the odd one out of five contexts is found; chance is 0.2, which null should be within 3"
        " standard errors of. Compare coders with neurons and untrained, and differences with the errors given.",
    ]
    scored = {**report["coders"], **report["baselines"]}
    if too_few := [name for name, row in scored.items() if row.get("latents_scored", 2) < 2]:
        lines.append(
            f"Without an intruder score, for want of two latents that are active on {MIN_ACTIVE} tokens:"
            f" {', '.join(too_few)}. Raise --tokens or --latents."
        )
    if "transcoder" in closed:
        share = {name: f"{closed[name] / closed['transcoder']:.1%}" for name in closed}
        lines.append(
            f"Of the gap between mean and transcoder (FVU 1 to {1 - closed['transcoder']:.4f}) the best affine map of x"
            f" alone closes {share['affine']}"
            + (f", the skip transcoder {share['skip_transcoder']}." if "skip_transcoder" in share else ".")
        )
    return lines


def legible(tokenizer, token: int) -> str:
    """A token as text in which line ends, control characters and torn UTF-8 can be seen."""
    text = tokenizer.decode([token])
    if "\ufffd" in text:  # part of a character: show its bytes
        raw = tokenizer.convert_ids_to_tokens(token)
        return "".join(f"\\x{BYTES[c]:02x}" if c in BYTES else c for c in raw)
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == " " else f"\\u{ord(c):04x}" for c in text) or "∅"


BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # byte-level BPE writes each byte as one character
BEFORE, AFTER = 14, 6  # tokens shown around the peak
MOST_ON_PAGE = 300  # latents per coder: the page stays under 3 MB


def page_data(seen: Tensor, latents: dict, tokenizer) -> dict:
    """What the page shows: the text of the tokens, and per coder its scored latents, each with eight contexts.

    Four contexts are those of the largest activations and four are random ones, of each lower fifth one. A context is
    [fifth, position of the peak, tokens, activation of each on a scale of 0 to 9].
    """
    vocabulary, random = {}, torch.Generator().manual_seed(0)  # token -> its place in the page's list of texts
    ctx_len = seen.shape[1]
    coders = {}
    for name, (active, found, density) in latents.items():
        coders[name] = []
        for (latent, (tokens, acts)), right in list(zip(active.items(), found))[:MOST_ON_PAGE]:
            top = acts.max()
            level = dict(zip(tokens.tolist(), (acts / top * 9).round().int().tolist()))
            fifths = tokens.tensor_split(FIFTHS)
            peaks = [(0, p) for p in fifths[0][:4].tolist()]
            peaks += [
                (q, fifths[q][torch.randint(len(fifths[q]), (), generator=random)].item()) for q in range(1, FIFTHS)
            ]
            contexts = []
            for fifth, peak in peaks:
                row, column = divmod(peak, ctx_len - 1)  # the sample counts from position 1 of each row
                first, last = max(column - BEFORE, -1), min(column + AFTER, ctx_len - 2)
                span = range(first, last + 1)
                ids = seen[row, first + 1 : last + 2].tolist()
                words = [vocabulary.setdefault(token, len(vocabulary)) for token in ids]
                base = row * (ctx_len - 1)
                levels = [level.get(base + c, 0) if c >= 0 else 0 for c in span]
                contexts.append([fifth, column - first, words, "".join(map(str, levels))])
            score = right.double().mean().item()
            coders[name].append([latent, score, density[latent].item(), top.item(), contexts])
    return {"text": [legible(tokenizer, token) for token in vocabulary], "coders": coders}


def page(config: dict, report: dict, seen: Tensor, latents: dict, tokenizer) -> str:
    """One self-contained HTML page: the table, and the scored latents with their contexts. All text is escaped."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(report).splitlines()]

    def tr(tag: str, row: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    results = f"<thead>{tr('th', rows[0])}</thead><tbody>{''.join(tr('td', row) for row in rows[2:])}</tbody>"
    data = json.dumps(page_data(seen, latents, tokenizer), separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title(config)), "HEADLINE": html.escape(headline(config, report))}
    parts |= {"RESULTS": results, "DATA": data}
    parts["NOTES"] = "".join(f"<p>{html.escape(note)}</p>" for note in notes(report))
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fdfdfc; --faint: #6b6b76; --line: #d9d9de;
  --hot: 234 120 20 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --paper: #16161a; --faint: #9a9aa6; --line: #37373f; --hot: 240 130 30 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 64rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.3rem; margin: 0 } p { margin: .4rem 0; color: var(--faint) }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .8rem 0; white-space: nowrap }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
form { position: sticky; top: 0; background: var(--paper); padding: .5rem 0; border-bottom: 1px solid var(--line);
  display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center }
select, input { font: inherit; max-width: 100% } input[type=number] { width: 4.5rem }
article { padding: .6rem 0; border-bottom: 1px solid var(--line) }
article h2 { font-size: 1rem; margin: 0 } h2 small { font-weight: normal; color: var(--faint) }
.context { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0;
  display: grid; grid-template-columns: 2.6rem 1fr }
.context b { font-weight: normal; color: var(--faint) }
.peak { outline: 2px solid rgb(var(--hot)); border-radius: 2px; font-weight: bold }
</style>
<h1>@TITLE@</h1><p>@HEADLINE@</p>
<div class="wide"><table>@RESULTS@</table></div>@NOTES@
<p>Below: the scored latents. Each line is a context from one fifth of the latent's active tokens, sorted by activation
(1 the top fifth, 5 the lowest); shading is the activation relative to the latent's largest, the box marks the token at
which the context was drawn.</p>
<form onsubmit="return false">
<label>coder <select id="coder"></select></label>
<label>sort by <select id="sort">
<option value="-1">score, high first</option><option value="1">score, low first</option>
<option value="-2">density, high first</option><option value="2">density, low first</option>
<option value="0">number</option></select></label>
<label>score from <input id="low" type="number" min="0" max="1" step="0.1" value="0"></label>
<label>to <input id="high" type="number" min="0" max="1" step="0.1" value="1"></label>
<span id="count"></span></form>
<main id="latents"></main>
<script id="data" type="application/json">@DATA@</script>
<script>
const {text, coders} = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const add = (parent, tag, content, name) => {  // textContent: whatever a document holds is shown, never run
  const node = parent.appendChild(document.createElement(tag));
  if (content !== undefined) node.textContent = content;
  if (name) node.className = name;
  return node;
};
for (const name in coders) add(get("coder"), "option", name);
function show() {
  const sort = +get("sort").value, key = Math.abs(sort), [low, high] = [+get("low").value, +get("high").value];
  const chosen = coders[get("coder").value].filter(l => l[1] >= low - 1e-9 && l[1] <= high + 1e-9);
  chosen.sort((a, b) => (sort < 0 ? -1 : 1) * (a[key] - b[key]) || a[0] - b[0]);
  get("count").textContent = chosen.length + " latents";
  get("latents").replaceChildren();
  for (const [latent, score, density, top, contexts] of chosen) {
    const card = add(get("latents"), "article"), title = add(card, "h2", "latent " + latent + " ");
    add(title, "small", `score ${score.toFixed(1)} · active on ${(100 * density).toPrecision(2)}% of tokens`
      + ` · largest activation ${top.toPrecision(3)}`);
    for (const [fifth, peak, tokens, levels] of contexts) {
      const line = add(card, "div", undefined, "context");
      add(line, "b", (fifth + 1) + "/5");
      const words = add(line, "span");
      tokens.forEach((token, i) => {
        const word = add(words, "span", text[token], i == peak ? "peak" : "");
        if (levels[i] > 0) word.style.background = `rgb(var(--hot) / ${levels[i] / 12 + 0.1})`;
      });
    }
  }
}
for (const id of ["coder", "sort", "low", "high"]) get(id).addEventListener("input", show);
show();
</script>
"""


def main():
    parser = Flags(prog="eval.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", type=Path, help="run directory that skipcoder.py wrote")
    flag("--tokens", type=skipcoder.whole, default=200_000, help="held-out tokens to evaluate on (default %(default)s)")
    flag("--latents", type=skipcoder.whole, default=300, help="latents scored per coder (default %(default)s)")
    flag("--json", type=Path, help="write all numbers to this file")
    flag("--html", type=Path, help="write a page to look at the scored latents to this file")
    flag("--seed", type=int, default=0, help="seed of the choice of latents and contexts (default 0)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    flag("--dataset", help="data set to evaluate on (default: the run's)")
    flag("--subset", help="configuration of that data set (default: the run's)")
    args = parser.parse_args()
    skipcoder.quiet_libraries()
    skipcoder.keep_freed_memory()
    try:
        args.device = skipcoder.pick_device(args.device)
        config, coders = skipcoder.load_run(args.run, args.device)
        if args.dataset is None:
            args.dataset, args.subset = config["dataset"], args.subset or config["subset"]
        for name, path in (("--json", args.json), ("--html", args.html)):
            if path:
                skipcoder.check_writable(name, path)
        report, shown = evaluate(config, coders, args)
        print(f"{title(config)}, {headline(config, report)}", table(report), *notes(report), sep="\n\n")
        if args.json:
            skipcoder.write("--json", {args.json: json.dumps(report, indent=2) + "\n"})
        if args.html:
            skipcoder.write("--html", {args.html: page(config, report, *shown)})
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped; nothing was written\n")


if __name__ == "__main__":
    main()
