"""Reading text in the shapes that users have it, splitting, tokenising, packing and shuffling."""

import bz2
import gzip
import json
import lzma
import os
import re
import zlib
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import end_readers, run, write_jsonl
from transformers import AutoTokenizer

import skipcoder
from skipcoder import documents, find_sources, is_held_out, pack, token_batches

TEXTS = sorted(f"{i} is the number of it: " + "some words " * (i % 7) for i in range(60))
BOS, EOS = 998, 999
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture(autouse=True)
def no_readers_stay():
    yield
    end_readers()


class Numbers:
    """A tokenizer by which the document "7 ..." is the token 7: with EOS it fills a row of 3."""

    bos_token_id, eos_token_id = BOS, EOS

    def __call__(self, texts, **_):
        return {"input_ids": [[int(text.split()[0])] for text in texts]}


def write(path, texts=TEXTS):
    """Write the texts in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compress = COMPRESS.get(path.suffix.lower())
    kind = Path(path.stem if compress else path.name).suffix.lower()
    if kind == ".parquet":
        content = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": texts}), content, row_group_size=7)
        content = content.getvalue().to_pybytes()
    elif kind == ".jsonl":
        content = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    else:
        content = "".join(texts).encode()
    path.write_bytes(compress(content) if compress else content)
    return path


def read(path) -> list[str]:
    """Return the texts of both sides of the split, sorted."""
    sources = find_sources(path, None)
    return sorted(text for side in (True, False) for text in documents(sources, side))


# ---- Files and folders ----------------------------------------------------------------------

NAMES = ["a.jsonl", "A.JSONL", "a.jsonl.gz", "a.Jsonl.BZ2", "a.b.jsonl.xz", "a.parquet"]
NAMES += ["A.PARQUET", "a.parquet.gz", "a.parquet.bz2", "a.parquet.xz"]
NAMES += ["x[1].jsonl", "a*b.jsonl", "{a,b}.jsonl.gz", "a::b.jsonl", "what?.jsonl", "ü ö.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_by_its_name(tmp_path, name):
    """In each format, compressed or not. Odd characters do not match neighbours, or mislead."""
    for neighbour in ("x1.jsonl", "aab.jsonl", "a.jsonl.txt", "b.jsonl.gz", "whats.jsonl"):
        write(tmp_path / "data[1]" / neighbour, ["not this"])
    path = write(tmp_path / "data[1]" / name)
    assert read(path) == TEXTS
    assert read(path.parent) == sorted([*TEXTS, *["not this"] * 5])


@pytest.mark.parametrize("name", ["a.txt", "A.TXT.GZ", "a.txt.xz"])
def test_text_files_are_cut_into_documents_of_100_lines_and_nothing_is_lost(tmp_path, name):
    lines = [f"line {i} of a long book\n" if i % 3 else "\n" for i in range(1234)]
    pieces = list(skipcoder.read_source(write(tmp_path / name, lines)))
    assert "".join(pieces) == "".join(lines)
    assert [piece.count("\n") for piece in pieces] == [100] * 12 + [34]


def test_a_folder_is_read_whole(tmp_path, capsys, monkeypatch):
    """All kinds together, with its subfolders. Hidden ones are not ours; others are counted."""
    folder = tmp_path / ".cache" / "data"  # that it lies in a hidden one itself does not matter
    names = ["a.jsonl", "b.parquet", "sub/c.txt", "sub/deeper/d.JSONL.gz", "sub/a.jsonl"]
    for i, name in enumerate(names):
        write(folder / name, [f"document {i}"])
    for name in ("._a.jsonl", ".hidden/d.txt", "sub/.ipynb_checkpoints/a-checkpoint.jsonl"):
        write(folder / name, ["hidden"])
    for name in ("README.md", "sub/words.csv", "infos.json", "noending"):
        (folder / name).write_text("not data")
    (folder / "folder.txt").mkdir()
    assert read(folder) == [f"document {i}" for i in range(5)]
    assert capsys.readouterr().out == f"--dataset {folder}: files read 5, left out 4\n"

    # Only one process of torchrun talks.
    monkeypatch.setattr(skipcoder, "RANK", 1)
    assert len(read(folder)) == 5 and capsys.readouterr().out == ""


# ---- What is in them ------------------------------------------------------------------------


def test_other_columns_do_not_matter(tmp_path):
    """They may be of mixed types, null at first, or missing here and there."""
    others = [{"meta": None}, {}, {"meta": "a"}, {"meta": [1]}, {"more": {"a": 1}}]
    rows = [others[i % 5] | {"text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i, other in enumerate(([1] * 60, ["x"] * 60, [None] * 60)):
        table = pa.table({"other": other, "text": TEXTS})
        pq.write_table(table, tmp_path / f"{i}.parquet")
    assert read(tmp_path) == sorted(TEXTS * 4)


def test_records_and_lines_without_text_are_skipped(tmp_path):
    """Nulls, blank lines, and records without a text, unless that is the first one."""
    for name in ("a.jsonl", "a.parquet"):
        assert read(write(tmp_path / name, [None, *TEXTS[:30], None, *TEXTS[30:]])) == TEXTS
    lines = [json.dumps({"text": text}) + "\n  \n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:9], '{"body": "b"}', "{}", *lines[9:]]))
    assert read(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    """Windows' editors write one."""
    content = ("é" if name == "a.txt" else '{"text": "é"}\n').encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name[-2:] == "gz" else content)
    assert read(tmp_path / name) == ["é"]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    r"""JSON allows "\ud83d" alone, and no tokenizer takes it."""
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a \ud83d b"}' + "\n" + r'{"text": "\ud83d\ude00"}')
    assert read(path) == ["a ? b", "😀"]


