# SPDX-License-Identifier: MIT
"""Train a sparse autoencoder, a transcoder and a skip transcoder side by side on one MLP.

    python skipcoder.py --layer 6

A sparse coder rewrites the output of an MLP in a language model (LM) as a sum of a few directions,
chosen for each token from a large learned set. These directions are called latents, and the hope
is that each of them stands for one thing. Let x be the MLP's input (after the layer norm) and y
its output:

    sae              z = TopK(W_enc (y - b_dec) + b_enc)    y_hat = W_dec z + b_dec
    transcoder       z = TopK(W_enc x + b_enc)              y_hat = W_dec z + b_dec
    skip_transcoder  z = TopK(W_enc x + b_enc)              y_hat = W_dec z + W_skip x + b_dec

x and y have d entries, and z has one entry for each of the M latents. TopK sets all but the k
largest entries to 0, and a ReLU then does the same to negative ones. The autoencoder shows what the
MLP's output is made of. The transcoders imitate what the MLP computes. All three predict y, and
training minimises the fraction of the variance of y that is left unexplained:

    FVU = sum |y - y_hat|^2 / sum |y - mean(y)|^2

Paper: "Transcoders Beat Sparse Autoencoders for Interpretability", Paulo, Shabalin & Belrose,
arXiv 2501.18823 (section 2). Our training differs from it in three ways, which the README measures:
pre-activations start with mean zero (see `Coder.start`), each parameter has a learning rate that
fits its scale, and the biases of dead latents are raised (see `Trainer`).

`Coder` and `Trainer` are the method. The sections on activations, text and training feed them. The
sections after those may be skipped: a faster version of the encoder, then files, errors and flags.
"""

import argparse
import gzip
import json
import logging
import math
import os
import random
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from glob import glob
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import datasets.distributed
import huggingface_hub.constants
import torch
import torch.nn.functional as F
import transformers
from pyarrow.parquet import ParquetFile
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# ---- Coder: the three architectures ---------------------------------------------------------


class Arch(NamedTuple):
    """The choices that distinguish one architecture from another."""

    reads: str  # what the encoder reads: "x", the MLP's input, or "y", its output
    color: str  # in the pictures of eval.py
    marker: str  # in these pictures, too: "circle", "square", "triangle" or "diamond"
    unit_rows: bool = False  # whether W_dec starts as W_enc, and keeps rows of length 1
    skip: bool = False  # whether W_skip x is added to the prediction


ARCHS = {  # a fourth architecture is one more line
    "sae": Arch(reads="y", unit_rows=True, color="#d55e00", marker="circle"),
    "transcoder": Arch(reads="x", color="#0080c6", marker="square"),
    "skip_transcoder": Arch(reads="x", skip=True, color="#009e73", marker="triangle"),
}


class Coder(nn.Module):
    """A sparse coder with M latents, for activations of width d.

    Row j of W_enc [M, d] is the direction that latent j reads, and row j of W_dec [M, d] is the
    direction that it writes. (This is the transpose of the W_dec in the equations at the top of the
    file.) The activations of N tokens are the rows of a matrix [N, d].
    """

    # Saved in cfg.json. Change it when you change `encode`, so that other code can tell.
    activation = "topk"

    def __init__(self, arch: str, d: int, num_latents: int, k: int, seed: int = 0):
        super().__init__()
        spec = ARCHS[arch]
        self.arch, self.reads, self.unit_rows, self.k = arch, spec.reads, spec.unit_rows, k
        generator = torch.Generator().manual_seed(seed)
        W = F.normalize(torch.randn(num_latents, d, generator=generator))  # rows of length 1
        self.W_enc = nn.Parameter(W)
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        # A latent of the autoencoder should write what it reads, so W_dec starts as W_enc. What a
        # latent of a transcoder should write is not known in advance, so W_dec starts as zero.
        # W_enc gets a gradient after one step, when W_dec is no longer zero.
        self.W_dec = nn.Parameter(W.clone() if self.unit_rows else torch.zeros_like(W))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.W_skip = nn.Parameter(torch.zeros(d, d)) if spec.skip else None

    @torch.no_grad()
    def start(self, x, y):
        """Set the biases from a first batch x, y [N, d].

        b_dec is the mean of y, so a transcoder predicts this mean at first, and its FVU is 1. b_enc
        is such that pre-activations have mean zero. In the autoencoder their mean is zero already,
        since its encoder reads y - b_dec.
        """
        self.b_dec.copy_(y.mean(0))
        if self.reads == "x":
            self.b_enc.copy_(-self.W_enc @ x.mean(0))  # [M, d] @ [d] -> [M]

    def encode(self, x, y):
        """Return acts and indices, [N, k] each: the k active latents of each token of x, y [N, d].

        An act is the value of a latent. It is positive, or 0 where the ReLU applies.
        """
        read = x if self.reads == "x" else y - self.b_dec  # [N, d]
        # A faster F.linear(read, self.W_enc, self.b_enc).topk(self.k), with the same gradients:
        top, indices = TopKEncoder.apply(read, self.W_enc, self.b_enc, self.k)  # [N, k] each
        return top.relu(), indices

    def decode(self, acts, indices, x):
        """Return y_hat [N, d]: for each token the sum of its latents' W_dec rows times its acts."""
        y_hat = F.embedding_bag(indices, self.W_dec, per_sample_weights=acts, mode="sum")
        y_hat = y_hat + self.b_dec
        if self.W_skip is not None:
            y_hat = y_hat + F.linear(x, self.W_skip)  # [N, d] @ [d, d] -> [N, d]
        return y_hat

    def forward(self, x, y):
        """Return y_hat [N, d], and the acts and indices that it comes from, [N, k] each."""
        acts, indices = self.encode(x, y)
        return self.decode(acts, indices, x), acts, indices


