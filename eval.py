# SPDX-License-Identifier: MIT
"""Measure the coders of a run: what they miss, what they cost the LM, how interpretable they are.

    python eval.py runs/gpt2-layer6

It reads held-out documents, which training never saw. The coders of a run may also come from
EleutherAI's sparsify (see README). For each of them it reports

    FVU           sum |y - y_hat|^2 / sum |y - mean(y)|^2 over all counted tokens (see below)
    L0, dead      active latents per token; latents that are never active on these tokens
    CE increase   CE(y_hat) - CE(clean), where CE(y_hat) is the cross-entropy of the LM's
                  predictions with y_hat in place of the MLP's output
    KL            KL(clean || patched) of the next-token distributions

CE and KL are in nats per token. Three scores ask whether the places at which a latent is active
have something in common. The judge is the LM itself: two places are alike if the hidden states of
its last layer there, after the final norm, are alike.

    intruder      a latent is active at four places, and silent at a fifth, the intruder. Guess the
                  odd one out. Score: the share of right guesses, .2 by chance
    one word      the same, but all five places have the same token, so that only the text before
                  that token can tell
    detection     the ten places of the first half of the text at which the latent is strongest
                  are examples. Tell places of the second half at which it is active from those at
                  which it is silent. Score: the area under the ROC curve, .5 by chance

In the JSON file, "intruder_token" and "detection_lookup" are intruder and detection by a judge that
sees the token alone.

Baselines give these numbers a scale. FVU, CE and KL:

    affine        the best affine map from x to y: how far one gets without latents
    token         the mean of y for the token, which needs no context at all
    mean, zero    the mean of all y, and nothing (only their CE, below the table)

The scores:

    neurons       the MLP's own neurons, the k with the largest values at each token, if positive
    untrained     a transcoder, and an autoencoder ("untrained_sae"), before training
    null          latents that are active at random places

In a row of T tokens these positions count:

    position                 0    1    2   ...   T-2   T-1
    x, y, latents                 *    *   ...    *     *
    predicts the next             *    *   ...    *

LMs use position 0 as an attention sink, with huge activations that say nothing about the text.
Outliers, tokens whose |y| is over the max_norm that training wrote to config.json, do not count
either. Where a token does not count, a patched LM keeps the MLP's own output.
"""

import argparse
import html
import json
import math
import sys
import textwrap
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import skipcoder
from skipcoder import Coder

CE_TOKENS = 20_000  # CE and KL use only about so many tokens, as each coder needs a pass of the LM
LOGITS = 2**26  # computed at a time (256 MB for each copy of them), but at least those of one row

# ---- The LM, with and without something in the MLP's place ----------------------------------


class PatchedLM:
    """The LM with hooks on one MLP. A call sets self.x, y, neurons and hidden, [rows, T, width].

    Unlike skipcoder.MLPActivations it keeps all positions, and it can replace the MLP's output.
    """

    def __init__(self, lm, layer):
        self.lm = lm
        self.hookpoint, _, mlp = skipcoder.find_mlp(lm, layer)
        mlp.register_forward_hook(self.at_mlp)
        # The neurons are the input of the MLP's last linear layer: c_proj in GPT-2, down_proj in
        # Llama.
        linears = [m for m in mlp.modules() if isinstance(m, (nn.Linear, Conv1D))]
        linears[-1].register_forward_pre_hook(self.at_neurons)
        # Our head replaces the LM's. It works in float32, because logits in bfloat16 have steps of
        # 0.1 nats, and computes only the positions that a call asks for.
        head = lm.get_output_embeddings()
        self.weight = head.weight.float()  # [vocabulary, width]
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
    def __call__(self, tokens, y_hat=None, positions=slice(1, -1)):
        """Return log-probabilities of the next tokens, [rows, number of positions, vocabulary].

        If y_hat [rows, T, d] is given, it replaces the MLP's output. With slice(0), which is empty,
        nothing is predicted, but x, y, neurons and hidden are set.
        """
        self.y_hat, self.positions = y_hat, positions
        log_p = self.lm(tokens, use_cache=False).logits.log_softmax(-1)
        if not (self.hidden.sum() + log_p.sum()).isfinite():  # faster than a check of each
            sys.exit("error: --model: its hidden states or predictions are not finite")
        return log_p


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


def mean_and_error(values):
    """Return the mean of independent values [n] and its standard error, or None, None if n < 2."""
    if len(values) < 2:
        return None, None
    values = values.double()
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def mean_over_rows(sums, numbers):
    """Return the mean of all values and its standard error.

    sums, numbers: [rows], for each row of tokens the sum of its values and how many they are.
    Tokens of one row depend on one another, so the error comes from the differences between rows.
    If row i has n_i values with the sum s_i, the mean is the ratio sum_i s_i / sum_i n_i. By the
    delta method (the ratio is linearised), row i contributes (s_i - mean * n_i) / mean(n_i) to its
    error.
    """
    mean = (sums.sum() / numbers.sum()).item()
    _, error = mean_and_error((sums - mean * numbers) / numbers.mean())
    return mean, error


