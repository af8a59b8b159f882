"""The coders' numbers and gradients against dense autograd in float64, and what a training step does."""

import pytest
import torch

from skipcoder import ARCHS, WAKE, Coder, Trainer, topk

N, d, M, k = 24, 8, 40, 5

def make(arch: str, device) -> tuple[Coder, torch.Tensor, torch.Tensor]:
    """A coder in float64 in which every parameter is random, and x, y [N, d]."""
    generator = torch.Generator().manual_seed(0)
    coder = Coder(arch, d, M, k).double().to(device)
    for p in coder.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(device)
    return coder, *torch.randn(2, N, d, generator=generator, dtype=torch.float64).to(device)

def dense_forward(coder: Coder, x, y, k: int = k):
    """y_hat [N, d] and z [N, M]: the equations of the docstring, written out with dense tensors."""
    pre = ((y - coder.b_dec) if coder.arch == "sae" else x) @ coder.W_enc.T + coder.b_enc  # [N, M]
    kept = torch.zeros_like(pre, dtype=torch.bool).scatter(1, pre.topk(k).indices, True)
    z = torch.where(kept, pre, 0).relu()
    return z @ coder.W_dec + coder.b_dec + (0 if coder.W_skip is None else x @ coder.W_skip.T), z

@pytest.mark.parametrize("l1", [0, 0.1])
@pytest.mark.parametrize("arch", ARCHS)
def test_forward_and_gradients_equal_dense_autograd(arch, l1, device):
    """Also of a penalty on acts, and of what the coder reads."""
    coder, x, y = make(arch, device)
    names, inputs = zip(*coder.named_parameters(), ("x", x.requires_grad_()), ("y", y.requires_grad_()))
    y_hat_dense, z = dense_forward(coder, x, y)
    y_hat, acts, indices = coder(x, y)
    torch.testing.assert_close(y_hat, y_hat_dense)
    torch.testing.assert_close(torch.zeros_like(z).scatter(1, indices, acts), z)
    losses = [(prediction - y).square().sum() + l1 * a.sum() for prediction, a in ((y_hat, acts), (y_hat_dense, z))]
    gradients, expected = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in losses)
    for name, gradient, dense_gradient in zip(names, gradients, expected):
        torch.testing.assert_close(gradient, dense_gradient, msg=lambda message: f"{name}: {message}")

@pytest.mark.parametrize("M, k", [(40, 5), (17, 17), (96, 40), (1024, 32), (16, 1)])
def test_topk_equals_that_of_torch(M, k, device):
    for pre in (torch.randn(9, M, device=device), torch.randint(4, (9, M), device=device).bfloat16()):  # with ties, too
        z, indices = topk(pre, k)
        assert torch.equal(z.sort(1).values, pre.topk(k).values.sort(1).values)
        assert torch.equal(pre.gather(1, indices), z)
        assert all(len(set(row)) == k for row in indices.tolist())

def make_data(device, scale_x=1.0, scale_y=1.0):
    """x, y [2000, d] that are not centred, where y is a smooth function of x."""
    torch.manual_seed(0)
    x = torch.randn(2000, d, device=device)
    y = torch.tanh(x @ torch.randn(d, d, device=device)) + 0.5
    return (x + 3) * scale_x, y * scale_y

@pytest.mark.parametrize("arch", ARCHS)
def test_start(arch, device):
    """Transcoders start as the constant mean of y (FVU 1), the autoencoder with W_dec = W_enc of unit rows."""
    x, y = make_data(device, 7, 5)
    coder = Coder(arch, d, M, k).to(device)
    Trainer(coder, x, y, 1e-3, 1000)
    torch.testing.assert_close(coder.b_dec.data, y.mean(0))
    torch.testing.assert_close(coder.W_enc.norm(dim=1), torch.ones(M, device=device))
    if arch == "sae":
        assert torch.equal(coder.W_dec, coder.W_enc) and not coder.b_enc.any()
    else:
        torch.testing.assert_close(coder.b_enc.data, -coder.W_enc.data @ x.mean(0))
        torch.testing.assert_close(coder(x, y)[0], y.mean(0).expand_as(y))
    assert torch.equal(coder.W_enc, Coder("sae", d, M, k).to(device).W_enc)  # one seed, one start

def test_training_lowers_the_loss_whatever_the_scale(device):
    reached = {}
    for scale in ((1, 1), (1000, 0.1)):
        x, y = make_data(device, *scale)
        for arch in ARCHS:
            coder = Coder(arch, d, M, k).to(device)
            trainer = Trainer(coder, x, y, 1e-2, dead_after=4000)
            for _ in range(150):
                trainer.sums.zero_()
                trainer.step(x, y, 1)
            assert trainer.sums[1].item() == pytest.approx((y - y.mean(0)).square().sum().item())
            reached[arch, scale] = (trainer.sums[0] / trainer.sums[1]).item()
            assert reached[arch, scale] < 0.25
            assert reached[arch, scale] == pytest.approx(reached[arch, (1, 1)], rel=0.05)
            if arch == "sae":
                torch.testing.assert_close(coder.W_dec.data.norm(dim=1), torch.ones(M, device=device))
        assert reached["skip_transcoder", scale] < reached["transcoder", scale]

@pytest.mark.parametrize("arch", ARCHS)
def test_silence_is_counted_in_tokens(arch, device):
    x, y = make_data(device)
    trainer = Trainer(coder := Coder(arch, d, M, k).to(device), x, y, 1e-2, dead_after=1e9)
    expected = torch.zeros(M, dtype=torch.int64, device=device)
    for part in torch.arange(2000, device=device).split(20)[:30]:
        _, z = dense_forward(coder, x[part], y[part])
        expected = torch.where((z > 0).any(0), 0, expected + 20)
        trainer.step(x[part], y[part], 1)
        assert torch.equal(trainer.silent, expected)
    assert expected.any()

@pytest.mark.parametrize("arch", ARCHS)
def test_a_dead_latent_has_its_bias_raised_until_it_fires(arch, device):
    """By WAKE s_z lr_factor a step, once it was silent for `dead_after` tokens; nothing else moves, as lr is 0."""
    x, y = make_data(device, 3, 0.2)
    trainer = Trainer(coder := Coder(arch, d, M, k).to(device), x, y, 0.0, dead_after=4000)
    read, dead = y if arch == "sae" else x, 7
    s_z = (read - read.mean(0)).square().mean().sqrt().item()
    coder.b_enc.data[dead] -= 10 * s_z
    start = coder.b_enc.data.clone()
    for _ in range(12):  # two steps of silence, ten of rising
        trainer.step(x, y, 0.5)
    gain = coder.b_enc.data - start
    assert gain[dead].item() == pytest.approx(10 * WAKE * s_z * 0.5, rel=1e-3)
    assert not gain[trainer.silent == 0].any() and (trainer.silent == 0).any()
    steps = 0
    while trainer.silent[dead] > 0:
        trainer.step(x, y, 1)
        steps += 1
        assert steps < 400
    fired = coder.b_enc[dead].item()
    trainer.step(x, y, 1)
    assert coder.b_enc[dead].item() == fired > start[dead].item()

def test_the_autoencoder_steps_along_the_sphere(device):
    x, y = torch.randn(2, 64, d, device=device)
    trainer = Trainer(Coder("sae", d, M, k).to(device), x, y, 1e-2, 1e9)
    W = trainer.coder.W_dec.detach().clone()
    trainer.step(x, y, 1)
    assert (trainer.coder.W_dec.grad * W).sum(1).abs().max() < 1e-4 * trainer.coder.W_dec.grad.norm(dim=1).max()
