# SPDX-License-Identifier: MIT
"""Train a sparse autoencoder, a transcoder and a skip transcoder side by side on one MLP of a language model.

    python skipcoder.py --layer 6

A sparse coder rewrites what an MLP does to a token as a sum of a few of many learned directions, its latents, in the
hope that each stands for one thing. With x the input of the MLP (after the layer norm), y its output, both d wide, and
M latents of which TopK keeps the k largest (and of those the positive ones):

    sae              z = TopK(W_enc (y - b_dec) + b_enc)      y_hat = W_dec z + b_dec
    transcoder       z = TopK(W_enc x + b_enc)                y_hat = W_dec z + b_dec
    skip_transcoder  z = TopK(W_enc x + b_enc)                y_hat = W_dec z + W_skip x + b_dec

The first says what the MLP's output is made of; the others imitate what the MLP computes. All predict y and minimise
the fraction of its variance that is left unexplained, FVU = sum |y - y_hat|^2 / sum |y - mean(y)|^2.
Paper: "Transcoders Beat Sparse Autoencoders for Interpretability", Paulo, Shabalin & Belrose, arXiv 2501.18823.

Two things are not the paper's, and were measured (README, "Recipe"). With s_x and s_y the root mean squares of the
centred entries of x and y, and s_z that of what the encoder reads, hence of the pre-activations:
    units           Adam moves a number by about its learning rate, whatever the gradient, so each parameter has lr in
                    its own units: W_enc lr, b_enc lr s_z, W_dec lr s_y / s_z, b_dec lr s_y, W_skip lr s_y / s_x.
                    And all start centred, which also keeps latents alive (arXiv 2605.31518).
    raised biases   b_enc of a latent that was silent for 2% of the run's tokens gains .03 s_z a step (times the factor
                    of lr) until it fires, which costs no time (kin: bias adaptation, arXiv 2506.14002).
"""

import argparse
import json
import logging
import math
import os
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import datasets.distributed
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# ---- Coders ---------------------------------------------------------------------------------------------------------
ARCHS = ("sae", "transcoder", "skip_transcoder")

