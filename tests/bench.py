"""How fast training is, and where the time goes, on a random model of GPT-2's size at layer 6.

    python tests/bench.py [--tokens-per-step 4096] [--steps 5] [--sparsify PYTHON]
    python tests/bench.py --eval RUN [flags of eval.py]

It is fed with real text. It prints the tokens/s of one coder and of all three, which share they
reach of the limit that this machine's matmul rate sets, and the profile of a step. --sparsify is
the path of a Python that has `eai-sparsify`: training alternates with that library, which trains a
coder on the same hookpoint. --eval says how many plain forward passes of the LM over the tokens
that eval.py reads it takes, and its peak memory. Not a test.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import eval as evaluation
import skipcoder
from skipcoder import ARCHS, Coder, Trainer

LAYER, D, M, K, CTX_LEN = 6, 768, 24576, 32, 256

# What sparsify runs for one coder: the LM's forward pass with a hook (all blocks, no LM head; on a
# GPU in bf16, as its command line loads it), its coder's forward and backward, and Adam. Its own
# Trainer adds data and logging to that.
SPARSIFY = """
import sys, time, torch
from sparsify.sparse_coder import SparseCoder
from sparsify.config import SparseCoderConfig
from transformers import GPT2Config, GPT2Model

def keep(module, args, output):
    seen["x"], seen["y"] = args[0].flatten(0, 1), output.flatten(0, 1)

rows, device, seen = int(sys.argv[1]), sys.argv[2], {}
dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
lm = GPT2Model(GPT2Config()).eval().to(device, dtype)
lm.h[6].mlp.register_forward_hook(keep)
config = SparseCoderConfig(transcode=True, normalize_decoder=False)
coder = SparseCoder(768, config, device=device)
optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4)
tokens = torch.randint(50257, (rows, 256), device=device)
for line in sys.stdin:
    start = time.perf_counter()
    with torch.no_grad():
        lm(tokens)
    coder(seen["x"], seen["y"]).fvu.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device != "cpu":
        torch.cuda.synchronize()
    print("seconds", time.perf_counter() - start, flush=True)
"""


def pick_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory() -> str:
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = f"peak memory {gib:.1f} GiB"
    if torch.cuda.is_available():
        told += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU"
    return told


def timed(f, times: int = 3) -> float:
    """Median seconds of a call, after one to warm up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


# ---- Evaluation -----------------------------------------------------------------------------


