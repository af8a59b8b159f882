"""The GPU path where there is no GPU: a pretended device that refuses what a GPU would refuse.

A tensor on it wraps a CPU tensor and claims to be on torch's device "meta". As between CPU and GPU,
an operation on tensors of both places fails (scalars may mix). As on Apple's MPS, none is float64.
A value that Python reads off the device is waited for, which is counted.
"""

import contextlib

import pytest
import torch
from conftest import flags, read_json, run_here
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import eval as evaluation
import skipcoder
from skipcoder import ARCHS, Coder, Trainer

aten = torch.ops.aten
READS = aten._local_scalar_dense.default, aten.nonzero.default


class Pretended(torch.Tensor):
    """A tensor on the pretended device."""

    @staticmethod
    def __new__(cls, tensor):
        options = {"strides": tensor.stride(), "dtype": tensor.dtype, "device": "meta"}
        self = torch.Tensor._make_wrapper_subclass(cls, tensor.shape, **options)
        self.tensor = tensor
        return self

    def tolist(self):  # torch refuses to, for a subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, *_):
        raise AssertionError(f"{func} outside of the mode")


def to_cpu(a):
    """Return what an argument of an operation is on the CPU."""
    if isinstance(a, Pretended):
        return a.tensor
    return torch.device("cpu") if isinstance(a, torch.device) else a


class PretendedDevice(TorchDispatchMode):
    reads = 0  # how often Python waited for the device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        there = {id(t.tensor): t for t in tensors if isinstance(t, Pretended)}
        here = [t.shape for t in tensors if t.dim() > 0 and not isinstance(t, Pretended)]
        copies = func == aten._to_copy.default
        assert copies or not there or not here, f"{func}: {here} are on the CPU, others are not"

        device = kwargs.get("device")
        goes_there = bool(there) if device is None else torch.device(device).type == "meta"
        if there and (func in READS or not goes_there):
            self.reads += 1

        def from_cpu(a):
            if not isinstance(a, torch.Tensor) or not goes_there:
                return a
            assert a.dtype != torch.float64, f"{func}: there is no float64 on this device"
            return there[id(a)] if id(a) in there else Pretended(a)  # the former if in place

        return tree_map(from_cpu, func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs)))


@pytest.fixture
def pretended(monkeypatch):
    """Until the end of the test the device "meta" is the pretended one."""
    adam = torch.optim.Adam

    def plain_adam(groups, fused, **options):  # fused is known for real devices alone
        return adam(groups, foreach=False, **options)

    monkeypatch.setattr(torch.optim, "Adam", plain_adam)
    monkeypatch.setattr(skipcoder, "fast_matmuls", lambda device: contextlib.nullcontext())
    # A wrapper cannot be swapped into a parameter.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with PretendedDevice() as device:
        yield device


@pytest.mark.parametrize("arch", ARCHS)
def test_a_training_step_never_waits_for_the_device(pretended, arch):
    x, y = torch.randn(2, 64, 8, device="meta")
    trainer = Trainer(Coder(arch, 8, 64, 4).to("meta"), x, y, 1e-3)
    before = pretended.reads
    trainer.step(x, y, 1)
    assert pretended.reads == before > 0


def test_a_run_and_its_evaluation(pretended, trained, tiny, tmp_path):
    """Nothing of either is left on the CPU by mistake, and eval.py's numbers are the CPU's."""
    out, report = tmp_path / "run", tmp_path / "e.json"
    assert run_here(skipcoder, *flags(tiny, out, "--device", "meta")) == 0

    numbers = []
    for device in ("meta", "cpu"):
        sizes = f"--tokens 4000 --latents 20 --device {device}"
        files = f"--json {report} --html {tmp_path}/e.html"
        assert run_here(evaluation, trained, *sizes.split(), *files.split()) == 0
        # (Not the scores: a tie that falls the other way makes trials draw other tokens.)
        for row in read_json(report)["coders"].values():
            numbers += [row[key] for key in ("fvu", "ce", "kl", "l0", "dead")]
    assert numbers[:15] == pytest.approx(numbers[15:], rel=1e-5)


@pytest.mark.parametrize("accelerator", ["cuda", "xpu", "mps", None])
def test_each_process_takes_an_accelerator_of_its_own(monkeypatch, accelerator):
    """With `auto` or by its kind. Where there is none, it takes the CPU."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    seen, kind = [], accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: kind)
    monkeypatch.setattr(torch, "zeros", lambda n, device: seen.append(device) or torch.empty(n))
    for name in ("auto", accelerator or "cpu", "cuda:1"):
        skipcoder.pick_device(name)
    expected = {"cuda": "cuda:3", "xpu": "xpu:3", "mps": "mps", None: "cpu"}[accelerator]
    assert seen == [expected, expected, "cuda:1"]
