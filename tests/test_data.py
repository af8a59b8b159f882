"""Reading, splitting, tokenising, packing and shuffling."""

import gzip
import json
import re
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import end_readers, run
from transformers import AutoTokenizer

import skipcoder
from skipcoder import documents, in_split, token_batches

TEXTS = [f"{i} is the number of this document: " + "some words of it " * (i % 7) for i in range(60)]

@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Once `datasets` has read a parquet file it sleeps for seconds, for which the end of a reader would wait."""
    monkeypatch.setattr(skipcoder.datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    yield
    end_readers()

class Numbers:
    """A tokenizer by which the document "7 ..." is the token 7: with an EOS it fills a row of two tokens."""

    eos_token_id = 999

    def __call__(self, texts, **_):
        return {"input_ids": [[int(text.split()[0])] for text in texts]}

def write(path, texts=TEXTS):
    """Write the texts in the format that the name asks for."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
        return path
    rows = [{"text": text} for text in texts]
    content = "".join(texts) if ".txt" in path.name else "\n".join(map(json.dumps, rows))
    content = (json.dumps(rows) if ".json" in path.suffixes else content).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path

def read(path) -> list[str]:
    return [document["text"] for document in documents(str(path), None)]

@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_files_are_cut_into_documents_of_100_lines_and_nothing_is_lost(tmp_path, name):
    lines = [f"line {i} of a long book\n" if i % 3 else "\n" for i in range(1234)]
    pieces = read(write(tmp_path / name, lines))
    assert "".join(pieces) == "".join(lines)
    assert [piece.count("\n") for piece in pieces] == [100] * 12 + [34]

def test_folder_of_mixed_kinds(tmp_path):
    """Every document of every file, in files of each kind in their order."""
    (tmp_path / "sub").mkdir()
    names = "sub/b.jsonl.gz", "a.jsonl", "sub/c.json", "c.json.gz", "a.parquet"
    for i, name in enumerate(names):
        assert read(write(tmp_path / name, TEXTS[i::5])) == TEXTS[i::5]
    write(tmp_path / "d.txt", ["a line\n"])
    (tmp_path / "README.md").write_text("not data")
    assert sorted(read(tmp_path)) == sorted([*TEXTS, "a line\n"])

def numbers(path, rows=1, n=None, **options) -> list[int]:
    """The documents in order of their rows: n of them, or all."""
    batches = token_batches(str(path), None, Numbers(), 2, rows, **options)
    found = torch.cat(list(batches if n is None else islice(batches, n // rows)))
    assert (found[:, 1] == Numbers.eos_token_id).all()
    end_readers()
    return found[:, 0].tolist()

@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind, files, readers, world", [("parquet", 3, 1, 1), ("txt", 3, 3, 1), ("txt", 3, 1, 1),
                                                         ("parquet", 3, 1, 2), ("txt", 4, 1, 2)])  # fmt: skip
def test_the_sides_of_the_split_are_disjoint_and_complete(tmp_path, monkeypatch, capsys, kind, files, readers, world):
    """For any number of files, readers and processes, and also when the data is read again, in another order."""
    texts = [f"{i} is the number\n" + "and so on\n" * (49 if i >= 120 - files else 99) for i in range(120)]
    for i in range(files):
        write(tmp_path / f"{i}.{kind}", texts[i::files])
    monkeypatch.setattr(skipcoder.os, "cpu_count", lambda: (readers + 1) * world)
    training, held_out = ([i for i, text in enumerate(texts) if in_split(text, side)] for side in (False, True))
    assert 5 < len(held_out) < 20 and sorted(training + held_out) == list(range(120))
    assert sorted(numbers(tmp_path, rows=7, held_out=True)) == held_out

    monkeypatch.setattr(skipcoder, "WORLD", world)
    epochs = [], []
    for rank in range(world):
        monkeypatch.setattr(skipcoder, "RANK", rank)
        found = numbers(tmp_path, n=2 * len(training) // world, seed=0)
        if rank == 0:  # which says how much all ranks read an epoch, by its own share
            share = int(re.search(r"it has (\d+) tokens", capsys.readouterr().out)[1]) // (2 * world)
        own = share if rank == 0 else len(training) - share
        epochs[0].extend(found[:own])
        epochs[1].extend(found[own:])
    assert sorted(epochs[0]) == training and not set(epochs[1]) & set(held_out)
    assert world > 1 or sorted(epochs[1]) == training and epochs[0] != epochs[1]

def test_the_split_is_the_same_in_every_format_and_skips_nulls(tmp_path):
    held_out = [i for i, text in enumerate(TEXTS) if in_split(text, True)]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        path = write(tmp_path / name, [None, *TEXTS[:30], None, *TEXTS[30:]])
        assert numbers(path, rows=4, held_out=True) == held_out
    assert in_split("a", True) == (0xE8B7BE43 % 10 == 0)  # CRC-32 of "a"
    assert not in_split(None, True) and not in_split(None, False)

def test_rows_are_full_and_join_documents_with_eos(tmp_path, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    path = write(tmp_path / "a.jsonl")
    batches = list(token_batches(str(path), None, tokenizer, 8, 4, held_out=True))
    rows = [row for batch in batches for row in batch.tolist()]
    texts = [text for text in TEXTS if in_split(text, True)]
    expected = [token for text in texts for token in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]
    assert len(rows) > 5 and sum(rows, []) == expected[: len(expected) // 8 * 8]

def test_rows_are_shuffled_in_another_order_for_another_seed(tmp_path):
    path = write(tmp_path / "a.jsonl")
    first, again, other = (numbers(path, n=50, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first != sorted(first)

def test_batches_are_full_and_that_data_is_repeated_is_said_once(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl")
    epoch = sum(in_split(text, False) for text in TEXTS) // 4 * 4  # whole batches of 4
    assert len(numbers(path, rows=4, n=3 * epoch, seed=0)) == 3 * epoch
    assert capsys.readouterr().out.strip() == f"--dataset {path} is repeated: it has {2 * epoch:,} tokens"

def test_half_read_parquet_does_not_abort_or_hang_at_exit(tmp_path, tiny):
    """As it used to (huggingface/datasets #7467)."""
    path = write(tmp_path / "a.parquet", TEXTS * 50)
    code = f"""
from skipcoder import *
tokenizer = transformers.AutoTokenizer.from_pretrained({str(tiny)!r})
for seed in (0, None):  # as in training, and as in evaluation
    print(next(token_batches({str(path)!r}, None, tokenizer, 8, 4, seed=seed)).shape)
"""
    done = run("-c", code)
    assert done.returncode == 0 and "torch.Size([4, 8])" in done.stdout, done.stderr
    assert "Fatal" not in done.stderr and "Traceback" not in done.stderr
