"""The coders' numbers and gradients against dense autograd in float64, and what a step does."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import skipcoder
from skipcoder import ARCHS, Coder, TopKEncoder, Trainer

N, d, M, k = 24, 8, 40, 5
EVERY_ARCH = pytest.mark.parametrize("arch", ARCHS)


def make(arch: str, device) -> tuple[Coder, torch.Tensor, torch.Tensor]:
    """Return a coder in float64 in which every parameter is random, and x, y [N, d]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        numbers = torch.randn(*shape, generator=generator)
        return numbers.double().to(device)

    coder = Coder(arch, d, M, k).double()
    for p in coder.parameters():
        p.data = random(*p.shape)
    return coder, random(N, d), random(N, d)


def new_trainer(arch, x, y, lr=1e-2) -> Trainer:
    return Trainer(Coder(arch, d, M, k).to(x.device), x, y, lr)


def variance(a) -> float:
    """Return the sum of squares of a [N, d] around its mean."""
    centred = a - a.mean(0)
    return centred.square().sum().item()


def deviation(a) -> float:
    """Return the standard deviation of an entry of a [N, d]."""
    return math.sqrt(variance(a) / a.numel())


def sizes_of_parameters(arch, x, y) -> dict:
    """Return the units of the learning rate."""
    s_x, s_y = deviation(x), deviation(y)
    s_z = s_y if arch == "sae" else s_x
    of_biases = {"b_enc": s_z, "b_dec": s_y}
    return of_biases | {"W_enc": 1, "W_dec": s_y / s_z, "W_skip": s_y / s_x}


def dense_forward(coder: Coder, x, y, k: int = k):
    """Return y_hat [N, d] and z [N, M]: the docstring's equations with dense tensors."""
    read = y - coder.b_dec if coder.arch == "sae" else x
    pre = read @ coder.W_enc.T + coder.b_enc  # [N, M]
    largest = pre.topk(k).indices
    kept = torch.zeros_like(pre).scatter(1, largest, 1)
    z = (kept * pre).relu()
    y_hat = z @ coder.W_dec + coder.b_dec
    if coder.W_skip is not None:
        y_hat = y_hat + x @ coder.W_skip.T
    return y_hat, z


# ---- Forward and backward -------------------------------------------------------------------


@pytest.mark.parametrize("bias", [0, -2.5])
@pytest.mark.parametrize("l1", [0, 0.1])
@EVERY_ARCH
def test_forward_and_gradients_equal_dense_autograd(arch, l1, bias, device):
    """Also of a penalty on acts, of what the coder reads, and where the ReLU cuts some of the k."""
    coder, x, y = make(arch, device)
    coder.b_enc.data += bias * coder.W_enc.norm(dim=1)
    inputs = dict(coder.named_parameters())
    inputs["x"] = x.requires_grad_()
    inputs["y"] = y.requires_grad_()

    # Ours, and the dense one.
    y_hat, acts, indices = coder(x, y)
    dense_y_hat, dense_z = dense_forward(coder, x, y)
    cut = (dense_z > 0).sum(1) < k
    assert cut.any() == (bias < 0), "the test needs tokens with fewer than k positive latents"

    assert_close(y_hat, dense_y_hat)
    z = torch.zeros_like(dense_z).scatter(1, indices, acts)
    assert_close(z, dense_z)

    # Gradients.
    def gradients(y_hat, acts):
        squared_error = (y_hat - y).square().sum()
        loss = squared_error + l1 * acts.sum()
        found = torch.autograd.grad(loss, inputs.values(), allow_unused=True)
        return dict(zip(inputs, found))

    ours, dense = gradients(y_hat, acts), gradients(dense_y_hat, dense_z)
    assert_close(ours, dense)