# ---- Trainer: one step ----------------------------------------------------------------------

BETAS = (0.9, 0.98)  # of Adam; the usual 0.999 averages over 1,000 steps, half of a short run
DEAD = 0.02  # a latent is dead once it has been silent for this share of all training steps
WAKE = 0.03  # in each step a dead latent's bias rises by this many standard deviations (see s_z)

# torchrun starts several processes, and each trains on its own part of the text.
RANK = int(os.environ.get("RANK", "0"))  # the number of this process
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # how many processes there are


def fast_bfloat16(device):
    """Return whether matmuls in bfloat16 are fast: 2 to 9 times as fast as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def fast_matmuls(device):
    """Return a context in which matmuls run in bfloat16 if that is fast, all else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


class Trainer:
    """A coder, its optimizer, and how long each latent has been silent."""

    def __init__(self, coder: Coder, x, y, lr: float, dead_after: float):
        """Start the coder on a first batch x, y [N, d]; `dead_after` is a number of steps."""
        self.coder, self.lr, self.dead_after = coder, lr, dead_after
        coder.start(x, y)

        # Adam changes every number by about lr per step, however large its gradient is. So we
        # multiply lr by a scale: for a bias, the size of what it is added to; for a matrix, the
        # size of its output over the size of its input. The sizes are standard deviations of single
        # entries: s_x those of x, s_y those of y, and s_z those of pre-activations.
        s_x, s_y = (a.var(0, correction=0).mean().sqrt().item() for a in (x, y))
        # A row of W_enc has length 1 at first, so a pre-activation varies as much as one entry of
        # what it reads.
        self.s_z = s_z = s_x if coder.reads == "x" else s_y
        scale = {
            "W_enc": 1,  # maps what is read to pre-activations of the same size
            "b_enc": s_z,
            "W_dec": s_y / s_z,  # maps latents to y
            "b_dec": s_y,
            "W_skip": s_y / s_x,  # maps x to y
        }
        groups = [{"params": [p], "scale": scale[name]} for name, p in coder.named_parameters()]
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=BETAS, fused=True)

        M = len(coder.W_enc)
        self.silent = torch.zeros(M, device=x.device)  # steps since each latent was last active
        # The squared error and the variance of all batches since FVU was last logged.
        self.sums = torch.zeros(2, device=x.device)

    def step(self, x, y, lr_factor: float):
        """Make one Adam step on a batch x, y [N, d], with the learning rate lr * lr_factor."""
        coder = self.coder

        # 1. Predict y.
        with fast_matmuls(x.device):
            y_hat, acts, indices = coder(x, y)

        # 2. The loss is the FVU of this batch. (Under torchrun, of this process's part of it.)
        squared_error = (y - y_hat).square().sum()
        variance = (y - y.mean(0)).square().sum()
        loss = squared_error / variance
        self.optimizer.zero_grad()
        loss.backward()

        # 3. Note the errors, and the sum of each latent's acts: it is 0 if the latent was silent.
        #    Then add up errors, acts and gradients over all processes. (Gradients need not be
        #    averaged, as Adam ignores their scale.)
        sums = torch.stack([squared_error.detach(), variance])
        act_sums = torch.zeros_like(coder.b_enc)  # [M]
        act_sums.index_add_(0, indices.flatten(), acts.detach().flatten())
        if WORLD > 1:
            # (The condition is for forks that freeze a parameter.)
            gradients = [p.grad for p in coder.parameters() if p.requires_grad]
            for tensor in (sums, act_sums, *gradients):
                torch.distributed.all_reduce(tensor)
        self.sums += sums

        # 4. Update the parameters. The autoencoder's W_dec rows stay on the unit sphere: make
        #    their gradient tangent to it before the step, and their length 1 after it.
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor * group["scale"]
        if coder.unit_rows:
            radial = torch.linalg.vecdot(coder.W_dec.grad, coder.W_dec.detach())  # [M]
            coder.W_dec.grad -= radial[:, None] * coder.W_dec.detach()
        self.optimizer.step()
        if coder.unit_rows:
            coder.W_dec.data /= coder.W_dec.data.norm(dim=1, keepdim=True)

        # 5. Raise the biases of dead latents until they are active again. (The raises shrink as the
        #    learning rate falls.) Without this up to half of the latents die. A drawback: latents
        #    that are rightly rare fire too often. Bias adaptation, arXiv 2506.14002, is related.
        self.silent = torch.where(act_sums > 0, 0, self.silent + 1)
        coder.b_enc.data += WAKE * self.s_z * lr_factor * self.dead()

    def dead(self):
        """Return which latents are dead: bool [M]."""
        return self.silent >= self.dead_after

    def is_finite(self):
        """Return whether the errors since the last `pop_fvu` are finite."""
        return bool(self.sums.isfinite().all())

    def pop_fvu(self):
        """Return the FVU of all batches since the last call."""
        squared_error, variance = self.sums.tolist()
        self.sums.zero_()
        return squared_error / variance


# ---- Activations: x and y of one MLP --------------------------------------------------------

OUTLIER = 10  # a token is an outlier if |y| is more than this many times the median of |y|


