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
largest entries to 0, and a ReLU then sets negative ones to 0, too. The autoencoder shows what the
MLP's output is made of. The transcoders imitate what the MLP computes. All three predict y, and
training minimises the fraction of the variance of y that is left unexplained:

    FVU = sum |y - y_hat|^2 / sum |y - mean(y)|^2

Paper: "Transcoders Beat Sparse Autoencoders for Interpretability", Paulo, Shabalin & Belrose,
arXiv 2501.18823 (section 2). Where our training differs from theirs, README says why (Recipe).

`Coder` and `Trainer` are the method. The sections on activations, text and training feed them. What
comes after those may be skipped: a faster version of the encoder, signals, files and flags.
"""

import argparse
import ctypes
import io
import json
import math
import os
import platform
import random
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from glob import glob
from itertools import count, islice, product
from pathlib import Path
from typing import NamedTuple

import datasets.distributed
import fsspec
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
    unit_rows: bool = False  # whether W_dec starts as W_enc, and its rows stay at length 1
    skip: bool = False  # whether W_skip x is added to the prediction


ARCHS = {  # a fourth architecture is one more line
    "sae": Arch(reads="y", unit_rows=True),
    "transcoder": Arch(reads="x"),
    "skip_transcoder": Arch(reads="x", skip=True),
}


class Coder(nn.Module):
    """A sparse coder with M latents, for activations of width d.

    Row j of W_enc [M, d] is the direction that latent j reads, and row j of W_dec [M, d] is the
    direction that it writes. (This is the transpose of the W_dec in the equations at the top of the
    file.) The activations of N tokens are the rows of a matrix [N, d].
    """

    # Saved in cfg.json. Change it when you change `encode`: `load_run` refuses any other value, so
    # that latents of one kind are never read as another.
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
        # (Then W_enc has no gradient in the first step. From the second on, W_dec is not zero.)
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

        An act is the value of a latent: its pre-activation, or 0 if that is negative.
        """
        read = x if self.reads == "x" else y - self.b_dec  # [N, d]
        # F.linear(read, self.W_enc, self.b_enc).topk(self.k), with a faster backward pass (which is
        # in the section "The same, faster"):
        top, indices = TopKEncoder.apply(read, self.W_enc, self.b_enc, self.k)  # [N, k] each
        return top.relu(), indices

    def decode(self, acts, indices, x):
        """Return y_hat [N, d]: for each token the sum of its latents' W_dec rows times its acts."""
        # The sum over i of acts[:, i, None] * W_dec[indices[:, i]], for i from 0 to k - 1:
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
    """A coder and its optimizer."""

    def __init__(self, coder: Coder, x, y, lr: float):
        """Start the coder on a first batch x, y [N, d]."""
        self.coder, self.lr = coder, lr
        coder.start(x, y)
        self.variance = (y - y.mean(0)).square().sum()  # the denominator of the loss, see `step`

        # Adam changes every number by about lr per step, however large its gradient is. So we
        # multiply lr by a scale: for a bias, the size of what it is added to; for a matrix, the
        # size of its output over the size of its input. Sizes are standard deviations of single
        # entries: s_x of x, s_y of y, s_z of pre-activations. (A rule of thumb, measured, not
        # derived: it ignores how many entries a matrix adds up.)
        s_x, s_y = (a.var(0, correction=0).mean().sqrt().item() for a in (x, y))
        if not math.isfinite(s_x + s_y):
            sys.exit("error: --model: the MLP's input or output is not finite")
        # A row of W_enc is a random direction of length 1 at first. So the variance of a
        # pre-activation is, on average, that of one entry of what it reads.
        s_z = s_x if coder.reads == "x" else s_y
        scale = {
            "W_enc": 1,  # maps what is read to pre-activations of the same size
            "b_enc": s_z,
            "W_dec": s_y / s_z,  # maps latents to y
            "b_dec": s_y,
            "W_skip": s_y / s_x,  # maps x to y
        }
        groups = [{"params": [p], "scale": scale[name]} for name, p in coder.named_parameters()]
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=BETAS, fused=True)

        # The squared error and the variance of all batches since FVU was last logged.
        self.sums = torch.zeros(2, device=x.device)

    def step(self, x, y, lr_factor: float):
        """Make one Adam step on a batch x, y [N, d], with the learning rate lr * lr_factor."""
        coder = self.coder

        # 1. Predict y.
        with fast_matmuls(x.device):
            y_hat, _, _ = coder(x, y)

        # 2. The loss is the FVU, with a fixed denominator: the variance of the first batch, which
        #    is the same batch in all processes. So an error counts the same in every step.
        squared_error = (y - y_hat).square().sum()
        loss = squared_error / self.variance
        self.optimizer.zero_grad()
        loss.backward()
        self.sums += torch.stack([squared_error.detach(), (y - y.mean(0)).square().sum()])

        # 3. Under torchrun, add up the gradients of all processes. (Adam makes the same step for
        #    their sum as for their mean.)
        if WORLD > 1:
            for parameter in coder.parameters():
                if parameter.requires_grad:  # (you may have frozen one)
                    torch.distributed.all_reduce(parameter.grad)

        # 4. Update the parameters. The autoencoder's W_dec rows keep length 1, as is usual, so an
        #    act is the length of what its latent writes. The part of a gradient along its row only
        #    changes the row's length, which `normalize` undoes. Remove that part, or else Adam's
        #    averages would hold it.
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor * group["scale"]
        if coder.unit_rows:
            radial = torch.linalg.vecdot(coder.W_dec.grad, coder.W_dec.detach())  # [M]
            coder.W_dec.grad -= radial[:, None] * coder.W_dec.detach()
        self.optimizer.step()
        self.normalize()

    def normalize(self):
        """Give the rows of an autoencoder's W_dec length 1."""
        if self.coder.unit_rows:
            self.coder.W_dec.data /= self.coder.W_dec.data.norm(dim=1, keepdim=True)

    def pop_fvu(self):
        """Return the FVU of all batches since the last call, in all processes.

        Exits if it is not finite.
        """
        if WORLD > 1:
            torch.distributed.all_reduce(self.sums)
        squared_error, variance = self.sums.tolist()
        self.sums.zero_()
        if not math.isfinite(variance):
            sys.exit("error: --model: the MLP's output is not finite")
        if not math.isfinite(squared_error):
            sys.exit(f"error: --lr {self.lr:g}: the loss is not finite any more, lower it")
        return squared_error / variance