class Coder(nn.Module):
    """One sparse coder. Row j of W_enc [M, d] is what latent j reads, row j of W_dec [M, d] what it writes."""
    def __init__(self, arch: str, d: int, num_latents: int, k: int, seed: int = 0):
        super().__init__()
        self.arch, self.k = arch, k
        W = F.normalize(torch.randn(num_latents, d, generator=torch.Generator().manual_seed(seed)))
        self.W_enc = nn.Parameter(W)  # random unit rows, for one seed the same in every architecture
        self.b_enc = nn.Parameter(torch.zeros(num_latents))  # Trainer centres it, and b_dec, on the first batch
        # an autoencoder starts with W_dec = W_enc, since its latents should write what they read. What a transcoder's
        # should write is not known: it starts with nothing, and W_enc gets its gradient once W_dec has moved
        self.W_dec = nn.Parameter(W.clone() if arch == "sae" else torch.zeros_like(W))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.W_skip = nn.Parameter(torch.zeros(d, d)) if arch == "skip_transcoder" else None

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y_hat [N, d], predicted from x or y [N, d]; and of the latents used the acts and indices, [N, k]."""
        read = y - self.b_dec if self.arch == "sae" else x  # never x - b_dec: b_dec starts as the mean of y
        pre, indices = TopKEncoder.apply(read, self.W_enc, self.b_enc, self.k)  # [N, d], [M, d] -> [N, k] each
        acts = pre.relu()
        y_hat = F.embedding_bag(indices, self.W_dec, per_sample_weights=acts, mode="sum") + self.b_dec  # -> [N, d]
        if self.W_skip is not None:
            y_hat = y_hat + F.linear(x, self.W_skip)  # [N, d] @ [d, d] -> [N, d]
        return y_hat, acts, indices

class TopKEncoder(torch.autograd.Function):
    """The k largest pre-activations of each token, and which latents they are, [N, k] each. It is these two lines:

        pre = F.linear(read, W_enc, b_enc)  # [N, d] @ [d, M] -> [N, M]
        return pre.topk(k)

    but its gradients cost k / M of theirs: autograd would multiply [N, M] matrices that are nearly all zero.
    """

    @staticmethod
    def forward(ctx, read, W_enc, b_enc, k):
        pre, indices = topk(F.linear(read, W_enc, b_enc), k)
        ctx.save_for_backward(read, W_enc, indices)
        ctx.mark_non_differentiable(indices)
        return pre.to(W_enc.dtype), indices  # of all that a coder computes only the dense matmuls may be in bfloat16

    @staticmethod
    def backward(ctx, grad, _):  # [N, k]
        read, W_enc, indices = ctx.saved_tensors
        # row j of the gradient is the weighted sum of the tokens that use latent j: an embedding bag over the (token,
        # latent) pairs sorted by latent, of which latent j owns those from start[j] to start[j + 1]
        latent, order = indices.flatten().sort()
        start = torch.searchsorted(latent, torch.arange(len(W_enc), device=latent.device))  # [M]
        token, weight = order // indices.shape[1], grad.flatten()[order]  # [N * k] each
        grad_W = F.embedding_bag(token, read, start, per_sample_weights=weight, mode="sum")  # [N, d] -> [M, d]
        grad_b = grad.new_zeros(len(W_enc)).index_add_(0, latent, weight)  # [M]
        if not ctx.needs_input_grad[0]:  # x; the autoencoder reads y - b_dec
            return None, grad_W, grad_b, None
        return F.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum"), grad_W, grad_b, None

def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """pre.topk(k) for pre [N, M], unsorted, in .5 to .8 of its time: the k largest are among the k best groups of 8."""
    groups = pre.unflatten(1, (math.gcd(pre.shape[1], 8), -1))  # [N, 8, n], a row's entries j, j + n, ... are group j
    best = groups.amax(1).topk(min(k, groups.shape[2]), sorted=False).indices  # [N, k], or all n groups if n < k
    candidates = groups.gather(2, best[:, None].expand(-1, groups.shape[1], -1)).flatten(1)  # [N, 8 * k]
    values, which = candidates.topk(k, sorted=False)  # [N, k]
    member, slot = which // best.shape[1], which % best.shape[1]
    return values, member * groups.shape[2] + best.gather(1, slot)

# ---- Tokens: documents, split by a checksum, packed into rows, shuffled, in batches ---------------------------------
SUFFIXES = {"text": (".txt",), "json": (".jsonl", ".json"), "parquet": (".parquet",)}  # of files, by how they are read
DATA = "pass a name on the hub, or a file or folder: .txt (UTF-8), .jsonl, .json or .parquet, with a column text"
SHUFFLE_ROWS = 2048  # pool that rows are drawn from: neighbours are alike, and mixing them lowers FVU by 15%
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of this process, under torchrun

def documents(dataset: str, subset: str | None) -> datasets.IterableDataset:
    """Stream {"text"} from a data set on the Hugging Face hub, or from a local file or a folder of files."""
    path, streams, options = Path(dataset), [], {"split": "train", "streaming": True}
    files = [str(file) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    for kind, ends in SUFFIXES.items():
        if some := [file for file in files if file.removesuffix(".gz").endswith(ends)]:
            streams.append(datasets.load_dataset(kind, data_files=some, **options).select_columns(["text"]))
            if kind == "text":
                streams[-1] = streams[-1].map(join, batched=True, batch_size=100, input_columns=["text"])
    streams = streams or [datasets.load_dataset(dataset, subset, **options).select_columns(["text"])]
    # each file is shuffled and read by itself, also if there is one stream: no document of join() spans two files
    return datasets.concatenate_datasets(streams)

def join(lines: list[str]) -> dict:
    """Each 100 lines of a .txt file, which may be a whole library, are a document."""
    return {"text": ["\n".join([*lines, ""])]}

def in_split(text: str | None, held_out: bool) -> bool:
    """Held out for eval.py are texts whose checksum is divisible by 10: the same ones in any order, for any reader."""
    return text is not None and (zlib.crc32(text.encode()) % 10 == 0) == held_out

def pack(texts: list[str], tokenizer, ctx_len: int) -> dict:
    """Join documents, 50 at a time (with 100 a run starts late), by EOS, and cut them into full rows; drop the rest."""
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = torch.tensor([token for document in ids for token in document + eos], dtype=torch.int64)
    return {"tokens": tokens[: len(tokens) // ctx_len * ctx_len].view(-1, ctx_len).numpy()}  # [rows, ctx_len]

def token_batches(dataset: str, subset: str | None, tokenizer, ctx_len, rows, held_out=False, seed=None):
    """Start processes that read and tokenise ahead; return an iterator over batches of tokens [rows, ctx_len]. With a
    seed they come shuffled, for ever (in another order each time), all full, and each rank has its own."""
    with blame(f"--dataset {dataset}", DATA):
        stream = documents(dataset, subset).filter(in_split, input_columns=["text"], fn_kwargs={"held_out": held_out})
        packing = {"batched": True, "batch_size": 50, "fn_kwargs": {"tokenizer": tokenizer, "ctx_len": ctx_len}}
        stream = stream.map(pack, input_columns=["text"], remove_columns=["text"], **packing)
    if endless := (seed is not None):
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
        stream = datasets.distributed.split_dataset_by_node(stream, RANK, WORLD)
    readers = max(1, min(stream.num_shards, os.cpu_count() // WORLD - 1))  # shards: files, or parts of a hub data set
    options = dict(drop_last=endless, persistent_workers=endless, num_workers=readers, prefetch_factor=16)
    loader = torch.utils.data.DataLoader(stream, rows, worker_init_fn=leave_group, **options)
    first = iter(loader)  # the readers start now, and work while the LM is loaded

    def batches():
        for epoch in count():
            n = 0
            with blame(f"--dataset {dataset}", DATA):
                for n, batch in enumerate(loader if epoch else first, 1):
                    yield batch["tokens"]
            if n == 0:
                side, size = "held-out" if held_out else "training", f"{rows if endless else 1} x {ctx_len} tokens"
                sys.exit(f"error: --dataset {dataset}: too little text, its {side} documents have no {size}")
            if not endless:
                return
            if epoch == 0 and RANK == 0:
                tqdm.write(f"--dataset {dataset} is repeated: it has {n * rows * ctx_len * WORLD:,} tokens")
            stream.set_epoch(epoch + 1)

    return batches()

def leave_group(_reader: int):
    sys.excepthook = lambda *_: None  # what matters is raised in the main process; when that has stopped, nothing does
    if hasattr(os, "setpgrp"):  # a signal to the whole group, such as Ctrl-C, is for the main process to act on
        os.setpgrp()

# ---- Activations: x and y of one MLP --------------------------------------------------------------------------------
def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16, in 1/2 to 1/9 of the time of float32 (as newer CPUs do, too)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)

def load_lm(name: str, device: torch.device) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(name)
    if getattr(config, "activation_function", None) == "gelu_new":  # GPT-2's, as eight kernels
        config.activation_function = "gelu_pytorch_tanh"  # the same function as one: 30% off the LM's time on a CPU
    dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return transformers.AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype).eval().to(device)

def find_mlp(lm: nn.Module, layer: int) -> tuple[str, nn.ModuleList, nn.Module]:
    """Return the hookpoint (the MLP's name under the base model, "h.6.mlp"), the list of blocks, and the MLP itself."""
    name, blocks = next(((n, m) for n, m in lm.base_model.named_modules() if isinstance(m, nn.ModuleList)), ("", []))
    if not 0 <= layer < len(blocks):
        sys.exit(f"error: --layer {layer}: the model has blocks 0 to {len(blocks) - 1}")
    mlp = getattr(blocks[layer], "mlp", None)
    if mlp is None or hasattr(mlp, "experts"):
        sys.exit(f"error: --layer {layer}: {type(blocks[layer]).__name__} has no dense .mlp")
    return f"{name}.{layer}.mlp", blocks, mlp

OUTLIER = 10  # a token whose |y| is over so many times the median does not count (README, "Outliers")

class MLPActivations:
    """Call it with tokens [rows, ctx_len] to get the MLP's input x and output y there, each [rows * (ctx_len - 1), d].

    Position 0 of each row is left out: LMs park attention there, with a huge norm that says nothing of the text. Some
    do so on a few other tokens as well. The first call finds the largest |y| that counts, unless it is given.
    """
    def __init__(self, lm: nn.Module, mlp: nn.Module, max_norm: float | None = None):
        self.lm, self.max_norm = lm, max_norm
        mlp.register_forward_hook(self.hook)

    def hook(self, mlp, args, output):
        if len(args) != 1:  # BLOOM's, for one, is given the residual stream as well, and adds its output to it
            sys.exit(f"error: --model: {type(mlp).__name__} takes {len(args)} inputs, not one")
        self.x, self.y = args[0], output  # [rows, ctx_len, d] each

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.lm.base_model(tokens, use_cache=False)
        x, y = (a[:, 1:].flatten(0, 1).float() for a in (self.x, self.y))
        norm = y.norm(dim=1)  # [N]
        self.max_norm = self.max_norm or OUTLIER * norm.median().item()
        counts, index = norm <= self.max_norm, torch.arange(len(y), device=y.device)
        # in place of an outlier comes the last token before it that is none (or the first of all): no sizes change
        index = torch.where(counts, index, counts.int().argmax()).cummax(0).values
        return x[index], y[index]

# ---- Training -------------------------------------------------------------------------------------------------------
WARM_UP, DECAY = 0.05, 0.5  # shares of the steps over which the learning rate rises at the start and falls at the end
BETAS = (0.9, 0.98)  # Adam's; the usual 0.999 remembers a thousand steps, half of a short run
DEAD = 0.02  # a latent is dead once it was silent for this share of the tokens to train on
WAKE = 0.03  # what a dead latent's bias gains a step, in s_z; without it up to a third of the latents die
LOG_EVERY, SAVE_EVERY = 5, 300  # seconds: not each step, as reading a number off a GPU waits for all work given to it

class Trainer:
    """A coder, its optimizer, how long each latent has been silent, and the FVU since the last report."""
    def __init__(self, coder: Coder, x: Tensor, y: Tensor, lr: float, dead_after: float):
        """x, y [N, d]: a first batch, which sets where the coder starts; `dead_after`: tokens of silence."""
        self.coder, self.lr, self.dead_after = coder, lr, dead_after
        coder.b_dec.data = y.mean(0)  # predict the mean of y, to start with, and centre what is read
        if coder.arch != "sae":
            coder.b_enc.data = -(coder.W_enc.data @ x.mean(0))  # [M, d] @ [d] -> [M]
        s_x, s_y = (a.var(0, correction=0).mean().sqrt().item() for a in (x, y))
        self.s_z = s_y if coder.arch == "sae" else s_x  # W_enc has unit rows
        units = {"W_enc": 1, "b_enc": self.s_z, "W_dec": s_y / self.s_z, "b_dec": s_y, "W_skip": s_y / s_x}
        groups = [{"params": [p], "unit": units[name]} for name, p in coder.named_parameters()]
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=BETAS, fused=True)
        self.silent = torch.zeros(len(coder.W_dec), dtype=torch.int64, device=x.device)  # [M] tokens since last active
        self.sums = torch.zeros(2, device=x.device)  # squared error and variance since the last report

    def step(self, x: Tensor, y: Tensor, lr_factor: float):
        """One Adam step on the FVU of x, y [N, d], the MLP's input and output."""
        coder = self.coder
        with torch.autocast(x.device.type, torch.bfloat16, enabled=fast_bfloat16(x.device)):
            y_hat, acts, indices = coder(x, y)
        squared_error = (y - y_hat).square().sum()
        variance = (y - y.mean(0)).square().sum()
        self.optimizer.zero_grad()
        (squared_error / variance).backward()
        active = torch.zeros_like(coder.b_enc).index_add_(0, indices.flatten(), acts.detach().flatten())  # [M]
        if WORLD > 1:
            for tensor in (active, *(p.grad for p in coder.parameters())):  # sums: Adam does not mind the factor
                torch.distributed.all_reduce(tensor)
        dead = self.silent >= self.dead_after  # [M]
        self.silent = torch.where(active > 0, 0, self.silent + len(x) * WORLD)
        self.sums += torch.stack([squared_error.detach(), variance])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor * group["unit"]
        W, grad = coder.W_dec.data, coder.W_dec.grad  # [M, d]
        if coder.arch == "sae":  # rows of W_dec stay unit vectors: step along the sphere, then back onto it
            grad -= torch.linalg.vecdot(grad, W)[:, None] * W
        self.optimizer.step()
        if coder.arch == "sae":
            W /= W.norm(dim=1, keepdim=True)
        coder.b_enc.data += WAKE * self.s_z * lr_factor * dead

