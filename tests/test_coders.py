"""The coders' numbers and gradients, against dense autograd in float64."""

import pytest
import torch

from skipcoder import ARCHS, Coder, Trainer, mean_and_variance, topk

N, d, M, k = 24, 8, 40, 5


def make(arch: str, device) -> tuple[Coder, torch.Tensor, torch.Tensor]:
    """A coder in float64 in which every parameter is random, and x, y [N, d]."""
    generator = torch.Generator().manual_seed(0)
    coder = Coder(arch, d, M, k).double().to(device)
    coder.matmul_dtype = torch.float64
    for p in coder.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(device)
    return coder, *torch.randn(2, N, d, generator=generator, dtype=torch.float64).to(device)


def dense_forward(coder: Coder, x, y, latents=None, k=k):
    """The equations of the docstring, written out with dense tensors; `latents` restricts TopK to some of them."""
    W_enc, b_enc, W_dec = coder.encoder.weight, coder.encoder.bias, coder.W_dec
    pre = ((y - coder.b_dec) if coder.arch == "sae" else x) @ W_enc.T + b_enc  # [N, M]
    if latents is not None:
        pre = torch.where(torch.isin(torch.arange(M, device=x.device), latents), pre, -torch.inf)
    kept = torch.zeros_like(pre, dtype=torch.bool).scatter(1, pre.topk(k).indices, True)
    z = torch.where(kept, pre, 0).relu()
    return z @ W_dec, z


@pytest.mark.parametrize("arch", ARCHS)
def test_forward_and_gradients_equal_dense_autograd(arch, device):
    coder, x, y = make(arch, device)
    target = torch.randn_like(y)
    dense, z = dense_forward(coder, x, y)
    dense = dense + coder.b_dec + (x @ coder.W_skip.T if arch == "skip_transcoder" else 0)
    expected = torch.autograd.grad((dense - target).square().sum(), list(coder.parameters()))

    y_hat, acts, indices = coder(x, y)
    gradients = torch.autograd.grad((y_hat - target).square().sum(), list(coder.parameters()))
    torch.testing.assert_close(y_hat, dense)
    torch.testing.assert_close(torch.zeros_like(z).scatter(1, indices, acts), z)
    for (name, _), gradient, dense_gradient in zip(coder.named_parameters(), gradients, expected):
        torch.testing.assert_close(gradient, dense_gradient, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("arch", ARCHS)
def test_auxk_gradients_equal_dense_autograd(arch, device):
    coder, x, y = make(arch, device)
    dead = torch.tensor([1, 4, 9, 16, 25, 36], device=device)
    error = torch.randn_like(y)
    k_aux = d // 2
    parameters = [coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec]
    dense, _ = dense_forward(coder, x, y, dead, k_aux)
    expected = torch.autograd.grad((error - dense).square().sum(), parameters, allow_unused=True)

    trainer = Trainer.__new__(Trainer)
    trainer.coder = coder
    loss = trainer.auxk_loss(x, y, error, dead)
    torch.testing.assert_close(loss, (error - dense).square().sum())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for gradient, dense_gradient in zip(gradients, expected):
        if dense_gradient is None:  # b_dec is no part of AuxK's prediction; only the autoencoder's input depends on it
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, dense_gradient)


@pytest.mark.parametrize("M, k", [(40, 5), (17, 17), (96, 40), (1024, 32), (16, 1)])
def test_topk_equals_that_of_torch(M, k, device):
    for pre in (torch.randn(9, M, device=device), torch.randint(4, (9, M), device=device).bfloat16()):  # with ties, too
        z, indices = topk(pre, k)
        assert torch.equal(z.sort(1).values, pre.topk(k).values.sort(1).values)
        assert torch.equal(pre.gather(1, indices), z)
        assert all(len(set(row)) == k for row in indices.tolist())


def test_float32_gradients_are_not_off(device):
    """The path that training takes: fp32 weights and sums, whatever the dtype of the dense matmul."""
    coder, x, y = make("transcoder", device)
    single = Coder("transcoder", d, M, k).to(device)
    single.load_state_dict({name: p.float() for name, p in coder.state_dict().items()})
    for c, dtype in ((coder, torch.float64), (single, torch.float32)):
        (c(x.to(dtype), y.to(dtype)).y_hat - y.to(dtype)).square().sum().backward()
    for p, q in zip(coder.parameters(), single.parameters()):
        assert q.grad.dtype == torch.float32
        torch.testing.assert_close(q.grad.double(), p.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_start(arch, device):
    """Transcoders start as the constant mean of y (FVU 1), the autoencoder with W_dec = W_enc of unit rows."""
    x, y = torch.randn(2, 500, d, device=device) * 7 + 3
    coder = Coder(arch, d, M, k).to(device)
    Trainer(coder, x, y, 1e-3, 0, 1000)
    y_hat = coder(x, y).y_hat
    _, variance = mean_and_variance(y)
    fvu = ((y - y_hat).square().sum() / variance).item()
    if arch == "sae":
        torch.testing.assert_close(coder.W_dec, coder.encoder.weight)
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(M, device=device))
        assert fvu != pytest.approx(1)
    else:
        assert fvu == pytest.approx(1, abs=1e-4)


def test_steps(device):
    """Training lowers the loss whatever the scale of x and y, keeps the autoencoder's rows unit, counts silence."""
    torch.manual_seed(0)
    x = torch.randn(2000, d, device=device)
    y = torch.tanh(x @ torch.randn(d, d, device=device)) + 0.5
    reached = {}
    for scale in (1, 1000):
        for arch in ARCHS:
            coder = Coder(arch, d, M, k).to(device)
            trainer = Trainer(coder, x, y * scale, 1e-2, 1 / 32, dead_after=4000)
            _, variance = mean_and_variance(y * scale)
            for _ in range(150):
                trainer.squared_error.zero_()
                trainer.step(x, y * scale, variance, 1)
            reached[arch, scale] = (trainer.squared_error / variance).item()
            assert reached[arch, scale] < 0.2
            if arch == "sae":
                torch.testing.assert_close(coder.W_dec.data.norm(dim=1), torch.ones(M, device=device))
            active = torch.zeros(M, dtype=torch.bool, device=device)
            out = coder(x, y * scale)
            active[out.indices[out.acts > 0]] = True
            assert (trainer.silent[~active] > 0).all()
        assert reached["skip_transcoder", scale] < reached["transcoder", scale]
    torch.testing.assert_close(coder.W_dec.norm(dim=1).isfinite().all().item(), True)
    for arch in ARCHS:  # a step is in the parameter's own units, so the scale of y makes no difference
        assert reached[arch, 1] == pytest.approx(reached[arch, 1000], rel=0.05)
