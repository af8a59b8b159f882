"""The GPU path where there is no GPU: a pretended device that refuses what a GPU would refuse.

A tensor on it wraps a CPU tensor and claims to be on torch's device "meta". As between CPU and GPU,
an operation on tensors of both places raises (scalars may mix). As on Apple's MPS, no tensor on it
is float64. A value that Python reads off the device is waited for, which is counted. What this
cannot see: speed, memory, bf16 autocast, and operations that a device lacks.
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
COPIES = aten._to_copy.default, aten.copy_.default
READS = aten._local_scalar_dense.default, aten.nonzero.default


class Pretended(torch.Tensor):
    """A tensor on the pretended device."""

    @staticmethod
    def __new__(cls, tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            tensor.shape,
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            device="meta",
        )
        self.tensor = tensor
        return self

    def tolist(self):  # torch refuses to, for a subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
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

        # Tensors of both places do not mix.
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        there = [t for t in tensors if isinstance(t, Pretended)]
        here = [t for t in tensors if not isinstance(t, Pretended)]
        if func == aten.index.Tensor and isinstance(args[0], Pretended):
            here = []  # devices take indices that are on the CPU
        if there and any(t.dim() for t in here) and func not in COPIES:
            shapes = [tuple(t.shape) for t in here]
            raise RuntimeError(f"{func}: tensors {shapes} are on the CPU, others are not")

        # Count when Python waits.
        device = kwargs.get("device")
        goes_there = bool(there) if device is None else torch.device(device).type == "meta"
        if there and (func in READS or not goes_there):
            self.reads += 1

        # Compute on the CPU. An operation in place returns what it was given.
        if func == aten.copy_.default:  # from one place to the other, or within one
            to_cpu(args[0]).copy_(to_cpu(args[1]))
            return args[0]
        out = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        given = {id(t.tensor): t for t in there}

        def from_cpu(a):
            if not isinstance(a, torch.Tensor) or not goes_there:
                return a
            if a.dtype == torch.float64:
                raise TypeError(f"{func}: there is no float64 on this device")
            return given[id(a)] if id(a) in given else Pretended(a)

        return tree_map(from_cpu, out)


@pytest.fixture
def pretended(monkeypatch):
    """Until the end of the test the device "meta" is the pretended one."""
    adam = torch.optim.Adam

    def plain_adam(groups, fused, **options):  # fused is known for real devices alone
        return adam(groups, foreach=False, **options)

    def no_autocast(*_, enabled):
        assert not enabled
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.optim, "Adam", plain_adam)
    monkeypatch.setattr(torch, "autocast", no_autocast)
    # A wrapper cannot be swapped into a parameter.
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)
    with PretendedDevice() as device:
        yield device
    future.set_overwrite_module_params_on_conversion(before)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_training_step_never_waits_for_the_device(pretended, arch):
    x, y = torch.randn(2, 64, 8, device="meta")
    trainer = Trainer(Coder(arch, 8, 64, 4).to("meta"), x, y, 1e-3)
    pretended.reads = 0
    for _ in range(3):
        trainer.step(x, y, 1)
    assert pretended.reads == 0
    assert trainer.sums[1].item() > 0
    assert pretended.reads == 1


def test_a_run_and_its_evaluation(pretended, trained, tiny, tmp_path):
    """Nothing of either is left on the CPU by mistake, and eval.py's numbers are the CPU's."""
    out = tmp_path / "run"
    assert run_here(skipcoder, *flags(tiny, out, "--device", "meta")) == 0
    assert read_json(out / "config.json")["device"] == "meta"
    assert pretended.reads > 0

    numbers = {}
    for device in ("meta", "cpu"):
        pretended.reads = 0
        sizes = f"--tokens 4000 --latents 20 --device {device}"
        files = f"--json {tmp_path}/e.json --html {tmp_path}/e.html"
        assert run_here(evaluation, trained, *sizes.split(), *files.split()) == 0
        assert (pretended.reads > 0) == (device == "meta")
        report = read_json(tmp_path / "e.json")
        rows = [*report["coders"].values(), report["baselines"]["affine"]]
        keys = "fvu", "ce", "kl", "l0", "dead"
        numbers[device] = [row[key] for row in rows for key in keys if key in row]
    # Attention is another kernel there. A tie that falls the other way would make the intruder
    # trials draw other tokens, so scores are not compared.
    assert len(numbers["cpu"]) == 18
    assert numbers["meta"] == pytest.approx(numbers["cpu"], rel=1e-5)


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
