"""The page: what documents say is never markup, and it reads as it was written."""

import html
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from conftest import change_json, read_json, run_here, write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import eval as evaluation
from skipcoder import ARCHS

LINE = "The quick 日本語 fox 👩‍🚀 naïve.\n\tNew York"
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


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
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

    # A context has the space before its first token, which Llama's drops if it decodes that alone.
    n = next(i for i in range(1, 9) if texts[i].startswith(" "))
    before, _ = evaluation.context(tokenizer, tokens, n + evaluation.AROUND, [0.5] * len(tokens))
    assert re.sub("<.*?>", "", before).startswith(" ")


class Page(HTMLParser):
    """What a browser finds: elements with their attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


ELEMENTS = "html meta title style h1 h3 div table tr th td p details summary article small span b"
ATTRIBUTES = "lang charset name content class style tabindex open"


def check_page(page):
    """Check that a page has no elements but ours, runs nothing and loads nothing."""
    parsed = Page(page)
    assert {tag for tag, _ in parsed.elements} <= set(ELEMENTS.split())
    for _, attributes in parsed.elements:
        assert set(attributes) <= set(ATTRIBUTES.split())
        assert re.fullmatch(r"(--act:\d\.\d\d)?", attributes.get("style", ""))
    assert not re.search(r"url\(|@import|https?://", page.split("</style>")[0])
    assert len(page.encode()) < 4e6
    assert "color-scheme: light dark" in page and "prefers-color-scheme: dark" in page
    return parsed


def test_the_page_of_a_run(evaluated):
    """The run, which text, the table, and each coder's latents, best first."""
    page, report = evaluated.page, evaluated.report
    parsed = check_page(page)
    assert f"<title>model {report['run']['hookpoint']}</title>" in page
    for key in ("dataset", "evaluated_on"):
        assert html.escape(report["run"][key]) in page
    assert f"{report['tokens']:,} held-out tokens" in parsed.text
    for name, row in (report["coders"] | report["baselines"]).items():
        first = "" if row.get("fvu") is None else f"{row['fvu']:.4f}".removeprefix("0")
        assert f"<th>{name}<td>{first}<td>" in page
    sections = page.split("<details open>")[1:]
    names = [re.search("<summary>(.*?):", section)[1] for section in sections]
    assert names == [*ARCHS, "neurons"]
    for section, name in zip(sections, names):
        row = report["coders"].get(name) or report["baselines"][name]
        best = [float(score) for score in re.findall(r"intruder ([\d.]+)", section)]
        assert len(best) == row["latents_scored"] > 5 and best == sorted(best, reverse=True)
        assert sum(best) / len(best) == pytest.approx(row["intruder"], abs=0.01)


def test_contexts_on_the_page(evaluated):
    """Eight of each latent: the four strongest, and the middle of each lower fifth.

    The peak and what follows is a column of its own. Shading is the act, relative to the largest.
    """
    _, tokens, where, shown, tokenizer = evaluated.made_of
    section = evaluated.page.split("<details open>")[2]
    active, judged = shown["transcoder"]
    articles = section.split("<article>")[1:]
    assert len(articles) == len(judged)
    of_row = where // tokens.shape[1], where % tokens.shape[1]
    for article in articles:
        latent = int(re.search(r"<h3>latent (\d+)</h3>", article)[1])
        (scores,) = [scores for scores in judged if scores["latent"] == latent]
        places, acts = active.places[latent], active.acts[latent]
        n = len(places)
        assert f"active on {n / len(where):.2%} of tokens" in article
        assert f"intruder {scores['intruder']:.2f}" in article
        assert ("one word" in article) == ("one_word" in scores)
        lines = re.findall(r"<small>(.*?)</small><p>(.*?)</p><p>(.*?)</p>", article)
        assert [line[0] for line in lines] == [f"{i}/5" for i in (1, 1, 1, 1, 2, 3, 4, 5)]
        ranks = [0, 1, 2, 3, *(int(share * n) for share in (0.3, 0.5, 0.7, 0.9))]
        relative = dict(zip(zip(*(index[places].tolist() for index in of_row)), acts / acts[0]))
        for rank, (_, before, after) in zip(ranks, lines):
            row, peak = (index[places[rank]].item() for index in of_row)
            texts = evaluation.legible(tokenizer, tokens[row].tolist())
            start, end = max(0, peak - 12), peak + 13
            plain = [html.unescape(re.sub("<.*?>", "", part)) for part in (before, after)]
            assert plain == ["".join(texts[start:peak]), "".join(texts[peak:end])]
            levels = [relative.get((row, i), 0) for i in range(start, min(end, tokens.shape[1]))]
            marked = re.findall(r"--act:([\d.]+)", before + after)
            expected = [f"{level:.2f}" for level in levels if level > 0]
            assert marked == expected
            assert after.startswith(f'<b style="--act:{relative[row, peak]:.2f}">')


