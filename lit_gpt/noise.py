"""What libraries say at each start that is no news to anybody: silenced line by line, each by its module and its text.

Nothing else of these modules is silenced. A line belongs here if its cause is known, lies outside of this project and
changes no result.
"""

from __future__ import annotations

import logging
import re
import warnings

LOGGED = {
    # transformers imports torchao, of whose kernels we use none there; they are built for other versions and machines
    "torchao": "Failed to load .*: Could not load this library",
    "torchao.kernel.intmm": "Warning: Detected no triton",
    # torchao again: what it registers is already known to this torch
    "torch.utils._pytree": ".* is an Enum subclass and is now natively supported by torch.compile",
    # our selective checkpointing passes it, on regions without such operations
    "torch._higher_order_ops.wrap": r"\s*Detected that context_fn is passed to torch.utils.checkpoint",
    # gguf names its temporary file; what is written, and where, is told by scripts/convert_gguf.py
    "gguf.gguf_writer": "gguf: This GGUF file is for|Writing the following files|.*: n_tensors = ",
}
"""Logger -> how its message begins."""
WARNED = {
    # the launcher is checked by launch/world.py, also where srun is installed and not used
    "lightning": "The `srun` command is available on your system",
    # flash-attn-4 hands its unused extra inputs to a compiler that does not know their type
    "cutlass.base_dsl": r"Argument aux_data \(position \d+\) cannot be converted to a JitArgument",
}
"""Package that warns -> how its warning begins."""


def silence() -> None:
    """Silence these lines in this process, whether or not their modules are loaded yet; again is as once."""
    for name, begins in LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(begins))
    for package, begins in WARNED.items():
        warnings.filterwarnings("ignore", begins, module=re.escape(package))


class _Without(logging.Filter):
    """Lets every record through but those whose message begins so."""

    def __init__(self, begins: str) -> None:
        super().__init__()
        self._begins = re.compile(begins, re.DOTALL)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._begins.match(record.getMessage()) is None