# ---- First stage: baselines from training text ----------------------------------------------


def counted_tokens(y, max_norm):
    """Return which tokens of y [rows, T, d] count: bool [rows, T]."""
    counted = y.norm(dim=-1) <= max_norm
    counted[:, 0] = False
    return counted


class Baselines:
    """What predicts y without latents: the best affine map, the token alone, the mean, zero.

    The affine map is the least-squares solution A [d, d], b [d] of y = x A + b. The matrix x^T x
    may be singular, as after a layer norm, whose outputs x lie in a hyperplane. So 1e-6 of the mean
    of its diagonal is added to the diagonal, which moves FVU by less than 1e-5.

    The token baseline is the mean of y over the n occurrences of a token, as if it had occurred 5
    more times with the mean of all y: (sum + 5 mean) / (n + 5). A token that never occurred gets
    the mean of all y.
    """

    def __init__(self, patched, batches, d, max_norm, device):
        # Tokens that occur get the numbers 1, 2, ... All others share number 0. (A table with a row
        # for each token of the vocabulary would be large, and nearly empty.)
        occurring = torch.cat(batches).unique().to(device)
        self.number_of = torch.zeros(len(patched.weight), dtype=torch.int64, device=device)
        self.number_of[occurring] = torch.arange(1, len(occurring) + 1, device=device)
        sums = torch.zeros(len(occurring) + 1, d, device=device)
        counts = torch.zeros(len(occurring) + 1, 1, device=device)

        # Sums over tokens of the products of (x, 1) with (x, 1, y): [d + 1, 2 d + 1], added up in
        # float64. They hold all that least squares needs, and also the sums of x and y.
        products = 0
        for tokens in tqdm(batches, "baselines", leave=False):
            tokens = tokens.to(device)
            patched(tokens, positions=slice(0))
            counted = counted_tokens(patched.y, max_norm)
            x = F.pad(patched.x[counted], (0, 1), value=1)  # [n, d + 1]
            y = patched.y[counted]
            products = products + (x.T @ torch.cat([x, y], 1)).cpu().double()
            numbers = self.number_of[tokens[counted]]  # [n]
            sums.index_add_(0, numbers, y)
            counts.index_add_(0, numbers, torch.ones_like(y[:, :1]))

        xx, xy = products.split([d + 1, d], dim=1)
        ridge = 1e-6 * xx.diagonal().mean() * torch.eye(d + 1, dtype=torch.float64)
        solution = torch.linalg.solve(xx + ridge, xy)  # [d + 1, d]: A, and b as the last row
        self.A, self.b = solution[:d].float().to(device), solution[d].float().to(device)
        # The last row of products comes from the appended 1: it holds sums of x, 1 and y.
        x_sum, number, y_sum = products[d].split([d, 1, d])
        self.x_mean = (x_sum / number).float().to(device)
        self.y_mean = (y_sum / number).float().to(device)
        self.token_means = (sums + 5 * self.y_mean) / (counts + 5)

    def predict(self, x, tokens):
        """Return y_hat [n, d] by name, for x [n, d] and tokens [n]."""
        return {
            "affine": x @ self.A + self.b,
            "token": self.token_means[self.number_of[tokens]],
            "mean": self.y_mean.expand_as(x),
            "zero": torch.zeros_like(x),
        }


# ---- Second stage: one pass over held-out text ----------------------------------------------


class Sample:
    """What one pass over held-out text collects.

    Counted tokens are numbered from 0 on, and such a number is called a place. Lists have an item
    for each batch. Dicts are by name, that of a coder or a baseline.
    """

    def __init__(self):
        self.counted = []  # bool [rows, T]: which of all tokens count
        self.hidden = []  # [n, d]: the LM's last hidden states at places
        self.active = defaultdict(list)  # (place, latent, act) of all active latents
        self.y = Moments()  # of places
        self.y_all = Moments()  # of places and outliers, to report how much outliers are
        self.errors = defaultdict(float)  # sum |y - y_hat|^2 over places
        # Only from every n-th batch, from which CE and KL are taken. Items are [some rows].
        self.num_predictions = []  # of each row: how many predictions count
        self.ce, self.kl = defaultdict(list), defaultdict(list)  # of each row: the sums over them


def active_entries(acts, indices, first_place):
    """Return (place, latent, act), [m] each, for all acts above 0. acts, indices: [n, k]."""
    token, slot = (acts > 0).nonzero(as_tuple=True)
    place, latent = token + first_place, indices[token, slot]
    act = acts[token, slot].float()
    return place.cpu(), latent.cpu(), act.cpu()


