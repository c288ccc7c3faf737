"""What a study says about the paper's claim."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """``word`` is confirmed, not confirmed or not testable here; ``numbers`` one sentence."""

    word: str
    numbers: str

    @classmethod
    def of(cls, holds: bool, numbers: str) -> "Verdict":
        """Confirmed if the claim holds here."""
        return cls("confirmed" if holds else "not confirmed", numbers)
