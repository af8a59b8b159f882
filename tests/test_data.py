"""Reading, tokenising, packing and splitting."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import skipcoder
from skipcoder import InputError, TokenBatches, documents, read_ahead

TEXTS = [f"document number {i}: " + "some words of it " * (i % 7) for i in range(60)]


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def write(path, texts=TEXTS):
    """Write the texts in the format that the name asks for."""
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    elif ".txt" in name:
        content = "".join(texts).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    else:
        lines = (
            json.dumps([{"text": t} for t in texts])
            if ".json" == path.with_suffix("").suffix + path.suffix
            else "\n".join(json.dumps({"text": t}) for t in texts)
        )
        path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_formats_give_every_document_in_order(tmp_path, name):
    assert list(documents(str(write(tmp_path / name)), None)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_files_are_cut_into_documents_and_nothing_is_lost(tmp_path, name):
    lines = [f"line {i} of a long book\n" for i in range(3000)]
    pieces = list(documents(str(write(tmp_path / name, lines)), None))
    assert "".join(pieces) == "".join(lines)
    assert len(pieces) > 3 and all(10_000 <= len(piece) < 10_100 for piece in pieces[:-1])


def test_folder_reads_its_files_in_order_of_name(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jsonl.gz", TEXTS[20:40])
    write(tmp_path / "a.parquet", TEXTS[:20])
    write(tmp_path / "sub" / "c.json", TEXTS[40:])
    (tmp_path / "README.md").write_text("not data")
    assert list(documents(str(tmp_path), None)) == TEXTS


def rows_of(data) -> list[list[int]]:
    return [row for batch in data for row in batch.tolist()]


def test_rows_are_full_and_join_documents_with_eos(tmp_path, tokenizer):
    """The rows of held-out documents, in order, are the tokens of every 10th document with an EOS after each."""
    path = write(tmp_path / "a.jsonl")
    rows = rows_of(TokenBatches(str(path), None, tokenizer, 8, 4, held_out=True, once=True))
    expected = [t for text in TEXTS[::10] for t in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]
    assert [t for row in rows for t in row] == expected[: len(expected) // 8 * 8]


def test_training_never_sees_held_out_documents_and_repeats(tmp_path, tokenizer, monkeypatch):
    """One pass gives each row of the other documents once, in another order for another seed; then it starts anew."""
    path = write(tmp_path / "a.jsonl")
    kept = [text for i, text in enumerate(TEXTS) if i % 10]
    tokens = [t for text in kept for t in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]
    expected = [tokens[i : i + 8] for i in range(0, len(tokens) - 7, 8)]
    assert len(expected) > 50
    orders = []
    for pool, seed in ((1024, 0), (16, 0), (16, 1)):
        monkeypatch.setattr(skipcoder, "SHUFFLE_ROWS", pool)
        stream, rows, note = iter(TokenBatches(str(path), None, tokenizer, 8, 1, seed=seed)), [], None
        while not isinstance(note := next(stream), str):
            rows += note.tolist()
        assert "repeated" in note and f"{len(expected) * 8:,} tokens" in note
        assert sorted(rows) == sorted(expected)
        orders.append(rows)
        again = [next(stream) for _ in range(len(expected) + 3)]  # the second pass, and no second note
        assert sorted(row for batch in again[: len(expected)] for row in batch.tolist()) == sorted(expected)
        assert all(isinstance(item, torch.Tensor) for item in again)
    assert expected not in orders and orders[1] != orders[2]


def test_ranks_share_the_documents(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl")
    kept = [text for i, text in enumerate(TEXTS) if i % 10]
    for rank in range(3):
        rows = list(TokenBatches(str(path), None, tokenizer, 8, 4, rank=rank, world=3).packed())
        texts = tokenizer.decode(torch.cat(rows)).split(tokenizer.eos_token)
        assert texts[:-1] == kept[rank::3][: len(texts) - 1] and len(texts) > 15


def test_read_ahead_gives_the_same_batches_and_raises_input_errors(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl")
    data = TokenBatches(str(path), None, tokenizer, 8, 4, held_out=True, once=True)
    for ours, theirs in zip(data, read_ahead(data), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(InputError, match="--dataset.*too little text"):
        next(read_ahead(TokenBatches(str(path), None, tokenizer, 32, 4000)))


def test_half_read_parquet_does_not_abort_at_exit(tmp_path, tiny):
    """A half-read parquet stream used to abort or hang the interpreter at exit (huggingface/datasets #7467)."""
    path = write(tmp_path / "a.parquet", TEXTS * 50)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from transformers import AutoTokenizer
from skipcoder import TokenBatches, documents, read_ahead
tokenizer = AutoTokenizer.from_pretrained({str(tiny)!r})
batches = read_ahead(TokenBatches({str(path)!r}, None, tokenizer, 8, 4))
print(next(batches).shape)
texts = documents({str(path)!r}, None)
print(next(texts))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, 8])" in done.stdout
