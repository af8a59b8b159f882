# SPDX-License-Identifier: MIT
"""Measure the coders of a run: what they miss, what they cost the LM, how interpretable they are.

    python eval.py runs/gpt2-layer6

It reads held-out documents, which training never saw. The coders of a run may also come from
EleutherAI's sparsify (see README). For each of them it reports

    FVU           sum |y - y_hat|^2 / sum |y - mean(y)|^2 over all counted tokens (see below)
    L0, dead      active latents per token; latents that are never active on these tokens
    CE increase   CE(y_hat) - CE(clean), where CE(y_hat) is the cross-entropy of the LM's
                  predictions with y_hat in place of the MLP's output
    CE recovered  1 - (CE(y_hat) - CE(clean)) / (CE(mean) - CE(clean)), where the mean of y in
                  training text replaces the MLP's output for CE(mean); CE(zero) is reported, too
    KL            KL(clean || patched) of the next-token distributions
    intruder      a proxy of interpretability. Draw five places in the text: a latent is active at
                  four of them, and silent at one, the intruder. Guess the one whose hidden state,
                  after the LM's final norm, is least like the others. The score is the share of
                  guesses that are right.
    same token    a harder version: the intruder's own token is one that activates the latent at
                  other places. So the token does not give the intruder away.

CE and KL are in nats per token. Baselines give these numbers a scale:

    FVU, CE, KL   the best affine map from x to y: how far one gets without latents
    the scores    the MLP's own neurons, the k largest of each token; an untrained transcoder and an
                  untrained autoencoder, for what random directions score; "null", five random
                  places, for chance. (If a run has coders of several k, neurons and untrained
                  coders have the median k.)

In a row of T tokens these positions count:

    position                 0    1    2   ...   T-2   T-1
    x, y, latents                 *    *   ...    *     *
    predicts position             2    3   ...   T-1

LMs use position 0 as an attention sink, with huge activations that say nothing about the text.
Outliers, tokens whose |y| is over the max_norm that training wrote to config.json, do not count
either. Where a token does not count, a patched LM keeps the MLP's own output.
"""

import argparse
import html
import json
import math
import re
import sys
import textwrap
from collections import defaultdict
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import skipcoder
from skipcoder import ARCHS, Coder

PREDICTING = slice(1, -1)  # the counted positions that have a next token
PREDICTED = slice(2, None)  # the positions of these next tokens
CE_TOKENS = 20_000  # CE and KL use only about so many tokens, as each coder needs a pass of the LM

TRIALS = 10  # intruder trials per latent
QUINTILES = 5  # each trial draws from one fifth of the latent's active tokens, sorted by act
SHOWN = 4  # tokens of a trial on which the latent is active; one more is the intruder
MIN_ACTIVE = 40  # a latent is scored if it is active on at least so many tokens: 8 in a quintile

# What the report repeats of config.json.
IN_REPORT = (
    "model",
    "layer",
    "seed",
    "dataset",
    "tokens",
    "tokens_trained",
    "versions",
)

# ---- The LM, with and without something in the MLP's place ----------------------------------


class PatchedLM:
    """The LM with hooks on one MLP. A call sets self.x, y, neurons and hidden, [rows, T, width]."""

    def __init__(self, lm, layer):
        self.lm = lm
        _, _, mlp = skipcoder.find_mlp(lm, layer)
        mlp.register_forward_hook(self.at_mlp)
        # The neurons are the input of the MLP's last linear layer: c_proj in GPT-2, down_proj in
        # Llama.
        linears = [m for m in mlp.modules() if isinstance(m, (nn.Linear, Conv1D))]
        linears[-1].register_forward_pre_hook(self.at_neurons)
        # Our head replaces the LM's. It works in float32, because logits in bfloat16 have steps of
        # 0.1 nats. It computes only the wanted positions. And it keeps its input as self.hidden.
        head = lm.get_output_embeddings()
        self.weight = head.weight.float()
        self.bias = None if head.bias is None else head.bias.float()
        head.forward = self.head

    def at_mlp(self, mlp, args, output):
        # Make copies, since a block may add to these tensors in place afterwards.
        self.x = args[0].to(torch.float32, copy=True)
        self.y = output.to(torch.float32, copy=True)
        return None if self.y_hat is None else self.y_hat.to(output.dtype, copy=True)

    def at_neurons(self, linear, args):
        self.neurons = args[0]

    def head(self, hidden):
        self.hidden = hidden  # after the final norm
        return F.linear(hidden[:, self.positions].float(), self.weight, self.bias)

    @torch.no_grad()
    def __call__(self, tokens, y_hat=None, logits=True):
        """Return log-probabilities over the vocabulary, [rows, T - 2, vocabulary].

        They predict positions 2 to T - 1. If y_hat [rows, T, d] is given, it replaces the MLP's
        output. With logits=False nothing is predicted, but x, y, neurons and hidden are set.
        """
        self.y_hat = y_hat  # for the hook at the MLP
        self.positions = PREDICTING if logits else slice(0)  # for the head; slice(0) is none
        return self.lm(tokens, use_cache=False).logits.log_softmax(-1)


# ---- Sums, means and errors -----------------------------------------------------------------


class Moments:
    """The number, sum and sum of squares of vectors.

    Each batch is summed in float32 on its own device. The sums of all batches are added in float64
    on the CPU.
    """

    def __init__(self):
        self.number, self.total, self.squares = 0, 0, 0

    def add(self, vectors):
        """vectors [n, d], in float32 on any device."""
        self.number += len(vectors)
        self.total = self.total + vectors.sum(0).cpu().double()
        self.squares += vectors.square().sum().item()

    def variance(self):
        """Return sum |v - mean(v)|^2, which is not divided by the number of vectors."""
        return self.squares - self.total.square().sum().item() / self.number


def standard_error(values):
    """Return the standard error of the mean of independent values [n]."""
    if len(values) < 2:
        return 0.0
    return values.std().item() / len(values) ** 0.5


def mean_and_error(values, counted):
    """Return the mean of the counted values and its standard error; both inputs are [rows, n].

    Tokens of one row depend on one another, so the error comes from the differences between rows.
    If row i has n_i counted values with the sum s_i, the mean is the ratio sum_i s_i / sum_i n_i.
    By the delta method, row i contributes (s_i - mean * n_i) / mean(n_i) to its error.
    """
    sums = (values.double() * counted).sum(1)  # [rows]
    numbers = counted.double().sum(1)  # [rows]
    mean = (sums.sum() / numbers.sum()).item()
    return mean, standard_error((sums - mean * numbers) / numbers.mean())


# ---- First stage: baselines from training text ----------------------------------------------


def counted_tokens(y, max_norm):
    """Return which tokens of y [rows, T, d] count: bool [rows, T]."""
    counted = y.norm(dim=-1) <= max_norm
    counted[:, 0] = False
    return counted


