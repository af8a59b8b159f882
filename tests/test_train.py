"""Training as a user runs it: what is printed and written, what a signal or a bad learning rate leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run, run_here
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import skipcoder
from skipcoder import ARCHS, InputError, MLPActivations, find_mlp, load_run


def flags(tiny, out, *more):
    base = f"--model {tiny} --dataset {tiny}/text.jsonl --layer 1 --expansion 8 --k 4 --ctx-len 32 --batch-size 16"
    return [*base.split(), "--tokens", 6000, "--out", out, *more]


def test_run_directory(trained, tiny):
    config = json.loads((trained / "config.json").read_text())
    assert config["hookpoint"] == "h.1.mlp" and config["arch"] == list(ARCHS) and config["seed"] == 0
    assert config["num_latents"] == 256 and config["d"] == 32 and config["tokens_trained"] >= 30_000
    assert set(config["versions"]) == {"torch", "transformers", "datasets", "python"}
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for line in log:
        assert set(line) == {"tokens", "tokens_per_s", "fvu", "dead"}
        assert set(line["fvu"]) == set(line["dead"]) == set(ARCHS)
    assert log[-1]["tokens"] == config["tokens_trained"] and log[-1]["tokens_per_s"] > 0
    assert all(0 < fvu < 0.8 for fvu in log[-1]["fvu"].values())
    assert not list(trained.rglob("*.tmp"))
    for arch in ARCHS:
        folder = trained / arch / "h.1.mlp"
        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "sae.safetensors").items()}
        expected = {"encoder.weight": (256, 32), "encoder.bias": (256,), "W_dec": (256, 32), "b_dec": (32,)}
        assert shapes == expected | ({"W_skip": (32, 32)} if arch == "skip_transcoder" else {})
        assert json.loads((folder / "cfg.json").read_text()) == {
            "activation": "topk", "expansion_factor": 8, "normalize_decoder": arch == "sae", "num_latents": 256, "k": 4,
            "multi_topk": False, "skip_connection": arch == "skip_transcoder", "transcode": arch != "sae", "d_in": 32,
        }  # fmt: skip


def test_saved_coders_predict_what_the_file_format_says(trained):
    """y_hat from the files alone, with the equations that EleutherAI's sparsify computes for these cfg.json."""
    _, coders = load_run(trained)
    x, y = torch.randn(2, 50, 32)
    for arch, coder in coders.items():
        folder = trained / arch / "h.1.mlp"
        p, cfg = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())
        pre = (x if cfg["transcode"] else y - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]
        top = pre.relu().topk(cfg["k"])
        expected = torch.zeros_like(pre).scatter(1, top.indices, top.values) @ p["W_dec"] + p["b_dec"]
        if cfg["skip_connection"]:
            expected += x @ p["W_skip"].T
        torch.testing.assert_close(coder(x, y).y_hat, expected, rtol=1e-4, atol=1e-5)
        if arch == "sae":
            torch.testing.assert_close(p["W_dec"].norm(dim=1), torch.ones(256))


