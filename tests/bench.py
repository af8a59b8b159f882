"""How fast training is, and where the time goes, on a GPT-2-sized random model at layer 6, fed with real text.

    python tests/bench.py [--tokens-per-step 4096] [--steps 5] [--sparsify PYTHON]

Prints tokens/s of one coder and of all three; the time of each part of a step; the matmul rate of this machine,
measured in the same run, and the share of the limit it sets that training reaches; and the peak memory. With
--sparsify, the path of a Python that has `eai-sparsify`, it alternates with that library training a coder on the
same hookpoint and prints the ratio of medians. Not a test: pytest does not collect it.
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

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_gpt2  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

import skipcoder  # noqa: E402
from skipcoder import ARCHS, Coder, MLPActivations, TokenBatches, Trainer, find_mlp, mean_and_variance  # noqa: E402

LAYER, D, M, K, CTX_LEN = 6, 768, 24576, 32, 256

# What sparsify runs for one coder: the LM's forward pass with a hook (all blocks, no LM head; on a GPU in bf16, as its
# command line loads it), its coder's forward and backward, Adam. Its own Trainer adds data and logging to that.
SPARSIFY = """
import sys, time, torch
from sparsify.sparse_coder import SparseCoder
from sparsify.config import SparseCoderConfig
from transformers import GPT2Config, GPT2Model
torch.manual_seed(0)
rows = int(sys.argv[1]); device = sys.argv[2]
lm = GPT2Model(GPT2Config()).eval().to(device)
if torch.cuda.is_bf16_supported():
    lm.to(torch.bfloat16)
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
    print(time.perf_counter() - start, flush=True)
"""


def timed(f, device, times: int = 3) -> float:
    """Median seconds of a call, after one to warm up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def make_inputs(folder: Path, rows: int):
    """Save a random GPT-2 in the folder, and return batches [rows, CTX_LEN] of the standard library's text."""
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    texts = tiny_gpt2.documents()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = tiny_gpt2.train_tokenizer(texts, 8192)
    return skipcoder.read_ahead(TokenBatches(str(folder / "text.jsonl"), None, tokenizer, CTX_LEN, rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each version")
    parser.add_argument("--sparsify", metavar="PYTHON", help="a Python that has eai-sparsify, to compare with")
    args = parser.parse_args()
    device = skipcoder.pick_device("auto")
    dtype = skipcoder.matmul_dtype(device)
    torch.manual_seed(0)
    skipcoder.quiet_libraries()
    skipcoder.keep_freed_memory()
    rows = args.tokens_per_step // CTX_LEN
    N = rows * (CTX_LEN - 1)
    folder = tempfile.TemporaryDirectory()  # gone when the program ends
    batches = make_inputs(Path(folder.name), rows)
    tokens = next(batches).to(device)
    lm = skipcoder.load_lm(folder.name, device, dtype)
    _, blocks, mlp = find_mlp(lm, LAYER)
    del blocks[LAYER + 1 :]
    activations = MLPActivations(lm, mlp, dtype)
    x, y = activations(tokens)
    variance = mean_and_variance(y)[1]
    trainers = {}
    for arch in ARCHS:
        coder = Coder(arch, D, M, K).to(device)
        coder.matmul_dtype = dtype
        trainers[arch] = Trainer(coder, x, y, 1e-4, 0, 1e9)
        trainers[arch].step(x, y, variance, 1)
    print(f"{device}, {torch.get_num_threads()} threads, matmuls in {dtype}; {rows * CTX_LEN} tokens a step")

    waited = []

    def step(archs):
        start = time.perf_counter()
        tokens = next(batches)
        waited.append(time.perf_counter() - start)
        x, y = activations(tokens.to(device, non_blocking=True))
        variance = mean_and_variance(y)[1]
        for arch in archs:
            trainers[arch].step(x, y, variance, 1)

    # whole steps, alternating
    reference = None
    if args.sparsify:
        command = [args.sparsify, "-c", SPARSIFY, str(rows), device.type]
        reference = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    seconds = {"one": [], "three": [], "sparsify": []}
    for i in range(args.steps + 1):
        for name, archs in (("one", ["transcoder"]), ("three", ARCHS)):
            seconds[name].append(timed(lambda: step(archs), device, 1))
        if reference:
            reference.stdin.write("go\n")
            reference.stdin.flush()
            line = reference.stdout.readline()
            while line and not line[0].isdigit():
                line = reference.stdout.readline()
            seconds["sparsify"].append(float(line))
    median = {name: statistics.median(values[1:]) for name, values in seconds.items() if values}
    for name, value in median.items():
        print(f"{name:10} {rows * CTX_LEN / value:10,.0f} tokens/s")
    if reference:
        reference.stdin.close()
        ratio = 3 * median["sparsify"] / median["three"]
        print(f"three coders here against three runs of sparsify: {ratio:.1f}x")

    # the limit by matmul alone, at the rate of the encoder's own shape
    a, b = torch.randn(N, D, device=device).to(dtype), torch.randn(M, D, device=device).to(dtype)
    rate = 2 * N * D * M / timed(lambda: F.linear(a, b), device)
    flops = 2 * rows * CTX_LEN * (LAYER + 1) * 12 * D * D + 3 * 2 * N * D * M  # of three coders and their LM
    print(f"matmul {rate / 1e12:.2f} TFLOP/s; limit by matmul alone {rate * rows * CTX_LEN / flops:,.0f} tokens/s")
    print(f"three coders reach {flops / rate / median['three']:.0%} of it")

    # the parts of one coder's step
    coder = trainers["transcoder"].coder
    W, W_dec = coder.encoder.weight.detach(), coder.W_dec.detach()
    pre = F.linear(x.to(dtype), W.to(dtype), coder.encoder.bias.detach().to(dtype))
    z, idx = skipcoder.topk(pre, K)
    z = z.relu().float()

    def forward_backward():
        y_hat, *_ = coder(x, y)
        ((y - y_hat).square().sum() / variance).backward()

    parts = {"data": statistics.median(waited), "LM forward": timed(lambda: activations(tokens), device)}
    parts["encoder"] = timed(lambda: F.linear(x.to(dtype), W.to(dtype), coder.encoder.bias.detach().to(dtype)), device)
    parts["topk"] = timed(lambda: skipcoder.topk(pre, K), device)
    parts["decoder"] = timed(lambda: F.embedding_bag(idx, W_dec, per_sample_weights=z, mode="sum"), device)
    both = timed(forward_backward, device)
    parts["backward"] = both - parts["encoder"] - parts["topk"] - parts["decoder"]
    parts["optimizer"] = timed(trainers["transcoder"].optimizer.step, device)
    times = {name: 1 if name in ("data", "LM forward") else 3 for name in parts}  # in a step of three coders
    total = sum(times[name] * value for name, value in parts.items())
    for name, value in parts.items():
        each = "a coder" if times[name] == 3 else ""
        print(f"{name:10} {1e3 * value:8.1f} ms {each:8} {times[name] * value / total:6.1%} of a step of three")
    start = time.perf_counter()
    for _ in range(64):  # more than are read ahead
        next(batches)
    rate = 64 * rows * CTX_LEN / (time.perf_counter() - start)
    print(f"the reader makes {rate:,.0f} tokens/s when nothing else runs")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