def train(args: argparse.Namespace):
    """Train a coder for each of `args.arch` on one stream of activations, and save them to `args.out`."""
    with blame(f"--model {args.model}", MODEL):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        source = args.dataset, args.subset, tokenizer, args.ctx_len
        batches = token_batches(*source, args.batch_size // WORLD, seed=args.seed)
        lm = load_lm(args.model, args.device)
    hookpoint, blocks, mlp = find_mlp(lm, args.layer)
    del blocks[args.layer + 1 :]  # nobody reads what they write; the LM head is never called either
    activations = MLPActivations(lm, mlp)
    first = next(batches).to(args.device)
    if WORLD > 1:
        torch.distributed.broadcast(first, 0)  # so that all start the same
    x, y = activations(first)  # [rows * (ctx_len - 1), d] each: where the coders start, not trained on
    d, M = y.shape[1], args.expansion * y.shape[1]
    names = coder_names(args.arch, args.k)
    if (k := max(k for _, k in names.values())) > M:
        sys.exit(f"error: --k {k}: there are {M} latents (--expansion {args.expansion} x {d})")
    with blame(f"--expansion {args.expansion}", "lower it"):  # what does not fit into memory
        coders = {name: Coder(arch, d, M, k, args.seed).to(args.device) for name, (arch, k) in names.items()}
        trainers = {name: Trainer(coder, x, y, args.lr, DEAD * args.tokens) for name, coder in coders.items()}
    step_tokens = args.batch_size * (args.ctx_len - 1)
    steps = math.ceil(args.tokens / step_tokens)
    config = vars(args) | {"hookpoint": hookpoint, "d": d, "num_latents": M, "max_norm": activations.max_norm}
    config |= {key: Path(config[key]).resolve() for key in ("model", "dataset") if Path(config[key]).exists()}
    config["tokens_trained"] = 0
    config["versions"] = {library.__name__: library.__version__ for library in (torch, transformers, datasets)}
    if RANK == 0:
        print(f"{', '.join(coders)} at {hookpoint} of {args.model}: M {M:,}, k {args.k}; on {args.device} x {WORLD}")
        print(f"{steps * step_tokens:,} tokens of {args.dataset} in steps of {step_tokens:,}, lr {args.lr:.2g}")
        log_path, flag = args.out / "log.jsonl", f"--out {args.out}"
        write(flag, {log_path: log_path.read_text() if log_path.exists() else ""})  # fails now if it cannot be written
    bar = tqdm(total=steps * step_tokens, unit="tok", unit_scale=True, disable=RANK > 0)
    log, tokens, logged, done, logged_at, saved_at = "", 0, 0, False, time.monotonic(), time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        for step, batch in zip(range(steps), batches):
            x, y = activations(batch.to(args.device))
            share = (step + 0.5) / steps
            for trainer in trainers.values():
                trainer.step(x, y, min(1, share / WARM_UP, (1 - share) / DECAY))
            bar.update(step_tokens)
            config["tokens_trained"] = tokens = tokens + step_tokens
            now, done = time.monotonic(), step + 1 == steps
            if RANK > 0 or now < logged_at + LOG_EVERY and not done:
                continue
            fvu = {name: (t.sums[0] / t.sums[1]).item() for name, t in trainers.items()}  # since the last report
            dead = {name: (t.silent >= t.dead_after).float().mean().item() for name, t in trainers.items()}
            if not all(map(math.isfinite, fvu.values())):
                sys.exit(f"error: --lr {args.lr:g}: the loss is not finite after {tokens:,} tokens, lower it")
            bar.set_postfix_str(", ".join(f"{name} FVU {fvu[name]:.3f} dead {dead[name]:.1%}" for name in coders))
            speed = round((tokens - logged) / (now - logged_at))
            log += json.dumps({"tokens": tokens, "tokens_per_s": speed, "fvu": fvu, "dead": dead}) + "\n"
            write(flag, {log_path: log})
            logged, logged_at = tokens, now
            for trainer in trainers.values():
                trainer.sums.zero_()
            if now > saved_at + SAVE_EVERY:
                save_run(config, coders)
                saved_at = now
    except KeyboardInterrupt:
        bar.close()  # Ctrl-C or SIGTERM: what there is, is saved
    if RANK == 0:
        save_run(config, coders)
        print("done" if done else "stopped", f"after {tokens:,} tokens; next: python eval.py {args.out}")
    sys.exit(0 if done else 130)

# ---- Files ----------------------------------------------------------------------------------------------------------
def coder_names(archs: list[str], k: int | list[int]) -> dict[str, tuple[str, int]]:
    """The architecture and k of each coder of a run, by its name."""
    if isinstance(k, int):
        return {arch: (arch, k) for arch in archs}
    return {f"{arch}-k{number}": (arch, number) for arch in archs for number in sorted(k)}

IN_FILES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}  # what EleutherAI's sparsify calls them

