"""The GPU path where there is no GPU: a pretended device that computes on the CPU and refuses what a GPU would refuse.

A tensor on it wraps a CPU tensor and claims to be on torch's device "meta". As between CPU and GPU, an operation on
tensors of both places raises (scalars may mix), and a value that Python reads off the device is waited for, which is
counted. What this cannot see: speed, memory, bf16 autocast, and operations that CUDA lacks.
"""

import contextlib
import json

import pytest
import torch
from conftest import flags, run_here
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import eval as evaluation
import skipcoder
from skipcoder import ARCHS, Coder, Trainer

aten = torch.ops.aten

class Pretended(torch.Tensor):
    """A tensor on the pretended device."""

    @staticmethod
    def __new__(cls, tensor):
        layout = dict(strides=tensor.stride(), storage_offset=tensor.storage_offset(), dtype=tensor.dtype)
        self = torch.Tensor._make_wrapper_subclass(cls, tensor.shape, **layout, device="meta")
        self.tensor = tensor
        return self

    def tolist(self):  # torch refuses to, for a subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the mode")

class PretendedDevice(TorchDispatchMode):
    reads = 0  # how often Python waited for the device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        there = [t for t in tensors if isinstance(t, Pretended)]
        here = [t for t in tensors if not isinstance(t, Pretended)]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if there and any(t.dim() for t in here) and not copies:
            raise RuntimeError(f"{func}: tensors {[tuple(t.shape) for t in here]} are on the CPU, others are not")
        device = kwargs.get("device")
        goes_there = bool(there) if device is None else torch.device(device).type == "meta"
        if there and (func in (aten._local_scalar_dense.default, aten.nonzero.default) or not goes_there):
            self.reads += 1

        def to_cpu(a):
            return a.tensor if isinstance(a, Pretended) else torch.device("cpu") if isinstance(a, torch.device) else a

        if func == aten.copy_.default:  # from one place to the other, or within one
            to_cpu(args[0]).copy_(to_cpu(args[1]))
            return args[0]
        out = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        given = {id(t.tensor): t for t in there}

        def from_cpu(a):
            if not (isinstance(a, torch.Tensor) and goes_there):
                return a
            return given[id(a)] if id(a) in given else Pretended(a)  # an operation in place returns what it was given

        return tree_map(from_cpu, out)

@pytest.fixture
def pretended(monkeypatch):
    """Until the end of the test the device "meta" is the pretended one."""
    adam = torch.optim.Adam  # fused is known for real devices alone
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, fused, **options: adam(groups, foreach=False, **options))
    monkeypatch.setattr(torch, "autocast", lambda *_, enabled: {False: contextlib.nullcontext()}[enabled])  # never on
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a wrapper cannot be swapped into a parameter
    with PretendedDevice() as device:
        yield device
    torch.__future__.set_overwrite_module_params_on_conversion(before)

@pytest.mark.parametrize("arch", ARCHS)
def test_a_training_step_never_waits_for_the_device(pretended, arch):
    x, y = torch.randn(2, 64, 8, device="meta")
    with pytest.raises(RuntimeError, match="on the CPU"):  # as a GPU would say
        x + torch.ones(8)
    trainer = Trainer(Coder(arch, 8, 64, 4).to("meta"), x, y, 1e-3, dead_after=100)
    pretended.reads = 0
    for _ in range(3):
        trainer.step(x, y, 1)
    assert pretended.reads == 0
    assert trainer.sums[1].item() > 0 and pretended.reads == 1

def test_a_run_and_its_evaluation(pretended, trained, tiny, tmp_path):
    """Nothing of either is left on the CPU by mistake, and eval.py's numbers are those of the CPU."""
    out = tmp_path / "run"
    assert run_here(skipcoder, *flags(tiny, out, "--device", "meta")) == 0
    assert json.loads((out / "config.json").read_text())["device"] == "meta" and pretended.reads > 0
    numbers = {}
    for device in ("meta", "cpu"):
        pretended.reads = 0
        sizes = f"--tokens 4000 --latents 20 --json {tmp_path}/e.json --html {tmp_path}/e.html --device {device}"
        assert run_here(evaluation, trained, *sizes.split()) == 0
        assert (pretended.reads > 0) == (device == "meta")
        report = json.loads((tmp_path / "e.json").read_text())
        rows = [*report["coders"].values(), report["baselines"]["affine"]]
        numbers[device] = [row[key] for row in rows for key in ("fvu", "ce", "kl", "l0", "dead") if key in row]
    # attention is another kernel there: a tie that falls the other way makes the intruder trials draw other tokens
    assert len(numbers["cpu"]) == 18 and numbers["meta"] == pytest.approx(numbers["cpu"], rel=1e-5)
