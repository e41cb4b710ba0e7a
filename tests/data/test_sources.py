"""Sources: formats, order, and every fault by file and place."""

import builtins
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from efficient_lm.data.sources import FilesSource, SotuSource
from efficient_lm.errors import DataError

TEXTS = ["first\nof two lines", "日本語 second", "third"]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def read(*paths, **values):
    return list(FilesSource(paths=[str(path) for path in paths], **values).documents())


def assert_fault(path, content, match, **values):
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(DataError, match=match) as caught:
        read(path, **values)
    assert caught.value.status == 3
    assert str(path) in str(caught.value)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_embedded_corpus_is_whole_and_in_order():
    documents = list(SotuSource().documents())
    assert len(documents) == 233
    assert sum(len(text.encode()) for text in documents) == 10_761_202
    assert documents[0].startswith("Fellow-Citizens of the Senate")
    truman, eisenhower = documents[162:164]
    assert truman.startswith("To the Congress of the United States: I have the honor to report")
    assert eisenhower.startswith("Mr. President, Mr. Speaker, Members of the Eighty-third Congress")
    assert SotuSource().identity() == SotuSource().identity()


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_and_json_lines(tmp_path, compression):
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESS[compression]("\ufeffwhole\nfile\n".encode()))
    (tmp_path / f"b.jsonl{compression}").write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + LINES + b"\n \n"))
    assert read(tmp_path / f"a.txt{compression}") == ["whole\nfile\n"]
    assert read(tmp_path / f"b.jsonl{compression}") == TEXTS


def test_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", id=[0, 1, 2], body=TEXTS)
    write_parquet(tmp_path / "b.parquet", body=pyarrow.array(TEXTS).dictionary_encode())
    assert read(tmp_path / "*.parquet", text_field="body") == TEXTS * 2


def test_order_globs_and_repeats(tmp_path):
    for name in ("b.txt", "a.txt", "[c].txt", "deep/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "b.txt", tmp_path / "?.txt", tmp_path / "[c].txt") == ["b.txt", "a.txt", "[c].txt"]
    assert sorted(read(tmp_path / "**" / "*.txt")) == sorted(["[c].txt", "a.txt", "b.txt", "deep/d.txt"])
    assert FilesSource(paths="one.txt").paths == ("one.txt",)
    with pytest.raises(ValidationError):
        FilesSource(paths=[])


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "b"}\n')
    assert read(tmp_path / "a.jsonl") == ["b"]


def test_identity_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = FilesSource(paths=[str(path)]).identity()
    assert FilesSource(paths=[str(path)]).identity() == before
    path.write_text("longer")
    assert FilesSource(paths=[str(path)]).identity() != before
    assert FilesSource(paths=[str(path)], text_field="body").identity() != FilesSource(paths=[str(path)]).identity()


def test_missing(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    assert_fault(tmp_path / "corpsu.txt", None, "no file .*; did you mean 'corpus.txt'")
    assert_fault(tmp_path / "none" / "a.txt", None, "there is no folder '.*none'")
    assert_fault(tmp_path / "*.jsonl", None, "no file matches")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert_fault(tmp_path / "gone.txt", None, "no file")
    with pytest.raises(DataError, match="no file"):
        FilesSource(paths=str(tmp_path / "gone.txt")).identity()


def test_folder(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    assert_fault(tmp_path / "folder.txt", None, r"is a folder: name files in it, such as '.*folder\.txt/\*\.txt'")


def test_no_permission(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(builtins, "open", refuse)
    assert_fault(tmp_path / "a.txt", None, "no permission to read")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "b.txt.gz", "b.jsonl.xz", "b.jsonl.zst", "a.parquet"])
def test_empty(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, text=pyarrow.array([], pyarrow.string()))
    else:
        path.write_bytes(COMPRESS[path.suffix](b"") if name.startswith("b") else b"")
    assert_fault(path, None, "is empty")


def test_unknown_extension(tmp_path):
    assert_fault(tmp_path / "a.json", b"{}", r"unknown extension '\.json'; did you mean '\.jsonl'\? valid: .*\.parquet")
    assert_fault(tmp_path / "a.txt.bz2", b"x", r"unknown extension '\.bz2'")
    assert_fault(tmp_path / "a", b"x", "unknown extension ''")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": "a"', "line 4: broken JSON: .* at column"),
        (b"[" * 100_000, "line 4: broken JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "line 4: broken JSON"),
        (b'["a"]', "line 4: expected an object with the field 'text', found an array"),
        (b'{"txet": "a", "id": 1}', "line 4: no field 'text'; did you mean 'txet'"),
        (b'{"text": null}', "line 4: field 'text' is null, expected text"),
        (b'{"text": 5}', "line 4: field 'text' is a number, expected text"),
        (b'{"text": "\\ud800"}', "line 4: field 'text' holds a lone surrogate"),
        (b'{"text": "\xff"}', rf"is not UTF-8: byte 0xff at offset {len(LINES) + 10} \(line 4\)"),
    ],
)
def test_broken_line(tmp_path, line, match):
    assert_fault(tmp_path / "a.jsonl", LINES + line + b"\n", match)
    assert_fault(tmp_path / "a.jsonl.gz", gzip.compress(LINES + line + b"\n"), match)


def test_text_that_is_not_utf8(tmp_path):
    assert_fault(tmp_path / "a.txt", b"abc\xe9 d", "is not UTF-8: byte 0xe9 at offset 3")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_truncated_or_not_compressed(tmp_path, kind, compression):
    whole = COMPRESS[compression](LINES * 100)
    assert_fault(tmp_path / f"a.{kind}{compression}", whole[:-6], "is truncated")
    assert_fault(tmp_path / f"b.{kind}{compression}", LINES, "cannot read")


def test_parquet_faults(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, txt=TEXTS, text_id=[1, 2, 3])
    assert_fault(path, None, "has no field 'text'; did you mean 'txt'")
    assert_fault(path, None, "field 'text_id' is int64, expected text", text_field="text_id")
    assert_fault(path, path.read_bytes()[:-9], "cannot read '.*' as Parquet")
    write_parquet(path, text=["a", None])
    assert_fault(path, None, "row 1: field 'text' is null")
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    write_parquet(path, text=broken)
    assert_fault(path, None, "is not UTF-8: field 'text'")
