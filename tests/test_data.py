"""Reading text in the shapes that users have it, splitting, tokenising, packing and shuffling."""

import gzip
import json
import re
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import end_readers, run, write_jsonl
from transformers import AutoTokenizer

import skipcoder
from skipcoder import DataError, documents, find_files, is_held_out, pack, read_texts, token_batches

TEXTS = [f"{i} is the number of this document: " + "some words " * (i % 7) for i in range(60)]
BOS, EOS = 998, 999


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
    name = path.name.lower()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
        return path
    rows = [{"text": text} for text in texts]
    if ".txt" in name:
        content = "".join(texts)
    elif ".jsonl" in name:
        content = "\n".join(map(json.dumps, rows))
    else:
        content = json.dumps(rows, indent=1)
    content = content.encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def read(path) -> list[str]:
    files, _ = find_files(path)
    return list(read_texts(files))


def refused(path) -> str:
    """Return the one line with which the program ends, whoever finds the fault."""
    with pytest.raises((SystemExit, DataError)) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Files and folders ----------------------------------------------------------------------

NAMES = [
    "a.jsonl",
    "a.jsonl.gz",
    "a.json",
    "a.json.gz",
    "a.parquet",
    "A.JSONL",
    "a.Json.GZ",
    "A.PARQUET",
]


@pytest.mark.parametrize("name", NAMES)
def test_formats(tmp_path, name):
    assert read(write(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT", "A.TXT.GZ"])
def test_text_files_are_cut_into_documents_of_100_lines_and_nothing_is_lost(tmp_path, name):
    lines = [f"line {i} of a long book\n" if i % 3 else "\n" for i in range(1234)]
    pieces = read(write(tmp_path / name, lines))
    assert "".join(pieces) == "".join(lines)
    assert [piece.count("\n") for piece in pieces] == [100] * 12 + [34]


@pytest.mark.parametrize(
    "name", ["x[1].jsonl", "a*b.jsonl", "{a,b}.jsonl", "what?.jsonl", "ü ö.jsonl"]
)
def test_a_name_is_taken_as_it_is(tmp_path, name):
    """Glob characters in it do not matter, and neighbours that match are not read."""
    for neighbour in ("x1.jsonl", "aab.jsonl", "a.jsonl", "b.jsonl", "whats.jsonl"):
        write(tmp_path / "data[1]" / neighbour, ["not this"])
    path = write(tmp_path / "data[1]" / name)
    assert read(path) == TEXTS
    assert sorted(read(tmp_path / "data[1]")) == sorted([*TEXTS, *["not this"] * 5])


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".txt", ".json"])
def test_a_folder_is_read_as_the_first_format_that_it_holds(tmp_path, ending):
    """With what is in its subfolders, but without hidden files and what is in hidden folders."""
    folder = tmp_path / ".cache" / "data"  # that it lies in a hidden one itself does not matter
    for i, name in enumerate(("a", "sub/b", "sub/deeper/c")):
        write(folder / f"{name}{ending}", TEXTS[i::3])
    for name in ("._a", ".hidden/d", ".ipynb_checkpoints/a-checkpoint", "sub/.git/e"):
        write(folder / f"{name}{ending}", ["hidden"])
    formats = [".parquet", ".jsonl", ".txt", ".json"]
    for later in formats[formats.index(ending) + 1 :]:
        write(folder / f"later{later}", ["of a later format"])
    (folder / "README.md").write_text("not data")
    (folder / "._b").write_bytes(b"\0\1\2")

    texts = read(folder)
    joined = [*TEXTS[0::3], *TEXTS[1::3], *TEXTS[2::3]]
    if ending == ".txt":
        assert "".join(texts) == "".join(joined)
    else:
        assert sorted(texts) == sorted(TEXTS)
    _, others = find_files(folder)
    later = formats[formats.index(ending) + 1 :]
    assert {file.name for file in others} == {"README.md", *(f"later{name}" for name in later)}


