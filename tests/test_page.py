"""The page and the pictures: what documents say is never run, and it reads as it was written."""

import json
import math
import re
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import eval as evaluation
from skipcoder import ARCHS, Arch

LINE = "The quick 日本語 fox 👩‍🚀 naïve.\n\tNew York"


@pytest.fixture(autouse=True)
def of_a_fork(monkeypatch):
    """Pictures show a fourth architecture, too."""
    looks = Arch(reads="x", color="#cc79a7", marker="diamond")
    monkeypatch.setitem(ARCHS, "of_a_fork", looks)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level():
    """A tokenizer like GPT-2's that knows no merges: each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(alphabet)}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def sentencepiece():
    """A tokenizer like Llama 2's: words start with a space, rare characters are bytes."""
    pieces = "▁ a e h T k q u i c n o f x v N w Y r . 日 ▁The ▁quick ▁fox ▁New ▁York"
    pieces = ["<unk>", *BYTES, *pieces.split()]
    vocabulary = [(piece, 1.0 * len(piece) - 9) for piece in pieces]
    unigram = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    start, spaces = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    unigram.normalizer = normalizers.Sequence([start, spaces])
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    steps = [spaces, decoders.ByteFallback(), decoders.Fuse(), strip]
    unigram.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=unigram)


def metaspace():
    """A BPE tokenizer that writes spaces as Mistral's does."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback(), decoders.Metaspace()]
    bpe.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", *BYTES], show_progress=False)
    bpe.train_from_iterator(["The quick fox in New York, a naïve one."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace])
def test_text_reads_as_it_was_written(make):
    """Spaces are there, and a character of several tokens is whole, at the last of them."""
    tokenizer = make()
    tokens = tokenizer.encode(LINE, add_special_tokens=False)
    texts = evaluation.legible(tokenizer, tokens)
    assert len(texts) == len(tokens)
    shown = LINE.replace("\n", "↵").replace("\t", "⇥")
    assert "".join(texts).removeprefix(" ") == shown
    emoji = texts.index("👩")
    assert texts[emoji - 3 : emoji] == ["", "", ""]


def test_what_cannot_be_seen_is_spelt_out():
    tokenizer = byte_level()
    tokens = tokenizer.encode("a\x07\u202eb\ufffd c\u3000")
    assert "".join(evaluation.legible(tokenizer, tokens)) == "a\\u0007\\u202eb\ufffd c\u3000"
    # A row may start in the middle of a character, and end there.
    tokens = tokenizer.encode("日 日 日")[1:-1]
    texts = evaluation.legible(tokenizer, tokens)
    assert "".join(texts).lstrip("�") == " 日 "


# An evaluation that is made up: numbers of all coders and baselines, and some of their own.
FIDELITY = {
    "fvu": 0.5,
    "fvu_all": 0.5,
    "l0": 0.5,
    "dead": 0.5,
    "ce": 0.5,
    "ce_increase_se": 0.5,
    "ce_recovered": 0.5,
    "kl": 0.5,
    "kl_se": 0.5,
}
SCORES = {
    "intruder": 0.7,
    "intruder_se": 0.02,
    "intruder_sd": 0.1,
    "intruder_by_quantile": [0.5] * 5,
    "intruder_histogram": [0.2, 0.8],
    "latents_scored": 2,
}
SAME_TOKEN = {
    "intruder_same_token": 0.4,
    "intruder_same_token_se": 0.02,
    "latents_same_token": 2,
}
RUN = {
    "model": "some/model",
    "hookpoint": "h.1.mlp",
    "layer": 1,
    "k": [8, 64],
    "num_latents": 512,
    "seed": 0,
    "dataset": "text",
    "tokens": 10,
    "tokens_trained": 10,
    "tokens_asked_for": 10,
    "tokens_read": 10,
    "baselines_k": 8,
    "versions": {},
}


def made_up(rows) -> dict:
    """A report on coders, from the (arch, k, CE increase, score) of each."""
    report = {
        "run": RUN | {"k": sorted({k for _, k, _, _ in rows})},
        "tokens": 10,
        "outliers": {"tokens": 0.0, "variance": 0.0},
        "clean_ce": 1.0,
        "mean_ablated_ce": 2.0,
        "zero_ablated_ce": 3.0,
        "coders": {},
        "baselines": {
            "affine": FIDELITY | {"ce_increase": 0.5},
            "neurons": SCORES | SAME_TOKEN | {"intruder": 0.3},
            "untrained": SCORES | SAME_TOKEN | {"intruder": 0.31},
            "untrained_sae": SCORES | SAME_TOKEN | {"intruder": 0.33},
            "null": SCORES | {"intruder": 0.19},
        },
    }
    for arch, k, ce_increase, score in rows:
        row = FIDELITY | SCORES | SAME_TOKEN | {"arch": arch, "k": k, "l0": k}
        row |= {"ce_increase": ce_increase, "intruder": score}
        report["coders"][f"{arch}-k{k}"] = row
    return report


ROWS = [
    ("sae", 8, 0.04, 0.7),
    ("sae", 64, 0.01, 0.6),
    ("transcoder", 8, 0.02, 0.8),
    ("transcoder", 64, 0.002, 0.8),
    ("skip_transcoder", 8, 1e-3, 0.9),
    ("of_a_fork", 8, 0.005, 0.75),
]


def made_up_scores(number, found_same_token):
    """Scores of latent 7 of 512, active on this number of tokens; its plain score is 1.

    And which intruders were found in trials of the same token, if there were such trials.
    """
    active = SimpleNamespace(count=torch.zeros(512), density=torch.full((512,), 0.25))
    active.places = {7: torch.arange(number)}
    active.acts = {7: torch.linspace(9, 1, number)}
    found = torch.tensor([found_same_token or [False] * 10])
    return SimpleNamespace(
        active=active,
        latents=[7],
        found=torch.ones(1, 10).bool(),
        has_same_token=torch.tensor([found_same_token is not None]),
        found_same_token=found,
    )


def make_page(tokenizer, tokens, promoted, rows=ROWS, found_same_token=None):
    """A page on which each coder has one latent, active on all tokens, and the page's data."""
    report, places = made_up(rows), torch.arange(len(tokens))
    scores = made_up_scores(len(tokens), found_same_token)
    scores = dict.fromkeys(report["coders"], scores)
    promotes = dict.fromkeys(report["coders"], torch.tensor([promoted]))
    seen = torch.tensor([tokens])
    page = evaluation.page(report, seen, places, scores, promotes, tokenizer)
    return page, check_page(page)