def test_what_is_printed(tiny, tmp_path):
    other = tmp_path / "run" / "mine" / "cfg.json"  # of something else, which may stay where it is
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    done = run("skipcoder.py", *flags(tiny, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    for words in ("model", "hookpoint  h.1.mlp", "M 256", "k 4", "device     cpu", "6,", f"{tmp_path}/run", "eval.py"):
        assert words in done.stdout
    assert other.read_text() == "{}"
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert "tok/s" in last and all(arch in last for arch in ARCHS) and "FVU" in last and "dead" in last


def test_a_coder_does_not_depend_on_its_neighbours(tiny, tmp_path):
    """The same seed and data give the same weights, whichever coders are trained beside it; another seed, others."""
    one = "--arch skip_transcoder".split()
    runs = {"all": [], "one": one, "two": [*one, "--seed", 1]}
    for name, more in runs.items():
        assert run_here(skipcoder, *flags(tiny, tmp_path / name, *more)) == 0
    assert [p.name for p in (tmp_path / "one").iterdir() if p.is_dir()] == ["skip_transcoder"]
    weights = "skip_transcoder/h.1.mlp/sae.safetensors"
    alone, beside, other = (load_file(tmp_path / out / weights) for out in ("one", "all", "two"))
    for name in alone:
        assert torch.equal(alone[name], beside[name]), name
    assert not torch.equal(alone["W_dec"], other["W_dec"])


def test_signals_save_what_there_is(tiny, tmp_path):
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = {}
    for number in codes:
        command = [sys.executable, ROOT / "skipcoder.py", *flags(tiny, tmp_path / number.name, "--tokens", "1e9")]
        processes[number] = subprocess.Popen([*map(str, command)], **pipes, env=env, start_new_session=True)
    deadline = time.time() + 60
    for number, process in processes.items():
        out = tmp_path / number.name
        while not (out / "log.jsonl").exists() or (out / "log.jsonl").stat().st_size == 0:
            assert time.time() < deadline and process.poll() is None, "training did not start"
            time.sleep(0.1)
        os.killpg(process.pid, number)  # as a terminal does: to every process of the group
    for number, process in processes.items():
        out = tmp_path / number.name
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == codes[number], stderr
        assert "Traceback" not in stderr
        assert f"stopped by {number.name}" in stdout.splitlines()[-1] and str(out) in stdout.splitlines()[-1]
        config, coders = load_run(out)
        assert set(coders) == set(ARCHS) and 0 < config["tokens_trained"] < 1e9
        assert all(p.isfinite().all() for coder in coders.values() for p in coder.parameters())


def test_killed_at_any_moment_leaves_whole_files(tiny, tmp_path, monkeypatch):
    """SIGKILL while it saves at every step: what is there can be loaded."""
    code = f"import sys; sys.path.insert(0, '{ROOT}'); import skipcoder; skipcoder.SAVE_EVERY = 0; skipcoder.main()"
    command = [sys.executable, "-c", code, *map(str, flags(tiny, tmp_path / "run", "--tokens", "1e9"))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    while not (tmp_path / "run/config.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.31)
    process.kill()
    process.wait()
    _, coders = load_run(tmp_path / "run")
    assert set(coders) == set(ARCHS)


def test_a_full_disk_loses_nothing(trained, tiny, tmp_path):
    """A limit on the size of a file stands in for it: one line, and the run that was there is there as it was."""
    out = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "log.jsonl"}
    code = f"import sys, resource; sys.path.insert(0, '{ROOT}'); import skipcoder;"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); skipcoder.main()"  # weights take 65 kB
    command = [sys.executable, "-c", code, *map(str, flags(tiny, out, "--overwrite"))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"--out {out}" in last and "cannot be written" in last, last
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "log.jsonl"}


def test_a_loss_that_is_not_finite_keeps_the_last_save(trained, tiny, capfd):
    before = {path: path.read_bytes() for path in trained.rglob("*.safetensors")}
    assert run_here(skipcoder, *flags(tiny, trained, "--overwrite", "--lr", "1e30")) not in (0, 130, 143)
    assert "--lr" in capfd.readouterr().err.splitlines()[-1]
    assert before == {path: path.read_bytes() for path in trained.rglob("*.safetensors")}


def test_an_existing_run_is_replaced_only_when_told_to(trained, tiny, tmp_path, capfd):
    out = shutil.copytree(trained, tmp_path / "run")
    others = [out / folder / "h.2.mlp/cfg.json" for folder in ("mine", "sae", "transcoder")]  # not of this run
    for other in others:
        other.parent.mkdir(parents=True)
        other.write_text("{}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run_here(skipcoder, *flags(tiny, out)) != 0
    stderr = capfd.readouterr().err
    assert "--overwrite" in stderr and len(stderr.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run_here(skipcoder, *flags(tiny, out), "--arch", "sae", "--seed", 3, "--overwrite") == 0
    config, coders = load_run(out)
    assert config["seed"] == 3 and set(coders) == {"sae"}
    # of the old run nothing is left beside the new one, and of other things nothing is gone
    assert not (out / "transcoder/h.1.mlp").exists() and not (out / "skip_transcoder").exists()
    assert all(other.read_text() == "{}" for other in others)


SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32), "h.1.mlp"),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES), "layers.1.mlp"),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2), "layers.1.mlp"),
    "gemma": (Gemma2ForCausalLM, Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8), "layers.1.mlp"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families(family, tmp_path, device):
    """x and y are what the MLP of the whole model reads and writes, without position 0; later blocks never run."""
    model_class, config, expected_name = FAMILIES[family]
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(device)
    tokens = torch.randint(64, (3, 12), device=device)
    name, blocks, mlp = find_mlp(lm, 1)
    assert name == expected_name
    whole = {}
    handle = mlp.register_forward_hook(lambda module, args, output: whole.update(x=args[0], y=output))
    ran = []
    with torch.no_grad():
        lm(tokens, use_cache=False)
    handle.remove()

    later, head = blocks[2], lm.get_output_embeddings()
    for module in (later, head):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    del blocks[2:]
    x, y = MLPActivations(lm, mlp, torch.float32)(tokens)
    assert not ran
    assert x.shape == y.shape == (3 * 11, 16)
    torch.testing.assert_close(x, whole["x"][:, 1:].reshape(-1, 16))
    torch.testing.assert_close(y, whole["y"][:, 1:].reshape(-1, 16))
    with pytest.raises(InputError, match="--layer 7.*0 to 1"):
        find_mlp(lm, 7)