def load_lm(name: str, device):
    """Load a causal LM from the hub or a folder, for inference."""
    with exit_on_error(f"--model {name}", MODEL_HINT):
        config = transformers.AutoConfig.from_pretrained(name)
        # GPT-2's gelu_new runs as eight kernels. This is the same function in one kernel.
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"
        dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
        lm = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
    return lm.eval().to(device)


def load_tokenizer(name: str):
    hint = "save the model's tokenizer beside it"
    with exit_on_error(f"--model {name}", hint):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if len(tokenizer) < 2:  # transformers may return an empty one if the folder has none
        sys.exit(f"error: --model {name}: there is no tokenizer ({hint})")
    return tokenizer


def find_mlp(lm, layer: int):
    """Return the hookpoint, the list of the LM's blocks, and the MLP of block `layer`.

    The hookpoint is the MLP's name under the base model, such as "h.6.mlp" in GPT-2.
    """
    # The blocks are the first list in the text decoder. (The LM may also have a vision tower.)
    blocks = next((m for m in lm.get_decoder().modules() if isinstance(m, nn.ModuleList)), [])
    if not 0 <= layer < len(blocks):
        sys.exit(f"error: --layer {layer}: the model has blocks 0 to {len(blocks) - 1}")
    mlp = getattr(blocks[layer], "mlp", None)
    parts = str(mlp).lower()  # lists the names and classes of its submodules
    if mlp is None or "expert" in parts or "router" in parts:
        sys.exit(f"error: --layer {layer}: {type(blocks[layer]).__name__} has no dense .mlp")
    hookpoint = next(name for name, m in lm.base_model.named_modules() if m is mlp)
    return hookpoint, blocks, mlp


class MLPActivations:
    """Call it with tokens [rows, ctx_len] to get x and y of the MLP, [N, d] each.

    Position 0 of each row is left out. LMs park attention there, and its huge activations say
    nothing about the text. Some LMs do the same on a few other tokens. Such outliers, with |y| over
    `max_norm`, are left out, too. If `max_norm` is not given, the first call sets it.
    """

    def __init__(self, lm, mlp, max_norm=None):
        self.lm, self.mlp, self.max_norm = lm, mlp, max_norm

    def hook(self, mlp, args, output):
        if len(args) != 1 or not isinstance(output, Tensor):  # BLOOM's MLP takes the residual, too
            sys.exit(f"error: --model: {type(mlp).__name__} does not map one tensor to another")
        if self.y is not None:  # as in an LM that loops over its blocks
            sys.exit(f"error: --model: {type(mlp).__name__} runs more than once for a token")
        # Make copies, since a block may add to these tensors in place afterwards. Falcon's does.
        self.x = args[0].to(torch.float32, copy=True)  # [rows, ctx_len, d]
        self.y = output.to(torch.float32, copy=True)

    @torch.no_grad()
    def __call__(self, tokens):
        self.x = self.y = None
        handle = self.mlp.register_forward_hook(self.hook)
        self.lm.base_model(tokens, use_cache=False)
        handle.remove()
        if self.y is None:  # as in a block for images
            sys.exit("error: --model: the MLP of this layer does not run on text")
        x, y = self.x[:, 1:].flatten(0, 1), self.y[:, 1:].flatten(0, 1)
        norm = y.norm(dim=1)
        if self.max_norm is None:
            self.max_norm = OUTLIER * norm.median().item()
        normal = norm <= self.max_norm
        return x[normal], y[normal]


# ---- Text: documents -> one side of the split -> packed rows -> shuffled -> batches ----------

LONGEST = 100_000  # characters; longer documents are tokenised in pieces
SHUFFLE_ROWS = 2048  # rows are drawn from a pool of this size; without shuffling FVU rose by 17%


def is_held_out(text):
    """Return whether a document is kept for eval.py, as one in ten is.

    It depends on a checksum of the text alone, so every reader and every order agree on it.
    """
    return zlib.crc32(text.encode()) % 10 == 0


def documents(sources, held_out):
    """Yield the texts of either the training or the held-out documents, long ones in pieces."""
    for text in read_texts(sources):
        if is_held_out(text) == held_out:
            yield from (text[i : i + LONGEST] for i in range(0, len(text), LONGEST))