def fit_affine(patched, batches, max_norm, device):
    """Return the best affine map from x to y, and the means of x and y.

    It is the least-squares solution A [d, d], b [d] of y = x A + b over all counted tokens. The
    matrix x^T x may be singular, as x comes from a layer norm, whose output before the scale sums
    to zero. So 1e-6 of the mean of its diagonal is added to the diagonal, which moves FVU by less
    than 1e-5.
    """
    # Sums over tokens of the products of (x, 1) with (x, 1, y): [d + 1, 2 d + 1], in float64 on the
    # CPU. They hold all that least squares needs, and also the sums of x and y.
    products = 0
    for tokens in batches:
        patched(tokens.to(device), logits=False)
        counted = counted_tokens(patched.y, max_norm)
        x = F.pad(patched.x[counted], (0, 1), value=1)  # [n, d + 1]
        y = patched.y[counted]
        products_of_batch = x.T @ torch.cat([x, y], 1)
        products = products + products_of_batch.cpu().double()
    d = y.shape[1]
    xx, xy = products.split([d + 1, d], dim=1)
    ridge = 1e-6 * xx.diagonal().mean() * torch.eye(d + 1, dtype=torch.float64)
    solution = torch.linalg.solve(xx + ridge, xy)  # [d + 1, d]: A, and b as the last row
    # The last row of products comes from the appended 1: it holds sums of x, 1 and y.
    x_sum, number, y_sum = products[d].split([d, 1, d])
    results = solution[:d], solution[d], x_sum / number, y_sum / number
    return [result.float().to(device) for result in results]


# ---- Second stage: one pass over held-out text ----------------------------------------------


class Sample:
    """What one pass over held-out text collects. The lists have one entry per batch.

    Counted tokens are numbered from 0 on, and such a number is called a place. Predictions are
    made only for the first batches, until there are CE_TOKENS of them.
    """

    def __init__(self):
        self.tokens = []  # [rows, T]: all tokens read
        self.counted = []  # bool [rows, T]: whether each of them counts
        self.hidden = []  # [n, d]: the LM's last hidden states at counted tokens
        self.active = defaultdict(list)  # by name: (place, latent, act) of all active latents
        self.prediction_masks = []  # bool [rows, T - 2]: which of all predictions count
        self.ce, self.kl = defaultdict(list), defaultdict(list)  # by name: [rows, T - 2]
        self.y = Moments()  # of counted tokens
        self.y_all = Moments()  # of counted tokens and outliers
        self.errors = defaultdict(Moments)  # by name: y - y_hat of counted tokens
        self.errors_outliers = defaultdict(Moments)  # by name: y - y_hat of outliers
        # What each part of a skip transcoder leaves of y, without b_dec: [name, "latents"] has
        # y - W_dec z, and [name, "skip"] has y - W_skip x. The variance of this is the squared
        # error that the part has with the constant that suits it best. So FVU comes from it.
        self.errors_alone = defaultdict(Moments)


def active_entries(acts, indices, first_place):
    """Return (place, latent, act), [m] each, for all entries of acts, indices [n, k] above 0."""
    token, slot = (acts > 0).nonzero(as_tuple=True)
    place, latent = token + first_place, indices[token, slot]
    act = acts[token, slot].float()
    return place.cpu(), latent.cpu(), act.cpu()


def cross_entropies(log_p, tokens):
    """Return the cross-entropies [rows, T - 2] of predictions log_p [rows, T - 2, vocabulary]."""
    following = tokens[:, PREDICTED, None]
    return -log_p.gather(-1, following).squeeze(-1).cpu()


def read_held_out(patched, batches, coders, baselines, max_norm):
    """Run the LM, the coders and the baselines on held-out text, and return a Sample."""
    sample = Sample()
    A, b, y_mean = baselines["A"], baselines["b"], baselines["y_mean"]
    untrained, k = baselines["untrained"], baselines["k"]
    device = y_mean.device

    def predict(x, y):
        """Return the outputs of each coder, and y_hat of the coders and baselines, by name."""
        # Coders get both x and y, since the autoencoder reads y and the transcoders read x.
        with skipcoder.fast_matmuls(device):
            coded = {name: coder(x, y) for name, coder in coders.items()}
        y_hats = {name: y_hat for name, (y_hat, _, _) in coded.items()}
        y_hats["affine"] = x @ A + b
        y_hats["mean"] = y_mean.expand_as(y)
        y_hats["zero"] = torch.zeros_like(y)
        return coded, y_hats

    for tokens in batches:
        # The clean LM. It predicts until there are CE_TOKENS predictions, counted or not.
        with_predictions = sum(map(torch.numel, sample.prediction_masks)) < CE_TOKENS
        tokens = tokens.to(device)
        log_p = patched(tokens, logits=with_predictions)
        x_rows, y_rows = patched.x, patched.y  # [rows, T, d] each
        counted = counted_tokens(y_rows, max_norm)  # [rows, T]
        x, y = x_rows[counted], y_rows[counted]  # [n, d] each
        first_place = sample.y.number  # the number of tokens counted so far
        sample.tokens.append(tokens.cpu())
        sample.counted.append(counted.cpu())
        sample.hidden.append(patched.hidden[counted].bfloat16().cpu())

        # The active latents of the coders and of untrained ones, and the top neurons.
        coded, y_hats = predict(x, y)
        entries = {name: (acts, indices) for name, (_, acts, indices) in coded.items()}
        with skipcoder.fast_matmuls(device):
            entries |= {name: coder.encode(x, y) for name, coder in untrained.items()}
        neurons = patched.neurons[counted]  # [n, number of neurons]
        entries["neurons"] = neurons.topk(min(k, neurons.shape[1]))  # as acts and indices
        for name, (acts, indices) in entries.items():
            sample.active[name].append(active_entries(acts, indices, first_place))

        # The variance of y, and the errors. The mean of the training text is subtracted from y for
        # precision alone: this changes no variance, and sums of smaller numbers lose fewer digits.
        sample.y.add(y - y_mean)
        sample.y_all.add(y - y_mean)
        for name, y_hat in y_hats.items():
            sample.errors[name].add(y - y_hat)
        for name, coder in coders.items():
            if coder.W_skip is not None:
                with skipcoder.fast_matmuls(device):  # as in `predict`
                    skip = F.linear(x, coder.W_skip)
                latents = y_hats[name] - skip - coder.b_dec  # W_dec z
                sample.errors_alone[name, "latents"].add(y - latents)
                sample.errors_alone[name, "skip"].add(y - skip)
        outlier = ~counted
        outlier[:, 0] = False
        if outlier.any():
            x_out, y_out = x_rows[outlier], y_rows[outlier]
            sample.y_all.add(y_out - y_mean)
            for name, y_hat in predict(x_out, y_out)[1].items():
                sample.errors_outliers[name].add(y_out - y_hat)

        # Predictions of the LM with each y_hat in the MLP's place, against the clean ones.
        if with_predictions:
            sample.prediction_masks.append(counted[:, PREDICTING].cpu())
            sample.ce["clean"].append(cross_entropies(log_p, tokens))
            for name, y_hat in y_hats.items():
                output = y_rows.clone()
                output[counted] = y_hat
                log_q = patched(tokens, output)
                kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
                sample.ce[name].append(cross_entropies(log_q, tokens))
                sample.kl[name].append(kl.cpu())
    return sample


def losses(sample, name):
    """Return FVU, CE and KL of what stood in the MLP's place under this name."""
    counted = torch.cat(sample.prediction_masks)
    ce, clean, ablated = (torch.cat(sample.ce[key]) for key in (name, "clean", "mean"))
    increase, increase_se = mean_and_error(ce - clean, counted)
    harm, _ = mean_and_error(ablated - clean, counted)
    kl, kl_se = mean_and_error(torch.cat(sample.kl[name]), counted)
    error = sample.errors[name].squares
    error_outliers = sample.errors_outliers[name].squares  # 0 if there are no outliers
    return {
        "fvu": error / sample.y.variance(),
        "fvu_all": (error + error_outliers) / sample.y_all.variance(),
        "ce": mean_and_error(ce, counted)[0],
        "ce_increase": increase,
        "ce_increase_se": increase_se,
        "ce_recovered": 1 - increase / harm,
        "kl": kl,
        "kl_se": kl_se,
    }


