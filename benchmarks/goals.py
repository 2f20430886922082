"""What each op is to reach on a GPU, and whether a run did.

Where nothing else is said, an op may not take longer than the fastest of what it is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

OURS = "fastdistill"

Measured = Mapping[str, Mapping[str, Any]]  # implementation -> its row
Cases = Mapping[tuple[str, str], Measured]  # op and case -> what was measured of it


@dataclass(frozen=True)
class Verdict:
    says: str
    value: str
    met: bool

    def __str__(self) -> str:
        return f"{self.says}: {'met' if self.met else f'**missed, {self.value}**'}"


class Goal(Protocol):
    def judge(self, case: str, measured: Measured, cases: Cases) -> Verdict | None:
        """None where a row that it needs is missing."""


@dataclass(frozen=True)
class Share:
    """Of the card's copy bandwidth, measured in the same run."""

    at_least: float

    def judge(self, case: str, measured: Measured, cases: Cases) -> Verdict | None:
        share = measured[OURS].get("copy_share")
        if share is None:
            return None
        return Verdict(f"≥ {self.at_least:.0%} of copy", f"{share:.0%}", round(share, 2) >= self.at_least)


@dataclass(frozen=True)
class Against:
    """A peer's time, by default the fastest one's; of the same case or of another."""

    at_most: float = 1.0
    peer: str | None = None
    case: str = "{case}"
    """The case whose peer is meant; ``{size}`` is the case up to its comma."""

    def judge(self, case: str, measured: Measured, cases: Cases) -> Verdict | None:
        other = cases.get((measured[OURS]["op"], self.case.format(case=case, size=case.partition(",")[0])), {})
        peers = {name: row["median_s"] for name, row in other.items() if not name.startswith(OURS)}
        if self.peer is not None:
            peers = {name: seconds for name, seconds in peers.items() if name == self.peer}
        if not peers:
            return None
        fastest = min(peers, key=lambda name: peers[name])
        return _ratio(self.at_most, fastest, measured[OURS]["median_s"] / peers[fastest])


@dataclass(frozen=True)
class LikeOp:
    """Our own time for the same case of another op."""

    at_most: float
    op: str

    def judge(self, case: str, measured: Measured, cases: Cases) -> Verdict | None:
        other = cases.get((self.op, case), {}).get(OURS)
        if other is None:
            return None
        return _ratio(self.at_most, self.op, measured[OURS]["median_s"] / other["median_s"])


@dataclass(frozen=True)
class Within:
    """However ours is run, as with graphs."""

    seconds: float

    def judge(self, case: str, measured: Measured, cases: Cases) -> Verdict | None:
        seconds = min(row["median_s"] for name, row in measured.items() if name.startswith(OURS))
        return Verdict(f"≤ {self.seconds * 1e3:g} ms", f"{seconds * 1e3:.3g} ms", seconds <= self.seconds)


@dataclass(frozen=True)
class Both:
    first: Goal
    second: Goal

    def judge(self, case: str, measured: Measured, cases: Cases) -> Verdict | None:
        one, other = (goal.judge(case, measured, cases) for goal in (self.first, self.second))
        if one is None or other is None:
            return one or other
        return Verdict(f"{one.says} and {other.says}", f"{one.value} and {other.value}", one.met and other.met)


def _ratio(at_most: float, of: str, ratio: float) -> Verdict:
    return Verdict(f"≤ {at_most:.2f}× {of}", f"{ratio:.2f}×", round(ratio, 2) <= at_most)


LONG = r"\d+×\d+×(512|1024|2048|4096)×\d+"  # attention: batch, heads, tokens, channels

GOALS: list[tuple[str, str, Goal]] = [  # of which op, of which cases (regular expressions, of the whole)
    ("kd_ce_loss", "8192×128256|8192×32000", Share(0.90)),
    ("kd_ce_loss", "32768×8192", Share(0.85)),
    ('kd_ce_loss, reduction="none"', ".*×.*", LikeOp(1.03, "kd_ce_loss")),
    ("kd_ce_loss, both gradients", "8192×.*|32768×.*", Share(0.85)),
    ("uncertainty", "65536×32000", Share(0.90)),
    ("uncertainty", "8192×128256", Share(0.92)),
    ("uncertainty", "65536×1000", Share(0.80)),
    ("accumulate_sensitivity_", "19M.*", Share(0.80)),
    ("accumulate_sensitivity_", "85M.*", Share(0.90)),
    ("gated_attention.*", f"{LONG}(, 0% closed)?", Against(1.0, "cuDNN")),
    ("gated_attention( forward)?", f"{LONG}, 50% closed", Against(0.55, "cuDNN", "{size}, 0% closed")),
    ("gated_attention.*", r".*, \d+% closed", Against(1.0, case="{size}, 0% closed")),
    ("gated_ffn and gradients", ".*", Against(1.05, "compacted")),
    ("select_uncertain", "10% of 1000000×3", Within(0.06e-3)),
    ("train step", "BERT-base 32x128", Both(Against(1.0, "sdpa"), Within(8e-3))),
    ("train step", ".*", Against(1.0, "sdpa")),
    ("score", "BERT-base 32x128 bfloat16", Both(Against(), Within(4e-3))),
]
NO_SLOWER = Against()


def judge(op: str, case: str, cases: Cases) -> Verdict | None:
    """Of the first goal that is of this op and case and can be judged."""
    named = [goal for ops, which, goal in GOALS if re.fullmatch(ops, op) and re.fullmatch(which, case)]
    verdicts = (goal.judge(case, cases[op, case], cases) for goal in (*named, NO_SLOWER))
    return next((verdict for verdict in verdicts if verdict is not None), None)
