"""Make a tiny GPT-2 that has really learned something, in about a minute on 2 CPU cores and without a download.

    python tests/tiny_gpt2.py

The text is what every installation of Python has: the sources of the standard library, which are half code and half
English, and the manual behind `help("for")`. From it come a tokenizer and a GPT-2, which go with it into a folder that
skipcoder.py reads like any model from the Hub. Random weights would leave a sparse coder nothing to find.
"""

import argparse
import json
import random
import sys
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from skipcoder import in_split, pack
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
# what not every installation has, tables of character codes, and the manual as one long literal
SKIP = {"test", "tests", "site-packages", "dist-packages", "idlelib", "turtledemo", "encodings", "pydoc_data"}

def split(text: str) -> list[str]:
    """Cut a text at blank lines into documents of 300 to 4000 characters; others are dropped."""
    least, most, found, document = 300, 4000, [], ""
    for paragraph in text.split("\n\n"):
        # PEP 8 has two blank lines before a top-level def or class: the next paragraph then starts with a newline
        at_def = paragraph.startswith("\n") and len(document) >= least
        if document and (at_def or len(document) + len(paragraph) > most):
            found.append(document)
            document = ""
        document += ("\n\n" if document else "") + paragraph.strip("\n")
    return [document for document in [*found, document] if least <= len(document) <= most]

def documents() -> list[str]:
    """Some 4500 documents of 300 to 4000 characters, all different, shuffled; Python's version decides which."""
    found = [document for _, text in sorted(topics.items()) for document in split(text)]
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if SKIP.isdisjoint(path.relative_to(stdlib).parts):
            found += split(path.read_text(encoding="utf-8", errors="ignore"))  # a few old modules are in Latin-1
    found = list(dict.fromkeys(found))
    random.Random(0).shuffle(found)
    return found

def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's: EOS, the 256 bytes, and the most frequent merges in the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = dict(special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, unk_token=EOS)

def make(out: Path, vocab_size=2048, layers=4, d=64, ctx_len=128, steps=1300, max_documents=None):
    """Write a trained model, its tokenizer and text.jsonl into the folder `out`."""
    if out.exists() and not (out / "text.jsonl").exists():
        raise SystemExit(f"--out {out}: this folder is not one of ours and would be overwritten: choose another one")
    texts = documents()[:max_documents]
    kept = [text for text in texts if in_split(text, held_out=False)]  # eval.py's are new to the model, too
    tokenizer = train_tokenizer(kept, vocab_size)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=layers, n_embd=d, n_head=2, n_positions=ctx_len,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,  # less than one epoch: there is nothing to overfit
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new in one kernel: a step takes 17% less time
        initializer_range=0.02 * (768 / d) ** 0.5,  # 0.02 suits GPT-2's d of 768; at d = 128 it cost 0.5 nats
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    # betas and weight decay as in nanoGPT for small batches
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.1)
    warmup = max(1, steps // 20)  # then linearly down to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup)))
    rows = torch.tensor(pack(kept, tokenizer, ctx_len + 1)["tokens"])  # [rows, ctx_len + 1]
    order = torch.cat([torch.randperm(len(rows)) for _ in range(steps * 8 // len(rows) + 1)])  # epochs
    for batch in order[: steps * 8].view(steps, 8):
        logits = model(rows[batch, :-1]).logits  # [8, ctx_len] -> [8, ctx_len, vocab]
        opt.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[batch, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
    out.mkdir(parents=True, exist_ok=True)
    (out / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a tiny trained GPT-2 and its text.")
    parser.add_argument("--out", type=Path, default="runs/tiny-gpt2", help="folder to write (default: %(default)s)")
    out, start = parser.parse_args().out, time.time()
    make(out)
    flags = f"--model {out} --dataset {out}/text.jsonl --layer 2 --expansion 16 --tokens 1e6"
    print(f"done in {time.time() - start:.0f} s; next: python skipcoder.py {flags}")