def save_run(config: dict, coders: dict[str, Coder]):
    """Write config.json and, per coder, <name>/<hookpoint>/, a folder that EleutherAI's `sparsify` loads as it is."""
    files = {}
    for name, coder in coders.items():
        folder = config["out"] / name / config["hookpoint"]
        cfg = {"activation": "topk", "expansion_factor": config["expansion"], "num_latents": config["num_latents"]}
        cfg |= {"k": coder.k, "multi_topk": False, "d_in": config["d"], "normalize_decoder": coder.arch == "sae"}
        cfg |= {"transcode": coder.arch != "sae", "skip_connection": coder.arch == "skip_transcoder"}
        files[folder / "cfg.json"] = json.dumps(cfg, indent=2) + "\n"
        files[folder / "sae.safetensors"] = {IN_FILES.get(n, n): p.cpu() for n, p in coder.state_dict().items()}
    files[config["out"] / "config.json"] = json.dumps(config, indent=2, default=str) + "\n"  # last: it makes it a run
    write(f"--out {config['out']}", files)

def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[dict, dict[str, Coder]]:
    """Return the config of a run directory and its coders by name. Ends the program if damaged."""
    with blame(f"RUN {run}", "pass a folder that skipcoder.py wrote, or train it again"):
        config, coders = json.loads((Path(run) / "config.json").read_text()), {}
        for name, (arch, k) in coder_names(config["arch"], config["k"]).items():
            coder = coders[name] = Coder(arch, config["d"], config["num_latents"], k)
            tensors = load_file(Path(run) / name / config["hookpoint"] / "sae.safetensors")
            coder.load_state_dict({n: tensors[IN_FILES.get(n, n)] for n in coder.state_dict()})
            coder.to(device).requires_grad_(False)
        return config, coders

