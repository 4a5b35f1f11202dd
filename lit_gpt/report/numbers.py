"""How a page and a terminal write numbers: three digits with a unit, bytes, durations."""

from __future__ import annotations

import time


def short(number: float) -> str:
    """1234567 -> "1.23 M"; three digits."""
    for unit in ("", " k", " M", " B", " T"):
        if number < 999.5 or unit == " T":
            break
        number /= 1000
    return f"{number:.{0 if not unit or number >= 99.95 else 1 if number >= 9.995 else 2}f}{unit}"


def duration(seconds: float) -> str:
    """ "0:01:05", or with days "2d 03:04"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}" if days else f"{hour}:{minute:02}:{second:02}"


def about(seconds: float) -> str:
    """ "12.3 s", or from a minute on as `duration`."""
    return f"{seconds:.3g} s" if seconds < 60 else duration(seconds)


def moment(seconds: float) -> str:
    """A time in seconds since 1970, on this machine's clock: "2026-11-27 15:26:49 CET"."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def size(number_of_bytes: float) -> str:
    """1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number_of_bytes < 1023.5 or unit == "TiB":
            break
        number_of_bytes /= 1024
    return f"{number_of_bytes:.0f} B" if unit == "B" else f"{number_of_bytes:.3g} {unit}"
