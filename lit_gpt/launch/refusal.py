"""A rank that refuses its input before the ranks have met: it says so where they meet, and all end with exit code 2.

Without that the others would wait for it to the end of --watchdog_long_s. failures.py does the same from the meeting
on. No torch, until there is something to tell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lit_gpt.cli import EXIT_BAD_INPUT, BadInput, KnownBadInput, print_bad_input
from lit_gpt.launch.job import host
from lit_gpt.launch.signals import StopFlag
from lit_gpt.launch.site import is_one_of_several


@contextmanager
def refusals_told(stop_flag: StopFlag) -> Iterator[None]:
    """Where one of several ranks raises BadInput in this context, all ranks end with exit code 2."""
    try:
        yield
    except KnownBadInput:
        raise
    except BadInput as error:
        if not is_one_of_several():
            raise
        print_bad_input(error)
        _tell(error, stop_flag)
        sys.exit(EXIT_BAD_INPUT)


def _tell(error: BadInput, stop_flag: StopFlag) -> None:
    from lit_gpt.launch.meeting import REFUSAL_S, NotMet, meet
    from lit_gpt.launch.world import place_among_ranks

    place = place_among_ranks()
    if place is None:
        return
    with suppress(NotMet, KeyError):  # KeyError: an environment that is not complete says not which rank this is
        meet(
            place,
            limit_s=REFUSAL_S,
            stopped=lambda: stop_flag.received is not None,
            refused=said_by_others(place.global_rank(), str(error)),
        )


def said_by_others(rank: int, why: str) -> str:
    """What the other ranks say of a rank that ends."""
    return f"all ranks end, since rank {rank} on {host()} cannot go on: {' '.join(why.split())}"
