# SPDX-License-Identifier: MIT
"""See sparse coders at work: from nothing to a page of latents in 3 minutes, without a network.

    python tests/demo.py

It makes a tiny GPT-2 that has really learned something (random weights would leave a sparse coder
nothing to find), and then runs skipcoder.py and eval.py on it, as you would. The second time, the
LM is there already.

The text is what every installation of Python has: the sources of the standard library, which are
half code and half English, and the manual behind `help("for")`. From it come a tokenizer and the
LM, which go with it into a folder that skipcoder.py reads like any model from the hub.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from skipcoder import is_held_out, pack

EOS = "<|endoftext|>"
BATCH = 8  # rows in a step

# What not every installation has, tables of character codes, and the manual as one long literal.
SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "turtledemo",
    "encodings",
    "pydoc_data",
}
LEAST, MOST = 300, 4000  # characters of a document; others are dropped


def split(text: str) -> list[str]:
    """Cut a text at blank lines into documents of LEAST to MOST characters."""
    found, document = [], ""
    for paragraph in text.split("\n\n"):
        # PEP 8 has two blank lines before a top-level def or class. The paragraph that follows
        # them starts with a newline.
        at_def = paragraph.startswith("\n") and len(document) >= LEAST
        too_long = len(document) + len(paragraph) > MOST
        if document and (at_def or too_long):
            found.append(document)
            document = ""
        if document:
            document += "\n\n"
        document += paragraph.strip("\n")
    found.append(document)
    return [document for document in found if LEAST <= len(document) <= MOST]


def documents() -> list[str]:
    """Return some 4500 different documents, shuffled. Python's version decides which."""
    found = []
    for _, text in sorted(topics.items()):
        found += split(text)
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        folders = path.relative_to(stdlib).parts
        if not any(folder in SKIPPED for folder in folders):
            found += split(path.read_text(encoding="utf-8", errors="ignore"))  # some are in Latin-1
    found = list(dict.fromkeys(found))
    random.Random(0).shuffle(found)
    return found


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer like GPT-2's.

    Its tokens are EOS, the 256 bytes, and the most frequent merges in the texts.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, unk_token=EOS
    )


def new_model(tokenizer, layers: int, d: int, ctx_len: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=layers,
        n_embd=d,
        n_head=2,
        n_positions=ctx_len,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # There is less than one epoch: nothing can be overfitted.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's, in one kernel: 17% less time a step
        initializer_range=0.02 * (768 / d) ** 0.5,  # 0.02 is for d 768; at d 128 it cost 0.5 nats
    )
    return GPT2LMHeadModel(config)


def train(model: GPT2LMHeadModel, rows, steps: int):
    """Train on rows [rows, ctx_len + 1], drawn at random; betas and decay are nanoGPT's."""
    warm_up = max(1, steps // 20)

    def lr_factor(step):  # up, and then down to zero
        return min((step + 1) / warm_up, (steps - step) / (steps - warm_up))

    adam = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lr_factor)
    epochs = steps * BATCH // len(rows) + 1
    order = torch.cat([torch.randperm(len(rows)) for _ in range(epochs)])
    for batch in tqdm(order.split(BATCH)[:steps], "training", unit="step"):
        logits = model(rows[batch, :-1]).logits  # [8, ctx_len] -> [8, ctx_len, vocabulary]
        adam.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[batch, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()


def make(out, vocab_size=2048, layers=4, d=64, ctx_len=128, steps=1300, max_documents=None):
    """Write text.jsonl, a model trained on it, and last its tokenizer into the folder `out`."""
    if out.exists() and not (out / "text.jsonl").exists():
        sys.exit(f"error: {out}: this folder is not one of ours, move it away")

    print("collecting the text of Python's standard library", flush=True)
    texts = documents()[:max_documents]
    kept = [text for text in texts if not is_held_out(text)]  # eval.py's are new to the model, too

    print(f"training a tokenizer on {len(kept):,} documents", flush=True)
    tokenizer = train_tokenizer(kept, vocab_size)
    rows = torch.stack(list(pack(kept, tokenizer, ctx_len + 1)))

    print(f"training a GPT-2 of {layers} blocks, d {d}, on {rows.numel():,} tokens", flush=True)
    model = new_model(tokenizer, layers, d, ctx_len)
    train(model, rows, steps)

    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (out / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def run(script, *flags):
    """Run a script of ours, as a user would. If it fails, exit with its code."""
    command = ["python", os.path.relpath(ROOT / script), *map(str, flags)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command[1:]])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # Ctrl-C goes to the script, too, which saves what it has
        code = process.wait()
    if code != 0:
        sys.exit(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag(
        "--tokens", type=float, default=1e6, help="for training; a fifth for eval.py (%(default)g)"
    )
    flag("--out", type=Path, default="runs", help="where all folders go (default: %(default)s)")
    args = parser.parse_args()

    lm, coders, page = args.out / "tiny-gpt2", args.out / "tiny-gpt2-layer2", args.out / "tiny.html"
    if not (lm / "tokenizer.json").exists():
        make(lm)
    source = "--model", lm, "--dataset", lm / "text.jsonl", "--layer", 2, "--expansion", 16
    run("skipcoder.py", *source, "--tokens", f"{args.tokens:g}", "--out", coders, "--overwrite")
    run("eval.py", coders, "--tokens", f"{args.tokens / 5:g}", "--html", page)
    print(f"\nopen {page} in a browser")


if __name__ == "__main__":
    main()