SIZES = [(40, 5), (17, 17), (96, 40), (1024, 32), (16, 1)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("M, k", SIZES)
def test_the_encoder_equals_two_plain_lines(M, k, ties, device):
    """Its values, its k different indices, and its gradients, also where values are tied."""
    inputs = [torch.randn(9, d), torch.randn(M, d), torch.randn(M)]
    if ties:
        inputs = [a.round() for a in inputs]
    read, W, b = (a.double().to(device).requires_grad_() for a in inputs)

    # Values and indices.
    pre, indices = TopKEncoder.apply(read, W, b, k)
    dense = F.linear(read, W, b)
    largest = dense.topk(k).values
    assert_close(pre.sort(1).values, largest.sort(1).values)
    assert_close(pre, dense.gather(1, indices))
    for row in indices.tolist():
        assert len(set(row)) == k

    # Gradients: of the dense one at the same indices, since ties may fall either way.
    weight = torch.randn_like(pre)
    loss = (pre * weight).sum()
    dense_loss = (dense.gather(1, indices) * weight).sum()
    ours = torch.autograd.grad(loss, (read, W, b))
    plain = torch.autograd.grad(dense_loss, (read, W, b))
    assert_close(ours, plain)


# ---- Start and training ---------------------------------------------------------------------


def make_data(device, scale_x=1.0, scale_y=1.0):
    """Return x, y [2000, d] that are not centred, where y is a smooth function of x."""
    torch.manual_seed(0)
    x = torch.randn(2000, d, device=device)
    W = torch.randn(d, d, device=device)
    y = torch.tanh(x @ W) + 0.5
    return (x + 3) * scale_x, y * scale_y


@EVERY_ARCH
def test_start(arch, device):
    """Transcoders start as the mean of y (FVU 1), the SAE with W_dec = W_enc of unit rows."""
    x, y = make_data(device, 7, 5)
    coder = new_trainer(arch, x, y).coder
    assert_close(coder.b_dec.data, y.mean(0))
    lengths = coder.W_enc.norm(dim=1)
    assert_close(lengths, torch.ones_like(lengths))
    if arch == "sae":
        assert torch.equal(coder.W_dec, coder.W_enc)
        assert not coder.b_enc.any()
    else:
        pre = F.linear(x, coder.W_enc, coder.b_enc)
        assert pre.mean(0).abs().max() < 1e-4 * deviation(x)
        assert coder.b_enc.any()
        y_hat, _, _ = coder(x, y)
        assert_close(y_hat, y.mean(0).expand_as(y))


def test_training_lowers_the_loss_whatever_the_scale(device):
    reached = {}
    for scale in ((1, 1), (1000, 0.1)):
        x, y = make_data(device, *scale)
        for arch in ARCHS:
            trainer = new_trainer(arch, x, y)
            for _ in range(100):
                trainer.sums.zero_()
                trainer.step(x, y, 1)
            assert trainer.sums[1].item() == pytest.approx(variance(y))
            fvu = reached[arch, scale] = trainer.pop_fvu()
            assert fvu < 0.25
            assert fvu == pytest.approx(reached[arch, (1, 1)], rel=0.05)
            if arch == "sae":
                lengths = trainer.coder.W_dec.norm(dim=1)
                assert_close(lengths, torch.ones_like(lengths))
        assert reached["skip_transcoder", scale] < reached["transcoder", scale]


def test_pop_fvu_is_of_all_tokens_since_the_last_call(device):
    """One ratio of sums, not a mean of ratios. With a rate of 0 nothing learns."""
    x, y = make_data(device)
    trainer = new_trainer("skip_transcoder", x, y, lr=0.0)
    trainer.coder.W_skip.data.fill_(0.1)
    parts = list(zip(x.split(300), y.split(300)))
    for batches in (parts[:2], parts[2:3]):
        error = total = 0
        for x, y in batches:
            y_hat, _ = dense_forward(trainer.coder, x, y)
            error += (y - y_hat).square().sum().item()
            total += variance(y)
            trainer.step(x, y, 1)
        assert trainer.pop_fvu() == pytest.approx(error / total, rel=1e-4)


def test_a_step_of_two_processes_is_that_of_one_with_their_rows(monkeypatch, device):
    """Gradients are added up over processes, and so are the sums of which the FVU is made."""
    x, y = (a.double() for a in make_data(device))
    new = [Trainer(Coder("sae", d, M, k).double().to(device), x, y, 0.01) for _ in range(3)]
    first, second, both = new
    both.step(x, y, 1)
    second.step(x[900:], y[900:], 1)
    of_second = [*(p.grad for p in second.coder.parameters()), second.sums.clone()]
    monkeypatch.setattr(skipcoder, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda a: a.add_(of_second.pop(0)))
    first.step(x[:900], y[:900], 1)
    for p, q in zip(first.coder.parameters(), both.coder.parameters()):
        assert_close(p, q)
    error, variance = (first.sums + second.sums).tolist()
    assert first.pop_fvu() == pytest.approx(error / variance)


@EVERY_ARCH
def test_steps_equal_adam_by_hand(arch, device):
    """In float64, on the dense equations, with the betas and the sizes that the README names.

    The loss of all batches is over the variance of the first one, so an error counts alike in each.
    """
    x, y = (a.double() for a in make_data(device, 7, 5))
    coder = Coder(arch, d, M, k).double().to(device)
    trainer = Trainer(coder, x, y, 1e-3)
    by_hand = copy.deepcopy(coder)

    sizes = sizes_of_parameters(arch, x, y)
    means = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    squares = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    for t in range(1, 21):
        x_t, y_t = x[20 * t :][: 40 + t], y[20 * t :][: 40 + t]
        trainer.step(x_t, y_t, 0.5)

        y_hat, _ = dense_forward(by_hand, x_t, y_t)
        error = (y_t - y_hat).square().sum()
        by_hand.zero_grad()
        (error / variance(y)).backward()
        for name, p in by_hand.named_parameters():
            gradient = p.grad
            on_sphere = arch == "sae" and name == "W_dec"
            if on_sphere:
                gradient = gradient - (gradient * p.data).sum(1, keepdim=True) * p.data
            means[name] = 0.9 * means[name] + 0.1 * gradient
            squares[name] = 0.98 * squares[name] + 0.02 * gradient.square()
            mean = means[name] / (1 - 0.9**t)
            root = (squares[name] / (1 - 0.98**t)).sqrt()
            p.data -= 1e-3 * 0.5 * sizes[name] * mean / (root + 1e-8)
            if on_sphere:
                p.data = F.normalize(p.data)
    for name, p in coder.named_parameters():
        assert_close(p, by_hand.get_parameter(name), rtol=1e-6, atol=1e-7)


def test_matmuls_in_bfloat16_leave_everything_else_in_float32(monkeypatch):
    """Where bfloat16 is fast. The numbers are a little off those of float32."""
    torch.manual_seed(0)
    coder = Coder("skip_transcoder", 16, 64, 4)
    x, y = torch.randn(50, 16), torch.randn(50, 16)
    torch.nn.init.normal_(coder.W_dec)
    torch.nn.init.normal_(coder.W_skip)
    results = []
    for fast in (False, True):
        monkeypatch.setattr(skipcoder, "fast_bfloat16", lambda device, fast=fast: fast)
        with skipcoder.fast_matmuls(x.device):
            y_hat, acts, _ = coder(x, y)
        coder.zero_grad()
        (y - y_hat).square().mean().backward()
        for tensor in (y_hat, acts, coder.W_enc.grad, coder.W_dec.grad, coder.W_skip.grad):
            assert tensor.dtype == torch.float32
        results.append((y_hat.detach(), coder.W_skip.grad.clone()))
    for exact, rounded in zip(*results):
        assert 1e-5 < (exact - rounded).norm() / exact.norm() < 0.1