def write(flag: str, files: dict[Path, str | dict[str, Tensor]]):
    """Write texts and tensors under temporary names, then rename all: each is replaced whole, on a full disk none."""
    temporary = {path: path.with_name(path.name + ".tmp") for path in files}
    with blame(flag, "make room there, or pass another path"):
        try:
            for path, content in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary[path].write_text(content) if isinstance(content, str) else save_file(content, temporary[path])
            for path in files:
                temporary[path].replace(path)
        finally:
            for path in files:
                temporary[path].unlink(missing_ok=True)

# ---- Flags ----------------------------------------------------------------------------------------------------------
MODEL = "pass a name on the hub, with a connection to it, or a local folder, as tests/tiny_gpt2.py makes one"

@contextmanager
def blame(flag: str, fix: str):
    """Around what a user can get wrong: whatever is raised ends the program with one line of flag, message and fix."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["nothing can be read there"]  # an empty file: StopIteration
        line = lines[-1 if "Traceback" in str(error) else 0]  # what a reader process raises comes with its traceback
        sys.exit(f"error: {flag}: {line.rstrip('.')} ({fix})")

def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags of either script, with numbers checked and the device tried; and what else both begin with."""
    parser.error = lambda message: sys.exit(f"error: {message}")  # one line, without the usage
    args = parser.parse_args()
    for name in ("expansion", "k", "tokens", "ctx_len", "batch_size", "lr", "latents"):
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 < value < math.inf:
                parser.error(f"--{name.replace('_', '-')} {value}: a number above 0 is needed")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: a number from 0 on is needed")
    args.tokens = math.ceil(args.tokens)
    auto = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    with blame(f"--device {args.device}", "use cpu, cuda or auto"):
        args.device = torch.zeros(1, device=auto if args.device == "auto" else args.device).device
    logging.disable(logging.ERROR)  # what matters of the libraries' messages is said in a line of our own
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends at once, as long as there is nothing to save
    return args

