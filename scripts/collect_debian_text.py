"""Collect real text from Debian packages: their German and English manuals and books, some 80 M tokens.

Each package is downloaded from where apt is configured to, unpacked, not installed. HTML and manual pages become plain
text (resiliparse, mandoc), a paragraph a line; pages in other languages are left out. DIR/documents/ gets a file a
package, in it a page a line: "id" (package and path), "text", "source" (package=version) and "language". Written last,
DIR/MANIFEST.json holds versions and digests: the same versions give the same bytes. After a kill at any moment, the
same command continues.

Needs apt and dpkg, mandoc (a package of Debian) for manual pages, and resiliparse: pip install --editable '.[text]'.

Example: python scripts/collect_debian_text.py --destination_path raw && python scripts/build_corpus.py \\
    --source raw/documents --stages paragraph_dedup --destination_path corpus
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program
from lit_gpt.files import publish, read_json, sweep, write_json
from lit_gpt.prepare.worker_pool import usable_cores

GERMAN = (
    "debian-edu-doc-de", "debian-faq-de", "debian-handbook", "debian-paketmanagement-buch", "debian-reference-de",
    "developers-reference-de", "gimp-help-de", "installation-guide-amd64", "kicad-doc-de", "libreoffice-help-de",
    "lilypond-doc-html-de", "maint-guide-de", "manpages-de", "manpages-de-dev", "udo-doc-de",
)  # fmt: skip
"""German manuals and handbooks; some hold English pages too."""
ENGLISH = (
    "anarchism", "apache2-doc", "cppreference-doc-en-html", "debian-policy", "erlang-doc", "git-doc",
    "libboost1.81-doc", "libreoffice-help-en-us", "linux-doc-6.1", "manpages", "manpages-dev", "nodejs-doc",
    "openjdk-17-doc", "perl-doc", "postgresql-doc-15", "python-django-doc", "python-pandas-doc",
    "python-scipy-doc", "python-sklearn-doc", "python-sympy-doc", "python3.11-doc", "qtbase5-doc-html", "racket-doc",
    "sqlite3-doc",
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
    add("--languages", nargs="+", default=["de", "en"], help="two letters each (default: de en)")
    add("--workers", type=int, default=usable_cores(), help="processes (%(default)s)")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, 1, "workers")
    if unknown := [language for language in arguments.languages if not re.fullmatch("[a-z]{2}", language)]:
        raise BadInput(f"--languages {unknown[0]}: give two letters, such as de")
    try:
        collect(arguments.source, arguments.destination_path, arguments.languages, arguments.workers)
    except OSError as error:
        raise BadInput(f"{error.filename or arguments.destination_path}: {error.strerror}") from None


def collect(sources: Sequence[str], destination: Path, languages: Sequence[str], workers: int) -> None:
    """Write DIR/documents and then DIR/MANIFEST.json."""
    made_by: dict[str, Any] = {"languages": sorted(set(languages)), **tool_versions()}
    for name in ("documents", "packages"):
        (destination / name).mkdir(parents=True, exist_ok=True)
        sweep(destination / name)
    (destination / "MANIFEST.json").unlink(missing_ok=True)
    archives = find_archives(sources, destination / "archives")
    wanted = {archive.package for archive in archives}
    for record in (destination / "packages").glob("*.json"):
        if record.stem not in wanted:  # of an earlier call with other packages
            (destination / f"documents/{record.stem}.jsonl.gz").unlink(missing_ok=True)
            record.unlink()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # a fork would copy locks of other threads
        jobs = [pool.submit(collect_package, archive, destination, made_by) for archive in archives]
        packages = []
        for job in jobs:
            packages.append(entry := job.result())
            found = [f"{n['documents']:,} {language}" for language, n in entry["languages"].items()]
            log.info("%s: %s", entry["package"], ", ".join(found) or "no page in these languages")
    write_json(destination / "MANIFEST.json", {**made_by, "packages": packages})
    for language in made_by["languages"]:
        parts = [package["languages"].get(language, {}) for package in packages]
        pages, characters = (sum(part.get(key, 0) for part in parts) for key in ("documents", "characters"))
        print(f"{language}: {pages:,} documents, {characters:,} characters")


def tool_versions() -> dict[str, str | None]:
    """Of what makes text out of pages; None for a missing mandoc, which only manual pages need."""
    try:
        resiliparse = version("resiliparse")
    except PackageNotFoundError:
        raise BadInput("resiliparse is not installed: pip install --editable '.[text]'") from None
    try:
        mandoc = run("dpkg-query", "--show", "--showformat", "${Version}", "mandoc").decode()
    except BadInput:
        mandoc = None
    return {"resiliparse": resiliparse, "mandoc": mandoc}


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


def run(*command: str, folder: Path | None = None, stdin: bytes = b"", works: Collection[int] = (0,)) -> bytes:
    """What a tool of Debian prints; works: exit codes. Raises BadInput with its last line of complaint."""
    try:
        done = subprocess.run(command, cwd=folder, input=stdin, capture_output=True, check=False)
    except FileNotFoundError:
        raise BadInput(f"{command[0]} is not on this machine: Debian's packages apt, dpkg, mandoc are needed") from None
    if done.returncode not in works:
        complaints = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        hint = " (apt-get update renews apt's list of packages)" if command[0].startswith("apt-") else ""
        raise BadInput(f"{' '.join(command[:2])}: {complaints[-1]}{hint}")
    return done.stdout


def collect_package(archive: Archive, destination: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """Write documents/PACKAGE.jsonl.gz unless it is there already; returns the package's entry in the manifest.

    made_by: what the bytes depend on beside the package; packages/PACKAGE.json holds it with the entry.
    """
    file, record = (
        destination / f"documents/{archive.package}.jsonl.gz",
        destination / f"packages/{archive.package}.json",
    )
    archive_sha256 = sha256(archive.path.read_bytes()).hexdigest()
    if file.is_file() and record.is_file():
        saved = read_json(record)
        entry: dict[str, Any] = saved["entry"]
        same_input = saved["made_by"] == made_by and entry["archive_sha256"] == archive_sha256
        if same_input and entry["file_sha256"] == sha256(file.read_bytes()).hexdigest():
            return entry
    content, counts = documents(archive, made_by["languages"])
    entry = {
        "package": archive.package,
        "version": archive.version,
        "archive_sha256": archive_sha256,
        "file": f"documents/{file.name}",
        "file_sha256": sha256(content).hexdigest(),
        "languages": counts,
    }
    publish(file, [content])
    write_json(record, {"made_by": made_by, "entry": entry})
    return entry


def documents(archive: Archive, languages: Sequence[str]) -> tuple[bytes, dict[str, dict[str, int]]]:
    """The lines of a package, gzipped; documents and characters of each language."""
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
                "language": language,
            }
            file.write((json.dumps(document, ensure_ascii=False) + "\n").encode())
            counts.setdefault(language, Counter()).update(documents=1, characters=len(text))
    return content.getvalue(), {language: dict(counts[language]) for language in sorted(counts)}


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each page below `root`, in the order of the paths; links to files are left out."""
    for path in sorted(root.rglob("*")):
        name = os.fsencode(path.relative_to(root)).decode(errors="replace")
        is_manual_page = MANUAL_PAGE.search(name) is not None
        if path.is_symlink() or not path.is_file() or not (is_manual_page or PAGE.search(name)):
            continue
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            log.warning("%s is left out: %s", name, error)
            continue
        if is_manual_page and content.startswith(b".so "):  # another name of a page
            continue
        yield name, manual_text(content) if is_manual_page else page_text(content)


def page_text(content: bytes) -> str:
    """The text of an HTML page without its navigation."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    html = bytes_to_str(content, detect_encoding(content, from_html_meta=True) or "utf-8")
    return plain_text(html, main_content=True)


def manual_text(content: bytes) -> str:
    html = run("mandoc", "-T", "html", stdin=content, works=range(5))  # 1 to 4: what it found odd, which it still shows
    return plain_text(html.decode(), main_content=False)


def plain_text(html: str, main_content: bool) -> str:
    """Without blanks at the ends of lines, and with at most one empty line between two others."""
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(html, main_content=main_content, list_bullets=False, alt_texts=False)
    lines = "\n".join(line.rstrip() for line in text.replace("\x00", "").splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


if __name__ == "__main__":
    run_program(main)