def pack(texts, tokenizer, ctx_len):
    """Join texts by EOS and cut them into rows, int64 [ctx_len]; drop the unfinished last row.

    Each row begins with BOS, or with EOS if the tokenizer has no BOS, because LMs are trained to
    find it there. This costs no token of text, since coders leave out position 0 anyway.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    bos = eos if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = ctx_len - len(bos)  # tokens of text in a row
    texts, tokens = iter(texts), []
    while group := list(islice(texts, 50)):  # tokenizers are faster on several texts at once
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += ids + eos
        whole = len(tokens) // width * width
        for i in range(0, whole, width):
            yield torch.tensor(bos + tokens[i : i + width])
        tokens = tokens[whole:]


def pack_groups(groups, held_out, tokenizer, ctx_len):
    """Yield the packed rows of each group of sources, as `datasets` wants them."""
    for sources in groups:
        for row in pack(documents(sources, held_out), tokenizer, ctx_len):
            yield {"tokens": row}


def token_rows(sources, tokenizer, ctx_len, batch_size, held_out, seed):
    """Yield the rows that reader processes pack. With a seed, they never end."""
    endless = seed is not None
    if endless:
        sources = sources.copy()
        random.Random(seed).shuffle(sources)

    # Divide the sources into a group for each reader of each process. The number of groups is a
    # multiple of WORLD, unless there are too few sources. (A group is packed as one text, since a
    # file may be shorter than a row.) One core per process is left for training.
    readers = max(1, min(len(sources) // WORLD, os.cpu_count() // WORLD - 1))
    num_groups = min(readers * WORLD, len(sources))
    groups = [sources[i::num_groups] for i in range(num_groups)]
    # If an argument of the generator is a list, `datasets` gives each reader a part of it.
    kwargs = {"groups": groups, "held_out": held_out, "tokenizer": tokenizer, "ctx_len": ctx_len}
    stream = datasets.IterableDataset.from_generator(pack_groups, gen_kwargs=kwargs)
    if endless:
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
        # Each process gets its own groups. If their number is no multiple of WORLD, each process
        # reads all of them instead, and keeps one row in WORLD.
        stream = datasets.distributed.split_dataset_by_node(stream, RANK, WORLD)
    loader = torch.utils.data.DataLoader(
        stream,
        batch_size=batch_size,  # rows come from a reader in batches, since one by one is slow
        num_workers=readers,
        prefetch_factor=16,
        persistent_workers=endless,
        worker_init_fn=ignore_signals,
    )

    epochs = count() if endless else [0]
    for epoch in epochs:
        # Shuffle anew. (This reaches the readers, too, which go on running.)
        stream.set_epoch(epoch)
        num_rows = 0
        for batch in loader:
            num_rows += len(batch["tokens"])
            yield from batch["tokens"]
        if num_rows == 0:
            side = "held-out" if held_out else "training"
            raise DataError(f"too little text, its {side} documents have no {ctx_len} tokens")
        if endless and epoch == 0 and RANK == 0:
            size = num_rows * ctx_len * WORLD
            tqdm.write(f"--dataset is repeated: it has {size:,} tokens")


def token_batches(sources, tokenizer, ctx_len, batch_size, held_out=False, seed=None):
    """Yield batches of tokens [batch_size, ctx_len] from sources: files, or shards on the hub.

    For training, pass a seed: rows are then shuffled, text is repeated for ever in a new order
    each time, and each process under torchrun gets its own. Without a seed, the last batch may be
    shorter.
    """
    # The last batch of each reader may be short, so the rows of all readers are batched anew.
    rows = token_rows(sources, tokenizer, ctx_len, batch_size, held_out, seed)
    while batch := list(islice(rows, batch_size)):
        yield torch.stack(batch)


def ignore_signals(_reader):
    """Keep signals from a reader process, since the main process decides when to stop.

    It ignores Ctrl-C, and it leaves the process group, to which a SIGTERM may be sent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


# ---- Training -------------------------------------------------------------------------------

WARM_UP, DECAY = 0.05, 0.5  # shares of the run over which the learning rate rises and falls
LOG_EVERY, SAVE_EVERY = 5, 300  # seconds; we log seldom, as reading numbers off a GPU stalls it


