"""Make a cloze task for lm-eval from held-out text: which of four sentences comes next? Needs no network.

The text is a validation split that prepare_data.py wrote, or files of documents. scripts/evaluate.py runs the task by
--task_dir and --tasks.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program
from lit_gpt.prepare.source_flags import add_source_flags, fields_of, guard_of

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--val_data_dir", type="path", help="validation split; with --tokenizer_path")
    source.add_argument(
        "--source", type="path", nargs="+", action="extend", help="files of documents, or folders of them"
    )
    parser.add_argument("--tokenizer_path", type="path", help="tokenizer that the split was made with")
    add_source_flags(parser, ids=False)
    parser.add_argument("--destination_path", type=Path, required=True, help="folder to write the task's two files to")
    parser.add_argument("--name", default="german_cloze", help="of the task (default: german_cloze)")
    parser.add_argument("--items", type=int, default=500, help="most questions (default: 500)")
    parser.add_argument("--max_documents", type=int, default=10_000, help="most documents to read (default: 10000)")
    parser.add_argument("--seed", type=int, default=3407, help="of the choice (default: 3407)")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, 1, "items", "max_documents")
    if not re.fullmatch(r"[a-z]\w*", arguments.name):
        raise BadInput(f"--name {arguments.name}: must be lower-case letters, digits and _, a letter first")
    if (arguments.val_data_dir is None) != (arguments.tokenizer_path is None):
        raise BadInput("--val_data_dir and --tokenizer_path go together")

    from lit_gpt.data.token_store import TokenStore
    from lit_gpt.data.tokenizer import Tokenizer
    from lit_gpt.tasks.cloze import make_items, texts_of_files, texts_of_store, write_task

    if arguments.val_data_dir:
        store = TokenStore.open(arguments.val_data_dir)
        texts = texts_of_store(store, Tokenizer.from_folder(arguments.tokenizer_path))
        origin = f"data set {store.dataset_id}"
    else:
        texts = texts_of_files(arguments.source, fields_of(arguments), guard_of(arguments))
        origin = ", ".join(Path(name).name for name in arguments.source)
    items = make_items(texts, arguments.items, arguments.seed, max_documents=arguments.max_documents)
    try:
        write_task(arguments.destination_path, arguments.name, items, origin)
    except OSError as error:
        raise BadInput(f"cannot write to {arguments.destination_path}: {error.strerror}") from None
    log.info("%d items of task %s in %s", len(items), arguments.name, arguments.destination_path)


if __name__ == "__main__":
    run_program(main)