# ---- Errors of users ------------------------------------------------------------------------

# (eval.py uses these two, too. There the model comes from config.json.)
MODEL_HINT = "pass a name on the hub, or a local folder; for a run, edit its config.json"
DATA_HINT = (
    "pass a name on the hub, or a file or folder of .parquet, .jsonl or .txt, compressed or not."
    " Without the hub, run python tests/demo.py"
)
LIBRARY_ERRORS = (OSError, ValueError, KeyError, EOFError, ImportError, SafetensorError)


class DataError(Exception):
    """Text cannot be read."""


@contextmanager
def exit_on_error(flag, hint, errors=LIBRARY_ERRORS):
    """Turn what a library raises for bad input into one line on stderr, and end the program.

    Use it around calls of libraries only, or with errors=DataError. An error in our own code must
    stay a traceback.
    """
    try:
        yield
    except errors as error:
        # An error in a process that reads text comes with its traceback before the message: keep
        # what follows the last "DataError: ".
        message = str(error).split("DataError: ")[-1] or type(error).__name__
        sys.exit(f"error: {flag}: {' '.join(message.split())} ({hint})")


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
    if mlp is None or "expert" in parts or "router" in parts:  # no MLP, or several to choose from
        sys.exit(f"error: --layer {layer}: {type(blocks[layer]).__name__} has no dense .mlp")
    hookpoint = next(name for name, m in lm.base_model.named_modules() if m is mlp)
    return hookpoint, blocks, mlp


