"""Seeded damage to the bytes of a file."""

from __future__ import annotations

import random

_ODD = (b"\0", b"\xff" * 8, b"\x7f\xff\xff\xff", (1 << 40).to_bytes(8, "little"), b"]" * 40, b"\x85" * 40, b"[" * 40)


def mutated(content: bytes, choice: random.Random) -> bytes:
    """The content with some bytes changed, removed, repeated or replaced by odd ones; half of it near either end."""
    damaged = bytearray(content)
    kind = choice.randrange(6)
    for _ in range(choice.choice([1, 1, 4, 20])):
        if not damaged:
            break
        near = min(len(damaged), choice.choice([200, 3000, len(damaged)]))
        at = choice.choice([choice.randrange(near), len(damaged) - 1 - choice.randrange(near)])
        if kind <= 2:
            damaged[at] = choice.randrange(256)
        elif kind == 3:
            odd = choice.choice(_ODD)
            damaged[at : at + choice.choice([0, len(odd)])] = odd
        elif kind == 4:
            del damaged[at : at + choice.choice([1, 8, 300])]
        else:
            other = choice.randrange(len(damaged))
            damaged[at : at + 8] = damaged[other : other + 8]
    if choice.random() < 0.1:
        del damaged[choice.randrange(len(damaged) + 1) :]
    return bytes(damaged)
