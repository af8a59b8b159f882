"""Train three sparse coders side by side on one MLP of a language model.

    python skipcoder.py --layer 6

A sparse coder rewrites what an MLP does to a token as a sum of a few of many learned directions, its latents, in the
hope that each latent stands for one thing. With x the input of the MLP (after the layer norm) and y its output, both
d wide, and M latents of which TopK keeps the k largest (and of those the positive ones):

    sae              z = TopK(W_enc (y - b_dec) + b_enc)      y_hat = W_dec z + b_dec
    transcoder       z = TopK(W_enc x + b_enc)                y_hat = W_dec z + b_dec
    skip_transcoder  z = TopK(W_enc x + b_enc)                y_hat = W_dec z + W_skip x + b_dec

The first says what the MLP's output is made of; the other two imitate what the MLP computes. All three predict y and
minimise the fraction of its variance that is left unexplained, FVU = sum |y - y_hat|^2 / sum |y - mean(y)|^2.
Paper: "Transcoders Beat Sparse Autoencoders for Interpretability", Paulo, Shabalin & Belrose, arXiv 2501.18823.

Read on in this order: coders, tokens, activations, training, files, flags. eval.py measures what comes out.
"""

import argparse
import ctypes
import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

ARCHS = ("sae", "transcoder", "skip_transcoder")

# ---------------------------------------------------------------------------------------------------------------------
# Coders
# ---------------------------------------------------------------------------------------------------------------------


class Coded(NamedTuple):
    y_hat: Tensor  # [N, d] the prediction of y
    acts: Tensor  # [N, k] activations of the latents that TopK kept, not sorted; zero where ReLU cut them
    indices: Tensor  # [N, k] which latents those are


class Coder(nn.Module):
    """One sparse coder. Its parameters have the names and shapes of EleutherAI's `sparsify`, and so have its files.

    encoder.weight [M, d], encoder.bias [M], W_dec [M, d] (row j is what latent j writes), b_dec [d], and for the skip
    transcoder W_skip [d, d]. Weights are fp32; `matmul_dtype` is what the two dense matmuls are computed in.
    """

    def __init__(self, arch: str, d: int, num_latents: int, k: int, seed: int = 0):
        super().__init__()
        self.arch, self.k, self.matmul_dtype = arch, k, torch.float32
        # random unit rows; the same seed gives every architecture the same encoder
        W = F.normalize(torch.randn(num_latents, d, generator=torch.Generator().manual_seed(seed)))
        self.encoder = nn.Linear(d, num_latents)
        self.encoder.weight.data = W
        self.encoder.bias.data.zero_()
        # an autoencoder starts with W_dec = W_enc, since its latents should write what they read. What a transcoder's
        # should write is not known: it starts with nothing, and W_enc gets its gradient once W_dec has moved
        self.W_dec = nn.Parameter(W.clone() if arch == "sae" else torch.zeros(num_latents, d))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.W_skip = nn.Parameter(torch.zeros(d, d)) if arch == "skip_transcoder" else None

    def start_at(self, x_mean: Tensor, y_mean: Tensor):
        """Predict the mean of y [d], to start with, and centre what the encoder reads; x_mean is [d] as well."""
        self.b_dec.data = y_mean
        if self.arch != "sae":
            self.encoder.bias.data = -(self.encoder.weight.data @ x_mean)  # [M, d] @ [d] -> [M]

    def forward(self, x: Tensor, y: Tensor) -> Coded:
        """Predict y [N, d], the MLP's output, from x [N, d], its input (the autoencoder: from y itself)."""
        out, acts, indices = self.sparse_mlp(x, y)
        out = out + self.b_dec
        if self.W_skip is not None:
            dtype = self.matmul_dtype
            out = out + F.linear(x.to(dtype), self.W_skip.to(dtype))  # [N, d] @ [d, d] -> [N, d]
        return Coded(out, acts, indices)

    def sparse_mlp(self, x: Tensor, y: Tensor, latents: Tensor | None = None, k: int | None = None):
        """W_dec z, activations and indices; for AuxK of these `latents` alone (indices then count in them)."""
        # a transcoder never subtracts b_dec from its input: b_dec is the mean of y, not of x
        source, shift = (y, self.b_dec) if self.arch == "sae" else (x, None)
        weights = self.encoder.weight, self.encoder.bias, self.W_dec
        if latents is not None:
            weights = [w[latents] for w in weights]
        return SparseMLP.apply(source, shift, *weights, k or self.k, self.matmul_dtype)


