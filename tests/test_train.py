"""Training as a user runs it: what is printed and written, what a signal or a bad learning rate leaves behind."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ALONE, ROOT, flags, run, run_here
from safetensors.torch import load_file

import skipcoder
from skipcoder import ARCHS, MLPActivations, find_mlp, load_run


def contents(folder) -> dict:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.jsonl"
    }


def test_run_directory(trained):
    config = json.loads((trained / "config.json").read_text())
    assert (
        config["hookpoint"] == "h.1.mlp" and config["arch"] == list(ARCHS) and config["seed"] == 0
    )
    assert config["num_latents"] == 256 and config["d"] == 32 and config["tokens_trained"] >= 30_000
    assert set(config["versions"]) == {"torch", "transformers", "datasets"}
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert all(set(line) == {"tokens", "tokens_per_s", "fvu", "dead"} for line in log)
    assert log[-1]["tokens"] == config["tokens_trained"] and log[-1]["tokens_per_s"] > 0
    assert all(0 < log[-1]["fvu"][arch] < 0.8 and 0 <= log[-1]["dead"][arch] < 1 for arch in ARCHS)
    assert not list(trained.rglob("*.tmp"))
    for arch, coder in load_run(trained)[1].items():
        p, cfg = (trained / arch / "h.1.mlp" / name for name in ("sae.safetensors", "cfg.json"))
        p, cfg = load_file(p), json.loads(cfg.read_text())
        shapes = {
            "encoder.weight": (256, 32),
            "encoder.bias": (256,),
            "W_dec": (256, 32),
            "b_dec": (32,),
        }
        shapes |= {"W_skip": (32, 32)} if arch == "skip_transcoder" else {}
        assert {name: tuple(tensor.shape) for name, tensor in p.items()} == shapes
        assert cfg == {
            "activation": "topk", "expansion_factor": 8, "normalize_decoder": arch == "sae", "num_latents": 256, "k": 4,
            "multi_topk": False, "skip_connection": arch == "skip_transcoder", "transcode": arch != "sae", "d_in": 32,
        }  # fmt: skip
        assert all(
            torch.equal(parameter, p[name]) for name, parameter in zip(shapes, coder.parameters())
        )
        assert (p["W_dec"].norm(dim=1) - 1).abs().max() < 1e-5 or arch != "sae"


def test_what_is_printed(tiny, tmp_path):
    done = run("skipcoder.py", *flags(tiny, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    words = (
        "sae, transcoder, skip_transcoder",
        "M 256",
        "k 4",
        "h.1.mlp",
        str(tiny),
        "cpu x 1",
        "6,448",
        "lr 0.0",
    )
    assert all(word in done.stdout for word in words), done.stdout
    assert (
        done.stdout.splitlines()[-1]
        == f"done after 6,448 tokens; next: python eval.py {tmp_path / 'run'}"
    )
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert (
        "tok/s" in last and all(arch in last for arch in ARCHS) and "FVU" in last and "dead" in last
    )


def test_a_coder_does_not_depend_on_its_neighbours(tiny, tmp_path):
    """The same seed and data give the same weights, whichever coders are trained beside it; another seed, others."""
    one = "--arch skip_transcoder".split()
    for name, more in {"all": [], "one": one, "two": [*one, "--seed", 1]}.items():
        assert run_here(skipcoder, *flags(tiny, tmp_path / name, *more)) == 0
    assert [p.name for p in (tmp_path / "one").iterdir() if p.is_dir()] == ["skip_transcoder"]
    weights = "skip_transcoder/h.1.mlp/sae.safetensors"
    alone, beside, other = (load_file(tmp_path / out / weights) for out in ("one", "all", "two"))
    for name in alone:
        assert torch.equal(alone[name], beside[name]), name
    assert not torch.equal(alone["W_dec"], other["W_dec"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_save_what_there_is(tiny, tmp_path, number):
    """Sent to every process of the group, as a terminal does; after SIGKILL, which none survives, files are whole."""
    out, deadline = tmp_path / "run", time.time() + 90
    code = "import skipcoder; skipcoder.LOG_EVERY = skipcoder.SAVE_EVERY = 0; skipcoder.main()"  # saves at each step
    command = [sys.executable, "-c", code, *flags(tiny, out, "--tokens", "1e9")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **pipes, env=ALONE, cwd=ROOT, start_new_session=True)
    while not all(
        (out / name).exists() for name in ("config.json", "skip_transcoder/h.1.mlp/sae.safetensors")
    ):
        assert time.time() < deadline and process.poll() is None, "training did not start"
        time.sleep(0.05)
    time.sleep(0.31)  # several saves later
    skipcoder.os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=30)
    config, coders = load_run(out)
    assert set(coders) == set(ARCHS) and 0 < config["tokens_trained"] < 1e9
    assert all(p.isfinite().all() for coder in coders.values() for p in coder.parameters())
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in stderr, stderr
        last = f"stopped after {config['tokens_trained']:,} tokens; next: python eval.py {out}"
        assert stdout.splitlines()[-1] == last and not list(out.rglob("*.tmp"))


def test_a_first_save_that_is_cut_short_leaves_no_broken_run(tmp_path, monkeypatch):
    """Killed between two of its renames: config.json, which makes a folder a run, comes last."""
    config = dict(
        out=tmp_path / "run",
        hookpoint="h.1.mlp",
        expansion=2,
        num_latents=16,
        d=8,
        k=4,
        arch=["sae"],
    )
    replace, renamed = skipcoder.Path.replace, []
    monkeypatch.setattr(
        skipcoder.Path, "replace", lambda path, to: (renamed.append(to.name), replace(path, to))
    )
    skipcoder.save_run(config, {"sae": skipcoder.Coder("sae", 8, 16, 4)})
    assert renamed[-1] == "config.json", renamed


def test_a_full_disk_loses_nothing(trained, tiny, tmp_path, capfd):
    """A limit on the size of a file stands in for it: one line, and the run that was there is there as it was."""
    resource = pytest.importorskip("resource")
    out = shutil.copytree(trained, tmp_path / "run")
    before, limits = contents(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # weights take 65 kB
    try:
        message = run_here(skipcoder, *flags(tiny, out, "--overwrite"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        message.startswith(f"error: --out {out}: ")
        and "make room" in message
        and "\n" not in message
    )
    assert before == contents(out)


def test_an_existing_run_is_replaced_only_when_told_to_and_by_a_finite_one(trained, tiny, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    (other := out / "mine/h.1.mlp/cfg.json").parent.mkdir(parents=True)  # of something else
    other.write_text("{}")
    before = contents(out)
    assert "pass --overwrite to replace it" in run_here(skipcoder, *flags(tiny, out))
    message = run_here(skipcoder, *flags(tiny, out, "--overwrite", "--lr", "1e30"))
    assert message.startswith("error: --lr 1e+30: the loss is not finite")
    assert before == contents(out)
    assert run_here(skipcoder, *flags(tiny, out, "--arch", "sae", "--seed", 3, "--overwrite")) == 0
    config, coders = load_run(out)
    assert config["seed"] == 3 and set(coders) == {"sae"} and other.read_text() == "{}"


def test_several_k_are_several_runs_in_one(tiny, tmp_path):
    """Bit for bit, from one stream; sorted, each in the folder of its name."""
    for out, ks in {"both": (8, 2), "two": (2,), "eight": (8,)}.items():
        assert run_here(skipcoder, *flags(tiny, tmp_path / out, "--k", *ks)) == 0
    config, both = load_run(tmp_path / "both")
    assert config["k"] == [8, 2] and list(both) == [
        f"{arch}-k{k}" for arch in ARCHS for k in (2, 8)
    ]
    last = json.loads((tmp_path / "both/log.jsonl").read_text().splitlines()[-1])
    for k, out in ((2, "two"), (8, "eight")):
        config, alone = load_run(tmp_path / out)
        log = json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[-1])
        assert config["k"] == k and list(alone) == list(ARCHS)
        for arch in ARCHS:
            name = f"{arch}-k{k}"
            assert both[name].k == alone[arch].k == k and both[name].arch == arch
            assert log["fvu"][arch] == last["fvu"][name]
            assert json.loads((tmp_path / "both" / name / "h.1.mlp/cfg.json").read_text())["k"] == k
            for p, q in zip(both[name].parameters(), alone[arch].parameters()):
                assert torch.equal(p, q)


SIZES = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
)
FAMILIES = {
    "gpt2": (transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2), "h.1.mlp"),
    "neox": (transformers.GPTNeoXConfig(**SIZES), "layers.1.mlp"),
    "llama": (transformers.LlamaConfig(**SIZES, num_key_value_heads=2), "layers.1.mlp"),
    "gemma": (
        transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8),
        "layers.1.mlp",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families(family, tmp_path, device):
    """x and y are what the MLP of the whole model reads and writes, without position 0; later blocks never run."""
    config, expected_name = FAMILIES[family]
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(device)
    tokens, seen, ran = torch.randint(64, (3, 12), device=device), {}, []
    find_mlp(whole, 1)[2].register_forward_hook(
        lambda module, args, output: seen.update(x=args[0], y=output)
    )
    with torch.no_grad():
        whole(tokens)

    lm = skipcoder.load_lm(str(tmp_path), device)
    name, blocks, mlp = find_mlp(lm, 1)
    assert name == expected_name
    for module in (blocks[2], lm.get_output_embeddings()):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    del blocks[2:]
    x, y = MLPActivations(lm, mlp)(tokens)
    assert not ran and x.shape == y.shape == (3 * 11, 16)
    torch.testing.assert_close(x, seen["x"][:, 1:].reshape(-1, 16))
    torch.testing.assert_close(y, seen["y"][:, 1:].reshape(-1, 16))


def test_outliers_are_replaced_by_the_token_before_them(tiny, device):
    """Of tokens with |y| over ten times the median of the first call; the threshold stays as it is, and is saved."""
    lm = skipcoder.load_lm(str(tiny), device)
    mlp, factor = find_mlp(lm, 1)[2], torch.ones(3, 12, 1, device=device)
    mlp.register_forward_hook(lambda module, args, output: output * factor)
    tokens = torch.randint(300, (3, 12), device=device)
    x, y = MLPActivations(lm, mlp)(tokens)
    factor[0, 1:3] = factor[1, 5] = factor[1, 6] = factor[2, 3] = (
        1000  # the first two of all, and three more
    )
    activations, index = MLPActivations(lm, mlp), torch.arange(33, device=device)
    index[:2], index[15:17], index[24] = 2, 14, 23
    for scale in (1, 2):
        factor[:, 1:] *= scale
        for a, whole in zip(activations(tokens), (x, scale * y)):
            assert torch.equal(a, whole[index])
        norms = y.norm(dim=1) * factor[:, 1:].flatten() / scale
        assert activations.max_norm == pytest.approx(10 * norms.median().item())
    assert torch.equal(
        MLPActivations(lm, mlp, activations.max_norm * 1e6)(tokens)[0], x
    )  # a threshold that is given


def test_mlps_that_cannot_be_coded(device):
    """BLOOM's MLP adds the residual stream to its output, and a mixture of experts has no neurons of its own."""
    mixture = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    mixture = transformers.AutoModelForCausalLM.from_config(mixture)
    with pytest.raises(SystemExit, match="error: --layer 1: MixtralDecoderLayer has no dense .mlp"):
        find_mlp(mixture, 1)
    bloom = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    bloom = transformers.AutoModelForCausalLM.from_config(bloom).to(device)
    with pytest.raises(SystemExit, match="error: --model: BloomMLP takes 2 inputs, not one"):
        MLPActivations(bloom, find_mlp(bloom, 1)[2])(torch.randint(64, (2, 12), device=device))