class MLPActivations:
    """Call it with tokens [rows, ctx_len] to get x and y of the MLP, [N, d] each.

    Position 0 of each row is left out: LMs park attention there (an attention sink), and its huge
    activations say nothing about the text. Some LMs do the same on a few other tokens. Such
    outliers, with |y| over `max_norm`, are left out, too. If `max_norm` is not given, the first
    call sets it.
    """

    def __init__(self, lm, mlp, max_norm=None):
        self.lm, self.mlp, self.max_norm = lm, mlp, max_norm

    def hook(self, mlp, args, output):
        if len(args) != 1 or not isinstance(output, Tensor):  # BLOOM's MLP takes the residual, too
            sys.exit(f"error: --model: {type(mlp).__name__} does not map one tensor to another")
        if self.y is not None:  # as in an LM that loops over its blocks
            sys.exit(f"error: --model: {type(mlp).__name__} runs more than once in a forward pass")
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
        # Keep what is not finite: Trainer shall see it and stop.
        outlier = norm.isfinite() & (norm > self.max_norm)
        # Indices and no mask: with a mask, the CPU would wait for the GPU once for x, once for y.
        kept = (~outlier).nonzero().flatten()
        return x[kept], y[kept]


# ---- Text: documents -> one side of the split -> packed rows -> shuffled -> batches ----------

LINES = 100  # a .txt file may hold many books, so this many lines make a document
LONGEST = 100_000  # characters; longer documents become several, on the same side of the split
SHUFFLE_ROWS = 2048  # rows are drawn from a pool of this size; without shuffling FVU rose by 17%
READERS = 2  # reader processes for each training process; a reader packs 0.5M tokens per second


def read_parquet(file):
    for batch in ParquetFile(file).iter_batches(columns=["text"]):
        yield from batch["text"].to_pylist()


def read_jsonl(file):
    for number, line in enumerate(io.TextIOWrapper(file, "utf-8-sig"), 1):
        try:
            if line.strip():
                record = json.loads(line)
                # If the first line has no text, the file is of another kind: raise. Others may
                # have none.
                yield record["text"] if number == 1 else record.get("text")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"line {number} is not an object with a text: {line[:60]!r}") from None


def read_txt(file):
    lines = io.TextIOWrapper(file, "utf-8-sig")
    while document := "".join(islice(lines, LINES)):
        yield document


FORMATS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}


def file_format(path):
    """Return ".jsonl" for words.jsonl and for words.jsonl.gz."""
    endings = fsspec.utils.compressions.keys() - {"zip"}  # (of a .zip fsspec reads one file only)
    compressed = path.suffix[1:].lower() in endings
    return Path(path.stem if compressed else path.name).suffix.lower()


def find_sources(dataset, subset):
    """Return the parts of a data set: local files, or the shards of a data set on the hub."""
    path = Path(dataset)
    if not path.exists():
        with exit_on_error(f"--dataset {dataset}", DATA_HINT):
            stream = datasets.load_dataset(dataset, subset, split="train", streaming=True)
            stream = stream.select_columns(["text"])
            return [stream.shard(stream.num_shards, i) for i in range(stream.num_shards)]
    # All files of a folder but hidden ones. (Where `path` is a file, path / "" is that file.)
    names = sorted(glob("**", root_dir=path, recursive=True)) if path.is_dir() else [""]
    files = [path / name for name in names if (path / name).is_file()]
    read = [file for file in files if file_format(file) in FORMATS]
    if not read:
        sys.exit(f"error: --dataset {path}: no text to read ({DATA_HINT})")
    if RANK == 0:
        print(f"--dataset {path}: files read {len(read)}, left out {len(files) - len(read)}")
    return read


def read_source(source):
    """Yield the text of each document of a file or a shard, or None if it has none."""
    if isinstance(source, datasets.IterableDataset):
        # (Not `for record in source`: in a reader process, `datasets` would divide the shard among
        # the readers, who have divided the shards already.)
        for batch in source.iter(100):
            yield from batch["text"]
    else:
        with fsspec.filesystem("file").open(source, compression="infer") as file:
            yield from FORMATS[file_format(source)](file)