def test_a_folder_as_the_hub_makes_it(tmp_path):
    """Descriptions of the data, in .json and .md, are no data."""
    for i in range(3):
        write(tmp_path / f"data/train-0000{i}-of-00003.parquet", TEXTS[i::3])
    (tmp_path / "dataset_infos.json").write_text('{"default": {"splits": 3}}')
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    assert sorted(read(tmp_path)) == sorted(TEXTS)


def test_formats_that_are_known_but_not_read_are_named(tmp_path):
    """In one line that says what to do."""
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert "save_to_disk" in refused(tmp_path / "saved")
    assert "to_parquet" in refused(tmp_path / "saved")
    for name, says in {"a.csv": ".jsonl or .parquet", "a.jsonl.zst": "zstd -d"}.items():
        path = write(tmp_path / name.split(".")[-1] / name)
        assert says in refused(path)
        assert says in refused(path.parent)
        assert str(path) in refused(path)


# ---- What is in them ------------------------------------------------------------------------

OTHER_COLUMNS = {
    "null at first": [{"meta": None}] * 3 + [{"meta": "a string"}],
    "of mixed types": [{"meta": 1}, {"meta": "one"}, {"meta": [1]}, {"meta": {"a": 1}}],
    "only in some rows": [{}, {"meta": 1}, {"more": "x"}, {}],
    "only at the end": [{}] * 40 + [{"meta": {"nested": [None, "x"]}}],
}


@pytest.mark.parametrize("columns", OTHER_COLUMNS.values(), ids=OTHER_COLUMNS)
def test_other_columns_do_not_matter(tmp_path, columns):
    rows = [columns[min(i, len(columns) - 1)] | {"text": text} for i, text in enumerate(TEXTS)]
    lines = "\n".join(map(json.dumps, rows))
    for name, content in {
        "a.jsonl": lines,
        "lines.json": lines,
        "a.json": json.dumps(rows),
    }.items():
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == TEXTS


def test_other_columns_of_parquet_do_not_matter(tmp_path):
    for i, other in enumerate(([1] * 60, ["x"] * 60, [None] * 60)):
        table = pa.table({"other": other, "text": TEXTS})
        pq.write_table(table, tmp_path / f"{i}.parquet")
    assert read(tmp_path) == TEXTS * 3


def test_nulls_and_empty_lines_are_skipped(tmp_path):
    for name in ("a.jsonl", "a.json", "a.parquet"):
        path = write(tmp_path / name, [None, *TEXTS[:30], None, *TEXTS[30:]])
        assert read(path) == TEXTS
    lines = [json.dumps({"text": text}) + "\n  \n" for text in TEXTS]
    (tmp_path / "spaced.jsonl").write_text("\n" + "\n".join(lines))
    assert read(tmp_path / "spaced.jsonl") == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "lines.json"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    """Windows' editors write one."""
    content = {"a.txt": "é", "a.json": '[{"text": "é"}]'}.get(name, '{"text": "é"}\n')
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read(tmp_path / name) == ["é"]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    r"""JSON allows "\ud83d" alone, and no tokenizer takes it."""
    (tmp_path / "a.jsonl").write_text(
        r'{"text": "a \ud83d b"}' + "\n" + r'{"text": "\ud83d\ude00"}'
    )
    assert read(tmp_path / "a.jsonl") == ["a ? b", "😀"]


