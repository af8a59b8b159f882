"""Reading, splitting, tokenising, packing and shuffling."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, end_readers, run
from transformers import AutoTokenizer

import skipcoder
from skipcoder import documents, in_split, token_batches

TEXTS = [f"{i} is the number of this document: " + "some words of it " * (i % 7) for i in range(60)]


@pytest.fixture
def tokenizer(tiny):
    yield AutoTokenizer.from_pretrained(tiny)
    end_readers()


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """Once `datasets` has read a parquet file it sleeps for seconds, for which the end of a reader would wait."""
    monkeypatch.setattr(skipcoder.datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


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
    content = (json.dumps(rows) if path.suffix == ".json" else content).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path) -> list[str]:
    return [document["text"] for document in documents(str(path), None)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_formats_give_every_document_in_order(tmp_path, name):
    assert read(write(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_files_are_cut_into_documents_of_100_lines_and_nothing_is_lost(tmp_path, name):
    lines = [f"line {i} of a long book\n" if i % 3 else "\n" for i in range(1234)]
    pieces = read(write(tmp_path / name, lines))
    assert "".join(pieces) == "".join(lines)
    assert [piece.count("\n") for piece in pieces] == [100] * 12 + [34]


def test_folder_of_mixed_kinds(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jsonl.gz", TEXTS[20:40])
    write(tmp_path / "a.parquet", TEXTS[:20])
    write(tmp_path / "sub" / "c.json", TEXTS[40:])
    write(tmp_path / "d.txt", ["a line\n"])
    (tmp_path / "README.md").write_text("not data")
    assert sorted(read(tmp_path)) == sorted([*TEXTS, "a line\n"])


def numbers(path, rows=1, n=None, **options) -> list[int]:
    """The documents in order of their rows: n of them, or all."""
    batches = token_batches(str(path), None, Numbers(), 2, rows, **options)
    found = []
    while (n is None or len(found) < n) and (batch := next(batches, None)) is not None:
        assert (batch[:, 1] == Numbers.eos_token_id).all()
        found += batch[:, 0].tolist()
    end_readers()
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("files, readers, world", [(3, 1, 1), (3, 3, 1), (3, 1, 2), (4, 1, 2)])
def test_the_sides_of_the_split_are_disjoint_and_complete(tmp_path, monkeypatch, capsys, files, readers, world):
    """For any number of files, readers and processes, and also when the data is read again, in another order."""
    texts = [f"{i} is the number" for i in range(120)]
    for i in range(files):
        write(tmp_path / f"{i}.parquet", texts[i::files])
    monkeypatch.setattr(skipcoder.os, "cpu_count", lambda: (readers + 1) * world)
    training, held_out = ([i for i, text in enumerate(texts) if in_split(text, side)] for side in (False, True))
    assert 5 < len(held_out) < 20 and sorted(training + held_out) == list(range(120))
    assert sorted(numbers(tmp_path, rows=7, held_out=True)) == held_out

    monkeypatch.setattr(skipcoder, "WORLD", world)
    epochs, n = ([], []), None
    for rank in range(world):
        monkeypatch.setattr(skipcoder, "RANK", rank)
        found = numbers(tmp_path, n=2 * len(training) // world, seed=0)
        if rank == 0:  # it says how much it reads an epoch, times the number of processes
            n = int(re.search(r"it has (\d+) tokens", capsys.readouterr().out)[1]) // (2 * world)
        n_here = n if rank == 0 else len(training) - n
        epochs[0].extend(found[:n_here])
        epochs[1].extend(found[n_here:] if world == 1 else [])
    assert sorted(epochs[0]) == training
    assert world > 1 or epochs[0] != epochs[1] and sorted(epochs[1]) == training


def test_the_split_is_the_same_in_every_format_and_skips_nulls(tmp_path):
    held_out = [i for i, text in enumerate(TEXTS) if in_split(text, True)]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        path = write(tmp_path / name, [None, *TEXTS[:30], None, *TEXTS[30:]])
        assert numbers(path, rows=4, held_out=True) == held_out
    assert in_split("a", True) == (0xE8B7BE43 % 10 == 0)  # CRC-32 of "a"
    assert not in_split(None, True) and not in_split(None, False)


def test_rows_are_full_and_join_documents_with_eos(tmp_path, tokenizer):
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


def test_batches_are_full_and_repeating_the_data_is_said_once(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl")
    epoch = sum(in_split(text, False) for text in TEXTS) // 4 * 4  # whole batches of 4
    assert len(numbers(path, rows=4, n=3 * epoch, seed=0)) == 3 * epoch
    says = f"--dataset {path} is repeated: it has {2 * epoch:,} tokens"
    assert capsys.readouterr().out.strip() == says


def test_too_little_text_is_an_error(tmp_path, tokenizer):
    with pytest.raises(SystemExit, match="error: --dataset .*a.jsonl: too little text for a batch of 4000 x 32 tokens"):
        next(token_batches(str(write(tmp_path / "a.jsonl")), None, tokenizer, 32, 4000, seed=0))


def test_half_read_parquet_does_not_abort_or_hang_at_exit(tmp_path, tiny):
    """As it used to (huggingface/datasets #7467)."""
    path = write(tmp_path / "a.parquet", TEXTS * 50)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from skipcoder import *
tokenizer = transformers.AutoTokenizer.from_pretrained({str(tiny)!r})
print(next(token_batches({str(path)!r}, None, tokenizer, 8, 4, seed=0)).shape)
print(next(iter(documents({str(path)!r}, None))))
"""
    done = run("-c", code)
    assert done.returncode == 0 and "torch.Size([4, 8])" in done.stdout, done.stderr
    assert "Fatal" not in done.stderr and "Traceback" not in done.stderr