EVIL = """</script><script>alert(1)</script><b onclick="x()">'bold'</b> <!-- & \u202e \x07 é 日本 &lt;"""


def test_what_documents_say_is_text(trained, tmp_path):
    """Nothing of it is an element, an attribute or the end of one; nor are names of coders."""
    folder = shutil.copytree(trained, tmp_path / "run")
    coders = read_json(folder / "config.json")["coders"]
    coders["<i>&amp;"] = coders.pop("sae")
    change_json(folder / "config.json", coders=coders)
    text = write_jsonl(tmp_path / "<u>evil.jsonl", [f"{i} {EVIL}" * 10 for i in range(200)])
    args = f"--dataset {text} --latents 20 --device cpu --html {tmp_path}/e.html"
    assert run_here(evaluation, folder, *args.split()) == 0
    page = (tmp_path / "e.html").read_text(encoding="utf-8")
    parsed = check_page(page)
    assert "<script" not in page and "<b onclick" not in page
    for word in ("alert", "onclick", '"', "'", "&lt;", "日本", "<i>&amp;", "<u>evil"):
        assert word in parsed.text
    # Each token is isolated, so that one that turns the direction of text turns its own alone.
    assert re.search(r"span, b \{[^}]*unicode-bidi: isolate", page)


class Words:
    """A tokenizer whose tokens are what could end an element, each as a whole."""

    words = "</p>", "</b>", "<b>", "<!--", '"', "'", "&lt;", "&", ">", "\\", "<style>"

    def decode(self, tokens, **_):
        return "".join(self.words[token] for token in tokens)


@pytest.mark.parametrize("act", [0.0, 0.5])
def test_tokens_that_are_markup(act):
    """Escaped whether the latent is active on them or not."""
    n = len(Words.words)
    parts = evaluation.context(Words(), list(range(n)), 5, [act] * n)
    for part, words in zip(parts, (Words.words[:5], Words.words[5:])):
        plain = re.sub('<(b|span) style="--act:0.[05]0">|</(b|span)>', "", part)
        assert plain == "".join(html.escape(word) for word in words)


def test_a_page_of_many_latents_is_small(evaluated):
    """Four coders of a hundred latents, in rows of long words: under 4 MB."""
    n, width = 40_000, 256
    tokens = torch.randint(500, (160, width), generator=torch.Generator().manual_seed(0))
    places = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    latent = torch.arange(400).repeat_interleave(100)
    active = evaluation.ActiveTokens([(places, latent, torch.rand(n) + 1)], 400, n)
    scores = dict.fromkeys(evaluation.SCORES, 0.5)
    judged = [{"latent": j} | scores for j in range(400)]
    shown = dict.fromkeys([*ARCHS, "neurons"], (active, judged))
    report, tokenizer = evaluated.report, evaluated.made_of[-1]
    page = evaluation.page(report, tokens, torch.arange(n), shown, tokenizer)
    check_page(page)
    assert page.count("<article>") == 4 * 100 and "100 of 400 latents" in page
