"""Make a tiny GPT-2 that has really learned something, in about a minute on 2 CPU cores and without a download.

    python tests/tiny_gpt2.py

The text is what every installation of Python has: the sources of the standard library, which are half code and half
English (docstrings and comments), and the manual behind `help("for")`. From it come a tokenizer and a GPT-2; both go
with the text into one folder, which skipcoder.py reads like any model from the Hub. The tests make a smaller one with
the same functions. Random weights would not do: they leave a sparse coder nothing to find.
"""

import argparse
import json
import os
import random
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from skipcoder import in_split  # noqa: E402  before torch, whose threads it keeps polite

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
# what not every installation has, tables of character codes, and the manual as one long literal
SKIP = {"test", "tests", "site-packages", "dist-packages", "idlelib", "turtledemo", "encodings", "pydoc_data"}

def split(text: str, least: int = 300, most: int = 4000) -> list[str]:
    """Cut a text at blank lines into documents of `least` to `most` characters; others are dropped."""
    found, document = [], ""
    for paragraph in text.split("\n\n"):
        # PEP 8 has two blank lines before a top-level def or class: the next paragraph then starts with a newline
        at_def = paragraph.startswith("\n") and len(document) >= least
        if document and (at_def or len(document) + len(paragraph) > most):
            found.append(document)
            document = ""
        document += ("\n\n" if document else "") + paragraph.strip("\n")
    return [document for document in [*found, document] if least <= len(document) <= most]

def documents(seed: int = 0) -> list[str]:
    """Some 4500 documents of 300 to 4000 characters, all different, shuffled; Python's version decides which."""
    found = [document for _, text in sorted(topics.items()) for document in split(text)]
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if SKIP.isdisjoint(path.relative_to(stdlib).parts):
            found += split(path.read_text(encoding="utf-8", errors="ignore"))  # a few old modules are in Latin-1
    found = list(dict.fromkeys(found))
    random.Random(seed).shuffle(found)
    return found

def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's: EOS, the 256 bytes, and the most frequent merges in the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = dict(special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, unk_token=EOS)

def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """The tokens of all texts, an EOS after each, cut into full rows [rows, length]; what is left over is dropped."""
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)

def next_token_loss(model: GPT2LMHeadModel, rows: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it in its row [rows, ctx_len + 1], in nats/token."""
    logits = model(rows[:, :-1]).logits  # [rows, ctx_len] -> [rows, ctx_len, vocab]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

def train(model: GPT2LMHeadModel, rows: Tensor, steps: int, batch_size: int, lr: float):
    """Train for so many batches of rows [rows, ctx_len + 1]."""
    # betas and weight decay as in nanoGPT for small batches
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)
    warmup = max(1, steps // 20)  # then linearly down to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup)))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(steps * batch_size // len(rows) + 1)])  # epochs
    for batch in order[: steps * batch_size].view(steps, batch_size):
        loss = next_token_loss(model, rows[batch])
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()

def make(
    out: Path, *, vocab_size: int = 2048, layers: int = 4, d: int = 64, heads: int = 2, ctx_len: int = 128,
    steps: int = 1300, batch_size: int = 8, lr: float = 5e-3, max_documents: int | None = None, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Write model, tokenizer and text.jsonl into the folder `out`; gives held-out loss and unigram entropy [nats]."""
    if out.exists() and not (out / "text.jsonl").exists():
        raise SystemExit(f"--out {out}: this folder is not one of ours and would be replaced: choose another one")
    texts = documents(seed)[:max_documents]
    kept, held_out = ([text for text in texts if in_split(text, side)] for side in (False, True))  # as skipcoder.py
    tokenizer = train_tokenizer(kept, vocab_size)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=layers, n_embd=d, n_head=heads, n_positions=ctx_len,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,  # less than one epoch: there is nothing to overfit
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new in one kernel: a step takes 17% less time
        initializer_range=0.02 * (768 / d) ** 0.5,  # 0.02 suits GPT-2's d of 768; at d = 128 it cost 0.5 nats
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    train(model, pack(kept, tokenizer, ctx_len + 1), steps, batch_size, lr)
    rows = pack(held_out, tokenizer, ctx_len + 1)
    with torch.no_grad():
        loss = sum(next_token_loss(model, part).item() * len(part) for part in rows.split(64)) / len(rows)
    p = rows[:, 1:].flatten().bincount() / rows[:, 1:].numel()  # [vocab]

    new = out.with_name(out.name + ".new")  # renamed at the end, so that no folder only looks complete
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    (new / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    return loss, -torch.xlogy(p, p).sum().item()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a tiny trained GPT-2 and its text.")
    default = os.path.relpath(ROOT / "runs" / "tiny-gpt2")
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: %(default)s)")
    out, start = parser.parse_args().out, time.time()
    loss, entropy = make(out)
    print(f"held-out loss {loss:.3f} nats/token, unigram entropy {entropy:.3f}, {time.time() - start:.0f} s")
    script, text = os.path.relpath(ROOT / "skipcoder.py"), out / "text.jsonl"
    print(f"next: python {script} --model {out} --dataset {text} --layer 2 --expansion 16 --tokens 1e6")
