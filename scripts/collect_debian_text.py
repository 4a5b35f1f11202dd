"""Collect real text from Debian packages: their German and English manuals and books, some 100 M tokens.

Each package is downloaded from where apt is configured to, unpacked, not installed. HTML and manual pages become plain
text (resiliparse, mandoc), a paragraph a line; pages in other languages are left out. DIR/documents/ gets a file a
package, in it a page a line: "id" (package and path), "text", "source" (package=version) and "language". Written last,
DIR/MANIFEST.json holds versions and digests: the same versions give the same bytes. A rerun keeps the downloads.

Needs apt and dpkg, mandoc (a package of Debian) for manual pages, and resiliparse: pip install --editable '.[text]'.

Example: python scripts/collect_debian_text.py --destination_path raw && python scripts/build_corpus.py \\
    --source raw/documents --stages paragraph_dedup --destination_path corpus
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import logging
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program
from lit_gpt.files import publish, sweep, write_json
from lit_gpt.prepare.worker_pool import usable_cores

GERMAN = (
    "debian-edu-doc-de", "debian-faq-de", "debian-handbook", "debian-paketmanagement-buch", "debian-reference-de",
    "developers-reference-de", "gimp-help-de", "installation-guide-amd64", "kicad-doc-de", "libreoffice-help-de",
    "lilypond-doc-html-de", "maint-guide-de", "manpages-de", "manpages-de-dev", "udo-doc-de",
)  # fmt: skip
"""German manuals and handbooks; some hold English pages too."""
ENGLISH = (
    "anarchism", "apache2-doc", "cppreference-doc-en-html", "debian-policy", "erlang-doc", "ghc-doc", "git-doc",
    "libboost1.81-doc", "libreoffice-help-en-us", "linux-doc-6.1", "manpages", "manpages-dev", "nodejs-doc",
    "openjdk-17-doc", "perl-doc", "petsc3.18-doc", "postgresql-doc-15", "python-django-doc", "python-pandas-doc",
    "python-scipy-doc", "python-sklearn-doc", "python-sympy-doc", "python3.11-doc", "qtbase5-doc-html", "racket-doc",
    "rust-web-doc", "sqlite3-doc",
)  # fmt: skip
"""A book and the large manuals, of Debian 12."""
PAGE = re.compile(r"\.x?html?(\.[a-z]{2}(-[a-z]+)?)?(\.gz)?$", re.IGNORECASE)
MANUAL_PAGE = re.compile(r"/man/([^/]+/)?man\d\w*/[^/]+$")
CONTROL_FIELDS = re.compile(r"^(?:Package|Version): (.+)$", re.MULTILINE)
MIN_CHARACTERS = 200
"""Shorter pages are redirects, frames and lists of links."""

log = logging.getLogger(__name__)


class Archive(NamedTuple):
    path: Path
    package: str
    version: str


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--destination_path", type=Path, required=True, help="folder to write")
    add("--source", nargs="+", metavar="PACKAGE", default=[*GERMAN, *ENGLISH],
        help="NAME, NAME=VERSION, or a file that ends in .deb (default: some 40 packages, see the source)")  # fmt: skip
    add("--languages", nargs="+", default=["de", "en"], help="languages to keep, two letters each (%(default)s)")
    add("--workers", type=int, default=usable_cores(), help="processes (%(default)s)")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, 1, "workers")
    if importlib.util.find_spec("resiliparse") is None:
        raise BadInput("resiliparse is not installed: pip install --editable '.[text]'")
    try:
        collect(arguments.source, arguments.destination_path, frozenset(arguments.languages), arguments.workers)
    except OSError as error:
        raise BadInput(f"{error.filename or arguments.destination_path}: {error.strerror}") from None


def collect(sources: Sequence[str], destination: Path, languages: frozenset[str], workers: int) -> None:
    """Write DIR/documents and then DIR/MANIFEST.json."""
    documents = destination / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    sweep(documents)
    (destination / "MANIFEST.json").unlink(missing_ok=True)
    archives = find_archives(sources, destination / "archives")
    for old in {*documents.glob("*.jsonl.gz")} - {documents / f"{archive.package}.jsonl.gz" for archive in archives}:
        old.unlink()  # of an earlier call with other packages
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(collect_package, archive, documents, languages) for archive in archives]
        packages = [job.result() for job in jobs]
    write_json(destination / "MANIFEST.json", {"languages": sorted(languages), "packages": packages})
    for language in sorted(languages):
        found = [package["languages"].get(language, {}) for package in packages]
        pages, characters = (sum(part.get(key, 0) for part in found) for key in ("documents", "characters"))
        print(f"{language}: {pages:,} documents, {characters:,} characters")


def find_archives(sources: Sequence[str], folder: Path) -> list[Archive]:
    """The packages' files, by name; those that are no files themselves are downloaded to `folder`."""
    names = [source for source in sources if not source.endswith(".deb")]
    archives = [read_control(Path(source)) for source in sources if source.endswith(".deb")]
    if names:
        folder.mkdir(exist_ok=True)
        log.info("downloading %d packages to %s", len(names), folder)
        run("apt-get", "download", "--quiet", *names, folder=folder)  # keeps what is there, if its hash is right
        shown = run("apt-cache", "show", "--no-all-versions", *names).decode()
        wanted = {
            tuple(re.findall(r"^(?:Package|Version): (.+)$", record, re.MULTILINE)) for record in shown.split("\n\n")
        }
        archives += [found for found in map(read_control, folder.glob("*.deb")) if found[1:] in wanted]
    twice = [name for name, count in Counter(archive.package for archive in archives).items() if count > 1]
    if twice:
        raise BadInput(f"--source: named twice: {', '.join(twice)}")
    return sorted(archives, key=lambda archive: archive.package)


