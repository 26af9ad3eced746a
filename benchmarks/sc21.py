"""The planner's choice beside the published one, for the ten models of Narayanan et al. SC'21, Table 1 (arXiv:2104.04473).

    python -m benchmarks.sc21 > docs/sc21.md        (make sc21)

Both are costed by the planner under the same execution: Megatron-LM's of 2021, unfused attention in fp16 (benchmarks/sc21.csv
has the published rows). Two choices are shown: one among all plans, and one with the means of the time, which are no ZeRO, no
sequence parallelism and full recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mlmdsl import words
from mlmdsl.planner.compare import Costed, costed, difference, verdict
from mlmdsl.planner.search import explore
from mlmdsl.planner.why import questions
from mlmdsl.validation.footprint import footprint
from mlmdsl.validation.predict import placed
from mlmdsl.validation.runs import Run, read_runs

ROWS = Path(__file__).parent / "sc21.csv"
_MEANS = "zero=0,sequence_parallel=false,recompute=full"

_HEAD = """# Plans of SC'21, Table 1, and the planner's

Narayanan et al. (SC'21, arXiv:2104.04473) chose the plans of Table 1 by hand, for ten models on clusters of A100 80 GB. Here
they stand beside the planner's choices for the same model, batch and cluster. All are costed by the planner as Megatron-LM ran
them in 2021: fp16, unfused attention, gradients in fp16, its optimizer. Written by `make sc21`.

- *published*: the plan of the table; its memory as Megatron-LM kept it.
- *means of 2021*: the planner's choice without ZeRO, without sequence parallelism, with full recomputation, as it was then.
- *all means*: the planner's choice among everything it knows: selective recomputation and sequence parallelism came with
  arXiv:2205.05198, ZeRO under a pipeline later.

Memory of the planner's plans is that of mlmdsl's programs: torch's pipeline stages make room for what each micro-batch
receives, Megatron-LM for one at a time. That is why the deepest published pipelines would not fit here as they are.

"""


@dataclass(frozen=True)
class Row:
    """One model: the published plan, its footprint in bytes, and what the planner chose."""

    run: Run
    published: Costed
    published_bytes: int
    then: Costed | None
    free: Costed


def rows() -> Iterator[Row]:
    (means,) = questions([_MEANS])
    for _, run in read_runs(ROWS.read_text(encoding="utf-8")):
        assert isinstance(run, Run), run
        place, candidate = placed(run)
        setting = place.bench.setting
        then, free = explore(setting, replace(setting.spec.plan, pins=means)), explore(setting, setting.spec.plan)
        limited = costed(then.found[0].place, then.found[0].candidate) if then.found else None
        best = costed(free.found[0].place, free.found[0].candidate)
        yield Row(run, costed(place, candidate), footprint(run, place, candidate), limited, best)


def page() -> str:
    found = list(rows())
    table = [
        "| model | GPUs | published: step | measured | means of 2021 | all means |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(_line(row) for row in found),
    ]
    return _HEAD + "\n".join(table) + "\n" + "".join(map(_section, found))


def _line(row: Row) -> str:
    measured = words.seconds(row.run.step_seconds or 0.0)
    then = words.seconds(row.then.seconds) if row.then else "none fits"
    cells = (row.run.model, f"{row.run.world_size:,}", words.seconds(row.published.seconds), measured, then)
    return f"| {' | '.join(cells)} | {words.seconds(row.free.seconds)} |"


def _section(row: Row) -> str:
    lines = [
        f"\n## {row.run.model}, {row.run.world_size:,} GPUs, batch {row.run.global_batch:,}\n",
        f"- published: {_plan(row.published)}, {words.seconds(row.published.seconds)}, {words.gib(row.published_bytes)}",
    ]
    if row.then is None:
        lines.append("- means of 2021: no plan fits mlmdsl's programs, for what torch's pipeline stages make room for")
    elif row.then.plan == row.published.plan:
        lines.append("- means of 2021: the published plan is the choice")
    else:
        lines += [f"- means of 2021: {_costed(row.then)}", _published(row.then, row.published)]
    return "\n".join([*lines, f"- all means: {_costed(row.free)}", _published(row.free, row.published)]) + "\n"


def _published(choice: Costed, published: Costed) -> str:
    text = difference(choice, published)
    if verdict(choice, published) != "slower" and published.peak_bytes > choice.peak_bytes:
        text += f"; it would take {words.gib(published.peak_bytes)} here"
    return f"  - the published plan {'' if text.startswith('takes') else 'is '}{text}"


def _costed(each: Costed) -> str:
    return f"{_plan(each)}, {words.seconds(each.seconds)}, {words.gib(each.peak_bytes)}"


def _plan(each: Costed) -> str:
    return (
        f"{each.plan.described} ({words.percent(each.part('bubble') / each.seconds)} idle)"
        if each.plan.pipeline > 1
        else each.plan.described
    )


if __name__ == "__main__":
    print(page(), end="")
