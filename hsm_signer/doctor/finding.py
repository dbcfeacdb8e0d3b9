"""What a check says: its verdict, the evidence, and what a person can do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from hsm_signer.errors import HsmSignerError


class Verdict(StrEnum):
    """Of one check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Outcome:
    """What a check that came to an end found. ``facts``: single values, for programs and for the bundle."""

    verdict: Verdict
    evidence: str
    remedy: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)


Facts = Mapping[str, object]


def ok(evidence: str, facts: Facts = MappingProxyType({}), *, advice: str | None = None) -> Outcome:
    """Nothing to do; ``advice``: what could be better still."""
    return Outcome(Verdict.OK, evidence, advice, facts)


def warning(evidence: str, remedy: str, facts: Facts = MappingProxyType({})) -> Outcome:
    """It works, but not well, or not for long."""
    return Outcome(Verdict.WARNING, evidence, remedy, facts)


class NotCheckedError(Exception):
    """A check cannot or must not be made now. ``remedy``: what it takes."""

    def __init__(self, why: str, remedy: str | None = None) -> None:
        super().__init__(why)
        self.remedy = remedy


@dataclass(frozen=True)
class Finding(Outcome):
    """One rung of the ladder. ``error``: what failed, where something did."""

    check: str = ""
    error: HsmSignerError | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "check": self.check,
            "verdict": str(self.verdict),
            "evidence": self.evidence,
            "remedy": self.remedy,
            "facts": dict(self.facts),
            "error": error_facts(self.error),
        }


def error_facts(error: HsmSignerError | None) -> dict[str, object] | None:
    """Class and codes of an error, without its words."""
    if error is None:
        return None
    names = ("code", "error", "status", "clause")
    codes = {name: value for name in names if (value := getattr(error, name, None)) is not None}
    return {"class": type(error).__name__, **codes}