def main():
    parser = argparse.ArgumentParser(prog="skipcoder.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--layer", type=int, required=True, help="the block whose MLP is coded, counted from 0")
    flag("--model", default="gpt2", help="a decoder on the Hugging Face hub, or a local folder (default %(default)s)")
    flag("--dataset", default="HuggingFaceFW/fineweb", help=f"{DATA} (default %(default)s)")
    flag("--subset", help="configuration of a hub data set (default: sample-10BT of the default data set)")
    flag("--arch", nargs="+", choices=ARCHS, default=list(ARCHS), help="coders to train (default: all three)")
    flag("--expansion", type=int, default=32, help="latents M as a multiple of the width d (default %(default)s)")
    flag("--k", type=int, nargs="+", default=[32], help="latents active per token, a coder for each one (default 32)")
    flag("--tokens", type=float, default=5e7, help="tokens to train on (default %(default)s)")
    flag("--ctx-len", type=int, help="tokens in a row (default 256, or the model's limit if that is lower)")
    flag("--batch-size", type=int, help="rows in a step (default: grows with --tokens, see README, Recipe)")
    flag("--lr", type=float, help="Adam's learning rate (default: falls with --tokens, see README, Recipe)")
    flag("--seed", type=int, default=0, help="seed of the coders' start and of the order of the rows (default 0)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    flag("--out", type=Path, help="run directory (default runs/<model>-layer<L>)")
    flag("--overwrite", action="store_true", help="replace the run in --out")
    args = parse(parser)
    if len(args.k) > len(set(args.k)):
        sys.exit(f"error: --k {' '.join(map(str, args.k))}: give each number once")
    args.k = args.k[0] if len(args.k) == 1 else args.k
    if WORLD > 1:
        torch.distributed.init_process_group()
    with blame(f"--model {args.model}", MODEL):
        model = transformers.AutoConfig.from_pretrained(args.model).get_text_config()
    limit = getattr(model, "max_position_embeddings", math.inf)
    args.ctx_len = args.ctx_len or min(256, limit)
    if not 3 <= args.ctx_len <= limit:  # position 0 is not used, and in eval.py the last one has no next token
        sys.exit(f"error: --ctx-len {args.ctx_len}: at least 3 and, for this model, at most {limit} tokens")
    # the recipe: for a run over 2M tokens a rate of 1.5e-3 and 1,024 tokens in a step
    args.lr = args.lr or 1.5e-3 * (2e6 / args.tokens) ** 0.25
    rows = args.batch_size or 1024 * (args.tokens / 2e6) ** 0.5 / args.ctx_len
    args.batch_size = max(1, round(rows / WORLD)) * WORLD
    args.subset = args.subset or {"HuggingFaceFW/fineweb": "sample-10BT"}.get(args.dataset)
    args.out = args.out or Path(f"runs/{Path(args.model).resolve().name}-layer{args.layer}")
    if (args.out / "config.json").exists() and not args.overwrite:
        sys.exit(f"error: --out {args.out} holds a run: pass --overwrite to replace it, or another --out")
    train(args)

if __name__ == "__main__":
    main()
