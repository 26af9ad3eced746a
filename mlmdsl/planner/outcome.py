"""What a search found: the plans that fit, best first, and why the others did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from math import inf
from typing import Any, NamedTuple

from mlmdsl.planner.pricing import Candidate, Place, Setting, Times
from mlmdsl.planner.rules import CompiledRule

# A wish (`prefer`, `avoid`) is granted where it costs no more than this share of the objective
WISH = 0.10


class Found(NamedTuple):
    """A plan that fits. objective: seconds, or bytes where memory is minimised; `broken`: a bit for each wish that it does not
    keep; `simplicity`: smaller is simpler; `exact`: or times and objective are bounds, which the plan does not fall below."""

    objective: float
    times: Times
    peak_bytes: int
    broken: int
    candidate: Candidate
    place: Place
    simplicity: tuple[int, ...]
    exact: bool

    @property
    def mesh(self) -> tuple[int, ...]:
        c = self.candidate
        return c.tensor, c.context, c.pipeline, c.data, c.expert

    def order(self, ignored: int = 0) -> tuple[Any, ...]:
        """Sorts the best first; `ignored`: wishes that do not count. Ties are seen through rounding."""
        unkept = (self.broken & ~ignored).bit_count()
        return float(f"{self.objective * (1 + WISH * unkept):.9g}"), float(f"{self.times.total:.9g}"), self.simplicity


@dataclass
class Tally:
    """Candidates that fell out for one reason, and the one that was closest to passing (least `distance`)."""

    count: int = 0
    distance: float = inf
    closest: Candidate | None = None
    place: Place | None = None
    words: str = ""

    def add(self, distance: float, candidate: Candidate | None = None, place: Place | None = None, words: str = "") -> None:
        self.count += 1
        self.closer(distance, candidate, place, words)

    def closer(self, distance: float, candidate: Candidate | None = None, place: Place | None = None, words: str = "") -> None:
        if distance < self.distance:
            self.distance, self.closest, self.place, self.words = distance, candidate, place, words


@dataclass
class Outcome:
    """All that fit, best first, and why the others did not. Keys of `rejected`: (reason, text of the rule or ""); `pruned`: of
    the candidates those that a bound on memory proves not to fit, which were not priced."""

    setting: Setting
    wishes: tuple[CompiledRule, ...]
    found: list[Found] = field(default_factory=list[Found])
    rejected: dict[tuple[str, str], Tally] = field(default_factory=dict[tuple[str, str], Tally])
    candidates: int = 0
    pruned: int = 0

    def reject(self, reason: str, text: str = "") -> Tally:
        return self.rejected.setdefault((reason, text), Tally())

    def settle(self) -> None:
        """The best to the front; of the others bounds may stand in for their times (`best_first`)."""
        best = next(self.best_first(), None)
        if best is not None:
            others = (each for each in self.found if each.candidate is not best.candidate)
            self.found = [best, *sorted(others, key=Found.order)]

    def best_first(self, ignored: int = 0, wished: int = 0) -> Iterator[Found]:
        """All that keep the wishes `wished` (bits) in their exact order; of bounds as many are made exact as it takes."""
        waiting = [(f.order(ignored), number, f) for number, f in enumerate(self.found) if not f.broken & wished]
        places = {id(f.candidate): number for number, f in enumerate(self.found)}
        heapify(waiting)
        while waiting:
            _, number, each = waiting[0]
            if each.exact:
                yield heappop(waiting)[2]
            else:
                times = each.place.times(each.candidate)
                each = each._replace(objective=times.total, times=times, exact=True)
                self.found[places[id(each.candidate)]] = each
                heapreplace(waiting, (each.order(ignored), number, each))