# ---- Third stage: the intruder proxy --------------------------------------------------------


class ActiveTokens:
    """The places where each latent of a coder is active, and its acts there, largest first."""

    def __init__(self, entries, num_latents, num_tokens):
        """entries: from `active_entries`, one for each batch."""
        place, latent, act = (torch.cat(parts) for parts in zip(*entries))  # [m] each
        # Sort by act, then by latent. The second sort is stable, so the acts of each latent stay
        # sorted.
        order = act.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        self.count = latent.bincount(minlength=num_latents)  # [M]
        self.density = self.count.double() / num_tokens  # [M], shares of the tokens
        self.places = place[order].split(self.count.tolist())  # M tensors
        self.acts = act[order].split(self.count.tolist())

    def draw(self, wanted, generator):
        """Draw latents that can be scored: active on enough tokens, and silent on some."""
        drawn = torch.randperm(len(self.count), generator=generator)
        can_be_scored = (self.count[drawn] >= MIN_ACTIVE) & (self.density[drawn] < 1)
        return drawn[can_be_scored][:wanted].tolist()


def intruder_weights(active, words, same_token):
    """Return the weight with which each of the n places is drawn as the intruder: [n].

    `active` are the places of one latent, and `words` [n] are the token ids at all places. Only
    silent places have a weight, and it is 1. With `same_token`, a silent place has a weight only if
    the latent is active at other places of its word. If a word has A active and S silent places,
    each silent one has the weight A / S. The silent places of a word then have the weight A
    together, so its share of the intruders is its share of the active places. (Words that are never
    silent are left out.) All weights are 0 if no word has both kinds of places.
    """
    silent = torch.ones(len(words)).index_fill(0, active, 0)
    if not same_token:
        return silent
    size = int(words.max()) + 1
    active_of_word = words[active].bincount(minlength=size)
    silent_of_word = words.bincount(minlength=size) - active_of_word
    # A word without silent places cannot be drawn. The clamp is only against x / 0.
    weight_of_word = active_of_word / silent_of_word.clamp(min=1)
    return silent * weight_of_word[words]


def intruder_trials(places, words, generator, same_token=False):
    """Draw 10 trials for each latent: four places where it is active, and last the intruder.

    This is intruder detection (Paulo & Belrose 2025, arXiv 2507.08473): if a latent stands for one
    thing, the places where it is active have similar contexts, and one where it is silent stands
    out. Here the judge is the LM under study (see `intruder_found`). `places` has a tensor for each
    latent, sorted by act, which is cut into quintiles. Quintile 0 has the largest acts. Trial t
    draws four places of quintile t mod 5, and an intruder by `intruder_weights`.

    Return int [latents, 10, 5], and which latents have trials: bool [latents]. The others, which
    have no possible intruder, have zeros.
    """
    trials = torch.zeros(len(places), TRIALS, SHOWN + 1, dtype=torch.int64)
    possible = torch.ones(len(places), dtype=torch.bool)
    for i, active in enumerate(places):
        weights = intruder_weights(active, words, same_token)
        if weights.sum() == 0:
            possible[i] = False
            continue
        trials[i, :, SHOWN] = weights.multinomial(TRIALS, replacement=True, generator=generator)
        quintiles = active.tensor_split(QUINTILES)
        for t in range(TRIALS):
            quintile = quintiles[t % QUINTILES]
            drawn = torch.randperm(len(quintile), generator=generator)[:SHOWN]
            trials[i, t, :SHOWN] = quintile[drawn]
    return trials, possible


def intruder_found(trials, hidden, mean):
    """Return whether the intruder was found in each trial: bool [latents, 10]. Chance is 1/5.

    The judge is the LM under study. Each context is represented by the LM's last hidden state at
    its place (hidden [n, d]), minus the mean over the sample. The guess is the context with the
    smallest sum of cosine similarities to the five. (The similarity of each to itself, 1, is in
    all sums.)
    """
    states = F.normalize(hidden[trials].float() - mean, dim=-1)  # [latents, 10, 5, d]
    similarity = states @ states.mT  # [latents, 10, 5, 5]
    return similarity.sum(-1).argmin(-1) == SHOWN  # the intruder is the last


def summary(found):
    """Return the score and its spread as a dict, from bool [latents, 10].

    With fewer than two latents all values are None.
    """
    scores = found.double().mean(1)  # [latents]
    error = standard_error(scores)
    right = found.sum(1)  # [latents], from 0 to 10
    row = {
        "intruder": scores.mean().item(),
        "intruder_se": error,
        "intruder_sd": error * len(scores) ** 0.5,  # the standard deviation
        # Trial t is about quintile t mod 5.
        "intruder_by_quantile": [
            found[:, q::QUINTILES].double().mean().item() for q in range(QUINTILES)
        ],
        "intruder_histogram": (right.bincount(minlength=TRIALS + 1) / len(right)).tolist(),
    }
    if len(scores) < 2:
        row = dict.fromkeys(row)
    return {"latents_scored": len(scores)} | row


class Scores:
    """The third stage for one coder: its latents to score, drawn at random, and their trials."""

    def __init__(self, entries, num_latents, words, hidden, mean, wanted, seed):
        """Judge up to `wanted` latents, by token ids `words` [n].

        `hidden` [n, d] are the last hidden states, and `mean` [d] is their mean.
        """
        # Each coder has a generator, so its draws do not depend on which other coders the run has.
        generator = torch.Generator().manual_seed(seed)
        self.active = ActiveTokens(entries, num_latents, len(words))
        self.latents = self.active.draw(wanted, generator)
        places = [self.active.places[j] for j in self.latents]
        # All latents that were drawn have such trials, since each is silent somewhere.
        trials, _ = intruder_trials(places, words, generator)
        self.found = intruder_found(trials, hidden, mean)  # bool [latents, 10]
        # But not all have these.
        trials, self.has_same_token = intruder_trials(places, words, generator, same_token=True)
        self.found_same_token = intruder_found(trials, hidden, mean)

    def row(self):
        """Return the numbers for the report."""
        same_token = summary(self.found_same_token[self.has_same_token])
        return summary(self.found) | {
            "intruder_same_token": same_token["intruder"],
            "intruder_same_token_se": same_token["intruder_se"],
            "latents_same_token": same_token["latents_scored"],
        }


# ---- The tokens that a latent promotes (for the page) ---------------------------------------


def final_norm(lm):
    """Return the final norm, which is in the same module as the list of blocks.

    GPT-1 has no final norm.
    """
    for module in lm.get_decoder().modules():
        parts = list(module.children())
        if any(isinstance(part, nn.ModuleList) for part in parts):
            norms = [part for part in parts if "Norm" in type(part).__name__]
            # If there are several, the last is the final one. (The first is of the embeddings.)
            return norms[-1] if norms else nn.Identity()


