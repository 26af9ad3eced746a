"""What a search found: the plans that fit, best first, and why the others did not.

A search is best first (Land and Doig 1960, branch and bound). Candidates stand in branches of which a bound says what none of
theirs falls below; the branch with the least bound is opened first: into smaller branches, and in the end into plans that fit,
which may have a bound, too, until their times are asked for. So what is behind the best plan and its runners-up is never looked
at (`Outcome.best_first`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from math import inf
from typing import Any, NamedTuple

from mlmdsl.planner.bench import Setting
from mlmdsl.planner.candidate import Candidate, Times
from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.rules import CompiledRule
from mlmdsl.planner.schedule import Course

# A wish (`prefer`, `avoid`) is granted where it costs no more than this share of the objective
WISH = 0.10

Mesh = tuple[int, ...]


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
    def mesh(self) -> Mesh:
        c = self.candidate
        return c.tensor, c.context, c.pipeline, c.data, c.expert

    def order(self, ignored: int = 0) -> tuple[Any, ...]:
        """Sorts the best first; `ignored`: wishes that do not count. Ties are seen through rounding."""
        unkept = (self.broken & ~ignored).bit_count()
        return float(f"{self.objective * (1 + WISH * unkept):.9g}"), float(f"{self.times.total:.9g}"), self.simplicity


class Branch(NamedTuple):
    """Candidates of one place: all with these micro-batches, the smallest first; or with one of them and some schedules
    (`courses`) and `shares`, which are ZeRO and its copies, in the end one of each; or (`mode`) in one way of recomputing, and
    others that recompute some of the layers in a milder way; or (`candidate`) one that fits, itself or (`mild`) as far as
    memory allows in that milder way.

    bound: the objective is no less; broken: a bit for each wish that none of them keeps; modes: of every layer, where a pin
    says so; closely: whether the bound knows how layers may be cut; told: whether it comes from the stages' layers."""

    bound: float
    broken: int
    place: Place
    micro_batches: tuple[int, ...]
    courses: tuple[Course, ...] = ()
    shares: tuple[tuple[int, int], ...] = ()
    mode: int | None = None
    modes: tuple[int, ...] = ()
    candidate: Candidate | None = None
    mild: int | None = None
    closely: bool = False
    told: bool = False

    @property
    def mesh(self) -> Mesh:
        sharding = self.place.bench.sharding
        return sharding.tensor, sharding.context, self.place.pipeline, self.place.data, sharding.expert

    @property
    def micro_batch(self) -> int:
        """The smallest."""
        return self.micro_batches[0]

    @property
    def course(self) -> Course:
        """Of one with a schedule."""
        (found,) = self.courses
        return found

    @property
    def schedule(self) -> Schedule:
        """Of one with a schedule; of several, which go with the same ways of recomputing and of ZeRO, one of them."""
        return self.courses[0][0]

    def order(self, ignored: int = 0) -> tuple[Any, ...]:
        """In front of all plans that it can have."""
        return (self.bound * (1 + WISH * (self.broken & ~ignored).bit_count()),)


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

    def join(self, other: Tally) -> None:
        """With the candidates of another."""
        self.count += other.count
        self.closer(other.distance, other.closest, other.place, other.words)


def _nothing(*_: object) -> Any:
    return ()


@dataclass
class Outcome:
    """All that is known to fit, best first, the branches that are not opened, and why other candidates did not. Keys of
    `rejected`: (reason, text of the rule or ""); `bounded`: of the candidates those that a bound on memory proves not to fit;
    `open_up`: the branches that one consists of, while plans that fit are added to `found`; `find_closest`: brings the
    tally of what does not fit up to date, where bounds stand in for the closest."""

    setting: Setting
    wishes: tuple[CompiledRule, ...]
    open_up: Callable[[Branch], Iterable[Branch]] = _nothing
    find_closest: Callable[[], None] = _nothing
    found: list[Found] = field(default_factory=list[Found])
    branches: dict[int, Branch] = field(default_factory=dict[int, Branch])
    rejected: dict[tuple[str, str], Tally] = field(default_factory=dict[tuple[str, str], Tally])
    candidates: int = 0
    bounded: int = 0
    _numbers: Iterator[int] = field(default_factory=count)

    def reject(self, reason: str, text: str = "") -> Tally:
        return self.rejected.setdefault((reason, text), Tally())

    def plant(self, branch: Branch) -> int:
        """Its number."""
        number = next(self._numbers)
        self.branches[number] = branch
        return number

    def opened(self, number: int) -> tuple[list[tuple[int, Branch]], range]:
        """The branches that a branch consists of, and which of `found` are new."""
        before = len(self.found)
        made = [(self.plant(each), each) for each in self.open_up(self.branches.pop(number))]
        return made, range(before, len(self.found))

    def settle(self) -> None:
        """The best to the front; of the others bounds may stand in for their times (`best_first`)."""
        best = next(self.best_first(), None)
        if best is not None:
            others = (each for each in self.found if each.candidate is not best.candidate)
            self.found = [best, *sorted(others, key=Found.order)]

    def exhaust(self) -> None:
        """Every branch is opened."""
        while self.branches:
            self.opened(next(iter(self.branches)))
        self.settle()

    @property
    def outpaced(self) -> int:
        """Candidates that a bound proves to be behind all that `best_first` has told: whether they fit is not known."""
        return self.candidates - len(self.found) - sum(tally.count for tally in self.rejected.values())

    def best_first(self, ignored: int = 0, wished: int = 0, but: Container[Mesh] = ()) -> Iterator[Found]:
        """All that fit and keep the wishes `wished` (bits) in their exact order, but those of some meshes, which may become
        more meanwhile. As many branches are opened and bounds made exact as it takes: one such iterator at a time."""
        waiting: list[tuple[tuple[Any, ...], bool, int, Found | Branch]] = []
        waiting += [(each.order(ignored), True, number, each) for number, each in enumerate(self.found)]
        waiting += [(each.order(ignored), False, number, each) for number, each in self.branches.items()]
        heapify(waiting)
        while waiting:
            _, _, number, each = waiting[0]
            if each.broken & wished or each.mesh in but:
                heappop(waiting)
            elif isinstance(each, Branch):
                heappop(waiting)
                branches, found = self.opened(number)
                for new, branch in branches:
                    heappush(waiting, (branch.order(ignored), False, new, branch))
                for new in found:
                    heappush(waiting, (self.found[new].order(ignored), True, new, self.found[new]))
            elif each.exact:
                heappop(waiting)
                yield each
            else:
                heapreplace(waiting, (self.made_exact(number).order(ignored), True, number, self.found[number]))

    def made_exact(self, number: int) -> Found:
        """A found plan whose times were bounds."""
        each = self.found[number]
        times = each.place.times(each.candidate)
        self.found[number] = each._replace(objective=times.total, times=times, exact=True)
        return self.found[number]