class SparseMLP(torch.autograd.Function):
    """W_dec TopK(W_enc (source - shift) + b_enc), with gradients that touch only the k active latents of each token.

    `source` [N, d] is what the coder reads, y or x; the LM is not trained, so it needs no gradient. `shift` [d] is
    b_dec for the autoencoder and None for the others.
    The forward pass is one dense matmul and a topk; all that follows is sparse. The decoder is an embedding bag: the
    weighted sum of the k rows of W_dec that a token uses. The gradient of either weight matrix is an embedding bag as
    well, over the same (token, latent) pairs sorted by latent: a row of the gradient is the weighted sum of the
    tokens that used this latent.
    """

    @staticmethod
    def forward(ctx, source, shift, W_enc, b_enc, W_dec, k, dtype):
        source = source if shift is None else source - shift
        pre = F.linear(source.to(dtype), W_enc.to(dtype), b_enc.to(dtype))  # [N, d] @ [d, M] -> [N, M]
        z, idx = topk(pre, k)  # [N, k] each
        z = z.relu().to(W_dec.dtype)
        ctx.save_for_backward(source, W_enc, W_dec, z, idx)
        ctx.mark_non_differentiable(z, idx)
        return F.embedding_bag(idx, W_dec, per_sample_weights=z, mode="sum"), z, idx  # [N, k], [M, d] -> [N, d]

    @staticmethod
    def backward(ctx, grad, *_):
        source, W_enc, W_dec, z, idx = ctx.saved_tensors
        (N, k), M = idx.shape, len(W_enc)
        # d loss / d z = (grad[:, None] * W_dec[idx]).sum(-1), without a tensor [N, k, d]; the last 0 is mode="sum"
        bag = torch.arange(N, device=idx.device)
        dz = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, W_dec, idx.flatten(), bag * k, bag.repeat_interleave(k), 0
        ) * (z.flatten() > 0)  # [N * k]
        # the (token, latent) pairs sorted by latent; latent j owns the pairs from start[j] to start[j + 1]
        latent, order = idx.flatten().sort()
        start = torch.searchsorted(latent, torch.arange(M, device=idx.device))  # [M]
        token = order // k  # [N * k]

        def per_latent(rows: Tensor, weights: Tensor) -> Tensor:  # [N, d], [N * k] -> [M, d]
            return F.embedding_bag(token, rows, start, per_sample_weights=weights[order], mode="sum")

        grad_b_enc = W_enc.new_zeros(M).index_add_(0, idx.flatten(), dz)  # [M]
        # all pre-activations contain W_enc (-shift): [M] @ [M, d] -> [d]
        grad_shift = -(grad_b_enc @ W_enc) if ctx.needs_input_grad[1] else None
        return None, grad_shift, per_latent(source, dz), grad_b_enc, per_latent(grad, z.flatten()), None, None


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of pre [N, M] and where they are, [N, k] each, not sorted.

    Exact, and in two stages, which takes 0.6 of the time of topk on whole rows: with a row cut into groups of 16, its k
    largest entries are among the k groups whose maxima are largest.
    """
    M = pre.shape[1]
    size = math.gcd(M, 16)
    n = M // size
    groups = pre.view(-1, size, n)  # the entries j, j + n, j + 2 n, ... of a row are its group j
    best = groups.amax(1).topk(min(k, n), sorted=False).indices  # [N, k], or all n groups if there are fewer
    candidates = groups.gather(2, best[:, None].expand(-1, size, -1))  # [N, size, k]
    z, which = candidates.flatten(1).topk(k, sorted=False)  # [N, size * k] -> [N, k]
    member, slot = which // best.shape[1], which % best.shape[1]
    return z, member * n + best.gather(1, slot)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_DATASET, DEFAULT_SUBSET = "HuggingFaceFW/fineweb", "sample-10BT"
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix -> builder of `datasets`
HELD_OUT = 10  # every 10th document is for eval.py alone
SHUFFLE_ROWS = 2048  # pool that rows are drawn from: neighbours are alike, and mixing them lowers FVU by 15%

HUB_HINT = (  # said when something cannot be had from the Hugging Face hub
    "check the name and the connection, or pass a local folder as --model and a local file or folder as --dataset"
    " (python tests/tiny_gpt2.py makes both offline)"
)


class InputError(Exception):
    """What the user can mend: one line that names the flag and the fix."""


def documents(dataset: str, subset: str | None):
    """Yield the texts of a data set in order: a Hugging Face one, streamed, or a local file or folder of files."""
    import datasets  # takes seconds, and only the reading process needs it

    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said in one line, below

    def reader(path: Path) -> str | None:
        return READERS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)

    path = Path(dataset)
    if not path.exists():
        sources = [(dataset, None)]  # on the hub
    else:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        sources = [(str(file), reader(file)) for file in files if reader(file)]
        if not sources:
            raise InputError(f"--dataset {dataset}: no {', '.join(READERS)} file (text ones may be .gz) there")
    for name, kind in sources:
        options = {"path": kind, "data_files": name} if kind else {"path": name, "name": subset}
        if kind == "text":
            options["sample_by"] = "document"  # one text a file, not one a line
        if kind and os.path.getsize(name) == 0:
            raise InputError(f"--dataset {name}: the file is empty")
        try:
            for example in datasets.load_dataset(**options, split="train", streaming=True):
                text = example.get("text", 0)  # 0: no string
                text = "" if text is None else text  # some data sets have a null here and there
                if not isinstance(text, str):
                    raise InputError(f"--dataset {name}: no column 'text' of strings, only {', '.join(example)}")
                yield from pieces(text) if kind == "text" else [text]
        except InputError:
            raise
        except Exception as error:  # broken JSON or parquet, hub out of reach, no such data set, ...
            hint = "" if kind else f"; {HUB_HINT}"
            raise InputError(f"--dataset {name}: {first_line(error)}{hint}") from error


def pieces(text: str, size: int = 10_000):
    """Cut the text of a .txt file, which may be a whole library, into documents of about `size` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