def is_held_out(text):
    """Return whether a document is among the tenth that is kept for eval.py.

    It depends on a checksum of the text alone, so every reader and every order agree on it.
    """
    return zlib.crc32(text.encode()) % 10 == 0


def documents(sources, held_out):
    """Yield the texts of either the training or the held-out documents, long ones in pieces.

    Raises DataError if a source cannot be read.
    """
    for source in sources:
        try:
            for text in read_source(source):
                # JSON may hold half a surrogate pair, which tokenizers refuse: it becomes "?".
                text = (text or "").encode("utf-8", "replace").decode()
                if is_held_out(text) == held_out:
                    yield from (text[i : i + LONGEST] for i in range(0, len(text), LONGEST))
        except (*LIBRARY_ERRORS, DataError) as error:
            name = source.name if isinstance(source, Path) else "the hub"
            raise DataError(f"{name}: {error}") from None


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
    """Yield the packed rows of each group of sources, each as a dict, as `datasets` wants it."""
    for sources in groups:
        for row in pack(documents(sources, held_out), tokenizer, ctx_len):
            yield {"tokens": row}


def start_reader(_number):
    """Shield a reader process from Ctrl-C, and let it use one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "setsid"):  # a session of its own, which signals of the terminal do not reach
        os.setsid()


def token_rows(sources, tokenizer, ctx_len, batch_size, held_out, seed):
    """Yield the rows that reader processes pack, shuffled and for ever if there is a seed."""
    endless = seed is not None
    if endless:
        sources = random.Random(seed).sample(sources, len(sources))  # a shuffled copy

    # Divide the sources into groups, one for each reader of each process: 8 files make 4 groups for
    # 2 processes of 2 readers, and 1 file makes 1 group, which both processes read. (A group is
    # packed as one text, since a file may be shorter than a row. The number of readers is fixed, so
    # that no run depends on the number of cores.)
    readers = max(1, min(READERS, len(sources) // WORLD))
    num_groups = min(readers * WORLD, len(sources))
    groups = [sources[i::num_groups] for i in range(num_groups)]
    # If an argument of the generator is a list, `datasets` divides it among the readers.
    kwargs = {"groups": groups, "held_out": held_out, "tokenizer": tokenizer, "ctx_len": ctx_len}
    stream = datasets.IterableDataset.from_generator(pack_groups, gen_kwargs=kwargs)
    if endless:
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
        # Each process gets its own groups. Or, if there are fewer groups than processes, each reads
        # all groups, and keeps one row in WORLD.
        stream = datasets.distributed.split_dataset_by_node(stream, RANK, WORLD)
    # Rows come from a reader in batches, since one by one is slow.
    options = {"batch_size": batch_size, "prefetch_factor": 16, "persistent_workers": endless}
    options |= {"num_workers": readers, "worker_init_fn": start_reader}
    loader = torch.utils.data.DataLoader(stream, **options)

    epochs = count() if endless else [0]
    for epoch in epochs:
        stream.set_epoch(epoch)  # shuffles anew (`datasets` tells the readers, which go on running)
        num_rows = 0
        for batch in loader:
            num_rows += len(batch["tokens"])
            yield from batch["tokens"]
        if num_rows == 0:
            side = "held-out" if held_out else "training"
            raise DataError(f"too little text, less than {ctx_len} tokens of {side} documents")
        if endless and epoch == 0 and RANK == 0:
            size = num_rows * ctx_len * WORLD
            tqdm.write(f"--dataset is repeated: it has {size:,} tokens to train on")


def token_batches(sources, tokenizer, ctx_len, batch_size, held_out=False, seed=None):
    """Yield batches of tokens [batch_size, ctx_len] from sources: files, or shards on the hub.

    For training, pass a seed: rows are then shuffled, text is repeated for ever in a new order
    each time, and each process under torchrun gets its own. Without a seed, the last batch may be
    shorter.
    """
    # The last batch of each reader may be short, so the rows that DataLoader yields in batches are
    # batched anew.
    rows = token_rows(sources, tokenizer, ctx_len, batch_size, held_out, seed)
    while batch := list(islice(rows, batch_size)):
        yield torch.stack(batch)


# ---- Training -------------------------------------------------------------------------------

WARM_UP, DECAY = 0.05, 0.5  # shares of the run over which the learning rate rises and falls
LOG_LINES = 200  # in a run; not more, as reading numbers off a GPU stalls it
SAVE_EVERY = 300  # seconds


def train(args):
    """Train a coder for each of `args.arch` and `args.k` on one stream of text, and save them."""
    keep_freed_memory()

    # Load the LM, only up to the MLP: we need neither the later blocks nor the LM head.
    lm = load_lm(args.model, args.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    hookpoint, blocks, mlp = find_mlp(lm, args.layer)
    del blocks[args.layer + 1 :]
    activations = MLPActivations(lm, mlp)

    # Start reading text.
    sources = find_sources(args.dataset, args.subset)
    rows = args.batch_size // WORLD  # in a batch of this process
    batches = token_batches(sources, tokenizer, args.ctx_len, rows, seed=args.seed)

    # The first batch sets where the coders start. (Not trained on, since all processes get it.)
    tokens = next(batches).to(args.device)
    if WORLD > 1:
        torch.distributed.broadcast(tokens, 0)
    x, y = activations(tokens)  # [N, d] each
    d, M = y.shape[1], args.expansion * y.shape[1]
    if max(args.k) > M:
        sys.exit(f"error: --k {max(args.k)}: there are {M} latents ({args.expansion} x {d})")
    trainers = {}
    for arch, k in product(args.arch, sorted(args.k)):
        coder = Coder(arch, d, M, k, args.seed).to(args.device)
        trainers[f"{arch}-k{k}" if len(args.k) > 1 else arch] = Trainer(coder, x, y, args.lr)
    coders = {name: trainer.coder for name, trainer in trainers.items()}

    # Open the run directory. Mode "x" fails if there is a log, so two runs cannot share a folder.
    config = new_config(args, hookpoint, coders, activations.max_norm)
    step_tokens = args.batch_size * (args.ctx_len - 1)
    steps = math.ceil(args.tokens / step_tokens)
    if RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        log = (args.out / "log.jsonl").open("w" if args.overwrite else "x", buffering=1)
        print(f"{hookpoint} of {args.model}, {M:,} latents, {args.device} x {WORLD}")
        print(f"{steps:,} steps of {step_tokens:,} tokens, lr {args.lr:.2g}")

    # The training loop.
    handle_signals()
    bar = tqdm(total=steps * step_tokens, unit="tok", unit_scale=True, disable=RANK > 0)
    fvu, logged_at, saved_at = {}, time.monotonic(), time.monotonic()
    try:
        for step, tokens in zip(range(1, steps + 1), batches):
            # Train each coder on the same activations.
            x, y = activations(tokens.to(args.device))
            progress = (step - 0.5) / steps  # of the run, in the middle of this step
            lr_factor = min(1, progress / WARM_UP, (1 - progress) / DECAY)  # up, level, down
            for trainer in trainers.values():
                trainer.step(x, y, lr_factor)
            config["tokens_trained"] += step_tokens

            # After so many steps, step * LOG_LINES // steps lines of the log are due. If no line
            # has become due in this step, go on. Or else log the FVU since the last line.
            if step * LOG_LINES // steps == (step - 1) * LOG_LINES // steps:
                continue
            fvu = {name: trainer.pop_fvu() for name, trainer in trainers.items()}
            if RANK > 0:
                continue
            now, done = time.monotonic(), config["tokens_trained"]
            new = done - bar.n  # tokens since the last time, as the bar moves only here
            speed = round(new / (now - logged_at))
            log.write(json.dumps({"tokens": done, "tokens_per_s": speed, "fvu": fvu}) + "\n")
            bar.set_postfix_str(f"FVU {min(fvu.values()):.3f} to {max(fvu.values()):.3f}")
            bar.update(new)
            logged_at = now
            if now > saved_at + SAVE_EVERY:
                save_run(config, coders)
                saved_at = now
    finally:
        # Save what was trained, whatever ended the loop.
        for number in STOP:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "SIGCHLD"):  # DataLoader's handler raises if a reader is killed
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        bar.close()
        finite = all(p.isfinite().all() for coder in coders.values() for p in coder.parameters())
        if RANK == 0 and config["tokens_trained"] > 0 and finite:
            for trainer in trainers.values():
                trainer.normalize()  # in case the loop ended within a step
            save_run(config, coders)
            last = ", ".join(f"{name} {value:.3f}" for name, value in fvu.items())
            print(f"saved after {config['tokens_trained']:,} tokens. Last FVU: {last or 'none'}")
            print(f"next: python eval.py {args.out} --html page.html")


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
        top, indices = F.linear(read, W_enc, b_enc).topk(k, sorted=False)  # [N, k] each
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
        # then start at first[j]: if M is 6 and `latent` is [0, 0, 2, 5], then `first` is
        # [0, 2, 2, 3, 3, 3]. An embedding_bag sums rows of a table. Here the table is `read`, and
        # bag j holds the tokens token[first[j] : first[j + 1]]. (The sum of an empty bag is zero.)
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


# ---- Memory and signals ---------------------------------------------------------------------

STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def keep_freed_memory():
    """Make glibc, if it is there, keep freed memory in the process.

    By default it returns the memory to the system, and asking for it again takes a fifth of a step
    on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def handle_signals():
    """Let SIGTERM and SIGHUP (the terminal was closed) interrupt training as Ctrl-C does."""
    for number in STOP:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup sets SIGHUP to be ignored
            signal.signal(number, signal.default_int_handler)


