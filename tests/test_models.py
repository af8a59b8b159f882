"""Families of LMs: each gives the right x, y and log-probabilities, or is refused in one line."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close

import eval as evaluation
import skipcoder
from skipcoder import MLPActivations, find_mlp

VOCABULARY, WIDTH = 64, 16
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
GEMMA_SIZES = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
VISION_SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def new_config(family: str):
    """Return the configuration of a tiny LM."""
    if family == "gpt2":
        return transformers.GPT2Config(**GPT2_SIZES)
    if family == "gptj":  # its head has a bias
        return transformers.GPTJConfig(**GPT2_SIZES, rotary_dim=4)
    if family == "phi":  # its head has a bias, too
        return transformers.PhiConfig(**SIZES, partial_rotary_factor=0.5)
    if family == "neox":
        return transformers.GPTNeoXConfig(**SIZES)
    if family == "llama":
        return transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    if family == "gemma2":  # its logits are capped after the head
        return transformers.Gemma2Config(**GEMMA_SIZES)
    if family == "falcon":  # its block adds to y in place
        return transformers.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    assert family == "gemma3"  # its first list of blocks is the vision tower's
    return transformers.Gemma3Config(text_config=GEMMA_SIZES, vision_config=VISION_SIZES)


FAMILIES = {  # the hookpoint of block 1
    "gpt2": "h.1.mlp",
    "gptj": "h.1.mlp",
    "phi": "layers.1.mlp",
    "neox": "layers.1.mlp",
    "llama": "layers.1.mlp",
    "gemma2": "layers.1.mlp",
    "falcon": "h.1.mlp",
    "gemma3": "language_model.layers.1.mlp",
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def new_lm(config):
    """Return an LM all of whose parameters are random, its norms' and biases, too."""
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in lm.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return lm


def random_tokens(device):
    return torch.randint(3, VOCABULARY, (3, 12), device=device)


@torch.no_grad()
def run_plainly(lm, tokens, y_hat=None):
    """Return log p [3, 12, vocabulary], and the MLP's x and y, with y_hat in the place of y."""

    def hook(module, args, output):
        seen.extend([args[0].clone(), output.clone()])
        return None if y_hat is None else y_hat.clone()

    seen = []
    handle = find_mlp(lm, 1)[2].register_forward_hook(hook)
    log_p = lm(tokens, use_cache=False).logits.log_softmax(-1)
    handle.remove()
    return log_p, *seen


@EVERY_FAMILY
def test_activations(family, tmp_path, device):
    """x and y are what the MLP of the whole LM reads and writes, without position 0.

    Later blocks and the head never run.
    """
    new_lm(new_config(family)).save_pretrained(tmp_path)
    tokens = random_tokens(device)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    _, x, y = run_plainly(whole.eval().to(device), tokens)

    lm = skipcoder.load_lm(str(tmp_path), device)
    hookpoint, blocks, mlp = find_mlp(lm, 1)
    assert hookpoint == FAMILIES[family]
    ran = []
    for module in (blocks[2], lm.get_output_embeddings()):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    del blocks[2:]
    ours = MLPActivations(lm, mlp, max_norm=1e9)(tokens)
    assert not ran
    for a, expected in zip(ours, (x, y)):
        assert a.shape == (3 * 11, WIDTH)
        assert_close(a, expected[:, 1:].reshape(-1, WIDTH))


@EVERY_FAMILY
def test_the_patched_lm(family, device):
    """Its log p, clean and with y_hat in the MLP's place, are the LM's own."""
    lm = new_lm(new_config(family)).to(device)
    tokens, y_hat = random_tokens(device), torch.randn(3, 12, WIDTH, device=device)
    clean, x, y = run_plainly(lm, tokens)
    with_y_hat, _, _ = run_plainly(lm, tokens, y_hat)
    assert (clean - with_y_hat).abs().max() > 0.01, "the patch has to matter"

    patched = evaluation.PatchedLM(lm, 1)
    given = y_hat.clone()
    assert_close(patched(tokens, given), with_y_hat[:, 1:-1], atol=1e-4, rtol=1e-4)
    assert torch.equal(given, y_hat), "a block may not change what it is given"
    assert_close(patched(tokens), clean[:, 1:-1], atol=1e-4, rtol=1e-4)
    assert_close(patched.x, x)
    assert_close(patched.y, y)
    some = patched(tokens, given, slice(3, 7))
    assert_close(some, with_y_hat[:, 3:7], atol=1e-4, rtol=1e-4)
    assert patched(tokens, positions=slice(0)).shape == (3, 0, VOCABULARY)
    assert_close(patched.y, y)


@pytest.mark.parametrize("family", ["gptj", "phi"])
def test_the_bias_of_a_head_counts(family, device):
    """One token made likely by the bias alone is likely."""
    lm = new_lm(new_config(family)).to(device)
    lm.get_output_embeddings().bias.data[7] = 1000
    log_p = evaluation.PatchedLM(lm, 1)(random_tokens(device))
    assert (log_p[..., 7] > -1e-3).all()


