"""Families of LMs: each gives the right x, y and log-probabilities, or is refused in one line."""

import pytest
import torch
import transformers
from torch.testing import assert_close

import eval as evaluation
import skipcoder
from skipcoder import MLPActivations, find_mlp

VOCABULARY, WIDTH = 64, 16
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": 2}
BASE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3}
FALCON_SIZES = BASE | {"num_attention_heads": 2}
SIZES = FALCON_SIZES | {"intermediate_size": 24}
GEMMA_SIZES = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
VISION_SIZES = SIZES | {"hidden_size": 8, "image_size": 8, "patch_size": 4}
GEMMA3_SIZES = {"text_config": GEMMA_SIZES, "vision_config": VISION_SIZES}


FAMILIES = {  # the configuration of a tiny LM, and the hookpoint of block 1
    "gpt2": (transformers.GPT2Config(**GPT2_SIZES), "h.1.mlp"),
    # Its head has a bias.
    "gptj": (transformers.GPTJConfig(**GPT2_SIZES, rotary_dim=4), "h.1.mlp"),
    "llama": (transformers.LlamaConfig(**SIZES, num_key_value_heads=2), "layers.1.mlp"),
    # Its logits are capped after the head.
    "gemma2": (transformers.Gemma2Config(**GEMMA_SIZES), "layers.1.mlp"),
    # Its block adds to y in place.
    "falcon": (transformers.FalconConfig(**FALCON_SIZES), "h.1.mlp"),
    # Its first list of blocks is the vision tower's.
    "gemma3": (transformers.Gemma3Config(**GEMMA3_SIZES), "language_model.layers.1.mlp"),
}


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


LAST_LAYERS = "c_proj", "fc_out", "down_proj", "dense_4h_to_h"  # of an MLP: GPT-J has fc_out


@torch.no_grad()
@pytest.mark.parametrize("config, hookpoint", FAMILIES.values(), ids=FAMILIES)
def test_activations_and_the_patched_lm(config, hookpoint, tmp_path, device):
    """x and y are what the MLP of the whole LM reads and writes, without position 0.

    The patched LM's log p, clean and with y_hat in the MLP's place, are the LM's own.
    """
    new_lm(config).save_pretrained(tmp_path)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(device)
    tokens, y_hat = random_tokens(device), torch.randn(3, 12, WIDTH, device=device)
    clean, x, y = run_plainly(whole, tokens)
    with_y_hat, _, _ = run_plainly(whole, tokens, y_hat)
    assert (clean - with_y_hat).abs().max() > 0.01, "the patch has to matter"

    lm = skipcoder.load_lm(str(tmp_path), device)
    found, blocks, mlp = find_mlp(lm, 1)
    assert found == hookpoint
    del blocks[2:]
    lm.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the head ran"))
    ours = MLPActivations(lm, mlp, max_norm=1e9)(tokens)
    for a, expected in zip(ours, (x, y)):
        assert a.shape == (3 * 11, WIDTH)
        assert_close(a, expected[:, 1:].reshape(-1, WIDTH))

    patched = evaluation.PatchedLM(whole, 1)
    given = y_hat.clone()
    assert_close(patched(tokens, given), with_y_hat[:, 1:-1], atol=1e-4, rtol=1e-4)
    assert torch.equal(given, y_hat), "a block may not change what it is given"
    assert_close(patched(tokens), clean[:, 1:-1], atol=1e-4, rtol=1e-4)
    assert_close(patched.x, x)
    assert_close(patched.y, y)
    mlp = find_mlp(whole, 1)[2]
    (last,) = [getattr(mlp, name) for name in LAST_LAYERS if hasattr(mlp, name)]
    assert_close(last(patched.neurons), y)  # the neurons are what it reads
    some = patched(tokens, given, slice(3, 7))
    assert_close(some, with_y_hat[:, 3:7], atol=1e-4, rtol=1e-4)
    assert patched(tokens, positions=slice(0)).shape == (3, 0, VOCABULARY)
    assert_close(patched.y, y)


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


MOE_SIZES = SIZES | {"num_key_value_heads": 2, "num_local_experts": 2}
JETMOE_SIZES = BASE | {"num_key_value_heads": 1, "kv_channels": 8, "num_local_experts": 2}
BLOOM_SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 2}


def loop(lm):
    """Make block 1 run twice for a token, as in LMs that loop over their blocks."""
    lm.transformer.h[0] = lm.transformer.h[1]


def pass_by(lm):
    """Make text pass the MLP by, as it does that of a vision tower."""
    lm.transformer.h[1].forward = lambda hidden, *args, **more: hidden


GPT2 = transformers.GPT2Config(**GPT2_SIZES)
MIXTRAL = transformers.MixtralConfig(**MOE_SIZES)
JETMOE = transformers.JetMoeConfig(**JETMOE_SIZES)
BLOOM = transformers.BloomConfig(**BLOOM_SIZES)
REFUSED = {  # a configuration, what is done to the LM, and how training ends
    "experts": (MIXTRAL, None, "--layer 1: MixtralDecoderLayer has no dense .mlp"),
    "experts named mlp": (JETMOE, None, "--layer 1: JetMoeDecoderLayer has no dense .mlp"),
    "adds the residual": (BLOOM, None, "--model: BloomMLP does not map one tensor to another"),
    "runs twice": (GPT2, loop, "--model: GPT2MLP runs more than once"),
    "does not run": (GPT2, pass_by, "--model: the MLP of this layer does not run on text"),
}


@pytest.mark.parametrize("config, change, line", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_coded_is_refused(config, change, line, device):
    lm = new_lm(config).to(device)
    if change is not None:
        change(lm)
    with pytest.raises(SystemExit) as error:
        _, blocks, mlp = find_mlp(lm, 1)
        del blocks[2:]
        MLPActivations(lm, mlp)(random_tokens(device))
    assert str(error.value).startswith(f"error: {line}")