def time_eval(argv: list[str]):
    """Run eval.py, with plain forward passes, head included, before and after it.

    These are of batches of 2,048 tokens.
    """
    config, _ = skipcoder.load_run(argv[0])
    device, ctx_len = pick_device(), config["ctx_len"]
    tokens = torch.randint(1000, (2048 // ctx_len, ctx_len), device=device)

    @torch.no_grad()
    def plain() -> float:
        lm = skipcoder.load_lm(config["model"], device)
        return timed(lambda: lm(tokens, use_cache=False).logits[0, 0, 0].item(), 5)

    evaluate, reports = evaluation.evaluate, []

    def seen(*args):
        report, shown = evaluate(*args)
        reports.append(report)
        return report, shown

    evaluation.evaluate = seen
    before, start = plain(), time.perf_counter()
    sys.argv = ["eval.py", *argv]
    evaluation.main()
    seconds, after = time.perf_counter() - start, plain()

    read = reports[0]["tokens"]
    passes = seconds / ((before + after) / 2 * read / tokens.numel())
    print(f"eval.py: {seconds:.0f} s for {read:,} tokens, {passes:.2f} plain passes")
    print(f"a plain pass over a batch took {before:.2f} s before, {after:.2f} s after")


# ---- Training -------------------------------------------------------------------------------


def prepare(folder: Path, rows: int, device):
    """Return an iterator over batches of tokens, and the activations of a random GPT-2."""
    texts = demo.documents()
    for i in range(5):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[i::5]]
        (folder / f"text{i}.jsonl").write_text("".join(lines))
    tokenizer = demo.train_tokenizer(texts, 8192)
    sources = skipcoder.find_sources(folder, None)
    batches = skipcoder.token_batches(sources, tokenizer, CTX_LEN, rows, seed=0)

    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    lm = skipcoder.load_lm(str(folder), device)
    _, blocks, mlp = skipcoder.find_mlp(lm, LAYER)
    del blocks[LAYER + 1 :]
    return batches, skipcoder.MLPActivations(lm, mlp)


def start_sparsify(python: str, rows: int, device):
    """Start the other library, and return a function that times one of its steps."""
    errors = OSError, subprocess.CalledProcessError
    with skipcoder.exit_on_error("--sparsify", "pass a Python that has eai-sparsify", errors):
        subprocess.run([python, "-c", "import sparsify"], check=True, capture_output=True)
    # With glibc set as skipcoder.py sets it, or else a part of what is compared would be that.
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    process = subprocess.Popen(
        [python, "-c", SPARSIFY, str(rows), device.type],
        env=os.environ | memory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=1,
        text=True,
    )

    def step() -> float:
        process.stdin.write("go\n")
        # A StopIteration here means that it has failed.
        line = next(line for line in process.stdout if line.startswith("seconds"))
        return float(line.split()[1])

    return step


def time_training(tokens_per_step: int, steps: int, sparsify: str | None, folder: Path):
    skipcoder.keep_freed_memory()
    device = pick_device()
    dtype = torch.bfloat16 if skipcoder.fast_bfloat16(device) else torch.float32
    rows = tokens_per_step // CTX_LEN
    tokens, N = rows * CTX_LEN, rows * (CTX_LEN - 1)
    batches, activations = prepare(folder, rows, device)
    x, y = activations(next(batches).to(device))
    trainers = {}
    for arch in ARCHS:
        coder = Coder(arch, D, M, K).to(device)
        trainers[arch] = Trainer(coder, x, y, 1e-4)
    threads = torch.get_num_threads()
    print(f"{device}, {threads} threads, matmuls in {dtype}; {tokens} tokens a step")

    def step(archs):
        x, y = activations(next(batches).to(device))
        for arch in archs:
            trainers[arch].step(x, y, 1)

    # Whole steps of each version, alternating. The first does not count.
    timers = {
        "one": lambda: timed(partial(step, ["transcoder"]), 1),
        "three": lambda: timed(partial(step, ARCHS), 1),
    }
    if sparsify:
        timers["sparsify"] = start_sparsify(sparsify, rows, device)
    seconds = {name: [] for name in timers}
    for _ in range(steps + 1):
        for name, timer in timers.items():
            seconds[name].append(timer())
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name:10} {tokens / value:10,.0f} tokens/s")
    if sparsify:
        ratio = 3 * median["sparsify"] / median["three"]
        print(f"three coders here against three runs of sparsify: {ratio:.1f}x")

    # The limit by matmul alone, at the rate of the encoder's own shape.
    a = torch.randn(N, D, device=device, dtype=dtype)
    b = torch.randn(M, D, device=device, dtype=dtype)
    rate = 2 * N * D * M / timed(lambda: a @ b.T)
    of_lm = 2 * tokens * (LAYER + 1) * 12 * D * D
    of_coders = 3 * 2 * N * D * M
    limit = (of_lm + of_coders) / rate  # seconds a step
    print(f"matmul {rate / 1e12:.2f} TFLOP/s; limit by it alone {tokens / limit:,.0f} tokens/s")
    print(f"three coders reach {limit / median['three']:.0%} of it")

    with torch.profiler.profile() as profile:
        step(ARCHS)
    sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=sort_by, row_limit=12))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--tokens-per-step", type=int, default=4096)
    flag("--steps", type=int, default=5, help="timed steps of each version")
    flag("--eval", nargs=argparse.REMAINDER, help="time eval.py: a run, and flags of eval.py")
    flag("--sparsify", metavar="PYTHON", help="a Python that has eai-sparsify, to compare with")
    args = parser.parse_args()
    if args.eval:
        time_eval(args.eval)
    else:
        with tempfile.TemporaryDirectory() as folder:
            sizes = args.tokens_per_step, args.steps
            time_training(*sizes, args.sparsify, Path(folder))
    print(peak_memory())


if __name__ == "__main__":
    main()
