"""Amounts as a person says them."""


def duration(seconds: float) -> str:
    """Return seconds in the units that fit."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {secs:02} s"


def short(amount: float) -> str:
    """Return a large number with a unit, a small one as it is."""
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if amount >= limit:
            return f"{amount / divisor:,.1f} {unit}"
    return f"{amount:,.0f}"


def size(amount: float) -> str:
    """Return bytes with a unit."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= limit:
            return f"{amount / limit:,.1f} {unit}"
    return f"{amount:,.0f} bytes"


def count(amount: int, thing: str, things: str | None = None) -> str:
    """Return a number of things; ``things`` is their plural where that is no bare s."""
    return f"{amount:,} {thing if amount == 1 else things or f'{thing}s'}"


def clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds, of equal width as long as they are under ten hours."""
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}"