class TokenBatches(IterableDataset):
    """Batches [rows, ctx_len] of tokens from a data set; to be read in a process of its own by `read_ahead`.

    Documents are joined with EOS and packed: every row is full, there is no padding. Every 10th document is left out,
    or with `held_out` all others are. Rows come in random order and for ever, or with `once` in order and once. Between
    batches there may be a str, to be shown, or an InputError, to be raised.
    """

    def __init__(
        self, dataset, subset, tokenizer, ctx_len, rows, *, held_out=False, once=False, seed=0, rank=0, world=1
    ):
        super().__init__()
        self.dataset, self.subset, self.tokenizer, self.ctx_len, self.rows = dataset, subset, tokenizer, ctx_len, rows
        self.held_out, self.once, self.seed, self.rank, self.world = held_out, once, seed, rank, world

    def __iter__(self):
        try:
            random = torch.Generator().manual_seed(self.seed)
            batch = []
            for epoch in count():
                seen = 0
                for row in self.packed() if self.once else shuffled(self.packed(), random):
                    seen += 1
                    batch.append(row)
                    if len(batch) == self.rows:
                        yield torch.stack(batch)  # [rows, ctx_len]
                        batch = []
                if self.once:
                    if batch:
                        yield torch.stack(batch)  # [fewer rows, ctx_len]
                    return
                if seen < self.rows:
                    raise InputError(
                        f"--dataset {self.dataset}: too little text, {seen} rows of {self.ctx_len} tokens where one"
                        f" batch takes {self.rows}: give more text, or lower --batch-size or --ctx-len"
                    )
                if epoch == 0 and self.rank == 0:
                    tokens = seen * self.ctx_len * self.world
                    yield f"--dataset {self.dataset} is used up after {tokens:,} tokens and is repeated"
        except InputError as error:
            yield error

    def packed(self):
        """Yield the rows [ctx_len] of one pass over the documents of this split and this rank."""
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        texts = enumerate(documents(self.dataset, self.subset))
        split = (text for index, text in texts if (index % HELD_OUT == 0) == self.held_out)
        mine = islice(split, self.rank, None, self.world)
        tokens = []
        while some := list(islice(mine, 64)):  # as many as keep a multi-threaded tokenizer busy
            for ids in self.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
                tokens += ids + eos
            full = len(tokens) - len(tokens) % self.ctx_len
            yield from torch.tensor(tokens[:full], dtype=torch.int64).view(-1, self.ctx_len)
            tokens = tokens[full:]


def shuffled(rows, random: torch.Generator):
    """Yield the rows in random order, as far as a pool of SHUFFLE_ROWS allows."""
    pool = []
    for row in rows:
        pool.append(row)
        if len(pool) > SHUFFLE_ROWS:
            i = torch.randint(len(pool), (), generator=random)
            pool[i], pool[-1] = pool[-1], pool[i]
            yield pool.pop()
    for i in torch.randperm(len(pool), generator=random):
        yield pool[i]


