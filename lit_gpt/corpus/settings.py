"""Settings of a corpus build. The recipe pretrain/configs/corpus_german_web.yaml names the source of each threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lit_gpt.cli import BadInput, SettingsSlice
from lit_gpt.values import PathText, did_you_mean

STAGES = (
    "quality_signals", "repetition", "quality", "token_to_word", "paragraph_dedup", "minhash", "pii",
    "decontaminate",
)  # fmt: skip
DEFAULT_STAGES = ("repetition", "quality", "token_to_word", "paragraph_dedup", "pii")
GERMAN_STOP_WORDS = [
    "der",
    "und",
    "die",
    "in",
    "von",
    "im",
    "den",
    "des",
    "mit",
    "das",
    "er",
    "dem",
    "als",
    "wurde",
    "für",
]


@dataclass(frozen=True)
class InputSettings(SettingsSlice):
    """What is read, and where the corpus goes."""

    source: list[PathText] = field(default_factory=list)
    """Files and folders of documents; everything that prepare_data reads."""
    tokenizer_path: PathText | None = None
    """Tokenizer folder, for the stage token_to_word."""
    destination_path: PathText | None = None
    """Folder for documents/, removed/, stats.json, report.html and MANIFEST.json."""
    text_field: str = "text"
    """Field that holds the text; a.b is the field b of the object a. A table without `text` is read from `content`."""
    id_field: str | None = "id"
    """Field that holds the id; none: documents are named after file and line."""
    max_reject_fraction: float = 0.001
    """Share of lines that may be rejected before the build stops."""
    allow_damaged_files: bool = False
    """Take what can be read of a file that is cut short or damaged, instead of stopping."""
    part_bytes: int = 256 << 20
    """Bytes of source files, as stored, of a part: the unit of work, of output files, and of what a kill costs. A file
    is never divided."""

    def check(self) -> None:
        super().check()
        if not self.source or self.destination_path is None:
            raise BadInput("--source and --destination_path are needed (--help lists the arguments)")
        self.require_at_least(1, "part_bytes")
        if not 0 <= self.max_reject_fraction < 1:
            raise BadInput(f"--max_reject_fraction {self.max_reject_fraction}: must be at least 0 and below 1")


@dataclass(frozen=True)
class ExecutorSettings(SettingsSlice):
    """Where the work is done. None of this changes a byte of the corpus."""

    workers: int | None = None
    """Processes at a time, one core each. Default: the cores that this process may use; on Slurm no limit."""
    executor: Literal["local", "slurm"] = "local"
    """slurm: submit job arrays and end; the same command tells how far they are."""
    tasks: int | None = None
    """slurm: elements of an array, which share its parts. Default: one a part, at most 1000."""
    slurm_partition: str | None = None
    """slurm: partition of the jobs. Default: the cluster's own."""
    slurm_time: str = "12:00:00"
    """slurm: time limit of each job."""
    slurm_memory_gb: int = 4
    """slurm: memory of each job."""
    slurm_options: list[str] = field(default_factory=list)
    """slurm: further options of sbatch, as --account=NAME without its dashes: account=NAME."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "workers", "tasks", "slurm_memory_gb")


@dataclass(frozen=True)
class SignalSettings(SettingsSlice):
    """quality_signals: limits for numbers that were published with the documents, such as RedPajama-V2's."""

    min_signals: list[str] = field(default_factory=list)
    """Documents below are removed: SIGNAL=NUMBER, as in rps_doc_word_count=50. A signal is a field of the record, an
    entry of its field quality_signals, or one of the files in signals_path."""
    max_signals: list[str] = field(default_factory=list)
    """Documents above are removed, as in perplexity=800."""
    signals_path: PathText | None = None
    """Folder quality_signals/ of RedPajama-V2, for a --source that is its folder documents/."""

    def check(self) -> None:
        super().check()
        for name in ("min_signals", "max_signals"):
            for words in getattr(self, name):
                signal_limit(name, words)


def signal_limit(setting: str, words: str) -> tuple[str, float]:
    """A signal and its limit; raises BadInput."""
    signal, _, number = words.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not signal or not math.isfinite(limit):
        raise BadInput(f"--{setting} {words}: must be SIGNAL=NUMBER, as in rps_doc_word_count=50")
    return signal, limit


@dataclass(frozen=True)
class FilterSettings(SettingsSlice):
    """Filters of whole documents; each limit may be none. A word is what lies between spaces, without the marks around
    it, which count as words of their own."""

    max_duplicate_line_fraction: float | None = 0.263
    """repetition: share of the lines that occur before in the document."""
    max_top_ngram_fractions: list[float] = field(default_factory=lambda: [0.169, 0.153, 0.137])
    """repetition: share of the characters in the most frequent 2-, 3- and 4-gram of words."""
    max_duplicate_ngram_fractions: list[float] = field(
        default_factory=lambda: [0.141, 0.134, 0.126, 0.117, 0.108, 0.098]
    )
    """repetition: share of the characters in 5- to 10-grams of words that occur before in the document."""
    min_document_words: int | None = 50
    """quality: words that are no marks."""
    max_document_words: int | None = 100_000
    """quality: words that are no marks."""
    min_mean_word_length: float | None = None
    """quality: characters, of words that are no marks."""
    max_mean_word_length: float | None = 15.0
    """quality: characters, of words that are no marks."""
    max_hash_fraction: float | None = 0.1
    """quality: # for each word."""
    max_ellipsis_fraction: float | None = 0.1
    """quality: ellipses for each word."""
    max_bullet_line_fraction: float | None = 0.9
    """quality: share of the lines that begin with a bullet or a dash."""
    max_ellipsis_line_fraction: float | None = 0.3
    """quality: share of the lines that end in an ellipsis."""
    min_alphabetic_word_fraction: float | None = 0.774
    """quality: share of the words with a letter."""
    min_stop_words: int | None = 2
    """quality: different words of `stop_words`."""
    stop_words: list[str] = field(default_factory=lambda: list(GERMAN_STOP_WORDS))
    """quality: frequent words of the language."""
    max_newline_fraction: float | None = 0.152
    """quality: line ends for each word."""
    max_duplicate_character_fraction: float | None = 0.1
    """quality: share of the characters in lines that occur before in the document."""

    def check(self) -> None:
        super().check()
        for name, count in (("max_top_ngram_fractions", 3), ("max_duplicate_ngram_fractions", 6)):
            values = getattr(self, name)
            if len(values) != count or not all(value > 0 for value in values):
                raise BadInput(f"--{name} {values}: must be {count} numbers above 0")