def test_neurons_are_what_the_last_linear_layer_reads(device):
    """In Llama that is down_proj, in GPT-2 c_proj."""
    tokens = random_tokens(device)
    for family in ("llama", "gpt2"):
        lm = new_lm(new_config(family)).to(device)
        patched = evaluation.PatchedLM(lm, 1)
        patched(tokens)
        mlp = find_mlp(lm, 1)[2]
        with torch.no_grad():
            if family == "llama":
                gate = F.silu(mlp.gate_proj(patched.x))
                neurons = gate * mlp.up_proj(patched.x)
            else:
                neurons = F.gelu(mlp.c_fc(patched.x), approximate="tanh")
        assert_close(patched.neurons, neurons, atol=1e-5, rtol=1e-4)


# ---- Outliers -------------------------------------------------------------------------------


def test_outliers_are_left_out(tiny, device):
    """Those with |y| over ten times the median of the first call, which sets the threshold."""
    lm = skipcoder.load_lm(str(tiny), device)
    mlp = find_mlp(lm, 1)[2]
    factor = torch.ones(3, 12, 1, device=device)
    mlp.register_forward_hook(lambda module, args, output: output * factor)
    tokens = torch.randint(300, (3, 12), device=device)
    x, y = MLPActivations(lm, mlp)(tokens)

    for row, column in ((0, 1), (0, 2), (1, 5), (1, 6), (2, 3)):
        factor[row, column] = 1000
    normal = factor[:, 1:].flatten() == 1

    # The threshold stays as it is when all activations grow.
    activations = MLPActivations(lm, mlp)
    for scale in (1, 2):
        factor[:, 1:] *= scale
        new_x, new_y = activations(tokens)
        assert torch.equal(new_x, x[normal])
        assert torch.equal(new_y, scale * y[normal])
        norms = y.norm(dim=1) * factor[:, 1:].flatten() / scale
        assert activations.max_norm == pytest.approx(10 * norms.median().item())

    # A threshold that is given counts instead.
    lenient = MLPActivations(lm, mlp, activations.max_norm * 1e6)
    assert torch.equal(lenient(tokens)[0], x)


def test_what_is_not_finite_is_no_outlier(tiny, device):
    """It would be left out, and all of it where the median is not finite: nothing would remain."""
    lm = skipcoder.load_lm(str(tiny), device)
    mlp = find_mlp(lm, 1)[2]
    tokens = torch.randint(300, (3, 12), device=device)
    broken = torch.ones(3, 12, 1, device=device)
    mlp.register_forward_hook(lambda module, args, output: output * broken)
    for value in (float("nan"), float("inf")):
        for count, max_norm in ((1, 1e9), (36, None)):
            broken[:] = 1
            broken.view(-1)[7 : 7 + count] = value
            _, y = MLPActivations(lm, mlp, max_norm)(tokens)
            assert len(y) == 33 and not y.isfinite().all()


# ---- What cannot be coded -------------------------------------------------------------------


def refused(lm, device, layer=1) -> str:
    """Return the one line with which training would end."""
    tokens = torch.randint(3, VOCABULARY, (2, 12), device=device)
    lm = lm.to(device)
    with pytest.raises(SystemExit) as error:
        _, blocks, mlp = find_mlp(lm, layer)
        del blocks[layer + 1 :]
        MLPActivations(lm, mlp)(tokens)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mixtures_of_experts_are_refused(device):
    """Also JetMoe's, whose experts are named `mlp`."""
    mixtral = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    jetmoe = transformers.JetMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_key_value_heads=1,
        kv_channels=8,
        num_local_experts=2,
    )
    for config, name in ((mixtral, "Mixtral"), (jetmoe, "JetMoe")):
        line = refused(new_lm(config), device)
        assert line == f"error: --layer 1: {name}DecoderLayer has no dense .mlp"


def test_an_mlp_that_adds_the_residual_is_refused(device):
    """As BLOOM's does."""
    config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    line = refused(new_lm(config), device)
    assert line == "error: --model: BloomMLP does not map one tensor to another"


def test_an_mlp_that_runs_more_than_once_is_refused(device):
    """As those of LMs that loop over their blocks: here block 1 is block 0, too."""
    lm = new_lm(new_config("gpt2"))
    lm.transformer.h[0] = lm.transformer.h[1]
    assert refused(lm, device) == "error: --model: GPT2MLP runs more than once for a token"


def test_an_mlp_that_does_not_run_on_text_is_refused(device):
    """As that of a vision tower; here its block passes it by."""
    lm = new_lm(new_config("gpt2"))
    lm.transformer.h[1].forward = lambda hidden, *args, **more: hidden
    assert refused(lm, device) == "error: --model: the MLP of this layer does not run on text"


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_block_that_is_not_there(device, layer):
    line = refused(new_lm(new_config("gpt2")), device, layer)
    assert line == f"error: --layer {layer}: the model has blocks 0 to 2"