def test_two_processes(tiny, tmp_path):
    """Under torchrun both ranks have the same coders, and a step is Adam's on the sum of both halves' gradients."""
    code = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from skipcoder import *
seen, init = [], Trainer.__init__
Trainer.__init__ = lambda self, *args: (seen.append(self), init(self, *args))[1]
try:
    main()
except SystemExit as exit_info:
    assert exit_info.code == 0, exit_info
for trainer in seen:  # what a run leaves on this rank is what it leaves on the other one
    for p in (*trainer.coder.parameters(), trainer.silent):
        both = [torch.empty_like(p.data) for _ in range(2)]
        torch.distributed.all_gather(both, p.data)
        assert torch.equal(*both)
Trainer.__init__ = init
start, x, y = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
halves = slice(0, 32), slice(32, 64)
for arch in ARCHS:
    trainer, one = (Trainer(Coder(arch, 8, 40, 5), start, start * 2, 1e-2, dead_after=60) for _ in range(2))
    for t in (trainer, one):
        t.coder.b_enc.data[7] -= 100  # a dead latent
    for _ in range(4):
        trainer.step(x[halves[RANK]], y[halves[RANK]], 1)
        one.optimizer.zero_grad()
        active = torch.zeros(40, dtype=torch.bool)
        for half in halves:
            y_hat, acts, indices = one.coder(x[half], y[half])
            active[indices[acts > 0]] = True
            ((y[half] - y_hat).square().sum() / (y[half] - y[half].mean(0)).square().sum()).backward()
        for group in one.optimizer.param_groups:
            group["lr"] = 1e-2 * group["unit"]
        W = one.coder.W_dec
        W.grad -= (W.grad * W.data).sum(1, keepdim=True) * W.data * (arch == "sae")
        one.optimizer.step()
        one.coder.b_enc.data += WAKE * one.s_z * (one.silent >= 60)
        one.silent = torch.where(active, 0, one.silent + 64)
        if arch == "sae":
            W.data = F.normalize(W.data)
    assert one.silent[7] == 4 * 64
    for p, q in zip((*trainer.coder.parameters(), trainer.silent), (*one.coder.parameters(), one.silent)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
print("equal")
torch.distributed.destroy_process_group()
"""
    (tmp_path / "two.py").write_text(code)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = run(*torchrun, tmp_path / "two.py", ROOT, *flags(tiny, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2 and done.stdout.count("cpu x 2") == 1
    config, coders = load_run(tmp_path / "run")
    assert config["tokens_trained"] == 13 * 16 * 31  # the first multiple of a step over 6000
    assert coders["skip_transcoder"].W_skip.any()