def leave_group(_worker: int):
    """Ctrl-C signals the whole process group of a terminal, and is for the main process alone: work outside of it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def read_ahead(data: TokenBatches):
    """Start a process that reads and tokenises ahead; return an iterator over its batches [rows, ctx_len]."""
    # not a generator itself: the process starts with this call, not with the first batch
    ahead = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=16, worker_init_fn=leave_group))

    def batches():
        for item in ahead:
            if isinstance(item, InputError):
                raise item
            if isinstance(item, str):
                tqdm.write(item, file=sys.stderr)
            else:
                yield item

    return batches()


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


def from_pretrained(auto_class, name: str, flag: str = "--model", **options):
    """`auto_class.from_pretrained(name)` that asks the network only for what is not on disk; raises InputError."""
    if Path(name).is_file():
        raise InputError(f"{flag} {name} is a file: pass the folder it is in, or a name on the Hugging Face hub")
    try:
        try:
            return auto_class.from_pretrained(name, local_files_only=True, **options)
        except OSError:
            if Path(name).exists():
                raise
            return auto_class.from_pretrained(name, **options)
    except Exception as error:  # OSError for a wrong name or no connection; nearly anything for broken files
        raise InputError(f"{flag} {name}: {first_line(error)}; {HUB_HINT}") from error


def load_lm(name: str, device: torch.device, dtype: torch.dtype, flag: str = "--model") -> nn.Module:
    """The LM, for forward passes under autocast to `dtype`: its linear layers are in it, all else is in fp32."""
    config = from_pretrained(AutoConfig, name, flag)
    if getattr(config, "activation_function", None) == "gelu_new":  # GPT-2's, as eight kernels
        config.activation_function = "gelu_pytorch_tanh"  # the same function as one: 30% off the LM's time on a CPU
    lm = from_pretrained(AutoModelForCausalLM, name, flag, config=config, dtype=torch.float32).eval().to(device)
    for module in lm.base_model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.to(dtype)  # as autocast would at every step
    return lm


def find_mlp(lm: nn.Module, layer: int) -> tuple[str, nn.ModuleList, nn.Module]:
    """Return the hookpoint (the MLP's name under the base model, "h.6.mlp"), the list of blocks, and the MLP itself.

    Any decoder of `transformers` will do whose base model has one list of blocks that have an `.mlp`, a dense one.
    """
    found = [
        (name, blocks)
        for name, blocks in lm.base_model.named_modules()
        if isinstance(blocks, nn.ModuleList) and len(blocks) and all(hasattr(block, "mlp") for block in blocks)
    ]
    if len(found) != 1:
        raise InputError(f"--model: {type(lm).__name__} has {len(found)} lists of blocks with an .mlp, not one")
    name, blocks = found[0]
    if not 0 <= layer < len(blocks):
        raise InputError(f"--layer {layer}: the model has blocks 0 to {len(blocks) - 1}")
    if hasattr(blocks[layer].mlp, "experts"):
        raise InputError(f"--layer {layer}: its MLP is a mixture of experts, and only dense ones can be coded")
    return f"{name}.{layer}.mlp", blocks, blocks[layer].mlp


class MLPActivations:
    """Call it with tokens [rows, ctx_len] to get the MLP's input x and output y there, each [rows * (ctx_len - 1), d].

    Position 0 of each row is left out: GPT-2 and others park their attention there and give it a huge norm, which says
    nothing of the text and would swamp the loss. (Some models have such attention sinks elsewhere too.)
    """

    def __init__(self, lm: nn.Module, mlp: nn.Module, dtype: torch.dtype):
        self.lm, self.dtype = lm, dtype
        mlp.register_forward_hook(self.hook)

    def hook(self, mlp, args, output):
        if len(args) != 1:  # BLOOM's, for one, is given the residual stream as well, and adds its output to it
            raise InputError(f"--model: {type(mlp).__name__} takes {len(args)} inputs, not one")
        self.x, self.y = args[0], output  # [rows, ctx_len, d] each

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            self.lm.base_model(tokens, use_cache=False)
        return self.x[:, 1:].flatten(0, 1).float(), self.y[:, 1:].flatten(0, 1).float()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

# The recipe, found by measurement (README, "Recipe"). Shares are of the tokens to train on.
DEFAULT_TOKENS = 50_000_000
WARM_UP, DECAY = 0.05, 0.5  # shares over which the learning rate rises at the start and falls at the end
BETAS = (0.9, 0.98)  # Adam's; the usual 0.999 remembers a thousand steps, half of a short run
DEAD = 0.02  # a latent is dead once it was silent for this share
# What a dead latent's bias gains per step until it fires, in standard deviations of the pre-activations (and times the
# factor of the learning rate). Without it a third of the SAE's and a quarter of the transcoder's latents die; AuxK, the
# usual cure, in its place left 13% of the transcoder's dead, and a step took five times as long (README).
WAKE = 0.03
LOG_EVERY, SAVE_EVERY = 5, 300  # seconds


def default_rows(tokens: int, ctx_len: int) -> int:
    """Rows in a step: 1,024 tokens for a run of 2M, growing with the square root of the run."""
    return max(1, round(1024 * math.sqrt(tokens / 2e6) / ctx_len))


def default_lr(tokens: int) -> float:
    """Adam's learning rate: 1.5e-3 for a run of 2M tokens, falling with the fourth root of the run."""
    return 1.5e-3 * (2e6 / tokens) ** 0.25


class Trainer:
    """A coder, its optimizer, how long each latent has been silent, and the squared error since the last report."""

    def __init__(self, coder: Coder, x: Tensor, y: Tensor, lr: float, auxk_alpha: float, dead_after: float):
        """x, y [N, d]: a first batch, which sets where the coder starts; `dead_after`: tokens of silence."""
        self.coder, self.lr, self.auxk_alpha, self.dead_after = coder, lr, auxk_alpha, dead_after
        (x_mean, x_scale), (y_mean, y_scale) = mean_and_scale(x), mean_and_scale(y)
        coder.start_at(x_mean, y_mean)
        # Adam moves each number by about lr whatever its gradient, so each parameter needs its lr in its own units: x
        # and y have scales of their own in each layer and model
        self.z_scale = y_scale if coder.arch == "sae" else x_scale  # of pre-activations: W_enc has unit rows
        units = {
            "encoder.weight": 1.0,
            "encoder.bias": self.z_scale,
            "W_dec": y_scale / self.z_scale,
            "b_dec": y_scale,
            "W_skip": y_scale / x_scale,
        }
        groups = [{"params": [p], "unit": units[name]} for name, p in coder.named_parameters()]
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=BETAS, fused=True)
        self.silent = torch.zeros(len(coder.W_dec), dtype=torch.int64, device=x.device)  # [M] tokens since last active
        self.squared_error, self.variance = torch.zeros(2, device=x.device)  # since the last report

    def step(self, x: Tensor, y: Tensor, variance: Tensor, lr_factor: float):
        """One Adam step on the loss over x, y [N, d]; `variance` is sum |y - mean(y)|^2 over the batch."""
        coder = self.coder
        y_hat, acts, indices = coder(x, y)
        error = y - y_hat  # [N, d]
        squared_error = error.square().sum()
        loss = squared_error / variance  # the FVU
        dead = self.silent >= self.dead_after  # [M]
        if self.auxk_alpha and dead.any():
            loss = loss + self.auxk_alpha * self.auxk_loss(x, y, error.detach(), dead.nonzero().flatten()) / variance
        self.optimizer.zero_grad()
        loss.backward()

        active = torch.zeros(len(coder.W_dec), device=x.device).index_add_(0, indices.flatten(), acts.flatten())  # [M]
        squared_error = squared_error.detach()
        sum_over_processes(active, squared_error, *(p.grad for p in coder.parameters()))
        self.silent = torch.where(active > 0, 0, self.silent + len(x) * world_size())
        self.squared_error += squared_error
        self.variance += variance

        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor * group["unit"]
        if coder.arch == "sae":  # rows of W_dec stay unit vectors: step along the sphere, then back onto it
            W, grad = coder.W_dec.data, coder.W_dec.grad  # [M, d]
            grad -= (grad * W).sum(1, keepdim=True) * W
        self.optimizer.step()
        if coder.arch == "sae":
            coder.W_dec.data = F.normalize(coder.W_dec.data)
        coder.encoder.bias.data += WAKE * self.z_scale * lr_factor * dead  # dead latents wake up, see WAKE

    def auxk_loss(self, x: Tensor, y: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Squared error of the dead latents at predicting what the others left over (Gao et al. 2024, appendix A.2).

        Each token uses the k_aux largest of the dead latents [n_dead]. Their prediction has no b_dec in it: the error
        [N, d] is what is left after y_hat, which has.
        """
        k_aux = min(len(dead), x.shape[1] // 2)
        error_hat, _, _ = self.coder.sparse_mlp(x, y, dead, k_aux)  # [N, d]
        return (error - error_hat).square().sum()

    def report(self) -> tuple[float, float]:
        """FVU since the last report, and the share of the latents that are dead now."""
        fvu = (self.squared_error / self.variance).item()
        self.squared_error.zero_()
        self.variance.zero_()
        return fvu, (self.silent >= self.dead_after).float().mean().item()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(*tensors: Tensor):
    """Replace each tensor by its sum over all processes. Losses are sums over tokens, so gradients add up as well."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def mean_and_variance(a: Tensor) -> tuple[Tensor, Tensor]:
    """mean(a) [d] and sum |a - mean(a)|^2 over the batch a [N, d] of all processes."""
    mean = a.mean(0) / world_size()
    sum_over_processes(mean)
    variance = (a - mean).square().sum()
    sum_over_processes(variance)
    return mean, variance


def mean_and_scale(a: Tensor) -> tuple[Tensor, float]:
    """mean(a) [d] and the root mean square of the entries of a - mean(a), a [N, d]."""
    mean, variance = mean_and_variance(a)
    return mean, (variance / (a.numel() * world_size())).sqrt().item()


def lr_schedule(done: float) -> float:
    """Factor of the learning rate after the share `done` of the steps: linear warm-up, constant, linear decay."""
    return min(1, done / WARM_UP, (1 - done) / DECAY)


def any_process(*flags) -> list[bool]:
    """Which of the flags are set in at least one process."""
    if not dist.is_initialized():
        return [bool(flag) for flag in flags]
    counts = torch.tensor([bool(flag) for flag in flags], dtype=torch.float32)  # on the CPU: no GPU is waited for
    sum_over_processes(counts)
    return (counts > 0).tolist()


def check(args: argparse.Namespace):
    """Raise InputError where flags do not fit together, or do not fit the model or the disk."""
    if args.batch_size % world_size():
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the {world_size()} processes")
    limit = getattr(from_pretrained(AutoConfig, args.model), "max_position_embeddings", math.inf)
    if not 3 <= args.ctx_len <= limit:  # position 0 is not used, and in eval.py the last one has no next token
        raise InputError(f"--ctx-len {args.ctx_len}: at least 3 and, for this model, at most {limit} tokens")
    if (args.out / "config.json").exists() and not args.overwrite:
        raise InputError(f"--out {args.out} holds a run: pass --overwrite to replace it, or another --out")
    if rank() == 0:
        check_writable("--out", args.out / "config.json")


def set_up(args: argparse.Namespace):
    """Start to read and load the LM. Return the run's config, the batches, the activations and a Trainer per coder."""
    device, dtype = args.device, matmul_dtype(args.device)
    # the data goes first: reading runs ahead in a process of its own while the LM loads
    tokenizer = from_pretrained(AutoTokenizer, args.model)
    share = {"rows": args.batch_size // world_size(), "rank": rank(), "world": world_size()}
    batches = read_ahead(TokenBatches(args.dataset, args.subset, tokenizer, args.ctx_len, seed=args.seed, **share))
    lm = load_lm(args.model, device, dtype)
    hookpoint, blocks, mlp = find_mlp(lm, args.layer)
    del blocks[args.layer + 1 :]  # nobody reads what they write; the LM head is never called either
    activations = MLPActivations(lm, mlp, dtype)
    first = next(batches)
    x, y = activations(first.to(device))  # [rows * (ctx_len - 1), d] each
    d = y.shape[1]
    num_latents = args.expansion * d
    if args.k > num_latents:
        raise InputError(f"--k {args.k}: there are {num_latents} latents (--expansion {args.expansion} x {d})")
    trainers = {}
    for arch in args.arch:
        try:
            coder = Coder(arch, d, num_latents, args.k, args.seed).to(device)
            coder.matmul_dtype = dtype
            trainers[arch] = Trainer(coder, x, y, args.lr, args.auxk_alpha, DEAD * args.tokens)
        except (RuntimeError, MemoryError) as error:  # what torch raises when it cannot allocate
            why = f"memory for {num_latents:,} latents could not be had ({first_line(error)})"
            raise InputError(f"--expansion {args.expansion}: {why}, lower it") from error

    config = vars(args) | {"hookpoint": hookpoint, "d": d, "num_latents": num_latents, "matmul_dtype": str(dtype)[6:]}
    config |= {key: Path(config[key]).resolve() for key in ("model", "dataset") if Path(config[key]).exists()}
    config["versions"] = {name: version(name) for name in ("torch", "transformers", "datasets")}
    config["versions"]["python"] = platform.python_version()
    if rank() == 0:
        gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        print(f"model      {args.model}: {type(lm).__name__}, d {d}")
        print(f"hookpoint  {hookpoint}")
        print(f"coders     {', '.join(args.arch)}: M {num_latents:,} latents, k {args.k}")
        print(f"device     {device}{gpu} x {world_size()}, matmuls in {config['matmul_dtype']}")
    return config, chain([first], batches), activations, trainers


def note_signals() -> list[int]:
    """From now on SIGINT and SIGTERM are only noted, in this list; a second Ctrl-C raises KeyboardInterrupt."""
    stop = []

    def on_signal(number: int, _frame):
        if number == signal.SIGINT and number in stop:  # do not wait for a step or for data
            raise KeyboardInterrupt
        stop.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop


def train(args: argparse.Namespace) -> int:
    """Train the coders `args.arch` on one stream of activations and save them to `args.out`. Return the exit code."""
    check(args)
    config, batches, activations, trainers = set_up(args)
    step_tokens = args.batch_size * (args.ctx_len - 1)
    steps = math.ceil(args.tokens / step_tokens)
    if rank() == 0:
        amounts = f"{steps * step_tokens:,} tokens, {step_tokens:,} a step, learning rate {args.lr:.2g}"
        print(f"data       {args.dataset}: {amounts}")
        print(f"saves to   {args.out}", flush=True)
    stop = note_signals()
    reported_at = saved_at = started_at = time.monotonic()
    tokens = reported_tokens = 0
    log = ""
    with tqdm(total=steps * step_tokens, unit="tok", unit_scale=True, disable=rank() > 0) as bar:
        for step, batch in enumerate(islice(batches, steps)):
            x, y = activations(batch.to(args.device))  # [rows * (ctx_len - 1), d] each
            _, variance = mean_and_variance(y)
            for trainer in trainers.values():
                trainer.step(x, y, variance, lr_schedule((step + 0.5) / steps))
            tokens += step_tokens
            bar.update(step_tokens)

            # Report every few seconds and save every few minutes, not at every step: reading a number off a GPU waits
            # for all the work given to it. Several processes have to agree on when.
            now = time.monotonic()
            ending, saving, reporting = any_process(
                stop or step + 1 == steps, now > saved_at + SAVE_EVERY, now > reported_at + LOG_EVERY
            )
            if not (ending or saving or reporting):
                continue
            reports = {arch: trainer.report() for arch, trainer in trainers.items()}
            fvu = {arch: report[0] for arch, report in reports.items()}
            dead = {arch: report[1] for arch, report in reports.items()}
            if not all(map(math.isfinite, fvu.values())):
                kept = f"the last save in {args.out} is kept" if saved_at > started_at else "nothing was saved"
                raise InputError(f"--lr {args.lr:g}: the loss is not finite after {tokens:,} tokens, lower it; {kept}")
            bar.set_postfix_str(", ".join(f"{arch} FVU {fvu[arch]:.3f} dead {dead[arch]:.1%}" for arch in trainers))
            speed = round((tokens - reported_tokens) / (now - reported_at))
            log += json.dumps({"tokens": tokens, "tokens_per_s": speed, "fvu": fvu, "dead": dead}) + "\n"
            reported_at, reported_tokens = now, tokens
            if ending or saving:
                saved_at = now
            if rank() == 0:
                write("--out", {args.out / "log.jsonl": log})
                if ending or saving:
                    coders = [trainer.coder for trainer in trainers.values()]
                    save_run(args.out, config | {"tokens_trained": tokens}, coders)
            if ending:
                break
    if rank() == 0:
        how = f"stopped by {signal.Signals(stop[0]).name}" if stop else "done"
        print(f"{how} after {tokens:,} tokens, saved to {args.out}; next: python eval.py {args.out}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 128 + stop[0] if stop else 0


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write(flag: str, files: dict[Path, str | dict[str, Tensor]]):
    """Write texts and tensors to temporary names, and only then rename all of them: each file is replaced whole.

    On a full disk none is. Raises InputError, with the flag that named the place.
    """
    temporary = {path: path.with_name(path.name + ".tmp") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                temporary[path].write_text(content)
            else:
                save_file(content, temporary[path])
        for path in files:
            os.replace(temporary[path], path)
    except (OSError, SafetensorError) as error:
        for left_over in temporary.values():
            with suppress(OSError):
                left_over.unlink()
        why = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{flag} {path}: cannot be written ({why}), make room or pass another path") from error


def save_run(out: Path, config: dict, coders: list[Coder]):
    """Write config.json and, per coder, <arch>/<hookpoint>/, a folder that EleutherAI's `sparsify` loads as it is."""
    folders = {out / coder.arch / config["hookpoint"]: coder for coder in coders}
    files = {}
    for folder, coder in folders.items():
        weights = {name: p.detach().cpu().contiguous() for name, p in coder.named_parameters()}
        cfg = {
            "activation": "topk",
            "expansion_factor": config["expansion"],
            "normalize_decoder": coder.arch == "sae",
            "num_latents": config["num_latents"],
            "k": coder.k,
            "multi_topk": False,
            "skip_connection": coder.arch == "skip_transcoder",
            "transcode": coder.arch != "sae",
            "d_in": config["d"],
        }
        files |= {folder / "sae.safetensors": weights, folder / "cfg.json": json.dumps(cfg, indent=2) + "\n"}
    files[out / "config.json"] = json.dumps(config, indent=2, default=str) + "\n"  # str: of paths and the device
    try:  # the run that --overwrite replaces may have had coders that this one has not
        old = json.loads((out / "config.json").read_text())
        stale = {out / arch / old["hookpoint"] for arch in old["arch"]} - folders.keys()
    except (OSError, ValueError, KeyError):  # there is none, or it is broken
        stale = ()
    write("--out", files)
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()  # where nothing else is in it


def check_writable(flag: str, path: Path):
    """Raise InputError, before any work is done, if the file `path` cannot be written."""
    if path.is_dir():
        raise InputError(f"{flag} {path}: it is a folder, pass the name of a file")
    probe = path.with_name(path.name + ".probe")
    write(flag, {probe: ""})
    probe.unlink()


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[dict, dict[str, Coder]]:
    """Return the config of a run directory and its coders by architecture. Raises InputError where it is damaged."""
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        coders = {}
        for arch in config["arch"]:
            path = Path(run) / arch / config["hookpoint"] / "sae.safetensors"
            coder = Coder(arch, config["d"], config["num_latents"], config["k"])
            coder.load_state_dict(load_file(path))
            coders[arch] = coder.to(device).requires_grad_(False)
    except FileNotFoundError:
        raise InputError(f"RUN {run}: no run is there, {path} is missing") from None
    except Exception as error:  # torn JSON, torn safetensors, keys or shapes that do not fit
        raise InputError(f"RUN {run}: {path} cannot be read ({first_line(error)}): train it again") from error
    return config, coders


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class Flags(argparse.ArgumentParser):
    def error(self, message):
        """One line, where argparse would print the usage as well."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(text: str) -> int:
    """A flag's value that counts something, 2000000 or 2e6."""
    if not (1 <= float(text) < 1e15 and float(text).is_integer()):
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is needed")
    return int(float(text))


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return float(text)


def not_negative(text: str) -> float:
    return 0.0 if float(text) == 0 else positive(text)


def pick_device(name: str) -> torch.device:
    """The device of that name, after seeing that it works; "auto" is the GPU if there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
        return device
    except Exception as error:
        raise InputError(f"--device {name}: {first_line(error)}; use cpu, cuda or auto") from error


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (then 2 to 9 times as fast as float32), else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)  # every CPU with AMX has it too
    return torch.bfloat16 if fast else torch.float32


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def keep_freed_memory():
    """Tell glibc to keep memory that was freed: new pages for the tensors of each step take 7 to 15% of a CPU step."""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def quiet_libraries():
    """Hide the warnings, retries and bars of the libraries: what matters of them we say in a line of our own."""
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()


def main():
    parser = Flags(prog="skipcoder.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    # fmt: off
    flag("--layer", type=int, required=True, help="the block whose MLP is coded, counted from 0")
    flag("--model", default="gpt2", help="a decoder on the Hugging Face hub, or a local folder (default %(default)s)")
    flag("--dataset", default=DEFAULT_DATASET, help="a data set on the hub, or a local .txt, .jsonl, .json or .parquet "
         "file (text ones also as .gz) or a folder of them (default %(default)s)")
    flag("--subset", help=f"configuration of a hub data set (default: {DEFAULT_SUBSET} of the default data set)")
    flag("--arch", nargs="+", choices=ARCHS, default=list(ARCHS), help="coders to train (default: all three)")
    flag("--expansion", type=whole, default=32, help="latents M as a multiple of the width d (default %(default)s)")
    flag("--k", type=whole, default=32, help="latents active per token (default %(default)s)")
    flag("--tokens", type=whole, default=DEFAULT_TOKENS, help="tokens to train on (default %(default)s)")
    flag("--ctx-len", type=whole, default=256, help="tokens in a row; the first is not used (default %(default)s)")
    flag("--batch-size", type=whole, help="rows in a step (default: grows with --tokens, see README, Recipe)")
    flag("--lr", type=positive, help="Adam's learning rate (default: falls with --tokens, see README, Recipe)")
    flag("--auxk-alpha", type=not_negative, default=0.0, help="weight of the AuxK loss (default 0: see README, Recipe)")
    flag("--seed", type=int, default=0, help="seed of the coders' start and of the order of the rows (default 0)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    flag("--out", help="run directory (default runs/<model>-layer<L>)")
    flag("--overwrite", action="store_true", help="replace the run in --out")
    # fmt: on
    args = parser.parse_args()
    quiet_libraries()
    keep_freed_memory()
    try:
        torchrun = "LOCAL_RANK" in os.environ  # starts one process per GPU, or several on the CPU
        if torchrun and args.device in ("auto", "cuda") and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        args.device = pick_device(args.device)
        if torchrun:
            if args.device.type == "cuda":
                torch.cuda.set_device(args.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
        args.subset = args.subset or (DEFAULT_SUBSET if args.dataset == DEFAULT_DATASET else None)
        rows = max(1, round(default_rows(args.tokens, args.ctx_len) / world_size()))  # of each process
        args.batch_size = args.batch_size or rows * world_size()
        args.lr = args.lr or default_lr(args.tokens)
        args.out = Path(args.out or f"runs/{Path(args.model).resolve().name}-layer{args.layer}")
        sys.exit(train(args))
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped at once, without saving\n")


if __name__ == "__main__":
    main()