def train(args):
    """Train a coder for each of `args.arch` and `args.k` on one stream of text, and save them."""
    # Load the LM, only up to the MLP: we need neither the later blocks nor the LM head.
    tokenizer = load_tokenizer(args.model)
    lm = load_lm(args.model, args.device)
    hookpoint, blocks, mlp = find_mlp(lm, args.layer)
    del blocks[args.layer + 1 :]
    activations = MLPActivations(lm, mlp)

    # Start reading text.
    if RANK == 0 and Path(args.dataset).exists():
        tell_what_is_read(Path(args.dataset), tokenizer, args.ctx_len)
    sources = find_sources(args.dataset, args.subset)
    rows = args.batch_size // WORLD  # in a batch of this process
    batches = token_batches(sources, tokenizer, args.ctx_len, rows, seed=args.seed)

    # Build the coders. The first batch sets where they start; they are not trained on it.
    step_tokens = args.batch_size * (args.ctx_len - 1)
    steps = math.ceil(args.tokens / step_tokens)
    tokens = next(batches).to(args.device)
    if WORLD > 1:
        torch.distributed.broadcast(tokens, 0)  # so that all processes start from the same batch
    x, y = activations(tokens)  # [N, d] each
    d, M = y.shape[1], args.expansion * y.shape[1]
    check_sizes(args, d, M)
    coders, trainers = {}, {}
    for name, (arch, k) in coder_names(args.arch, args.k).items():
        coders[name] = Coder(arch, d, M, k, args.seed).to(args.device)
        trainers[name] = Trainer(coders[name], x, y, args.lr, DEAD * steps)

    # Collect what goes into config.json.
    config = vars(args) | {"hookpoint": hookpoint, "d": d, "num_latents": M}
    config["max_norm"] = activations.max_norm
    config["coders"] = {name: f"{name}/{hookpoint}" for name in coders}  # the folder of each
    config["versions"] = {lib.__name__: lib.__version__ for lib in (torch, transformers, datasets)}
    config["tokens_trained"] = 0
    for key in ("model", "dataset"):
        if Path(config[key]).exists():  # eval.py may be called from another folder
            config[key] = Path(config[key]).resolve()

    # Say what is about to happen, and check that the run directory can be written.
    if RANK == 0:
        ks = " ".join(map(str, args.k))
        print(f"{', '.join(args.arch)} with k {ks}, M {M:,} at {hookpoint} of {args.model}")
        print(
            f"{steps:,} steps of {step_tokens:,} tokens, lr {args.lr:.2g}, {args.device} x {WORLD}"
        )
        with exit_on_error(f"--out {args.out}", "pass another folder"):
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "log.jsonl").open("a").close()

    # The training loop.
    asked_to_stop = stop_on_signals()
    stopped, log, logged_at, saved_at = False, [], time.monotonic(), time.monotonic()
    bar = tqdm(total=steps * step_tokens, unit="tok", unit_scale=True, disable=RANK > 0)
    try:
        for step, tokens in zip(range(1, steps + 1), batches):
            stopped = asked_to_stop()
            if stopped:
                break

            # Train each coder on the same activations.
            x, y = activations(tokens.to(args.device))
            progress = (step - 0.5) / steps
            for trainer in trainers.values():
                trainer.step(x, y, min(1, progress / WARM_UP, (1 - progress) / DECAY))
            config["tokens_trained"] += step_tokens
            bar.update(step_tokens)

            # Every few seconds, log the FVU since the last time.
            now = time.monotonic()
            if RANK > 0 or (now < logged_at + LOG_EVERY and step < steps):
                continue
            if not all(trainer.is_finite() for trainer in trainers.values()):
                # (When this process exits, torchrun ends the others.)
                sys.exit(f"error: --lr {args.lr:g}: the loss is not finite any more, lower it")
            fvu = {name: trainer.pop_fvu() for name, trainer in trainers.items()}
            dead = {name: t.dead().float().mean().item() for name, t in trainers.items()}
            done, logged = config["tokens_trained"], log[-1]["tokens"] if log else 0
            speed = round((done - logged) / (now - logged_at))
            log.append({"tokens": done, "tokens_per_s": speed, "fvu": fvu, "dead": dead})
            # The file is written anew each time, so that it never ends in half a line.
            lines = "".join(json.dumps(entry) + "\n" for entry in log)
            write(args.out / "log.jsonl", lines, f"--out {args.out}")
            bar.set_postfix_str(f"FVU {min(fvu.values()):.3f} to {max(fvu.values()):.3f}")
            logged_at = now
            if now > saved_at + SAVE_EVERY:
                save_run(config, coders)
                saved_at = now
    finally:
        # Save what was trained, whatever ended the loop, unless it is not finite.
        bar.close()
        # Switch off DataLoader's SIGCHLD handler, which raises if a reader was killed.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        finite = all(trainer.is_finite() for trainer in trainers.values())
        if RANK == 0 and config["tokens_trained"] > 0 and finite:
            save_run(config, coders)
            print(f"saved after {config['tokens_trained']:,} tokens")
            last = log[-1] if log else {"fvu": {}}
            for name, fvu in last["fvu"].items():
                print(f"  {name}: FVU {fvu:.3f}, dead {last['dead'][name]:.1%}")
            print(f"next: python eval.py {args.out} --html page.html")
    if stopped:
        if WORLD > 1:
            # Exit code 130 counts as a failure, and torchrun ends all processes as soon as one
            # fails. So all wait here for process 0, which comes only after it has saved.
            torch.distributed.all_reduce(torch.zeros(1))
        sys.exit(130)


def coder_names(archs, ks):
    """Return the architecture and k of each coder of a run, by its name."""
    if len(ks) == 1:
        return {arch: (arch, ks[0]) for arch in archs}
    return {f"{arch}-k{k}": (arch, k) for arch in archs for k in sorted(ks)}


def check_sizes(args, d, M):
    """Exit if k is larger than M, or if the coders do not fit in memory."""
    if max(args.k) > M:
        latents = f"{M} latents (--expansion {args.expansion} x {d})"
        sys.exit(f"error: --k {max(args.k)}: there are {latents}")
    # Each coder has W_enc and W_dec [M, d] in float32, 4 bytes. Both have a gradient, and Adam has
    # two averages of it.
    size = len(args.arch) * len(args.k) * 2 * M * d * 4 * (1 + 1 + 2)
    try:
        torch.empty(size, dtype=torch.int8, device=args.device)
    except RuntimeError:  # torch has no error class of its own for this
        sys.exit(f"error: --expansion {args.expansion}: {size:,} bytes are needed (lower it)")


def stop_on_signals():
    """Catch Ctrl-C and SIGTERM, and return a function that says whether to stop.

    The first signal is to end the run after the current step. A second one of its kind raises
    KeyboardInterrupt, which ends it at once.
    """
    received = []

    def handler(number, frame):
        received.append(number)
        if RANK == 0:
            tqdm.write("stopping after this step; once more to stop at once")
        signal.signal(number, signal.default_int_handler)

    def asked_to_stop():
        # If one process was asked, all have to stop after the same step: a process that went on
        # would wait for the others for ever. They talk by Gloo here, as this tensor is on the CPU.
        signals = torch.tensor(len(received))
        if WORLD > 1:
            torch.distributed.all_reduce(signals)
        return bool(signals)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return asked_to_stop


# ---- The same, faster -----------------------------------------------------------------------
# You can skip this section: it equals two plain lines of PyTorch. On a CPU it shortens the step of
# three coders by 39% (d 768, M 24,576, k 32), or by 26% (d 384, M 6,144).