def check_page(page: str) -> dict:
    """The data of a page on which nothing that it shows is a tag, and which loads nothing."""
    assert page.count("<script") == page.count("</script") == 2
    assert "<b>" not in page and "<!--" not in page
    loads = r"(src|href)=|url\(|@import|https?://(?!www.w3.org/2000/svg)"  # that is but a name
    assert not re.search(loads, page)
    data = re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    return json.loads(data)


def test_page_escapes_tokens_that_are_tags():
    """With a tokenizer whose tokens are what could end a script, each as a whole."""
    evil = ["</script", "</SCRIPT>", "<!--", "<script", "<b>", "&lt;", '"', "\\", "@DATA@", "]]>"]
    tokenizer = SimpleNamespace(encode=lambda text, **_: [0])
    tokenizer.decode = lambda tokens, **_: "".join(evil[token] for token in tokens)
    _, data = make_page(tokenizer, list(range(10)) * 2, [0, 1, 2, 3, 4])
    assert set(data["text"]) == set(evil)


def test_contexts():
    """Four of the largest activations, the middle of each lower fifth, text on both sides."""
    tokenizer = byte_level()
    tokens = tokenizer.encode("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567")
    _, data = make_page(tokenizer, tokens, [0] * 5)
    assert data["sizes"]["sae-k8"] == [1, 512] and data["best"] == "skip_transcoder-k8"
    ((latent, score, density, largest, _, contexts, _),) = data["coders"]["sae-k8"]
    assert (latent, score, density, largest) == (7, 1, 0.25, 9)
    texts = ["".join(data["text"][word] for word in words) for _, words, _ in contexts]
    peaks = [text[peak] for text, (peak, *_) in zip(texts, contexts)]
    assert "".join(peaks) == "abcdsEQ2"
    around = evaluation.AROUND
    for peak, words, levels in contexts[4:7]:
        assert peak == around and len(words) == len(levels) == 2 * around + 1
    assert contexts[0][0] == 0 and contexts[0][2][0] == "9"


def test_the_score_against_the_same_token_is_shown_where_there_is_one():
    """A 0 is a score, too."""
    tokenizer = byte_level()
    tokens = tokenizer.encode("the quick fox")
    for right, score in ((3, 0.3), (0, 0), (None, None)):
        found = None if right is None else [True] * right + [False] * (10 - right)
        _, data = make_page(tokenizer, tokens, tokens[:5], found_same_token=found)
        ((_, plain, _, _, same_token, _, _),) = data["coders"]["sae-k8"]
        assert plain == 1 and same_token == pytest.approx(score)


def test_promoted_tokens_leave_out_what_cannot_be_seen():
    tokenizer = byte_level()
    first, _, last = tokenizer.encode("日")
    blank, line_end, control, letter = tokenizer.encode(" \n\x07x")
    promoted = [first, last, blank, line_end, control, letter]
    _, data = make_page(tokenizer, [letter] * 9, promoted)
    ((*_, promoted),) = data["coders"]["sae-k8"]
    assert [data["text"][word] for word in promoted] == ["x"]


def test_with_one_k_there_is_no_picture_of_fvu_against_l0():
    tokenizer = byte_level()
    tokens = tokenizer.encode("the quick fox")
    for rows, pictures in ((ROWS, 3), (ROWS[::2], 2)):
        page, _ = make_page(tokenizer, tokens, tokens[:5], rows)
        assert page.count("<svg") == pictures


