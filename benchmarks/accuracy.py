"""How far the planner's step times are from measured ones: the band that stands under every plan.

    python -m benchmarks.accuracy runs.csv          rewrites mlmdsl/planner/accuracy.json

The table has the columns of docs on `mlmdsl validate`. The 10th and 90th percentile of predicted over measured, for runs on one
node and on many.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mlmdsl.validation.judge import errors_by_nodes, validate

FILE = Path(__file__).resolve().parents[1] / "mlmdsl" / "planner" / "accuracy.json"


def measured(text: str) -> dict[str, Any]:
    """What accuracy.json holds."""
    rows = validate(text).rows
    ratios, names = errors_by_nodes(rows), {False: "one_node", True: "many_nodes"}
    sources = sorted({row.source for row in rows if row.time_error is not None})
    return {"origin": sources, **{names[key]: _band(found) for key, found in ratios.items()}}


def _band(ratios: list[float]) -> dict[str, float]:
    ordered = sorted(ratios)
    low, high = (round(ordered[round(share * (len(ordered) - 1))], 3) for share in (0.1, 0.9))
    return {"runs": len(ordered), "low": low, "high": high}


def main(path: str) -> None:
    FILE.write_text(json.dumps(measured(Path(path).read_text(encoding="utf-8")), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