class TopKEncoder(torch.autograd.Function):
    """Return the k largest pre-activations of each token and their latents, [N, k] each.

        pre = F.linear(read, W_enc, b_enc)  # [N, d] @ [d, M] -> [N, M]
        return pre.topk(k)

    These two lines give the same, but their backward pass multiplies [N, M] matrices that are
    nearly all zero. Ours computes with the k latents of each token only, k / M of the work.
    """

    @staticmethod
    def forward(ctx, read, W_enc, b_enc, k):
        top, indices = topk(F.linear(read, W_enc, b_enc), k)  # [N, k] each
        ctx.save_for_backward(read, W_enc, indices)
        ctx.mark_non_differentiable(indices)
        return top.to(W_enc.dtype), indices  # the matmul may have run in bfloat16

    @staticmethod
    def backward(ctx, grad, _):
        """grad [N, k] is the gradient of the k largest pre-activations."""
        read, W_enc, indices = ctx.saved_tensors
        k = indices.shape[1]

        # The gradient of row j of W_enc is a weighted sum of rows of `read`: those of the tokens
        # that use latent j. So we sort the N * k pairs (token, latent) by latent; those of latent j
        # then start at first[j]. An embedding_bag sums rows of a table. Here the table is `read`,
        # and bag j is token[first[j] : first[j + 1]]. (The sum of an empty bag is zero.)
        latent, order = indices.flatten().sort()
        first = torch.searchsorted(latent, torch.arange(len(W_enc), device=latent.device))  # [M]
        token = order // k  # pair i belongs to token i // k
        weight = grad.flatten()[order]
        grad_W = F.embedding_bag(token, read, offsets=first, per_sample_weights=weight, mode="sum")
        grad_b = grad.new_zeros(len(W_enc)).index_add_(0, latent, weight)  # [M]

        # The autoencoder reads y - b_dec, so there `read` needs a gradient, too.
        grad_read = None
        if ctx.needs_input_grad[0]:
            grad_read = F.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum")
        return grad_read, grad_W, grad_b, None