# ---- Files of a run -------------------------------------------------------------------------

FILE_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}  # as in EleutherAI's sparsify


def new_config(args, hookpoint, coders, max_norm):
    """Return what config.json says: the flags, and what else eval.py needs."""
    M, d = next(iter(coders.values())).W_dec.shape
    config = vars(args) | {"hookpoint": hookpoint, "d": d, "num_latents": M}
    config |= {"max_norm": max_norm, "tokens_trained": 0}
    config["coders"] = {name: f"{name}/{hookpoint}" for name in coders}  # the folder of each
    config["versions"] = {lib.__name__: lib.__version__ for lib in (torch, transformers, datasets)}
    for key in ("model", "dataset"):
        if Path(config[key]).exists():  # eval.py may be called from another folder
            config[key] = Path(config[key]).resolve()
    return config


def save_run(config, coders):
    """Write config.json, and a folder for each coder in the format of EleutherAI's sparsify."""
    contents = {}
    for name, coder in coders.items():
        spec = ARCHS[coder.arch]
        cfg = {
            "activation": coder.activation,
            "expansion_factor": config["expansion"],
            "normalize_decoder": spec.unit_rows,
            "num_latents": config["num_latents"],
            "k": coder.k,
            "multi_topk": False,  # an option of sparsify's
            "skip_connection": spec.skip,
            "transcode": spec.reads == "x",
            "d_in": config["d"],
            "arch": coder.arch,  # sparsify ignores this one
        }
        tensors = {FILE_NAMES.get(n, n): p.cpu() for n, p in coder.state_dict().items()}
        folder = config["out"] / config["coders"][name]
        contents[folder / "sae.safetensors"] = tensors
        contents[folder / "cfg.json"] = json.dumps(cfg, indent=2) + "\n"
    contents[config["out"] / "config.json"] = json.dumps(config, indent=2, default=str) + "\n"
    write(contents)


