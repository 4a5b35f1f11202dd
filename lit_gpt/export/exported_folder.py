"""A folder that create.sh wrote, as an argument of a program. Imports no torch, so that a mistake is told at once."""

from __future__ import annotations

from pathlib import Path

from lit_gpt.checkpoint.record import MANIFEST, NAME
from lit_gpt.cli import BadInput, command_line


def require_exported(folder: Path) -> None:
    """Raise BadInput unless --model is a folder with a model of Hugging Face; the way out for a checkpoint or a run."""
    if (folder / "config.json").is_file():
        return
    inside = [found.name for found in folder.glob("iter-*") if NAME.fullmatch(found.name)]
    if (folder / MANIFEST).is_file():
        why = f"a checkpoint, not an exported model: {command_line('scripts/create.sh', folder)} exports it"
    elif inside:
        export = command_line("scripts/create.sh", folder / max(inside))
        why = f"a run folder, not an exported model: {export} exports its newest checkpoint"
    elif folder.is_dir():
        why = "holds no config.json; give a folder that create.sh wrote"
    else:
        why = "there is no such folder; give one that create.sh wrote"
    raise BadInput(f"--model {folder}: {why}")