def test_a_data_set_of_the_hub(monkeypatch):
    """Each of its shards is a part, of which the column text is read."""

    def generate(shards):
        for shard in shards:
            for text in TEXTS[shard::4]:
                yield {"text": text, "other": {"a": shard}}

    def load_dataset(name, subset, split, streaming):
        assert (name, subset, split, streaming) == ("user/data", "part", "train", True)
        shards = {"shards": list(range(4))}
        return datasets.IterableDataset.from_generator(generate, gen_kwargs=shards)

    monkeypatch.setattr(skipcoder.datasets, "load_dataset", load_dataset)
    sources = find_sources("user/data", "part")
    assert len(sources) == 4
    for i, source in enumerate(sources):
        assert list(skipcoder.read_source(source)) == TEXTS[i::4]
    batches = token_batches(sources, Numbers(), 3, 1, held_out=True)
    found = [batch[0, 1].item() for batch in batches]
    assert sorted(found) == sorted(int(text.split()[0]) for text in filter(is_held_out, TEXTS))


# ---- The split ------------------------------------------------------------------------------


def test_one_document_in_ten_is_held_out_by_its_checksum():
    """It may not differ between processes, as Python's own hash does."""
    texts = [f"dôcument {i}" for i in range(10_000)]
    expected = [zlib.crc32(text.encode()) % 10 == 0 for text in texts]
    assert list(map(is_held_out, texts)) == expected
    assert 900 < sum(expected) < 1100


def test_a_long_document_is_cut_and_its_pieces_stay_on_one_side(tmp_path):
    """A tokenizer would take gigabytes for it as a whole."""
    texts = [f"{i} " + "word " * 40_000 for i in range(10)]  # 200,000 characters each
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert len(set(map(is_held_out, texts))) == 2
    for held_out in (True, False):
        pieces = list(documents([path], held_out))
        assert max(map(len, pieces)) == skipcoder.LONGEST == 100_000
        assert "".join(pieces) == "".join(t for t in texts if is_held_out(t) == held_out)