@torch.no_grad()
def promoted(lm, W):
    """Return the five tokens [n, 5] that directions W [n, d] promote most.

    The directions go through the final norm, without its bias, and the LM head.
    """
    norm, head = final_norm(lm), lm.get_output_embeddings().weight
    W = W.to(head.dtype)
    bias = norm(torch.zeros_like(W))  # since a norm maps zero to its bias
    return ((norm(W) - bias) @ head.T).topk(5).indices


# ---- All stages -----------------------------------------------------------------------------


def evaluate(config, coders, args):
    """Return the report, and what an HTML page needs besides it (see `page`)."""
    device, ctx_len = args.device, config["ctx_len"]
    max_norm = config.get("max_norm", math.inf)
    M, d = next(iter(coders.values())).W_dec.shape  # the same for all coders of a run
    rows = max(1, 1024 // ctx_len)  # per batch; predictions over the vocabulary take much memory

    # Load the LM, and start to read both sides of the split.
    tokenizer = skipcoder.load_tokenizer(config["model"])
    sources = skipcoder.find_sources(args.dataset, args.subset)
    training = skipcoder.token_batches(sources, tokenizer, ctx_len, rows, held_out=False)
    held_out = skipcoder.token_batches(sources, tokenizer, ctx_len, rows, held_out=True)
    lm = skipcoder.load_lm(config["model"], device)
    width = lm.config.get_text_config().hidden_size
    if width != d:
        sys.exit(f"error: RUN {args.run}: {config['model']} is {width} wide, the coders {d}")
    patched = PatchedLM(lm, config["layer"])

    # First stage: baselines from training text. With 200 tokens per dimension, overfitting of the
    # affine map costs about 1/200 of its FVU.
    number = math.ceil(200 * d / rows / (ctx_len - 1))  # of batches; position 0 does not count
    training = tqdm(islice(training, number), "affine map", number, leave=False)
    A, b, x_mean, y_mean = fit_affine(patched, training, max_norm, device)
    ks = sorted(coder.k for coder in coders.values())
    k = ks[len(ks) // 2]  # the median
    untrained = {}
    for name, arch in (("untrained", "transcoder"), ("untrained_sae", "sae")):
        # Another seed than that of training, so that the directions are not those from which the
        # trained coders started. (A run of another library has no seed.)
        seed = config.get("seed", 0) + 1
        untrained[name] = Coder(arch, d, M, k, seed).to(device).requires_grad_(False)
        # Set the biases as in training. A batch of one token will do, since only its mean is used.
        untrained[name].start(x_mean[None], y_mean[None])
    baselines = {"A": A, "b": b, "y_mean": y_mean, "untrained": untrained, "k": k}

    # Second stage: one pass over held-out text.
    number = math.ceil(args.tokens / rows / (ctx_len - 1))
    held_out = tqdm(islice(held_out, number), "held-out text", number, leave=False)
    sample = read_held_out(patched, held_out, coders, baselines, max_norm)

    # Third stage: intruder scores.
    tokens, counted = torch.cat(sample.tokens), torch.cat(sample.counted)  # [all rows, T] each
    words, hidden = tokens[counted], torch.cat(sample.hidden)  # [n] and [n, d]
    mean = hidden.float().mean(0)
    sizes = dict.fromkeys(coders | untrained, M)
    sizes["neurons"] = patched.neurons.shape[-1]  # those of the last batch are still there
    scores = {}
    for name, entries in tqdm(sample.active.items(), "intruder trials", leave=False):
        scores[name] = Scores(entries, sizes[name], words, hidden, mean, args.latents, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    shape = args.latents, TRIALS, SHOWN + 1
    null = intruder_found(torch.randint(len(hidden), shape, generator=generator), hidden, mean)

    # The report.
    run = {key: config.get(key) for key in IN_REPORT}
    run["hookpoint"] = skipcoder.find_mlp(lm, config["layer"])[0]
    run |= {"num_latents": M, "k": sorted(set(ks)), "baselines_k": k}
    # "tokens" and "tokens_trained" in `run` are about training. "tokens_asked_for" and
    # "tokens_read" are held-out tokens with outliers, and report["tokens"] are those without.
    run |= {"tokens_asked_for": args.tokens, "tokens_read": sample.y_all.number}
    report = {"tokens": sample.y.number, "run": run}
    predicting = torch.cat(sample.prediction_masks)
    report["clean_ce"] = mean_and_error(torch.cat(sample.ce["clean"]), predicting)[0]
    report["mean_ablated_ce"] = losses(sample, "mean")["ce"]
    report["zero_ablated_ce"] = losses(sample, "zero")["ce"]
    report["outliers"] = {
        "tokens": 1 - sample.y.number / sample.y_all.number,
        "variance": 1 - sample.y.variance() / sample.y_all.variance(),
    }
    report["coders"] = {}
    for name, coder in coders.items():
        row = {"arch": coder.arch, "k": coder.k}
        row["l0"] = scores[name].active.density.sum().item()
        row["dead"] = (scores[name].active.count == 0).double().mean().item()
        report["coders"][name] = row | losses(sample, name) | scores[name].row()
    # A part is judged up to a constant: its FVU is the variance of its error over that of y.
    for (name, part), errors in sample.errors_alone.items():
        report["coders"][name][f"fvu_{part}_alone"] = errors.variance() / sample.y.variance()
    report["baselines"] = {"affine": losses(sample, "affine")}
    for name in ("neurons", *untrained):
        report["baselines"][name] = scores[name].row()
    report["baselines"]["null"] = summary(null)

    # What the page needs: the tokens that scored latents promote, and where in the flattened
    # tokens each place is.
    promotes = {}
    for name, coder in coders.items():
        promotes[name] = promoted(lm, coder.W_dec[scores[name].latents])
    on_page = {name: scores[name] for name in (*coders, "neurons")}
    where = counted.flatten().nonzero().flatten()  # [n]
    return report, (tokens, where, on_page, promotes, tokenizer)


# ---- The report as text ---------------------------------------------------------------------

# The columns of the tables: the key in the report, the heading, and the format (see `cell`).
COLUMNS = {
    "fvu": ("FVU", "{:.4f}"),
    "l0": ("L0", "{:.1f}"),
    "dead": ("dead", "{:.1%}"),
    "ce_increase": ("CE increase", "±"),
    "ce_recovered": ("recovered", "{:.1%}"),
    "kl": ("KL", "±"),
    "intruder": ("intruder", "±"),
    "intruder_same_token": ("same token", "±"),
    "intruder_by_quantile": ("top → lowest", "{0[0]:.2f} → {0[4]:.2f}"),
    "intruder_histogram": ("scores 0…1", "bars"),
}
BARS = " ▁▂▃▄▅▆▇█"  # from 0 to 8 eighths
FIDELITY, SCORES = list(COLUMNS)[:6], list(COLUMNS)[6:]  # a table each: up to KL, and the scores


def cell(row, key):
    """Return a number of the report as text, empty where there is none."""
    value, form = row.get(key), COLUMNS[key][1]
    if value is None:
        return ""
    if form == "bars":  # a histogram
        return "".join(BARS[math.ceil(8 * share / max(value))] for share in value)
    if form == "±":  # rounded so that the error has two significant digits, as in 0.345 ± 0.012
        error = row[f"{key}_se"]
        digits = 1 - math.floor(math.log10(error)) if error > 0 else 4
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    return form.format(value)


def table(report, keys=tuple(COLUMNS)):
    """Return a header, and a row of cells for each coder or baseline that has any of `keys`."""
    cells = [["", *(COLUMNS[key][0] for key in keys)]]
    for name, row in (report["coders"] | report["baselines"]).items():
        if any(key in row for key in keys):
            cells.append([name, *(cell(row, key) for key in keys)])
    return cells


def markdown(cells):
    """Return a table of cells as text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [text.rjust(width) for text, width in zip(row, widths)]
        padded[0] = row[0].ljust(widths[0])
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * width for width in widths]
    lines.insert(1, f"|-{'-|-'.join(rule)}-|")
    return "\n".join(lines)


def curve(report, arch):
    """Return the rows of the coders of `arch` with both scores and a KL above 0, sorted by KL."""
    rows = [row for row in report["coders"].values() if row["arch"] == arch and row["kl"] > 0]
    rows = [row for row in rows if None not in (row["intruder"], row["intruder_same_token"])]
    return sorted(rows, key=lambda row: row["kl"])


def compare(report, arch, other):
    """Return a list with a sentence on how two architectures differ in their scores at equal KL.

    (KL is never negative, and it has smaller errors than CE increase.) Each k of an architecture
    gives a point, (log KL, score), and lines between neighbours make a curve. Where both curves
    exist, take the mean of their difference. Its error comes from 1,000 repetitions with normal
    noise of the size of the scores' own errors. If the curves do not overlap, the list is empty.
    """
    curves = curve(report, arch), curve(report, other)
    if not all(curves):
        return []
    low = max(rows[0]["kl"] for rows in curves)
    high = min(rows[-1]["kl"] for rows in curves)
    if low >= high:
        return []
    at = np.linspace(math.log(low), math.log(high), 101)
    random = np.random.default_rng(0)
    results = []
    for score in ("intruder", "intruder_same_token"):
        means = []  # of each curve: first without noise, then 1,000 times with noise
        for rows in curves:
            log_kl = [math.log(row["kl"]) for row in rows]
            heights = np.array([row[score] for row in rows])
            errors = np.array([row[f"{score}_se"] for row in rows])
            noise = random.standard_normal((1001, len(rows)))
            noise[0] = 0
            means.append([np.interp(at, log_kl, line).mean() for line in heights + errors * noise])
        differences = np.subtract(*means)  # [1001]
        name, error = COLUMNS[score][0], differences[1:].std()
        results.append(f"{name} {differences[0]:+.3f} ± {error:.3f}")
    where = f"At equal KL, from {low:.2g} to {high:.2g} nats"
    return [f"{where}, {arch} minus {other}: {', '.join(results)}."]


HOW_TO_READ = (
    "Lower is better for FVU (1: no better than the mean), CE increase and KL (nats per token)."
    " Higher is better for CE recovered (0%: as bad as the mean) and for the intruder score (chance"
    " is 0.2, and null should be within 3 errors of it). In the score “same token”, the latent is"
    " active on other occurrences of the intruder's token. ± is one standard error, over rows of"
    " text or over latents."
)


def remarks(report):
    """Return what was evaluated, on what, how to read the tables, and what is missing."""
    run, rows = report["run"], report["coders"] | report["baselines"]
    ks = " ".join(map(str, run["k"]))
    about = f"{run['hookpoint']} of {run['model']}: M {run['num_latents']:,}, k {ks}"
    if run["tokens_trained"]:  # not known of coders that another library trained
        about += f", seed {run['seed']}, {run['tokens_trained']:,} tokens of {run['dataset']}"
    where = f"{report['tokens']:,} held-out tokens. Cross-entropy is {report['clean_ce']:.4f} nats"
    where += f" per token, {report['mean_ablated_ce']:.4f} with the mean of y in the MLP's place,"
    where += f" and {report['zero_ablated_ce']:.4f} with zero."
    lines = [
        about + ".",
        where,
        HOW_TO_READ + f" The baselines of the score have k {run['baselines_k']}.",
    ]
    archs = dict.fromkeys(row["arch"] for row in report["coders"].values())
    for other, arch in combinations(archs, 2):  # such as: transcoder minus sae
        lines += compare(report, arch, other)
    parts = [
        f"{name} {row['fvu_latents_alone']:.4f} and {row['fvu_skip_alone']:.4f}"
        for name, row in rows.items()
        if "fvu_skip_alone" in row
    ]
    if parts:
        lines.append(
            "FVU of the latents alone and of the skip connection alone, each with the best"
            f" constant: {', '.join(parts)}."
        )
    left_out = report["outliers"]
    if left_out["tokens"] > 0:
        fvu_all = [f"{n} {row['fvu_all']:.4f}" for n, row in rows.items() if "fvu_all" in row]
        lines.append(
            f"Left out as outliers: {left_out['tokens']:.2%} of the tokens, with"
            f" {left_out['variance']:.1%} of the variance of y. FVU with them:"
            f" {', '.join(fvu_all)}."
        )
    if run["tokens_trained"] and run["tokens_trained"] < run["tokens"]:
        lines.append(f"The run was stopped early: {run['tokens']:,} tokens were asked for.")
    if run["tokens_read"] < run["tokens_asked_for"]:
        lines.append(f"There are fewer held-out tokens than --tokens {run['tokens_asked_for']:,}.")
    scored = {name: row["latents_scored"] for name, row in rows.items() if "intruder" in row}
    too_few = [name for name, number in scored.items() if number < 2]
    if too_few:
        lines.append(
            f"Raise --tokens or --latents: fewer than 2 latents could be scored in"
            f" {', '.join(too_few)}."
        )
    return lines


# ---- Flags ----------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.splitlines()[0])
    at_least, flag = skipcoder.at_least, parser.add_argument
    flag("run", metavar="RUN", type=Path, help="run directory that skipcoder.py wrote")
    flag("--tokens", type=at_least(1, float), default=2e5, help="held-out tokens (default 200000)")
    flag("--latents", type=at_least(1), default=300, help="scored per coder (default 300)")
    flag("--json", type=Path, help="write all numbers to this file")
    flag("--html", type=Path, help="write a page with pictures and the scored latents to this file")
    flag("--svg", type=Path, help="write the picture of scores against KL to this file")
    flag("--seed", type=at_least(0), default=0, help="of the choice of latents and contexts")
    flag("--device", default="auto", help="cpu, cuda, mps, ... (default: the accelerator)")
    flag("--dataset", help="data set to evaluate on (default: the run's)")
    flag("--subset", help="configuration of that data set")
    args = skipcoder.parse(parser)  # turns --device into a torch.device
    args.tokens = math.ceil(args.tokens)
    # `multinomial`, which draws intruders, takes at most 2**24 (and some more tokens may be read).
    if args.tokens > 16_000_000:
        sys.exit(f"error: --tokens {args.tokens}: pass at most 16000000")
    config, coders = skipcoder.load_run(args.run, args.device)
    if args.dataset is None:
        args.dataset = config["dataset"]
        args.subset = args.subset or config["subset"]
    outputs = {"--json": args.json, "--html": args.html, "--svg": args.svg}
    outputs = {name: path for name, path in outputs.items() if path is not None}
    for name, path in outputs.items():  # better now than after the work
        with skipcoder.exit_on_error(
            f"{name} {path}", "pass the name of a file that can be written"
        ):
            path.open("a").close()

    with skipcoder.exit_on_error(
        f"--dataset {args.dataset}", skipcoder.DATA_HINT, errors=skipcoder.DataError
    ):
        report, for_page = evaluate(config, coders, args)
    for name, path in outputs.items():
        if name == "--json":
            content = json.dumps(report, indent=2)
        elif name == "--html":
            content = page(report, *for_page)
        else:
            content = chart(report, "kl", "intruder")
        skipcoder.write(path, content + "\n", f"{name} {path}")
    tables = markdown(table(report, FIDELITY)), markdown(table(report, SCORES))
    notes = [textwrap.fill(line, 100) for line in remarks(report)]
    print(*tables, *notes, sep="\n\n")
    for path in outputs.values():
        print(f"wrote {path}")
    if not args.html:
        print(f"next: python eval.py {args.run} --html page.html shows the latents")


# ---- Pictures and the page: from here on nothing is measured -------------------------------
# The shapes of markers, 10 pixels wide.
MARKERS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-4-4h8v8h-8z",
    "triangle": "M0-5l5 9h-10z",
    "diamond": "M0-6l5 6l-5 6l-5-6z",
}

# The names of the axes.
AXES = {
    "ce_increase": "CE increase, nats/token (← better)",
    "kl": "KL, nats/token (← better)",
    "l0": "L0, active latents per token (← sparser)",
    "fvu": "FVU (↓ better)",
    "intruder": "intruder score (↑ better)",
}

# A picture is 440 pixels wide. These are the edges of its plot. (Right of it are the names of
# baselines.)
LEFT, RIGHT, BOTTOM = 46, 328, 282
# How far from a coder's point its k is written: (x, y), for the first architecture and so on.
LABEL = (14, 12), (14, -12), (-14, -12), (-14, 12)
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 440 326" width="440" height="326"
role="img" fill="currentColor"><style>
svg { color: #1b1b1f; background: #fdfdfc }
svg .faint { color: #62626c; stroke: currentColor; stroke-dasharray: 5 4 }
svg .k text { stroke: #fdfdfc; stroke-width: 3px; paint-order: stroke }
text { font: 14px system-ui, sans-serif; stroke: none; fill: currentColor }
@media (prefers-color-scheme: dark) {
  svg { color: #e6e6ea; background: #16161a }
  svg .faint { color: #a0a0ac }
  svg .k text { stroke: #16161a }
}</style>"""


def svg_text(x, y, words, anchor="start"):
    """Return a text whose middle is at height y."""
    return f'<text x="{x}" y="{y}" dy=".35em" text-anchor="{anchor}">{words}</text>'


def axis(numbers, start, end):
    """Return a function from numbers to pixels between start and end, and round numbers to mark.

    If the numbers differ by more than a factor of six, the axis is logarithmic. Otherwise it spans
    at least half of the largest number, so that small differences look small.
    """
    low, high = min(numbers), max(numbers)
    log = 0 < 6 * low < high
    least_span = 0 if log else max(high, -low) / 2
    scale = math.log10 if log else float
    low, high = scale(low), scale(high)
    # The margin at either end is 8% of the span, or more where the span would be too small. (It
    # would be 0 if all numbers are 0.)
    margin = max(0.08 * (high - low), (least_span - (high - low)) / 2) or 1
    low, high = low - margin, high + margin

    marks = [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)]
    if not log:
        step = next(step for step in marks if 5 * step >= high - low)
        marks = [step * i for i in range(int(low / step) - 1, int(high / step) + 2)]
    marks = [mark for mark in marks if low <= scale(mark) <= high]
    if len(marks) > 7:  # too many, as on a long logarithmic axis: keep one a decade
        marks = marks[::3]
    pixels = (end - start) / (high - low)
    return lambda number: round(start + pixels * (scale(number) - low), 1), marks


def chart(report, x, y):
    """Return an SVG of two columns of the table, with a line through the k of each architecture.

    Error bars reach two standard errors of y up and down.
    """
    rows = [dict(row) for row in report["coders"].values() if row[y] is not None]
    if not rows:
        return SVG + svg_text(5, 16, "no latents could be scored") + "</svg>"
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    baselines = []
    if y == "intruder":
        others = {"chance": {y: 0.2}} | report["baselines"]
        baselines = [(row[y], n) for n, row in others.items() if row.get(y) and n != "null"]

    # The axes, and above them a legend with three architectures in a row.
    top = 30 + 18 * math.ceil(len(archs) / 3)
    heights = [score for score, _ in baselines]
    for row in rows:
        error = 2 * row.get(f"{y}_se", 0)
        row["low"], row["high"] = row[y] - error, row[y] + error
        heights += row["low"], row["high"]
    x_at, x_marks = axis([row[x] for row in rows], LEFT, RIGHT)
    y_at, y_marks = axis(heights, BOTTOM, top)
    grid = [f"M{x_at(mark)} {top}V{BOTTOM}" for mark in x_marks]
    grid += [f"M{LEFT} {y_at(mark)}H{RIGHT}" for mark in y_marks]
    out = [
        SVG,
        f'<path stroke="currentColor" opacity=".15" d="{"".join(grid)}"/>',
        svg_text(5, top - 16, AXES[y]),
        svg_text(RIGHT, BOTTOM + 34, AXES[x], "end"),
        *(svg_text(x_at(mark), BOTTOM + 14, f"{mark:.6g}", "middle") for mark in x_marks),
        *(svg_text(LEFT - 6, y_at(mark), f"{mark:.6g}", "end") for mark in y_marks),
    ]

    # Baselines are dashed lines. Where their names would overlap, the higher one moves up. (Heights
    # are counted from the top, so up means less.)
    name_y = math.inf
    for score, name in sorted(baselines):
        name_y = min(y_at(score), name_y - 14)
        out += [
            f'<g class="faint"><path d="M{LEFT} {y_at(score)}H{RIGHT}"/>',
            svg_text(RIGHT + 5, name_y, name) + "</g>",
        ]

    # For each architecture its name, a line, and markers. Pointing at one shows its numbers.
    labels = []
    for i, arch in enumerate(archs):
        color, marker = ARCHS[arch].color, MARKERS[ARCHS[arch].marker]
        left, height = 12 + 138 * (i % 3), 11 + 18 * (i // 3)
        line = []
        out += [
            f'<g fill="{color}" stroke="{color}">{svg_text(left + 9, height, arch)}',
            f'<path transform="translate({left} {height})" d="{marker}"/>',
        ]
        for row in rows:
            if row["arch"] == arch:
                px, py = x_at(row[x]), y_at(row[y])
                line.append(f"{px} {py}")
                about = ", ".join(f"{COLUMNS[key][0]} {cell(row, key)}" for key in (x, y))
                out += [
                    f"<g><title>{arch}, k {row['k']}: {about}</title>",
                    f'<path d="M{px} {y_at(row["low"])}V{y_at(row["high"])}"/>',
                    f'<path transform="translate({px} {py})" d="{marker}"/></g>',
                ]
                right, down = LABEL[i % 4]
                labels.append(svg_text(px + right, py + down, row["k"], "middle"))
        out.append(f'<path fill="none" stroke-width="1.5" d="M{"L".join(line)}"/></g>')
    return "".join([*out, '<g class="k">', *labels, "</g></svg>"])


# Control characters, and characters that take no room or turn the direction of a text.
UNSEEN = "[\0-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
# The texts of tokens with nothing to see: blanks, control characters, parts of characters.
EMPTY = r"([ ↵⇥]|\\u[0-9a-f]{4})*|.*�.*"


def legible(tokenizer, tokens):
    """Return the text that each token adds to those before it. Line ends and controls are visible.

    A character that several tokens share stands at the last of them, and the others are empty.
    """
    # At the start of a text a SentencePiece tokenizer drops a token's space: put an "a" first.
    # (It may itself put a space before the "a", as another token.)
    a = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start, texts, held = len(tokenizer.decode(a)), [], []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(a + held, clean_up_tokenization_spaces=False)[start:]
        # What is not yet a character reads as "�". A character has at most four bytes.
        if text.endswith("�") and len(held) < 4:
            text = ""
        else:
            held = []
        text = text.replace("\n", "↵").replace("\t", "⇥")
        texts.append(re.sub(UNSEEN, lambda match: f"\\u{ord(match[0]):04x}", text))
    return texts


ON_PAGE = 2000  # latents in all, which keeps the page under 4 MB
AROUND = 12  # tokens on each side of the token that a context is about


def contexts(active, acts, texts, width):
    """Return four contexts with the latent's largest acts, and the middle one of each lower fifth.

    `texts` has the number of each token's text, and a row has `width` tokens. active [m] says at
    which tokens the latent is active. A context is (index of the peak, texts, for each token a
    digit for its act, relative to the largest, a 9).
    """
    digits = (acts / acts.max() * 9).ceil().int()
    digit = dict(zip(active.tolist(), digits.tolist()))
    n, found = len(active), []
    for rank in (0, 1, 2, 3, 0.3 * n, 0.5 * n, 0.7 * n, 0.9 * n):
        peak = active[int(rank)].item()
        row = peak - peak % width
        window = range(max(peak - AROUND, row), min(peak + AROUND + 1, row + width))
        levels = "".join(str(digit.get(i, 0)) for i in window)
        found.append((window.index(peak), [texts[i] for i in window], levels))
    return found


def page(report, tokens, where, scores, promotes, tokenizer):
    """Return one self-contained HTML page: pictures, the table, and the scored latents.

    `tokens` [rows, T] are those read, and `where` [n] is the index in tokens.flatten() of each
    place. `scores` and `promotes` hold a coder's Scores and the tokens [latents, 5] that these
    latents promote, by name. Neurons have none of the latter.
    """
    # Each text of a token is on the page only once. A new one gets the next number.
    numbers = defaultdict(lambda: len(numbers))
    texts = [numbers[text] for row in tokens.tolist() for text in legible(tokenizer, row)]
    coders, sizes = {}, {}
    for name, judged in scores.items():
        active = judged.active
        coders[name], sizes[name] = [], (len(judged.latents), len(active.count))
        for i, latent in enumerate(judged.latents[: ON_PAGE // len(scores)]):
            places, acts = active.places[latent], active.acts[latent]
            score, same_token = judged.found[i].double().mean().item(), None
            if judged.has_same_token[i]:
                same_token = judged.found_same_token[i].double().mean().item()
            about = score, active.density[latent].item(), acts[0].item(), same_token
            lines = contexts(where[places], acts, texts, tokens.shape[1])
            # Leave out promoted tokens with nothing to see.
            top = promotes[name][i].tolist() if name in promotes else []
            top = [legible(tokenizer, [token])[0] for token in top]
            top = [numbers[text] for text in top if not re.fullmatch(EMPTY, text)]
            coders[name].append((latent, *about, lines, top))

    rows = report["coders"]
    best = max(rows, key=lambda name: rows[name]["intruder"] or 0)
    data = {"text": list(numbers), "coders": coders, "sizes": sizes, "best": best}
    pictures = [chart(report, x, "intruder") for x in ("kl", "ce_increase")]
    if len(report["run"]["k"]) > 1:
        pictures.append(chart(report, "l0", "fvu"))
    parts = {
        # No text of a document may end the script that holds it.
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "TITLE": html.escape(f"{Path(report['run']['model']).name} {report['run']['hookpoint']}"),
        "RESULTS": "".join(
            f"<tr><th>{'<td>'.join(map(html.escape, row))}" for row in table(report)
        ),
        "PICTURES": "".join(pictures),
        "NOTES": "".join(f"<p>{html.escape(line)}" for line in remarks(report)),
    }
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #1b1b1f; --paper: #fdfdfc; --faint: #62626c; --line: #ddd; --link: #0b57d0;
  --hot: 237 125 25;  /* of the largest activation; the text on it stays dark */
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e6ea; --paper: #16161a; --faint: #a0a0ac; --line: #444; --link: #9ab8ff;
    --hot: 170 80 5;  /* the text on it stays light */
  }
}
body {
  max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
}
h1 { font-size: 1.3rem }
h2 { font-size: 1rem; margin: 0 }
p, small { color: var(--faint); font-weight: normal }
a { color: var(--link) }
:focus-visible { outline: 3px solid var(--link); outline-offset: 1px }

#pictures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem;
  margin-bottom: 1rem;
}
#pictures svg { width: 100%; max-width: 32rem; height: auto }
@media (max-width: 30rem) { #pictures { grid-template-columns: 100% } }

/* What is too wide scrolls sideways, and its first column stays where it is. */
.scroller { overflow-x: auto }
th:first-child, .fifth { position: sticky; left: 0; background: var(--paper) }
.fifth { font-size: 12px }
table { border-collapse: collapse; font-size: 13px; white-space: pre }
th, td { text-align: right; padding: .15rem .5rem; border-bottom: thin solid var(--line) }
th:first-child { text-align: left; padding-left: 0 }
tr:first-child { font-weight: bold }
td:nth-child(5) { font-family: monospace }  /* bars of the histogram */

nav {
  position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .4rem 0;
  display: grid; grid-template-columns: auto auto 1fr auto; gap: .4rem .6rem; align-items: center;
}
nav > * { font: inherit; min-width: 0; box-sizing: border-box; height: 2.1rem }
select, input { color: var(--ink); background: var(--paper); border: thin solid var(--faint) }
nav output { font-size: 13px; line-height: 1.2; color: var(--faint); align-content: center }
::placeholder { color: var(--faint); opacity: 1 }
@media (max-width: 40rem) { nav { grid-template-columns: 1fr 1fr } }
html { scroll-padding-top: 5.5rem }  /* what is opened or has the focus is not under the controls */

article { padding: .6rem 0; border-bottom: thin solid var(--line) }
article:empty { min-height: 15rem }
article p { margin: 0; font-size: smaller }

/* A line is the fifth, the text before the peak, and the peak with the text after it. The columns
   of text are equally wide, so that all peaks stand below one another, in the middle. */
.contexts {
  display: grid; grid-template-columns: 2.5rem 1fr 1fr; width: max-content; min-width: 100%;
  font: 13px/1.7 ui-monospace, monospace; white-space: pre;
}
.before { text-align: right }
.token { background: rgb(var(--hot) / calc(var(--level) / 10)) }
/* An empty token is the beginning of a character that stands at a later token. */
.token:empty { padding: 0 min(2px, var(--level) * 1px) }
/* Isolated, the peak stays at the left of text that runs to the left. */
.peak { outline: 2px solid var(--ink); margin: 0 2px; unicode-bidi: isolate }
</style>
<h1>@TITLE@</h1>
<div id="pictures">@PICTURES@</div>
<div class="scroller" tabindex="0" role="region" aria-label="results">
<table id="results">@RESULTS@</table></div>
@NOTES@
<p>Below are the scored latents. A line is a context of one token on which a latent is active: the
one in the box. All such tokens, sorted by activation, fall into five parts, of which 1/5 has the
largest. The first four lines show the very largest, the others the middle of their part. Shading:
activation, relative to the latent's largest. What is too wide scrolls sideways.
<nav>
<select id="coder" aria-label="coder"></select>
<select id="sort" aria-label="order">
<option value="-1">high scores first<option value="1">low scores first
<option value="-2">frequent ones first<option value="2">rare ones first
<option value="0">by number</select>
<input id="search" type="search" placeholder="text or number"
  aria-label="text that a latent fires on, or the number of a latent">
<output id="count"></output>
</nav>
<main><p id="message" role="status"></p><div id="latents"></div></main>
<script id="data" type="application/json">@DATA@</script>
<script>
const get = id => document.getElementById(id);
const {text, coders, sizes, best} = JSON.parse(get("data").textContent);
const lowerCase = text.map(word => word.toLowerCase());
const count = number => number.toLocaleString("en");

// Elements are made from text, never from HTML: nothing that a document holds is run.
function add(parent, tag, textContent = "", more = {}) {
  const child = document.createElement(tag);
  return parent.appendChild(Object.assign(child, {textContent, ...more}));
}

// A context: its fifth, the tokens before the peak, the peak and the tokens after it.
function addContext(grid, [peak, tokens, levels], number) {
  const fifth = Math.max(1, number - 2);  // the first four are from the top one
  add(grid, "small", `${fifth}/5`, {className: "fifth"});
  const before = add(grid, "div", "", {className: "before"}), after = add(grid, "div");
  tokens.forEach((token, i) => add(i < peak ? before : after, "span", text[token], {
    className: i == peak ? "token peak" : "token",
    style: `--level: ${levels[i]}`,
  }));
}

// The peaks are in the middle of what scrolls.
function showPeaks(scroller) {
  scroller.scrollLeft = (scroller.scrollWidth - scroller.clientWidth) / 2;
}

// A latent: its numbers, the tokens that it promotes, and its contexts.
function fill(card, [latent, score, density, largest, sameToken, contexts, promoted]) {
  const title = add(card, "h2"), share = +(100 * density).toPrecision(2);
  const harder = sameToken?.toFixed(1) ?? "none, it is active whenever its tokens occur";
  add(title, "a", `latent ${latent}`, {href: `#${get("coder").value}/${latent}`});
  add(title, "small", ` score ${score.toFixed(1)} (same token: ${harder})`
    + ` · active on ${share}% of tokens · largest activation ${+largest.toPrecision(3)}`);
  if (promoted.length) {
    add(card, "p", "promotes " + promoted.map(token => `“${text[token]}”`).join(" "));
  }
  const scroller = add(card, "div", "", {className: "scroller"});
  const grid = add(scroller, "div", "", {className: "contexts"});
  contexts.forEach((context, number) => addContext(grid, context, number));
  if (scroller.scrollWidth > scroller.clientWidth) scroller.tabIndex = 0;
  showPeaks(scroller);
}

// A card is filled when it is about to be scrolled to: all at once would take seconds.
const onSight = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) {
    if (isIntersecting && !target.firstChild) fill(target, target.latent);
  }
}, {rootMargin: "600px"});