def topk(pre, k):
    """Return pre.topk(k) for pre [N, M], unsorted, in 50 to 80% of its time.

    Divide a row into M / 8 groups of 8 entries, which stand M / 8 apart. Take the k groups with the
    largest maxima. No entry of another group is larger than any of these k maxima. So the k groups
    hold the k largest entries, and only these groups are searched.
    """
    N, M = pre.shape
    if M % 8 or M < 8 * k:
        return pre.topk(k, sorted=False)
    # [N, 8 members, M / 8 groups]: member m of group g is entry m * (M / 8) + g of its row.
    groups = pre.view(N, 8, M // 8)
    best = groups.amax(1).topk(k, sorted=False).indices  # [N, k] groups
    candidates = groups.gather(2, best[:, None].expand(N, 8, k))  # [N, 8, k] entries
    values, place = candidates.flatten(1).topk(k, sorted=False)
    # A place in the flattened [8, k] candidates is member place // k of group best[place % k].
    member, group = place // k, best.gather(1, place % k)
    return values, member * (M // 8) + group


# ---- Files of text --------------------------------------------------------------------------

# If a folder holds files of several formats, only those of the first of these are read.
FORMATS = (".parquet", ".jsonl", ".txt", ".json")
OTHER_FORMATS = {  # what to do with files that we do not read
    ".arrow": "this is a folder of save_to_disk: write the data set with to_parquet instead",
    ".csv": "convert it to .jsonl or .parquet, with a column text",
    ".zst": "unpack it first, with zstd -d",
}
LINES = 100  # a .txt file may hold a whole library, so this many lines make a document


def file_format(path):
    return Path(path.name.lower().removesuffix(".gz")).suffix


def find_files(path):
    """Return the files to read at a local path, all of one format, and the files left out."""
    files = [path]
    if path.is_dir():
        names = sorted(glob("**", root_dir=path, recursive=True))  # without hidden ones
        files = [path / name for name in names if (path / name).is_file()]
    formats = {file_format(file) for file in files}
    chosen = next((ending for ending in FORMATS if ending in formats), None)
    # A folder of save_to_disk holds .json files, too, but without text.
    if chosen is None or (chosen == ".json" and ".arrow" in formats):
        hints = [hint for ending, hint in OTHER_FORMATS.items() if ending in formats]
        sys.exit(f"error: --dataset {path}: no text to read ({(hints or [DATA_HINT])[0]})")
    read = [file for file in files if file_format(file) == chosen]
    return read, [file for file in files if file_format(file) != chosen]


def find_sources(dataset, subset):
    """Return the parts of a data set: local files, or the shards of a data set on the hub."""
    if Path(dataset).exists():
        return find_files(Path(dataset))[0]
    with exit_on_error(f"--dataset {dataset}", DATA_HINT):
        stream = datasets.load_dataset(dataset, subset, split="train", streaming=True)
        stream = stream.select_columns(["text"])
        return [stream.shard(stream.num_shards, i) for i in range(stream.num_shards)]


def read_records(source):
    """Yield {"text": ...} or a bare string for each document. Other columns do not matter."""
    if isinstance(source, datasets.IterableDataset):
        yield from source
    elif file_format(source) == ".parquet":
        for batch in ParquetFile(source).iter_batches(batch_size=1000, columns=["text"]):
            yield from batch.to_pylist()
    else:
        opener = gzip.open if source.suffix.lower() == ".gz" else open
        with opener(source, "rt", encoding="utf-8-sig") as lines:  # -sig drops a BOM, if any
            if file_format(source) == ".txt":
                while document := "".join(islice(lines, LINES)):
                    yield {"text": document}
            elif lines.read(100).lstrip().startswith("["):  # the whole file is one JSON list
                lines.seek(0)
                yield from json.load(lines)
            else:  # each line is a JSON object
                lines.seek(0)
                yield from map(json.loads, filter(str.strip, lines))


def read_texts(sources):
    """Yield the text of each document. Raises DataError if a source cannot be read."""
    for source in sources:
        try:
            for number, record in enumerate(read_records(source)):
                text = record
                if isinstance(record, dict):
                    # Later records may lack a text. If the first does, the column is missing.
                    if number == 0 and "text" not in record:
                        raise ValueError("there is no column 'text'")
                    text = record.get("text")
                if isinstance(text, str):
                    # JSON may hold half a surrogate pair, which tokenizers refuse: write "?".
                    yield text.encode("utf-8", "replace").decode()
                elif text is not None:
                    raise ValueError(f"a text is of type {type(text).__name__}, not a string")
        except LIBRARY_ERRORS as error:
            name = source.name if isinstance(source, Path) else "the hub"
            raise DataError(f"{name}: {error}") from None


def tell_what_is_read(path, tokenizer, ctx_len):
    """Say which files of a folder are read, and whether eval.py will find text in them."""
    files, others = find_files(path)
    if path.is_dir():
        names = ", ".join(file.name for file in others[:5]) or "none"
        print(f"--dataset {path}: {len(files)} {file_format(files[0])} files; not read: {names}")
    if next(pack(documents(files, held_out=True), tokenizer, ctx_len), None) is None:
        print(
            f"--dataset {path}: too few documents to keep one in ten for eval.py. Cut the text into"
            " more documents (each line of a .jsonl is one), or pass eval.py another --dataset."
        )


# ---- Files of a run -------------------------------------------------------------------------

FILE_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}  # as in EleutherAI's sparsify


def save_run(config, coders):
    """Write config.json, and a folder for each coder in the format of EleutherAI's sparsify."""
    out, flag = config["out"], f"--out {config['out']}"
    for name, coder in coders.items():
        spec = ARCHS[coder.arch]
        cfg = {
            "activation": coder.activation,
            "expansion_factor": config["expansion"],
            "normalize_decoder": spec.unit_rows,
            "num_latents": config["num_latents"],
            "k": coder.k,
            "multi_topk": False,
            "skip_connection": spec.skip,
            "transcode": spec.reads == "x",
            "d_in": config["d"],
            "arch": coder.arch,  # sparsify ignores this one
        }
        tensors = {FILE_NAMES.get(n, n): p.cpu() for n, p in coder.state_dict().items()}
        folder = out / config["coders"][name]
        write(folder / "sae.safetensors", tensors, flag)
        write(folder / "cfg.json", json.dumps(cfg, indent=2) + "\n", flag)
    # Written last, because a folder with a config.json counts as a run.
    write(out / "config.json", json.dumps(config, indent=2, default=str) + "\n", flag)


def load_run(run, device="cpu"):
    """Return the config of a run directory and its coders by name. Exits if it is not a run.

    The key "coders" of config.json maps names to folders. A folder may come from sparsify.
    """
    run = Path(run)
    with exit_on_error(f"RUN {run}", "pass a folder that skipcoder.py wrote"):
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        for key in ("model", "layer", "dataset", "subset", "ctx_len"):  # what eval.py needs
            if key not in config:
                raise ValueError(f"config.json has no {key}")
        if "coders" not in config:  # written by an earlier version of this script
            ks = config["k"] if isinstance(config["k"], list) else [config["k"]]
            names = coder_names(config["arch"], ks)
            config["coders"] = {name: f"{name}/{config['hookpoint']}" for name in names}
        parts = {name: read_coder(run / folder) for name, folder in config["coders"].items()}
    coders = {}
    for name, (arch, d, M, k, tensors) in parts.items():
        coders[name] = Coder(arch, d, M, k).to(device).requires_grad_(False)
        coders[name].load_state_dict(tensors)
    return config, coders


def read_coder(folder):
    """Return architecture, d, M, k and tensors from a folder of ours or of sparsify."""
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "sae.safetensors")
    if cfg["activation"] != Coder.activation:
        raise ValueError(f"{folder}: activation {cfg['activation']}, not {Coder.activation}")
    if "arch" in cfg:
        arch = cfg["arch"]
    elif cfg["skip_connection"]:
        arch = "skip_transcoder"
    else:
        arch = "transcoder" if cfg["transcode"] else "sae"
    M, d = tensors["W_dec"].shape
    for ours, in_file in FILE_NAMES.items():
        tensors[ours] = tensors.pop(in_file)
    return arch, d, M, cfg["k"], tensors