def write(contents):
    """Write texts and tensors, by path.

    All are written under temporary names first. Then the old file at the last path is deleted, and
    then all are renamed, in order. For a run the last path is config.json, without which nothing is
    loaded. So what a crash leaves is all old, all new, or no run.
    """
    temporary = {path: path.with_name(path.name + ".tmp") for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                temporary[path].write_text(content, encoding="utf-8")
            else:
                save_file(content, temporary[path])
        list(contents)[-1].unlink(missing_ok=True)
        for path in contents:
            temporary[path].replace(path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def load_run(run, device="cpu"):
    """Return the config of a run directory and its coders by name. Exits if it is not a run.

    The key "coders" of config.json maps names to folders. A folder may come from sparsify.
    """
    coders = {}
    with exit_on_error(f"RUN {run}", "pass a folder that skipcoder.py wrote"):
        config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        for name, folder in config["coders"].items():
            cfg = json.loads((Path(run) / folder / "cfg.json").read_text(encoding="utf-8"))
            tensors = load_file(Path(run) / folder / "sae.safetensors")
            # In 2024 sparsify did not write activation, transcode and skip_connection.
            if cfg.get("activation", "topk") != Coder.activation:
                raise ValueError(f"{folder}: activation {cfg['activation']}")
            arch = "transcoder" if cfg.get("transcode") else "sae"
            arch = "skip_transcoder" if cfg.get("skip_connection") else arch
            M, d = tensors["W_dec"].shape
            coders[name] = Coder(cfg.get("arch", arch), d, M, cfg["k"])
            for ours, in_file in FILE_NAMES.items():
                tensors[ours] = tensors.pop(in_file)
            coders[name].load_state_dict(tensors)
            coders[name].to(device).requires_grad_(False)
    return config, coders


# ---- Flags ----------------------------------------------------------------------------------


def at_least(least, kind=int):
    """Return a type for argparse: a number that is at least `least` (and not NaN)."""

    def number(text):
        if not kind(text) >= least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
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


def parse(parser):
    """Parse the flags of skipcoder.py or eval.py, and do what both begin with."""
    parser.error = lambda message: sys.exit(f"error: {message}")  # one line, without the usage
    args = parser.parse_args()
    args.device = pick_device(args.device)
    args.tokens = math.ceil(args.tokens)
    if args.dataset == "HuggingFaceFW/fineweb":
        args.subset = args.subset or "sample-10BT"
    sys.stdout.reconfigure(errors="replace")  # "?" for what a console cannot print
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
    flag("--k", type=at_least(1), nargs="+", default=[32], help="active latents, a coder for each")
    flag("--tokens", type=at_least(1, float), default=5e7, help="default 50 million")
    # (At least 3, as eval.py needs BOS, a token, and a next one that is predicted.)
    flag("--ctx-len", type=at_least(3), help="tokens in a row (default 256, or the LM's limit)")
    flag("--batch-size", type=at_least(1), help="rows per step (default: see README, Recipe)")
    flag("--lr", type=at_least(1e-9, float), help="of Adam (default: see README, Recipe)")
    flag("--seed", type=at_least(0), default=0, help="of weights and shuffling (default 0)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator)")
    flag("--out", type=Path, help="run directory (default runs/<model>-layer<L>)")
    flag("--overwrite", action="store_true", help="replace the run in --out")
    args = parse(parser)
    if not Path(args.dataset).exists() and not huggingface_hub.constants.HF_HUB_OFFLINE:
        # `datasets` would try for half a minute to reach the hub. (Which errors the hub's library
        # raises depends on its version.)
        with exit_on_error(f"--dataset {args.dataset}", DATA_HINT, errors=Exception):
            huggingface_hub.dataset_info(args.dataset, timeout=5)
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
    rows = 1024 * (args.tokens / 2e6) ** 0.5 / args.ctx_len
    args.batch_size = args.batch_size or max(1, round(rows / WORLD)) * WORLD
    if args.batch_size % WORLD:
        sys.exit(f"error: --batch-size {args.batch_size}: pass a multiple of the {WORLD} processes")
    args.out = args.out or Path(f"runs/{Path(args.model).resolve().name}-layer{args.layer}")
    if (args.out / "log.jsonl").exists() and not args.overwrite:
        sys.exit(f"error: --out {args.out} holds a run: pass --overwrite, or another --out")
    try:
        with exit_on_error(f"--dataset {args.dataset}", DATA_HINT, errors=DataError):
            train(args)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