def read_control(path: Path) -> Archive:
    if not path.is_file():
        raise BadInput(f"--source {path}: there is no such file")
    package, version = run("dpkg-deb", "--show", "--showformat", "${Package} ${Version}", str(path)).decode().split()
    return Archive(path, package, version)


def run(*command: str, folder: Path | None = None, stdin: bytes = b"") -> bytes:
    """What a tool of Debian prints. Raises BadInput with its last line of complaint."""
    try:
        done = subprocess.run(command, cwd=folder, input=stdin, capture_output=True, check=False)
    except FileNotFoundError:
        raise BadInput(f"{command[0]} is not on this machine: Debian's packages apt, dpkg, mandoc are needed") from None
    if done.returncode != 0:
        complaints = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        hint = " (apt-get update renews apt's list of packages)" if command[0].startswith("apt-") else ""
        raise BadInput(f"{' '.join(command[:2])}: {complaints[-1]}{hint}")
    return done.stdout


def collect_package(archive: Archive, folder: Path, languages: frozenset[str]) -> dict[str, Any]:
    """Write folder/PACKAGE.jsonl.gz; returns the package's entry in the manifest."""
    from resiliparse.parse.lang import detect_fast

    counts: dict[str, Counter[str]] = {}
    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as unpacked, gzip.GzipFile(fileobj=content, mode="wb", mtime=0) as file:
        run("dpkg-deb", "--extract", str(archive.path), unpacked)
        for path, text in pages(Path(unpacked)):
            language = detect_fast(text)[0]
            if len(text) < MIN_CHARACTERS or language not in languages:
                continue
            document = {
                "id": f"{archive.package}/{path}",
                "text": text,
                "source": f"{archive.package}={archive.version}",
            }
            file.write((json.dumps({**document, "language": language}, ensure_ascii=False) + "\n").encode())
            counts.setdefault(language, Counter()).update(documents=1, characters=len(text))
    name = f"{archive.package}.jsonl.gz"
    publish(folder / name, [content.getvalue()])
    log.info(
        "%s: %s", archive.package, ", ".join(f"{n['documents']} {key}" for key, n in sorted(counts.items())) or "none"
    )
    return {
        "package": archive.package,
        "version": archive.version,
        "archive_sha256": hashlib.sha256(archive.path.read_bytes()).hexdigest(),
        "file": f"documents/{name}",
        "file_sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        "languages": {key: dict(n) for key, n in sorted(counts.items())},
    }


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each page below `root`, in the order of the paths; links to files are left out."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        is_manual_page = MANUAL_PAGE.search(name) is not None
        if path.is_symlink() or not path.is_file() or not (is_manual_page or PAGE.search(name)):
            continue
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if is_manual_page and content.startswith(b".so "):  # another name of a page
            continue
        yield name, manual_text(content) if is_manual_page else page_text(content)


def page_text(content: bytes) -> str:
    """The text of an HTML page without its navigation."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    html = bytes_to_str(content, detect_encoding(content, from_html_meta=True) or "utf-8")
    return plain_text(html, main_content=True)


def manual_text(content: bytes) -> str:
    return plain_text(run("mandoc", "-T", "html", stdin=content).decode(), main_content=False)


def plain_text(html: str, main_content: bool) -> str:
    """Without blanks at the ends of lines, and with at most one empty line between two others."""
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(html, main_content=main_content, list_bullets=False, alt_texts=False)
    lines = "\n".join(line.rstrip() for line in text.replace("\x00", "").splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


if __name__ == "__main__":
    run_program(main)