def write(path, content, flag):
    """Write text or tensors under a temporary name, then rename it.

    If this is interrupted, the old file stays as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    with exit_on_error(flag, "make room there, or pass another path"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(content, str):
                temporary.write_text(content, encoding="utf-8")
            else:
                save_file(content, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


# ---- Errors: one line about what a user can get wrong ---------------------------------------

MODEL_HINT = "pass a name on the hub, or a local folder, as written by tests/tiny_gpt2.py"
DATA_HINT = "pass a name on the hub, or a file or folder of .parquet, .jsonl, .json or .txt"
LIBRARY_ERRORS = (OSError, ValueError, KeyError, EOFError, ImportError, zlib.error, SafetensorError)


class DataError(Exception):
    """Text cannot be read."""

    def __str__(self):
        # If a reader process raises it, DataLoader raises it again here. Its message is then the
        # whole traceback, which ends in "skipcoder.DataError: " and the message proper.
        return super().__str__().strip().split("DataError: ")[-1]


@contextmanager
def exit_on_error(flag, hint, errors=LIBRARY_ERRORS):
    """Turn what a library raises for bad input into one line on stderr, and end the program.

    Use it around calls of libraries, or for DataError: an error in our own code must stay a
    traceback.
    """
    try:
        yield
    except errors as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"error: {flag}: {line.rstrip('.')} ({hint})")


# ---- Flags ----------------------------------------------------------------------------------


def at_least(least, kind=int):
    """Return a type for argparse: a finite number that is not below `least`."""

    def number(text):
        if not least <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is below {least}, or not finite")
        return kind(text)

    return number


def pick_device(name):
    """Return the device of this name. "auto" is the accelerator, or the CPU if there is none."""
    if name == "auto":
        available = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if available else "cpu"
    if name in ("cuda", "xpu"):  # under torchrun each process has one of its own
        name += f":{os.environ.get('LOCAL_RANK', '0')}"
    errors = RuntimeError, AssertionError  # torch has no error class of its own for this
    with exit_on_error(f"--device {name}", "use cpu, cuda, mps, xpu or auto", errors):
        return torch.zeros(1, device=name).device


def check_hub(dataset):
    """Exit if the hub cannot be reached. (`datasets` would try for half a minute.)"""
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # the data set may be in the cache
        return
    hub = huggingface_hub.constants.ENDPOINT
    hint = "without it: run tests/tiny_gpt2.py, and pass --model runs/tiny-gpt2"
    hint += " --dataset runs/tiny-gpt2/text.jsonl"
    # Versions of huggingface_hub differ in the HTTP library that they use, and so in its errors.
    with exit_on_error(f"--dataset {dataset}: no {hub}", hint, errors=Exception):
        huggingface_hub.get_session().head(hub, timeout=5)


def parse(parser):
    """Parse the flags of either script, and do what both begin with."""
    parser.error = lambda message: sys.exit(f"error: {message}")  # one line, without the usage
    args = parser.parse_args()
    args.device = pick_device(args.device)
    logging.disable(logging.ERROR)  # we say ourselves what matters of the libraries' messages
    transformers.logging.disable_progress_bar()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console without "→" prints "?"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program without a traceback
    return args


def main():
    parser = argparse.ArgumentParser(prog="skipcoder.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--layer", type=int, required=True, help="the block whose MLP is coded, counted from 0")
    flag("--model", default="gpt2", help="name on the hub, or local folder (default %(default)s)")
    flag("--dataset", default="HuggingFaceFW/fineweb", help="name on the hub, local file or folder")
    flag("--subset", help="configuration of a hub data set (default sample-10BT, for FineWeb)")
    flag("--arch", nargs="+", choices=ARCHS, default=list(ARCHS), help="default: all three")
    flag("--expansion", type=at_least(1), default=32, help="latents M = expansion * d (default 32)")
    flag(
        "--k", type=at_least(1), nargs="+", default=[32], help="active latents; a coder for each k"
    )
    flag("--tokens", type=at_least(1, float), default=5e7, help="default 50 million")
    # (At least 3, as eval.py needs BOS, a token, and a next one that is predicted.)
    flag("--ctx-len", type=at_least(3), help="tokens in a row (default 256, or the LM's limit)")
    flag("--batch-size", type=at_least(1), help="rows per step (default: see README, Recipe)")
    flag("--lr", type=at_least(1e-9, float), help="of Adam (default: see README, Recipe)")
    flag(
        "--seed", type=at_least(0), default=0, help="for initial weights and shuffling (default 0)"
    )
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator)")
    flag("--out", type=Path, help="run directory (default runs/<model>-layer<L>)")
    flag("--overwrite", action="store_true", help="replace the run in --out")
    args = parse(parser)
    args.tokens = math.ceil(args.tokens)
    if len(set(args.k)) < len(args.k):
        sys.exit(f"error: --k {' '.join(map(str, args.k))}: give each number once")
    if not Path(args.dataset).exists():
        check_hub(args.dataset)
    if WORLD > 1:
        torch.distributed.init_process_group()  # Gloo for tensors on the CPU, NCCL on CUDA
    with exit_on_error(f"--model {args.model}", MODEL_HINT):
        lm_config = transformers.AutoConfig.from_pretrained(args.model).get_text_config()
    limit = getattr(lm_config, "max_position_embeddings", math.inf)
    args.ctx_len = args.ctx_len or min(256, limit)
    if args.ctx_len > limit:
        sys.exit(f"error: --ctx-len {args.ctx_len}: this model takes at most {limit} tokens")
    # The recipe for T tokens in all: the learning rate is proportional to T^(-1/4), the number of
    # tokens per step to T^(1/2). At 2M tokens they are 1.5e-3 and 1,024.
    args.lr = args.lr or 1.5e-3 * (2e6 / args.tokens) ** 0.25
    rows = args.batch_size or 1024 * (args.tokens / 2e6) ** 0.5 / args.ctx_len
    args.batch_size = max(1, round(rows / WORLD)) * WORLD  # the same number for each process
    if args.dataset == "HuggingFaceFW/fineweb":
        args.subset = args.subset or "sample-10BT"
    args.out = args.out or Path(f"runs/{Path(args.model).resolve().name}-layer{args.layer}")
    if (args.out / "config.json").exists() and not args.overwrite:
        sys.exit(f"error: --out {args.out} holds a run: pass --overwrite, or another --out")
    try:
        with exit_on_error(f"--dataset {args.dataset}", DATA_HINT, errors=DataError):
            train(args)
    except KeyboardInterrupt:  # the second Ctrl-C
        sys.exit(130)


if __name__ == "__main__":
    main()