def test_mlps_that_cannot_be_coded(device):
    """BLOOM's MLP adds the residual stream to its output, and a mixture of experts has no neurons of its own."""
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2))
    with pytest.raises(InputError, match="--layer 1.*mixture of experts"):
        find_mlp(mixture, 1)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)).to(device)
    activations = MLPActivations(bloom, find_mlp(bloom, 1)[2], torch.float32)
    with pytest.raises(InputError, match="--model: BloomMLP takes 2 inputs"):
        activations(torch.randint(64, (2, 12), device=device))


def test_two_processes_equal_one(tiny, tmp_path):
    """torchrun with 2 gloo processes: each reads its own documents, and a step is the step on both batches at once."""
    code = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from skipcoder import ARCHS, Coder, Trainer, mean_and_variance
def steps(x, y):
    for arch in ARCHS:
        coder = Coder(arch, 8, 40, 5)
        trainer = Trainer(coder, start, start * 2, 1e-2, 1 / 32, dead_after=60)
        for _ in range(4):
            trainer.step(x, y, mean_and_variance(y)[1], 1)
        yield arch, {**coder.state_dict(), "silent": trainer.silent, "squared_error": trainer.squared_error}
start, x, y = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
one = dict(steps(x, y))
dist.init_process_group("gloo")
half = slice(0, 32) if dist.get_rank() == 0 else slice(32, 64)
for arch, state in steps(x[half], y[half]):
    for name, value in state.items():
        torch.testing.assert_close(value, one[arch][name], rtol=1e-4, atol=1e-5)
print("equal", flush=True)
dist.barrier()
dist.destroy_process_group()
"""
    (tmp_path / "two.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*torchrun, tmp_path / "two.py", ROOT], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2
    done = subprocess.run(
        [*torchrun, *map(str, [ROOT / "skipcoder.py", *flags(tiny, tmp_path / "run")])],
        capture_output=True, text=True, timeout=120, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saves to") == 1 and "x 2" in done.stdout
    assert load_run(tmp_path / "run")[0]["tokens_trained"] == 13 * 16 * 31  # the first multiple of a step over 6000