def numbers(path, rows=1, n=None, **options) -> list[int]:
    """Return the documents in order of their rows: n of them, or all."""
    batches = token_batches(find_sources(path, None), Numbers(), 3, rows, **options)
    batches = list(batches if n is None else islice(batches, n // rows))
    end_readers()
    found = torch.cat(batches)
    assert found.dtype == torch.int64
    assert (found[:, 0] == BOS).all() and (found[:, 2] == EOS).all()
    return found[:, 1].tolist()


# The format, the number of files, and of processes under torchrun. Two processes get a reader each
# of 3 files, two of 4, and have to share one file.
CASES = [("parquet", 3, 1), ("jsonl", 1, 1), ("txt", 3, 1)]
CASES += [("parquet", 3, 2), ("txt", 4, 2), ("jsonl", 1, 2)]


@pytest.mark.parametrize("kind, files, world", CASES)
def test_the_sides_of_the_split_are_disjoint_and_complete(
    tmp_path, monkeypatch, capsys, kind, files, world
):
    """For any number of files, readers and processes, also when the data is read again."""
    # Each is a document of its own in a .txt, too: 100 lines, of which the last one has fewer.
    texts = [f"{i} is the number\n" + "and so on\n" * 99 for i in range(120)]
    for i in range(120 - files, 120):
        texts[i] = texts[i][:500]
    for i in range(files):
        write(tmp_path / f"{i}.{kind}", texts[i::files])

    # Evaluation reads all held-out documents once.
    held_out = [i for i, text in enumerate(texts) if is_held_out(text)]
    training = [i for i, text in enumerate(texts) if not is_held_out(text)]
    assert 5 < len(held_out) < 20 and len(held_out + training) == 120
    assert sorted(numbers(tmp_path, rows=7, held_out=True)) == held_out

    # Training reads all others, and then again.
    monkeypatch.setattr(skipcoder, "WORLD", world)
    first, second = [], []
    for rank in range(world):
        monkeypatch.setattr(skipcoder, "RANK", rank)
        capsys.readouterr()
        found = numbers(tmp_path, n=2 * len(training) // world, seed=0)
        said = re.findall(r"it has (\d+) tokens", capsys.readouterr().out)
        if rank == 0:  # it says how much all ranks read in an epoch, by its own share
            own = share = int(said[0]) // (3 * world)
        else:
            own = len(training) - share
        assert len(said) == (rank == 0)
        first += found[:own]
        second += found[own:]
    assert sorted(first) == training
    assert not set(second) & set(held_out)
    if world == 1:
        assert sorted(second) == training and first != second


# ---- Rows and batches -----------------------------------------------------------------------


class Letters:
    """A tokenizer with a token for each character, and some special tokens or none."""

    def __init__(self, bos, eos):
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


@pytest.mark.parametrize("bos", [BOS, 0, None])
@pytest.mark.parametrize("eos", [EOS, None])
def test_rows_begin_with_bos_and_lose_no_token(bos, eos):
    """Or with EOS where there is no BOS, or with text where there is neither."""
    texts = ["x" * (i % 11) + str(i) for i in range(170)]  # more than are tokenised at once
    rows = list(pack(texts, Letters(bos, eos), 8))
    joined = []
    for text in texts:
        joined += [ord(c) for c in text] + ([] if eos is None else [eos])
    start = bos if bos is not None else eos
    for row in rows:
        assert row.dtype == torch.int64 and len(row) == 8
        if start is not None:
            assert row[0] == start
    skip = 0 if start is None else 1
    found = torch.cat([row[skip:] for row in rows]).tolist()
    assert found == joined[: len(found)]
    assert len(joined) - len(found) < 8 - skip, "only what fills no row is dropped"


def test_files_are_shuffled(tmp_path, monkeypatch):
    """A pool of rows cannot mix what is far apart. Evaluation reads files as they are sorted."""
    monkeypatch.setattr(skipcoder, "SHUFFLE_ROWS", 1)
    for i in range(30):
        write(tmp_path / f"{i:02}.jsonl", [f"{i} {j}" for j in range(40)])
    first, again, other = (numbers(tmp_path, rows=4, n=400, seed=seed) for seed in (0, 0, 1))
    assert first == again
    for found in (first, other):
        in_order = list(dict.fromkeys(found))  # the files of both readers
        for parity in (0, 1):
            of_one = [i for i in in_order if i % 2 == parity]
            assert of_one != sorted(of_one)
    assert list(dict.fromkeys(first)) != list(dict.fromkeys(other))
    files = numbers(tmp_path, held_out=True)
    for group in (0, 1):
        of_one = [i for i in files if i % 2 == group]
        assert of_one == sorted(of_one)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_what_is_read_does_not_depend_on_the_number_of_cores(tmp_path, monkeypatch):
    """Neither on those of the machine, nor on those that the process may use."""
    for i in range(16):
        write(tmp_path / f"{i}.jsonl", TEXTS[i::16])
    found = set()
    for cores in (1, 64):
        for name in ("cpu_count", "process_cpu_count"):
            monkeypatch.setattr(os, name, lambda cores=cores: cores, raising=False)
        usable = set(range(cores))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, usable=usable: usable, raising=False)
        found.add(tuple(numbers(tmp_path, rows=4, n=40, seed=0)))
        found.add(tuple(numbers(tmp_path, held_out=True)))
    assert len(found) == 2


def test_batches_are_full_and_that_data_is_repeated_is_said_once(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl")
    epoch = sum(not is_held_out(text) for text in TEXTS)  # not a multiple of 4
    found = numbers(path, rows=4, n=8 * epoch, seed=0)
    for i in range(0, 8 * epoch, epoch):
        assert len(set(found[i : i + epoch])) == epoch, "no row is lost between epochs"
    _, said = capsys.readouterr().out.strip().splitlines()
    assert said.startswith(f"--dataset is repeated: it has {3 * epoch:,} tokens")


@pytest.mark.parametrize("held_out", [True, False])
def test_files_that_are_shorter_than_a_row_share_rows(tmp_path, tiny, held_out):
    """And no batch needs more text than one reader has."""
    for i in range(500):
        (tmp_path / f"{i}.txt").write_text(f"short {i}")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    texts = [f"short {i}" for i in range(500) if is_held_out(f"short {i}") == held_out]
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    rows = tokens // 31 - 2  # each reader may drop an unfinished row
    assert rows > 0
    seed = None if held_out else 0
    batches = token_batches(find_sources(tmp_path, None), tokenizer, 32, rows, held_out, seed)
    assert next(batches).shape == (rows, 32)


def test_a_reader_starts_no_threads_and_may_stop_half_way(tmp_path, tiny):
    """Streams of parquet used to hang or abort at exit (huggingface/datasets #7467)."""
    path = write(tmp_path / "a.parquet", TEXTS * 50)
    code = f"""
from skipcoder import *

def threads():
    return len(os.listdir("/proc/self/task"))

class Counting:  # a token is the number of threads that the tokenizer has started
    bos_token_id = eos_token_id = 0
    real = transformers.AutoTokenizer.from_pretrained({str(tiny)!r})

    def __call__(self, texts, **_):
        before = threads()
        self.real(texts)
        return {{"input_ids": [[threads() - before]] * len(texts)}}

for seed in (0, None):  # as in training, and as in evaluation
    batch = next(token_batches([Path({str(path)!r})], Counting(), 8, 4, seed=seed))
    print(batch.shape, batch.max().item(), "started")
"""
    done = run("-c", code, RAYON_NUM_THREADS="4", TOKENIZERS_PARALLELISM="true")
    assert done.stdout == "torch.Size([4, 8]) 0 started\n" * 2, done.stdout + done.stderr
    assert done.returncode == 0
    assert "Fatal" not in done.stderr and "Traceback" not in done.stderr
