"""What a check of the doctor says."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Of the check, the same every time.
        verdict: `problem`: it will not work, or messages may be lost. `warning`: it works, less
            well or not for long.
        sentence: What was found.
        remedy: What to do about it; empty when nothing need be done.
        did: What `--fix` did; empty when nothing.
        mend: Mends it, where that is safe; says what was done. May raise OSError or an error
            of ours.
    """

    name: str
    verdict: Verdict
    sentence: str
    remedy: str = ""
    did: str = ""
    mend: Callable[[], str] | None = field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, str]:
        """For `--json`."""
        words = {"name": self.name, "verdict": self.verdict, "sentence": self.sentence}
        return {**words, "remedy": self.remedy, "did": self.did}


def ok(name: str, sentence: str) -> Finding:
    return Finding(name=name, verdict="ok", sentence=sentence)


def warning(
    name: str, sentence: str, remedy: str, *, mend: Callable[[], str] | None = None
) -> Finding:
    return Finding(name=name, verdict="warning", sentence=sentence, remedy=remedy, mend=mend)


def problem(
    name: str, sentence: str, remedy: str, *, mend: Callable[[], str] | None = None
) -> Finding:
    return Finding(name=name, verdict="problem", sentence=sentence, remedy=remedy, mend=mend)