@torch.no_grad()
def read_held_out(patched, batches, coders, untrained, baselines, k, max_norm):
    """Run the LM, the coders and the baselines on batches of tokens, and return a Sample."""
    sample, device = Sample(), baselines.y_mean.device
    rows, T = batches[0].shape
    # CE and KL are taken from every n-th batch. n is the largest that leaves CE_TOKENS, and two
    # batches for a standard error.
    every = len(batches) * rows * (T - 2) // CE_TOKENS
    every = max(1, min(every, len(batches) // 2))
    rows_at_once = max(1, LOGITS // len(patched.weight) // T)

    for batch_number, tokens in enumerate(tqdm(batches, "held-out text", leave=False)):
        # The clean LM. Position 0 never counts, so x and y are without it.
        tokens = tokens.to(device)
        patched(tokens, positions=slice(0))
        y_rows = patched.y  # [rows, T, d]
        x, y = patched.x[:, 1:].flatten(0, 1), y_rows[:, 1:].flatten(0, 1)  # [rows * (T - 1), d]
        counted = counted_tokens(y_rows, max_norm)  # [rows, T]
        inlier = counted[:, 1:].flatten()  # counted, flattened as x and y are: [rows * (T - 1)]
        first_place = sample.y.number  # the number of tokens counted so far
        sample.counted.append(counted.cpu())
        sample.hidden.append(patched.hidden[counted].bfloat16().cpu())

        # The active latents of the coders and of untrained ones, and the top neurons.
        with skipcoder.fast_matmuls(device):  # as in training
            # Coders get both x and y, since the autoencoder reads y and the transcoders read x.
            coded = {name: coder(x, y) for name, coder in coders.items()}
            entries = {name: coder.encode(x, y) for name, coder in untrained.items()}
        entries |= {name: (acts, indices) for name, (_, acts, indices) in coded.items()}
        neurons = patched.neurons[:, 1:].flatten(0, 1)  # [rows * (T - 1), number of neurons]
        # Acts and indices. (As with latents, only acts above 0 will count as active.)
        entries["neurons"] = neurons.topk(min(k, neurons.shape[1]))
        for name, (acts, indices) in entries.items():
            active = active_entries(acts[inlier], indices[inlier], first_place)
            sample.active[name].append(active)

        # The variance of y, and the errors. The mean of the training text is subtracted from y for
        # precision alone: this changes no variance, and sums of smaller numbers lose fewer digits.
        sample.y.add((y - baselines.y_mean)[inlier])
        sample.y_all.add(y - baselines.y_mean)
        y_hats = {name: y_hat for name, (y_hat, _, _) in coded.items()}
        y_hats |= baselines.predict(x, tokens[:, 1:].flatten())
        for name, y_hat in y_hats.items():
            sample.errors[name] += (y - y_hat)[inlier].square().sum().item()

        # Predictions of the LM with each y_hat in the MLP's place, against the clean ones.
        if batch_number % every:
            continue
        outputs = {"clean": None}
        for name, y_hat in y_hats.items():
            outputs[name] = y_rows.clone()
            outputs[name][counted] = y_hat[inlier]
        for first in range(0, len(tokens), rows_at_once):
            part = slice(first, first + rows_at_once)
            predicted = counted[part, 1:-1].cpu()
            sample.num_predictions.append(predicted.sum(1))
            log_p = patched(tokens[part])  # [rows of part, T - 2, vocabulary]
            p = log_p.exp()
            for name, output in outputs.items():
                log_q = log_p if output is None else patched(tokens[part], output[part])
                ce = -log_q.gather(-1, tokens[part, 2:, None])[..., 0]
                kl = torch.linalg.vecdot(p, log_p - log_q)
                sample.ce[name].append((ce.cpu().double() * predicted).sum(1))
                sample.kl[name].append((kl.cpu().double() * predicted).sum(1))
    return sample


def losses(sample, name):
    """Return FVU, CE and KL of what stood in the MLP's place under this name."""
    numbers = torch.cat(sample.num_predictions).double()
    ce, clean, ablated = (torch.cat(sample.ce[key]) for key in (name, "clean", "mean"))
    increase, increase_se = mean_over_rows(ce - clean, numbers)
    harm, harm_se = mean_over_rows(ablated - clean, numbers)
    kl, kl_se = mean_over_rows(torch.cat(sample.kl[name]), numbers)
    return {
        "fvu": sample.errors[name] / sample.y.variance(),
        "ce": mean_over_rows(ce, numbers)[0],
        "ce_increase": increase,
        "ce_increase_se": increase_se,
        # How much of the harm that the mean of y does is avoided, if it does any.
        "ce_recovered": 1 - increase / harm if harm > 3 * harm_se else None,
        "kl": kl,
        "kl_se": kl_se,
    }


# ---- Third stage: the scores ----------------------------------------------------------------

TRIALS = 10  # of each latent, by intruder and by one word
SHOWN = 4  # places of a trial at which the latent is active; one more is the intruder
FIFTHS = 5  # parts of a latent's active places, which are sorted by act
MIN_ACTIVE, MIN_SHARE = 40, 1 / 2500  # a latent is scored if active at 1 in 2,500 places, and at 40
EXEMPLARS, NEAREST, SILENT = 10, 3, 1000  # places for detection: see `detect`
SCORES = ("intruder", "one_word", "detection")
WITHOUT_CONTEXT = ("intruder_token", "detection_lookup")  # by a judge that sees the token alone


class ActiveTokens:
    """The places where each latent of a coder is active, and its acts there, largest first."""

    def __init__(self, entries, num_latents, n):
        """entries: from `active_entries`, one for each batch of a sample of n places."""
        place, latent, act = (torch.cat(parts) for parts in zip(*entries))  # [m] each
        # Sort by act, then by latent. The second sort is stable, so the acts of each latent stay
        # sorted.
        order = act.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        self.count = latent.bincount(minlength=num_latents)  # [M]
        self.places = place[order].split(self.count.tolist())  # M tensors
        self.acts = act[order].split(self.count.tolist())
        # Which latents are scored: those active at enough places, and silent at as many.
        least = max(MIN_ACTIVE, n * MIN_SHARE)
        self.eligible = (self.count >= least) & (self.count <= n - least)


class Contexts:
    """How the LM sees the n places of a sample."""

    def __init__(self, hidden, tokens, embedding):
        """hidden [n, d]: last hidden states. tokens [n]: ids. embedding: [vocabulary, d]."""
        hidden = hidden.float()
        self.states = F.normalize(hidden - hidden.mean(0), dim=-1)  # [n, d]
        # Words are the ids of the tokens that occur, numbered anew from 0 on.
        ids, self.words, self.count = tokens.unique(return_inverse=True, return_counts=True)
        self.places_of = self.words.argsort(stable=True).split(self.count.tolist())  # of each word
        # For a judge that sees the token alone: its embedding, minus the mean over the sample.
        static = embedding[ids.to(embedding.device)].float().cpu()  # [words, d]
        mean = (self.count / len(tokens)) @ static
        self.static = F.normalize(static - mean, dim=-1)


def draw(places, number, generator):
    """Return `number` of these places at random, or all if there are fewer."""
    return places[torch.randperm(len(places), generator=generator)[:number]]


def intruder_trials(active, silent, generator):
    """Return trials [10, 5] of a latent: four places where it is active, and last the intruder.

    (Paulo & Belrose 2025, arXiv 2507.08473.) `active` is sorted by act, and cut into fifths. Trial
    t draws from fifth number t mod 5. Number 0 has the largest acts.
    """
    fifths = (TRIALS // FIFTHS) * active.tensor_split(FIFTHS)  # a tuple with each fifth twice
    shown = torch.stack([draw(fifth, SHOWN, generator) for fifth in fifths])
    intruders = silent[torch.randint(len(silent), (TRIALS, 1), generator=generator)]
    return torch.cat([shown, intruders], dim=1)


def one_word_trials(active, is_active, contexts, generator):
    """Return trials as above, each of places with one word, or None if no word allows it.

    The chance of a word is proportional to how often the latent is active on it. It must be active
    on it four times, and silent once. is_active: bool [n].
    """
    times = contexts.words[active].bincount(minlength=len(contexts.count))  # active on each word
    weight = times.double() * (times >= SHOWN) * (times < contexts.count)
    if weight.sum() == 0:
        return None
    trials = []
    for word in weight.multinomial(TRIALS, replacement=True, generator=generator):
        places = contexts.places_of[word]
        shown = draw(places[is_active[places]], SHOWN, generator)
        trials.append(torch.cat([shown, draw(places[~is_active[places]], 1, generator)]))
    return torch.stack(trials)


def found(states):
    """Return the share of intruders found in trials of unit vectors [10, 5, d].

    The guess is the place with the smallest sum of cosine similarities to all five. If there is a
    tie, as when a judge sees equal tokens, the trial counts in part.
    """
    sums = (states @ states.mT).sum(-1)  # [10, 5]
    guesses = sums < sums.min(-1, keepdim=True).values + 1e-5
    return (guesses[:, SHOWN] / guesses.sum(-1)).double().mean().item()


def auroc(active, silent):
    """Return the chance that an active value is above a silent one, where a tie counts half."""
    silent = silent.sort().values
    below = torch.searchsorted(silent, active)  # how many silent values are below each active one
    not_above = torch.searchsorted(silent, active, right=True)  # the same with those equal to it
    return ((below + not_above) / 2 / len(silent)).mean().item()


def detect(active, silent, contexts, generator):
    """Return how well examples from half of the sample tell active places in the other half.

    The counterpart of the paper's detection (section 3), with exemplars in place of an explanation:
    the ten strongest places of the first half. Places of the second half are ranked by their mean
    similarity to their three nearest exemplars. Returned are, as a dict,

        detection         AUROC of the second half's active places against silent ones
        detection_lookup  AUROC if ranked by how often the latent was active on the place's word
        detection_tpr     for each fifth of acts, the share of active places above a threshold. (5%
                          of the silent places of the first half are above it.)
        detection_fpr     the share of silent places that rank above the median active one, which
                          is the false positive rate at a true positive rate of .5

    or None if a half has fewer than ten active places, or silent ones.
    """
    words, half = contexts.words, len(contexts.words) // 2
    before, after = active[active < half], active[active >= half]  # sorted by act, as `active`
    silent_before, silent_after = silent[silent < half], silent[silent >= half]
    if min(map(len, (before, after, silent_before, silent_after))) < EXEMPLARS:
        return None
    silent_before = silent_before[torch.randint(len(silent_before), (SILENT,), generator=generator)]
    silent_after = silent_after[torch.randint(len(silent_after), (SILENT,), generator=generator)]
    exemplars = contexts.states[before[:EXEMPLARS]]  # [10, d]

    def similarity(places):
        return (contexts.states[places] @ exemplars.T).topk(NEAREST).values.mean(1)

    of_active, of_silent = similarity(after), similarity(silent_after)
    threshold = similarity(silent_before).quantile(0.95)
    fifths = of_active.tensor_split(FIFTHS)
    size = len(contexts.count)
    seen = words[:half].bincount(minlength=size).clamp(min=1)
    lookup = words[before].bincount(minlength=size) / seen  # [words]
    return {
        "detection": auroc(of_active, of_silent),
        "detection_lookup": auroc(lookup[words[after]], lookup[words[silent_after]]),
        "detection_tpr": [(fifth > threshold).double().mean().item() for fifth in fifths],
        "detection_fpr": (of_silent >= of_active.median()).double().mean().item(),
    }


def score(active_tokens, contexts, wanted, seed):
    """Return the row of the report, and a dict of scores for each of up to `wanted` latents."""
    # Each coder has a generator, so its draws do not depend on which other coders the run has.
    generator = torch.Generator().manual_seed(seed)
    judged = []
    for latent in draw(active_tokens.eligible.nonzero().flatten(), wanted, generator).tolist():
        active = active_tokens.places[latent]
        is_active = torch.zeros(len(contexts.words), dtype=torch.bool).index_fill(0, active, True)
        silent = (~is_active).nonzero().flatten()
        trials = intruder_trials(active, silent, generator)
        scores = {"latent": latent, "intruder": found(contexts.states[trials])}
        scores["intruder_token"] = found(contexts.static[contexts.words[trials]])
        trials = one_word_trials(active, is_active, contexts, generator)
        if trials is not None:
            scores["one_word"] = found(contexts.states[trials])
        judged.append(scores | (detect(active, silent, contexts, generator) or {}))

    row = {"latents_scored": len(judged), "eligible": None}
    live = (active_tokens.count > 0).sum().item()
    if live > 0:  # the share of latents that could be scored, among those that are ever active
        row["eligible"] = active_tokens.eligible.sum().item() / live
    for key in (*SCORES, *WITHOUT_CONTEXT, "detection_fpr"):
        values = [scores[key] for scores in judged if key in scores]
        row[key], row[f"{key}_se"] = mean_and_error(torch.tensor(values, dtype=torch.float64))
        row[f"{key}_share"] = len(values) / max(1, len(judged))  # of scored latents that have it
    row["intruder_sd"] = None
    if len(judged) > 1:
        # How much latents differ: the spread of their scores, without the noise of ten trials. If
        # s is the share of right guesses, s (1 - s) / 9 estimates the variance of that noise. (By
        # 9, not 10, since s itself is an estimate.)
        s = torch.tensor([scores["intruder"] for scores in judged])
        noise = (s * (1 - s)).mean() / (TRIALS - 1)
        row["intruder_sd"] = (s.var() - noise).clamp(min=0).sqrt().item()
    by_fifth = torch.tensor([scores["detection_tpr"] for scores in judged if "detection" in scores])
    row["detection_tpr"] = by_fifth.mean(0).tolist() if len(by_fifth) > 1 else None
    return row, judged


# ---- All stages -----------------------------------------------------------------------------


def evaluate(config, coders, args):
    """Return the report, and what the page needs besides it (see `page`)."""
    device, ctx_len = args.device, config["ctx_len"]
    max_norm = config.get("max_norm", math.inf)
    rows = max(1, 1024 // ctx_len)  # in a batch

    lm = skipcoder.load_lm(config["model"], device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config["model"])
    d = lm.config.get_text_config().hidden_size
    for name, coder in coders.items():
        if len(coder.b_dec) != d:
            sys.exit(f"error: RUN {args.run}: {config['model']} is {d} wide, and {name} is not")

    # Read training documents for the baselines, and held-out ones for all else. With 200 training
    # tokens per dimension, overfitting of the affine map costs about 1/200 of its FVU.
    sources = skipcoder.find_sources(args.dataset, args.subset)
    batches = {}
    for side, wanted in (("training", 200 * d), ("held-out", args.tokens)):
        stream = skipcoder.token_batches(sources, tokenizer, ctx_len, rows, side == "held-out")
        batches[side] = list(islice(stream, math.ceil(wanted / rows / (ctx_len - 1))))
    if sum(map(len, batches["held-out"])) < 2:
        sys.exit(f"error: --tokens {args.tokens}: fewer than two rows of {ctx_len} held-out tokens")
    trained_on = sum(map(len, batches["training"])) * (ctx_len - 1)
    enough_training = trained_on > 100 * d  # a small data set may have less than is wanted

    # The run may come from another library: exit if its MLP is of a kind that our training refuses.
    _, _, mlp = skipcoder.find_mlp(lm, config["layer"])
    skipcoder.MLPActivations(lm, mlp, max_norm)(batches["held-out"][0].to(device))

    # First stage: baselines. Neurons and untrained coders have the k of the coder of median k.
    patched = PatchedLM(lm, config["layer"])
    baselines = Baselines(patched, batches["training"], d, max_norm, device)
    reference = sorted(coders.values(), key=lambda coder: coder.k)[len(coders) // 2]
    M, k = len(reference.W_dec), reference.k
    untrained = {}
    for name, arch in (("untrained", "transcoder"), ("untrained_sae", "sae")):
        # Another seed than that of training, so that the directions are not those from which the
        # trained coders started. (A run of another library has no seed.)
        seed = config.get("seed", 0) + 1
        untrained[name] = Coder(arch, d, M, k, seed).to(device)
        # Set the biases as in training. A batch of one token will do, since only its mean is used.
        untrained[name].start(baselines.x_mean[None], baselines.y_mean[None])

    # Second stage: held-out text.
    sample = read_held_out(patched, batches["held-out"], coders, untrained, baselines, k, max_norm)
    tokens = torch.cat(batches["held-out"])  # [all rows, T]
    counted = torch.cat(sample.counted)  # [all rows, T]
    n = sample.y.number

    # Third stage: the scores, also of latents that are active at random places.
    generator = torch.Generator().manual_seed(args.seed)
    size = min(n, max(2 * MIN_ACTIVE, n // 200))  # places of such a latent, enough for all scores
    places = [torch.randperm(n, generator=generator)[:size] for _ in range(args.latents)]
    latents = torch.arange(args.latents).repeat_interleave(size)
    acts = torch.rand(len(latents), generator=generator)
    sample.active["null"] = [(torch.cat(places), latents, acts)]
    contexts = Contexts(torch.cat(sample.hidden), tokens[counted], lm.get_input_embeddings().weight)
    sizes = {name: len(coder.W_dec) for name, coder in (coders | untrained).items()}
    sizes |= {"neurons": patched.neurons.shape[-1], "null": args.latents}
    active = {
        name: ActiveTokens(entries, sizes[name], n) for name, entries in sample.active.items()
    }
    score_rows, judged = {}, {}
    for name in tqdm(active, "scores", leave=False):
        score_rows[name], judged[name] = score(active[name], contexts, args.latents, args.seed)

    # The report.
    run = config | {"hookpoint": patched.hookpoint, "evaluated_on": args.dataset}
    run |= {"evaluated_subset": args.subset, "baselines_k": k, "baselines_tokens": trained_on}
    report = {"tokens": n, "tokens_asked_for": args.tokens, "run": run}
    report["clean_ce"] = losses(sample, "clean")["ce"]
    report["mean_ablated_ce"] = losses(sample, "mean")["ce"]
    report["zero_ablated_ce"] = losses(sample, "zero")["ce"]
    report["outliers"] = {
        "tokens": 1 - n / sample.y_all.number,
        "variance": 1 - sample.y.variance() / sample.y_all.variance(),
    }
    report["coders"] = {}
    for name, coder in coders.items():
        count = active[name].count
        row = {"arch": coder.arch, "k": coder.k, "num_latents": len(count)}
        row |= {"l0": count.sum().item() / n, "dead": (count == 0).double().mean().item()}
        row |= losses(sample, name) | score_rows[name]
        if not enough_training:  # it compares with the mean of y, and few tokens make a rough one
            row["ce_recovered"] = None
        report["coders"][name] = row
    report["baselines"] = {
        name: losses(sample, name) if enough_training else None for name in ("affine", "token")
    }
    report["baselines"] |= {name: row for name, row in score_rows.items() if name not in coders}
    where = counted.flatten().nonzero().flatten()  # [n], where each place is in tokens.flatten()
    shown = {name: (active[name], judged[name]) for name in (*coders, "neurons")}
    return report, (tokens, where, shown, tokenizer)


# ---- The report as text ---------------------------------------------------------------------

COLUMNS = {  # key in the report: heading, and digits if there is no error
    "fvu": ("FVU", 4),
    "l0": ("L0", 1),
    "dead": ("dead", 3),
    "ce_increase": ("CE increase", 4),
    "kl": ("KL", 4),
    "intruder": ("intruder", 3),
    "one_word": ("one word", 3),
    "detection": ("detection", 3),
}


def short(number, digits):
    """Return a number as text, without a zero before the point."""
    text = f"{number:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(number) < 1 else text


def table(report):
    """Return a header and a row of cells for each coder and baseline."""
    rows = report["coders"] | report["baselines"]
    rows = {name: row for name, row in rows.items() if row is not None}
    columns = [["", *rows]]
    for key, (heading, digits) in COLUMNS.items():
        errors = [row.get(f"{key}_se") or 0 for row in rows.values()]
        if max(errors) > 0:  # two digits of the largest error (.0123: .012), and no more than five
            digits = min(5, 1 - math.floor(math.log10(max(errors))))
        cells = [heading]
        for row, error in zip(rows.values(), errors):
            value = row.get(key)
            cells.append("" if value is None else short(value, digits))
            if error > 0:
                cells[-1] += f"±{short(error, digits)}"
        columns.append(cells)
    return list(zip(*columns))


def remarks(report):
    """Return the text, how to read the table, and what is missing, as a list of paragraphs."""
    run, left_out = report["run"], report["outliers"]
    trained_on = " ".join(filter(None, (run["dataset"], run.get("subset"))))
    evaluated_on = " ".join(filter(None, (run["evaluated_on"], run["evaluated_subset"])))
    lines = [f"{run['hookpoint']} of {run['model']}, trained on {trained_on}."]
    lines.append(
        f"{report['tokens']:,} held-out tokens of {evaluated_on}. Cross-entropy is"
        f" {report['clean_ce']:.4f} nats per token, {report['mean_ablated_ce']:.4f} with the mean"
        f" of y in the MLP's place, {report['zero_ablated_ce']:.4f} with zero."
    )
    lines.append(
        "Lower is better for FVU (1: no better than the mean), CE increase and KL, higher for the"
        " scores (by chance: intruder and one word .2, detection .5). ± is one standard error,"
        f" over rows of text or over latents. Baselines of the scores have k {run['baselines_k']}."
    )
    by_token = {name: row["intruder_token"] for name, row in report["coders"].items()}
    told = ", ".join(f"{name} {short(x, 3)}" for name, x in by_token.items() if x is not None)
    lines.append(f"Intruder by a judge that sees the token alone, no context: {told or 'none'}.")
    if left_out["tokens"] > 0:
        lines.append(
            f"Left out as outliers: {left_out['tokens']:.2%} of the tokens, with"
            f" {left_out['variance']:.1%} of the variance of y."
        )
    if report["baselines"]["affine"] is None:
        lines.append(f"Only {run['baselines_tokens']:,} training tokens: no affine and token map.")
    if report["tokens"] < MIN_ACTIVE / MIN_SHARE:  # 100,000
        lines.append(f"Few tokens: only latents active at {MIN_ACTIVE} places or more have scores.")
    return lines


# ---- The page -------------------------------------------------------------------------------

ON_PAGE = 100  # latents of each coder, which keeps the page under 4 MB
AROUND = 12  # tokens on each side of the token that a context is about


def legible(tokenizer, tokens):
    """Return the text that each token adds to those before it.

    A character that several tokens share is shown at the last of them.
    """
    texts, before = [], ""
    for i in range(len(tokens)):
        text = tokenizer.decode(tokens[: i + 1], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):  # not yet a whole character
            texts.append("")
        else:
            texts.append(text[len(before) :].replace("\n", "↵").replace("\t", "⇥"))
            before = text
    return texts


def context(tokenizer, row, peak, acts):
    """Return the HTML of the text around the token `peak` of a row: before it, and from it on.

    acts: the latent's act at each token of the row, relative to its largest.
    """
    start, end = max(0, peak - AROUND), min(peak + AROUND + 1, len(row))
    # Some tokenizers drop a space before the first token, so take one more, which is not shown.
    texts = legible(tokenizer, row[max(0, start - 1) : end])[-(end - start) :]
    shown = []
    for i, text in enumerate(texts, start):
        tag = "b" if i == peak else "span"
        shaded = f'<{tag} style="--act:{acts[i]:.2f}">{html.escape(text)}</{tag}>'
        shown.append(shaded if acts[i] > 0 else html.escape(text))
    return "".join(shown[: peak - start]), "".join(shown[peak - start :])


def latent_on_page(scores, active, tokens, where, tokenizer):
    """Return the HTML of one latent: its scores, and eight contexts, the strongest first.

    active: the ActiveTokens of its coder. For the rest see `page`.
    """
    at, acts = where[active.places[scores["latent"]]], active.acts[scores["latent"]]
    # Its act at each token of all rows, relative to the largest.
    relative = torch.zeros(tokens.shape).flatten().index_copy_(0, at, acts / acts[0])
    n, numbers = len(at), [f"active on {len(at) / len(where):.2%} of tokens"]
    numbers += [f"{COLUMNS[key][0]} {scores[key]:.2f}" for key in SCORES if key in scores]
    parts = [f"<article><h3>latent {scores['latent']}</h3> {', '.join(numbers)}<div>"]
    # The four strongest, and the middles of the fifths after the first.
    for rank in (0, 1, 2, 3, 0.3 * n, 0.5 * n, 0.7 * n, 0.9 * n):
        row, peak = divmod(at[int(rank)].item(), tokens.shape[1])
        of_row = relative.view(tokens.shape)[row].tolist()
        before, after = context(tokenizer, tokens[row].tolist(), peak, of_row)
        fifth = 1 + int(FIFTHS * rank / n)
        parts.append(f"<small>{fifth}/5</small><p><span>{before}</span></p><p>{after}</p>")
    return "".join([*parts, "</div></article>"])


def page(report, tokens, where, shown, tokenizer):
    """Return one self-contained HTML page: the table, and latents of each coder, best first.

    tokens [rows, T] were read, and where [n] is the index in tokens.flatten() of each place.
    `shown` has the ActiveTokens and the scores of latents, by the name of their coder.
    """
    parts = []
    for name, (active, judged) in shown.items():
        best = sorted(judged[:ON_PAGE], key=lambda scores: -scores["intruder"])
        about = f"{name}: {len(best)} of {len(active.count):,} latents, drawn at random, best first"
        parts.append(f"<details open><summary>{html.escape(about)}</summary>")
        parts += [latent_on_page(scores, active, tokens, where, tokenizer) for scores in best]
        parts.append("</details>")
    rows = ["<tr><th>" + "<td>".join(map(html.escape, row)) for row in table(report)]
    title = html.escape(f"{Path(report['run']['model']).name} {report['run']['hookpoint']}")
    notes = "".join(f"<p>{html.escape(line)}" for line in remarks(report))
    return PAGE.format(title=title, table="".join(rows), notes=notes, coders="".join(parts))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --hot: 237 125 25; --line: #8884 }}
@media (prefers-color-scheme: dark) {{ :root {{ --hot: 170 80 5 }} }}
body {{ max-width: 76rem; margin: auto; padding: 1rem; font: 15px/1.5 system-ui, sans-serif }}
.table {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 13px; white-space: pre }}
th, td {{ text-align: right; padding: .1rem .5rem; border-bottom: thin solid var(--line) }}
th {{ text-align: left }}
summary {{ font-size: 1.2rem; margin-top: 1rem }}
article {{ padding: .5rem 0; border-bottom: thin solid var(--line) }}
h3 {{ display: inline; font-size: 1rem; margin-right: .5rem }}
/* Contexts: a column for the fifth, one for the text before the peak, one for peak and the rest. */
article div {{
  display: grid; grid-template-columns: 2rem minmax(0, 1fr) minmax(0, 1fr);
  font: 13px/1.7 ui-monospace, monospace; white-space: pre;
}}
article p {{ margin: 0; padding: 0 1px; overflow: hidden }}
/* The text before the peak is cut at its start. */
article p:nth-of-type(odd) {{ display: flex; justify-content: flex-end }}
span, b {{ background: rgb(var(--hot) / calc(var(--act, 0) * 90%)); unicode-bidi: isolate }}
b {{ font-weight: normal; outline: thin solid }}
</style>
<h1>{title}</h1>
<div class="table" tabindex="0"><table>{table}</table></div>
{notes}
<p>Below, a line is a context of the token in the box, on which the latent is active. Tokens on
which it is active, sorted by activation, fall into five parts: 1/5 has the largest. The first four
lines show the very largest, the others the middle of their part. Shading: activation.
{coders}
"""


# ---- Flags ----------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.splitlines()[0])
    at_least, flag = skipcoder.at_least, parser.add_argument
    flag("run", metavar="RUN", type=Path, help="run directory that skipcoder.py wrote")
    flag("--tokens", type=at_least(1, float), default=2e5, help="held-out tokens (default 200000)")
    flag("--latents", type=at_least(1), default=300, help="scored per coder (default 300)")
    flag("--json", type=Path, help="write all numbers to this file")
    flag("--html", type=Path, help="write a page with the table and latents to this file")
    flag("--seed", type=at_least(0), default=0, help="of the choice of latents and contexts")
    flag("--device", default="auto", help="cpu, cuda, mps, ... (default: the accelerator)")
    flag("--dataset", help="data set to evaluate on (default: the run's)")
    flag("--subset", help="configuration of that data set")
    args = skipcoder.parse(parser)
    config, coders = skipcoder.load_run(args.run, args.device)
    if args.dataset is None:
        args.dataset = config["dataset"]
        args.subset = args.subset or config.get("subset")
    for path in (args.json, args.html):
        if path and not path.parent.is_dir():
            sys.exit(f"error: {path}: there is no folder {path.parent}")

    with skipcoder.exit_on_error(
        f"--dataset {args.dataset}", skipcoder.DATA_HINT, errors=skipcoder.DataError
    ):
        report, for_page = evaluate(config, coders, args)
    cells = table(report)
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *rest in cells:
        numbers = [text.rjust(width) for text, width in zip(rest, widths[1:])]
        print(" ".join([first.ljust(widths[0]), *numbers]))
    # (Paths stay whole, so that they can be copied.)
    whole = {"break_on_hyphens": False, "break_long_words": False}
    print(*[textwrap.fill(line, 100, **whole) for line in ["", *remarks(report)]], sep="\n\n")
    if args.json:
        skipcoder.write({args.json: json.dumps(report, indent=2, allow_nan=False) + "\n"})
    if args.html:
        skipcoder.write({args.html: page(report, *for_page)})


if __name__ == "__main__":
    main()