@dataclass(frozen=True)
class RatioSettings(SettingsSlice):
    """token_to_word: tokens for each word, where a word is a run of letters and digits."""

    min_token_to_word: float | None = None
    """Documents below it are removed."""
    max_token_to_word: float | None = None
    """Documents above it are removed. Default: the quantile below."""
    max_token_to_word_quantile: float = 0.99
    """Share of the documents that reach this stage which is kept, where max_token_to_word is not given."""

    def check(self) -> None:
        super().check()
        if not 0 < self.max_token_to_word_quantile <= 1:
            raise BadInput(
                f"--max_token_to_word_quantile {self.max_token_to_word_quantile}: must be above 0, at most 1"
            )


@dataclass(frozen=True)
class DedupSettings(SettingsSlice):
    """paragraph_dedup: of equal paragraphs (lines) the earliest stays. minhash: of near-equal documents one stays."""

    min_words: int = 4
    """Paragraphs with fewer words are never removed alone, only between removed ones."""
    min_kept_fraction: float = 0.1
    """A document that loses paragraphs and keeps less than this share of its words is removed."""
    min_kept_words: int = 20
    """A document that loses paragraphs and keeps fewer words is removed."""
    keep_next_survivor: bool = True
    """Where a document with a paragraph's first occurrence is removed, the next document that is not keeps it."""
    fold_case: bool = False
    """Paragraphs that differ in case alone are equal."""
    minhash_ngrams: int = 5
    """minhash: words of a shingle."""
    minhash_buckets: int = 14
    """minhash: buckets; documents with equal hashes in one bucket are near-duplicates."""
    minhash_hashes: int = 8
    """minhash: hashes of a bucket."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "min_words", "min_kept_words")
        self.require_at_least(1, "minhash_ngrams", "minhash_buckets", "minhash_hashes")
        if not 0 <= self.min_kept_fraction <= 1:
            raise BadInput(f"--min_kept_fraction {self.min_kept_fraction}: must be from 0 to 1")


@dataclass(frozen=True)
class MaskSettings(SettingsSlice):
    """pii: what is masked."""

    email_replacement: str = "email@example.com"
    """Stands for every e-mail address; a domain that is reserved for examples (RFC 2606)."""
    ip_replacement: str = "192.0.2.1"
    """Stands for every public IP address; an address that is reserved for documentation (RFC 5737)."""

    def check(self) -> None:
        super().check()
        for name in ("email_replacement", "ip_replacement"):
            if "\n" in getattr(self, name):
                raise BadInput(f"--{name}: must be one line")


@dataclass(frozen=True)
class DecontaminationSettings(SettingsSlice):
    """decontaminate: documents that share an n-gram of words with texts of evaluations are removed."""

    evaluation_texts: list[PathText] = field(default_factory=list)
    """Files and folders of evaluation texts: plain text; records, of which every text is taken; YAML files of lm-eval's
    tasks, which name such files."""
    decontamination_ngrams: int = 13
    """Words of an n-gram. A shorter text, from 8 words on, is looked for as a whole."""

    def check(self) -> None:
        super().check()
        self.require_at_least(8, "decontamination_ngrams")


@dataclass(frozen=True)
class StageSettings(SettingsSlice):
    """Which stages there are, and their order."""

    stages: list[str] = field(default_factory=lambda: list(DEFAULT_STAGES))
    """Between reading and writing, in this order: quality_signals, repetition, quality, token_to_word,
    paragraph_dedup, minhash, pii, decontaminate."""

    def check(self) -> None:
        super().check()
        for stage in self.stages:
            if stage not in STAGES:
                raise BadInput(f"--stages: {stage} is none of {', '.join(STAGES)}{did_you_mean(stage, STAGES)}")
            if self.stages.count(stage) > 1:
                raise BadInput(f"--stages: {stage} stands there twice")


@dataclass(frozen=True)
class CorpusSettings(
    DecontaminationSettings, MaskSettings, DedupSettings, RatioSettings, FilterSettings, SignalSettings,
    StageSettings,
    ExecutorSettings, InputSettings,
):  # fmt: skip
    """The settings of build_corpus."""

    def check(self) -> None:
        super().check()
        if "token_to_word" in self.stages and self.tokenizer_path is None:
            raise BadInput("the stage token_to_word needs --tokenizer_path (or leave it out of --stages)")
        if "decontaminate" in self.stages and not self.evaluation_texts:
            raise BadInput("the stage decontaminate needs --evaluation_texts")
        limits = bool(self.min_signals or self.max_signals)
        if limits != ("quality_signals" in self.stages) or (self.signals_path is not None and not limits):
            raise BadInput("the stage quality_signals and --min_signals or --max_signals need each other")
        if self.evaluation_texts and "decontaminate" not in self.stages:
            raise BadInput("--evaluation_texts are given, but --stages does not name decontaminate")


COMMON = ("source", "tokenizer_path", "destination_path", "stages", "workers", "executor")