def draw(rows):
    """A picture of the score against CE increase, and by axis the pixels of its marks."""
    svg = evaluation.chart(made_up(rows), "ce_increase", "intruder")
    svg = ElementTree.fromstring(svg.replace(' xmlns="', ' ns="'))
    across, down = {}, {}
    for text in svg.findall("text"):
        x, y = float(text.get("x")), float(text.get("y"))
        if y == evaluation.BOTTOM + 14:
            across[float(text.text)] = x
        elif x == evaluation.LEFT - 6:
            down[float(text.text)] = y
    return svg, across, down


def points(svg) -> dict:
    """The error bar and the marker of each coder, by architecture and k."""
    found = {}
    for group in svg.iter("g"):
        title = group.find("title")
        if title is not None:
            arch, k = re.match(r"(\w+), k (\d+): CE increase", title.text).groups()
            bar, marker = group.findall("path")
            ends = re.findall(r"[\d.]+", bar.get("d"))
            place = re.findall(r"[\d.]+", marker.get("transform"))
            found[arch, int(k)] = [float(n) for n in place + ends]
    return found


def baselines(svg) -> dict:
    """The heights of the line and of the name of each baseline."""
    found = {}
    for group in svg.findall("g[@class='faint']"):
        line, name = group.find("path"), group.find("text")
        height = re.search(r" ([\d.]+)H", line.get("d"))[1]
        found[name.text] = float(height), float(name.get("y"))
    return found


def test_points_lie_where_the_marks_put_them():
    """On a log scale across, and on a linear one down. So do the lines of the baselines."""
    svg, across, down = draw(ROWS)
    assert 4 < len(across) + len(down) < 16
    decade = across[0.01] - across[0.001]
    per_score = (down[0.8] - down[0.2]) / 0.6
    for arch, k, ce_increase, score in ROWS:
        x, y, _, low, high = points(svg)[arch, k]
        right_x = across[0.001] + decade * math.log10(ce_increase / 0.001)
        right_y = down[0.2] + per_score * (score - 0.2)
        assert x == pytest.approx(right_x, abs=0.3)
        assert y == pytest.approx(right_y, abs=0.3)
        # Error bars reach two standard errors of 0.02 up and down.
        assert low == pytest.approx(y - 0.04 * per_score, abs=0.3)
        assert high == pytest.approx(y + 0.04 * per_score, abs=0.3)
    lines = {"chance": 0.2, "neurons": 0.3, "untrained": 0.31, "untrained_sae": 0.33}
    for name, score in lines.items():
        right_y = down[0.2] + per_score * (score - 0.2)
        assert baselines(svg)[name][0] == pytest.approx(right_y, abs=0.3)


def test_names_of_baselines_do_not_cover_one_another():
    names = baselines(draw(ROWS)[0])
    assert list(names) == ["chance", "neurons", "untrained", "untrained_sae"]
    # A letter is up to 8 pixels wide, and the picture 440.
    assert evaluation.RIGHT + 5 + 8 * max(map(len, names)) <= 440
    heights = [height for _, height in names.values()]
    assert all(low - high >= 14 for low, high in pairwise(heights))


def test_below_zero_the_scale_is_linear():
    rows = [("sae", 8, 0.04, 0.7), ("transcoder", 8, -0.01, 0.7)]
    svg, across, _ = draw(rows)
    per_nat = (across[0.02] - across[0]) / 0.02
    x = points(svg)["transcoder", 8][0]
    assert x == pytest.approx(across[0] - 0.01 * per_nat, abs=0.3)


def test_small_differences_look_small():
    """An axis spans half of its largest number at least, also with one number, and with zero."""
    at, marks = evaluation.axis([31.92, 32], 0, 100)
    assert at(32) - at(31.92) < 1 and 2 <= len(marks) < 8
    for number in (0.5, 0, -3):
        at, marks = evaluation.axis([number], 0, 100)
        assert at(number) == 50 and len(marks) > 1
    _, marks = evaluation.axis([1e-5, 1], 0, 100)  # round numbers of five decades are too many
    assert len(marks) < 8


def test_looks_of_architectures_differ():
    svg, *_ = draw(ROWS)
    groups = svg.findall("g[@fill]")
    assert len({group.get("fill") for group in groups}) == 4
    assert len({group.find("path").get("d") for group in groups}) == 4


def test_labels_of_k_do_not_cover_each_other():
    """Also where six coders are in nearly the same place."""
    ks = [8, 16, 32, 64, 128, 256]
    svg, *_ = draw([("sae", k, 0.02 + k / 1e5, 0.7) for k in ks])
    labels = svg.findall("g[@class='k']/text")
    assert [label.text for label in labels] == [str(k) for k in ks]
    assert len({(label.get("x"), label.get("y")) for label in labels}) == 6


def test_nothing_to_draw():
    empty = evaluation.chart({"coders": {}}, "ce_increase", "intruder")
    assert "no latents" in empty