@pytest.mark.parametrize("text", [7, 1.5, True, ["a", "b"], {"a": 1}])
def test_a_text_that_is_none_is_said_in_one_line(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    line = refused(tmp_path / "a.jsonl")
    assert line.startswith("a.jsonl: ") and type(text).__name__ in line


def test_text_columns_of_parquet_that_are_none(tmp_path):
    for column in ([1, 2], [["a"], ["b"]]):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        line = refused(tmp_path / "a.parquet")
        assert type(column[0]).__name__ in line


@pytest.mark.parametrize("content", ["[1, 2]", "7", "true", '["a", 2]', '[["a"]]'])
def test_records_that_are_neither_objects_nor_strings_are_said_in_one_line(tmp_path, content):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(content)
        line = refused(tmp_path / name)
        assert re.fullmatch(rf"{name}: a text is of type (int|bool|list), not a string", line)


def test_a_plain_string_is_a_text(tmp_path):
    """As in a JSON list of strings, which may begin after blanks."""
    for content in (json.dumps(TEXTS), "\n \n" + json.dumps([None, *TEXTS], indent=1)):
        for name in ("a.json", "a.jsonl"):
            (tmp_path / name).write_text(content)
            assert read(tmp_path / name) == TEXTS
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    assert read(tmp_path / "lines.jsonl") == TEXTS


def test_a_missing_column_is_said_in_one_line(tmp_path):
    """It is missing if the first record has no text. Later ones without are skipped."""
    for name, content in {
        "a.jsonl": '{"body": "a"}\n{"text": "b"}',
        "a.json": '[{"body": "a"}, {"text": "b"}]',
    }.items():
        (tmp_path / name).write_text(content)
        assert refused(tmp_path / name) == f"{name}: there is no column 'text'"
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "a.parquet")
    assert "text" in refused(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n{}\n{"text": "c"}')
    assert read(tmp_path / "b.jsonl") == ["a", "c"]


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
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
    sources = skipcoder.find_sources("user/data", "part")
    assert len(sources) == 4
    for i, source in enumerate(sources):
        assert list(read_texts([source])) == TEXTS[i::4]
    batches = token_batches(sources, Numbers(), 3, 1, held_out=True)
    found = [batch[0, 1].item() for batch in batches]
    assert sorted(found) == [i for i, text in enumerate(TEXTS) if is_held_out(text)]


# ---- The split ------------------------------------------------------------------------------


def test_one_document_in_ten_is_held_out():
    crc_of_a = 0xE8B7BE43
    assert is_held_out("a") == (crc_of_a % 10 == 0)
    texts = [f"document {i}" for i in range(10_000)]
    assert 900 < sum(map(is_held_out, texts)) < 1100


def test_the_split_is_the_same_in_every_format(tmp_path):
    for name in ("a.jsonl", "a.json", "a.parquet"):
        path = write(tmp_path / name)
        assert list(documents([path], True)) == list(filter(is_held_out, TEXTS))
        kept = [text for text in TEXTS if not is_held_out(text)]
        assert list(documents([path], False)) == kept


def test_a_long_document_is_cut_and_its_pieces_stay_on_one_side(tmp_path, monkeypatch):
    """A tokenizer would take gigabytes for it as a whole."""
    monkeypatch.setattr(skipcoder, "LONGEST", 1000)
    texts = [f"{i} " + "word " * i for i in range(600)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for held_out in (True, False):
        pieces = list(documents([path], held_out))
        assert max(map(len, pieces)) == 1000
        side = [text for text in texts if is_held_out(text) == held_out]
        assert "".join(pieces) == "".join(side)
        assert len(pieces) > len(side)


def test_a_very_long_document_reaches_the_tokenizer_in_pieces(tmp_path):
    """With the limit as it is."""
    path = write_jsonl(tmp_path / "a.jsonl", ["a" * 1_000_000])
    sizes = [len(text) for side in (True, False) for text in documents([path], side)]
    assert sum(sizes) == 1_000_000
    assert max(sizes) <= 200_000


def numbers(path, rows=1, n=None, **options) -> list[int]:
    """Return the documents in order of their rows: n of them, or all."""
    batches = token_batches(find_files(path)[0], Numbers(), 3, rows, **options)
    batches = list(batches if n is None else islice(batches, n // rows))
    end_readers()
    found = torch.cat(batches)
    assert found.dtype == torch.int64
    assert (found[:, 0] == BOS).all() and (found[:, 2] == EOS).all()
    return found[:, 1].tolist()


CASES = [  # format, number of files, of reader processes, and of processes under torchrun
    ("parquet", 3, 1, 1),
    ("jsonl", 3, 3, 1),
    ("txt", 3, 3, 1),
    ("txt", 3, 1, 1),
    ("parquet", 3, 1, 2),
    ("txt", 4, 1, 2),
]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind, files, readers, world", CASES)
def test_the_sides_of_the_split_are_disjoint_and_complete(
    tmp_path, monkeypatch, capsys, kind, files, readers, world
):
    """For any number of files, readers and processes, also when the data is read again."""
    # Each is a document of its own in a .txt, too: 100 lines, of which the last one has fewer.
    texts = [f"{i} is the number\n" + "and so on\n" * 99 for i in range(120)]
    for i in range(120 - files, 120):
        texts[i] = texts[i][:500]
    for i in range(files):
        write(tmp_path / f"{i}.{kind}", texts[i::files])
    monkeypatch.setattr(skipcoder.os, "cpu_count", lambda: (readers + 1) * world)

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


@pytest.mark.parametrize("bos", [BOS, None])
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


def test_a_bos_of_number_0_is_one():
    (row,) = pack(["ab"], Letters(0, EOS), 4)
    assert row.tolist() == [0, ord("a"), ord("b"), EOS]


def test_rows_of_a_real_tokenizer(tmp_path, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    path = write(tmp_path / "a.jsonl")
    batches = list(token_batches([path], tokenizer, 8, 4, held_out=True))
    rows = torch.cat(batches)
    expected = []
    for text in filter(is_held_out, TEXTS):
        expected += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    expected = expected[: len(expected) // 7 * 7]
    assert len(rows) > 5 and [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    assert rows[:, 1:].flatten().tolist() == expected
    assert (rows[:, 0] == tokenizer.bos_token_id).all()


def test_rows_are_shuffled_in_another_order_for_another_seed(tmp_path):
    path = write(tmp_path / "a.jsonl")
    first, again, other = (numbers(path, n=50, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first != sorted(first)


def test_batches_are_full_and_that_data_is_repeated_is_said_once(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl")
    epoch = sum(not is_held_out(text) for text in TEXTS)  # not a multiple of 4
    found = numbers(path, rows=4, n=8 * epoch, seed=0)
    for i in range(0, 8 * epoch, epoch):
        assert len(set(found[i : i + epoch])) == epoch, "no row is lost between epochs"
    said = capsys.readouterr().out.strip()
    assert said == f"--dataset is repeated: it has {3 * epoch:,} tokens"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("cores", [2, 9])
@pytest.mark.parametrize("held_out", [True, False])
def test_files_that_are_shorter_than_a_row_share_rows(tmp_path, monkeypatch, tiny, cores, held_out):
    """And no batch needs more text than one reader has."""
    monkeypatch.setattr(skipcoder.os, "cpu_count", lambda: cores)
    for i in range(1000):
        (tmp_path / f"{i}.txt").write_text(f"short {i}")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    texts = [f"short {i}" for i in range(1000) if is_held_out(f"short {i}") == held_out]
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    rows = tokens // 31 - cores  # each reader may drop an unfinished row
    assert rows > 0
    seed = None if held_out else 0
    batches = token_batches(find_files(tmp_path)[0], tokenizer, 32, rows, held_out, seed)
    assert next(batches).shape == (rows, 32)


def test_half_read_parquet_does_not_abort_or_hang_at_exit(tmp_path, tiny):
    """Streams of parquet used to (huggingface/datasets #7467)."""
    path = write(tmp_path / "a.parquet", TEXTS * 50)
    code = f"""
from skipcoder import *
tokenizer = transformers.AutoTokenizer.from_pretrained({str(tiny)!r})
for seed in (0, None):  # as in training, and as in evaluation
    print(next(token_batches(find_files(Path({str(path)!r}))[0], tokenizer, 8, 4, seed=seed)).shape)
"""
    done = run("-c", code)
    assert done.returncode == 0 and done.stdout.count("torch.Size([4, 8])") == 2, done.stderr
    assert "Fatal" not in done.stderr and "Traceback" not in done.stderr
