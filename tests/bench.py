"""How fast training is, and where the time goes, on a GPT-2-sized random model at layer 6, fed with real text.

    python tests/bench.py [--tokens-per-step 4096] [--steps 5] [--sparsify PYTHON]
    python tests/bench.py --eval RUN [flags of eval.py]

Prints tokens/s of one coder and of all three, the share they reach of the limit that this machine's matmul rate sets,
and the profile of a step. With --sparsify, the path of a Python that has `eai-sparsify`, it alternates with that
library training a coder on the same hookpoint. With --eval: how many plain forward passes of the LM over the tokens
that eval.py reads it takes, and its peak memory. Not a test.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
import skipcoder
import tiny_gpt2
import torch
from skipcoder import ARCHS, Coder, Trainer
from transformers import GPT2Config, GPT2LMHeadModel

LAYER, D, M, K, CTX_LEN = 6, 768, 24576, 32, 256

# What sparsify runs for one coder: the LM's forward pass with a hook (all blocks, no LM head; on a GPU in bf16, as its
# command line loads it), its coder's forward and backward, Adam. Its own Trainer adds data and logging to that.
SPARSIFY = """
import sys, time, torch
from sparsify.sparse_coder import SparseCoder
from sparsify.config import SparseCoderConfig
from transformers import GPT2Config, GPT2Model
rows, device = int(sys.argv[1]), sys.argv[2]
lm = GPT2Model(GPT2Config()).eval().to(device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32)
seen = {}
lm.h[6].mlp.register_forward_hook(lambda m, a, o: seen.update(x=a[0].flatten(0, 1), y=o.flatten(0, 1)))
coder = SparseCoder(768, SparseCoderConfig(transcode=True, normalize_decoder=False), device=device)
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


def time_eval(argv: list[str]):
    """Run eval.py, with plain forward passes, head included, of batches of 2,048 tokens before and after it."""
    config, _ = skipcoder.load_run(argv[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.randint(1000, (2048 // config["ctx_len"], config["ctx_len"]), device=device)

    @torch.no_grad()
    def plain() -> float:
        lm = skipcoder.load_lm(config["model"], device)
        return timed(lambda: lm(tokens, use_cache=False).logits[0, 0, 0].item(), 5)

    before, start = plain(), time.perf_counter()
    table, reports = evaluation.table, []  # of the report
    evaluation.table = lambda report: (reports.append(report), table(report))[1]
    sys.argv = ["eval.py", *argv]
    evaluation.main()
    seconds, read, after = time.perf_counter() - start, reports[0]["tokens"], plain()
    passes = seconds / ((before + after) / 2 * read / tokens.numel())
    print(
        f"eval.py: {seconds:.0f} s for {read:,} tokens, {passes:.2f} plain passes ({before:.2f}, {after:.2f} s a batch)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each version")
    parser.add_argument(
        "--eval", nargs=argparse.REMAINDER, help="a run, and flags of eval.py: time that instead"
    )
    parser.add_argument(
        "--sparsify", metavar="PYTHON", help="a Python that has eai-sparsify, to compare with"
    )
    args = parser.parse_args()
    if args.eval:
        time_eval(args.eval)
        return print(
            f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if skipcoder.fast_bfloat16(device) else torch.float32
    rows = args.tokens_per_step // CTX_LEN
    N = rows * (CTX_LEN - 1)
    folder = Path((_keep := tempfile.TemporaryDirectory()).name)  # gone when the program ends
    texts = tiny_gpt2.documents()
    for i in range(5):
        (folder / f"text{i}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts[i::5])
        )
    tokenizer = tiny_gpt2.train_tokenizer(texts, 8192)
    batches = skipcoder.token_batches(str(folder), None, tokenizer, CTX_LEN, rows, seed=0)

    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    lm = skipcoder.load_lm(str(folder), device)
    _, blocks, mlp = skipcoder.find_mlp(lm, LAYER)
    del blocks[LAYER + 1 :]
    activations = skipcoder.MLPActivations(lm, mlp)
    x, y = activations(next(batches).to(device))
    trainers = {arch: Trainer(Coder(arch, D, M, K).to(device), x, y, 1e-4, 1e9) for arch in ARCHS}
    print(
        f"{device}, {torch.get_num_threads()} threads, matmuls in {dtype}; {rows * CTX_LEN} tokens a step"
    )

    def step(archs):
        x, y = activations(next(batches).to(device))
        for arch in archs:
            trainers[arch].step(x, y, 1)

    seconds, reference = {"one": [], "three": []}, None  # of whole steps, alternating
    if args.sparsify:
        command = [args.sparsify, "-c", SPARSIFY, str(rows), device.type]
        pipes = dict(
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=1,
            text=True,
        )
        seconds["sparsify"], reference = [], subprocess.Popen(command, **pipes)
    for _ in range(args.steps + 1):
        for name, archs in (("one", ["transcoder"]), ("three", ARCHS)):
            seconds[name].append(timed(lambda: step(archs), 1))
        if reference:
            reference.stdin.write("go\n")
            line = next(
                line for line in reference.stdout if line.startswith("seconds")
            )  # StopIteration: it has failed
            seconds["sparsify"].append(float(line.split()[1]))
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name:10} {rows * CTX_LEN / value:10,.0f} tokens/s")
    if reference:
        reference.stdin.close()
        print(
            f"three coders here against three runs of sparsify: {3 * median['sparsify'] / median['three']:.1f}x"
        )

    # the limit by matmul alone, at the rate of the encoder's own shape
    a, b = (torch.randn(n, D, device=device, dtype=dtype) for n in (N, M))
    rate = 2 * N * D * M / timed(lambda: a @ b.T)
    flops = (
        2 * rows * CTX_LEN * (LAYER + 1) * 12 * D * D + 3 * 2 * N * D * M
    )  # of three coders and their LM
    print(
        f"matmul {rate / 1e12:.2f} TFLOP/s; limit by matmul alone {rate * rows * CTX_LEN / flops:,.0f} tokens/s"
    )
    print(f"three coders reach {flops / rate / median['three']:.0%} of it")

    with torch.profiler.profile() as profile:
        step(ARCHS)
    sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=sort_by, row_limit=12))
    gpu = (
        f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU"
        if device.type == "cuda"
        else ""
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB{gpu}")


if __name__ == "__main__":
    main()