// Whether a context holds what is sought, over at least one token on which the latent is active.
function firesOn(sought, [, tokens, levels]) {
  const words = tokens.map(token => lowerCase[token]), line = words.join("");
  for (let at = line.indexOf(sought); at >= 0; at = line.indexOf(sought, at + 1)) {
    let start = 0;
    for (let i = 0; i < words.length; i++) {
      // The beginning of a character has no text of its own and counts as one letter.
      const end = start + Math.max(words[i].length, 1);
      if (levels[i] > 0 && start < at + sought.length && end > at) return true;
      start += words[i].length;
    }
  }
  return false;
}

// What the reader asks for: a number in the search field or else in the address, and a text.
function query() {
  const typed = get("search").value.toLowerCase();
  const [, prefix, digits] = typed.trim().match(/^(latent *|#)?(\\d+)$/) ?? [];
  const [name, addressed] = location.hash.slice(1).split("/");
  const isText = typed.trim() && !prefix;
  return {name, number: parseInt(digits ?? addressed), prefix, sought: isText ? typed : ""};
}

// In words, what is not on the page.
function message({name, number, sought}, chosen) {
  const coder = get("coder").value, [scored, size] = sizes[coder];
  const missing = coders[coder].length < scored ? "is not on this page" : "was not scored";
  const lines = [];
  if (name && !Object.hasOwn(coders, name)) lines.push(`There is no coder “${name}”.`);
  else if (number >= size) lines.push(`${coder} has no latent ${number}: it has ${count(size)}.`);
  else if (number >= 0 && !coders[coder].some(([latent]) => latent == number)) {
    lines.push(`Latent ${number} of ${coder} ${missing}.`);
  }
  if (sought && !chosen.length) lines.push(`Nothing found: no latent fires on “${sought}” here.`);
  return lines.join(" ");
}

// Show the latents that are asked for, one whose number is asked for first.
function show() {
  const asked = query(), {number, prefix, sought} = asked, coder = get("coder").value;
  const wanted = latent => latent[0] == number
    || (sought ? latent[5].some(context => firesOn(sought, context)) : !prefix);
  const chosen = coders[coder].filter(wanted);

  const sort = +get("sort").value, key = Math.abs(sort), sign = sort < 0 ? -1 : 1;
  chosen.sort((a, b) => (b[0] == number) - (a[0] == number)
    || sign * (a[key] - b[key]) || a[0] - b[0]);

  const onPage = coders[coder].length, [scored, size] = sizes[coder];
  const ofScored = onPage < scored ? `here (${count(scored)} scored, ` : "scored latents (";
  get("count").value = `${count(chosen.length)} of ${count(onPage)} ${ofScored}of ${count(size)})`;
  get("message").textContent = message(asked, chosen);
  get("latents").replaceChildren();
  for (const latent of chosen) onSight.observe(add(get("latents"), "article", "", {latent}));
}

// Open what the address names, as in #transcoder/1234.
function open() {
  const {name} = query();
  if (Object.hasOwn(coders, name)) get("coder").value = name;
  show();
  if (name) document.querySelector("nav").scrollIntoView();
}

// On a change of the controls, the address no longer names a latent.
function change() {
  history.replaceState(null, "", "#" + get("coder").value);
  show();
}

// In the table, move the scores to the front: on a phone the last columns are out of sight.
function scoresFirst() {
  const rows = [...get("results").rows];
  const first = [...rows[0].cells].findIndex(cell => cell.textContent == "intruder");
  for (const row of rows) row.cells[0].after(...[...row.cells].slice(first));
}

scoresFirst();
Object.keys(coders).forEach(name => add(get("coder"), "option", name));
get("coder").value = best;
document.querySelector("nav").addEventListener("input", change);
addEventListener("hashchange", open);
addEventListener("resize", () => document.querySelectorAll("article .scroller").forEach(showPeaks));
open();
</script>
"""


if __name__ == "__main__":
    main()
