"""`make bench BENCH=demo`: run the demo and keep its figures as a result file with its bars.

`--from runs/demo/summary.json` keeps a run that just ended instead of running again. Measures nothing itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import Bar, at_least, at_most, write


def main() -> int:
    """0 when every bar is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--from", dest="source", help="summary.json of a finished `make demo`")
    source = parser.parse_args().source
    if source is None:
        from demo import run

        run.main([])
        source = "runs/demo/summary.json"
    facts = json.loads(Path(source).read_text())
    bars = _bars(facts)
    for bar in bars:
        print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")
    small = facts["size"] != "full"
    name, command = ("demo-small", 'make demo DEMO_ARGS="--size small"') if small else ("demo", "make demo")
    print(f"written: {write(name, command, bars, [facts])}")
    return 0 if all(b.ok for b in bars) else 1


def _bars(facts: dict[str, Any]) -> list[Bar]:
    ratios, (good, bad) = facts["ratios"], facts["rollouts"]
    return [
        at_most("whole demo, minutes", facts["seconds"] / 60, 15),
        at_least("teacher, exact match through vLLM", facts["teacher"]["accuracy"], 0.97),
        at_least("quantized student / teacher, accuracy", ratios["accuracy"], 0.98),
        at_least("teacher / student, parameters", ratios["params"], 8),
        at_least("quantized student / teacher, served tokens/s", ratios["tokens_per_s"], 3),
        at_most("AWQ / bf16 student, perplexity", ratios["perplexity"], 1.02),
        at_most("client requests failed", facts["traffic"]["failed"], 0),
        at_least("student promoted", good["decision"] == "promoted", 1),
        at_least("broken student rolled back", bad["decision"] == "rolled_back", 1),
        at_most("broken student's largest share", bad["max_weight"], 0.10),
    ]


if __name__ == "__main__":
    sys.exit(main())
