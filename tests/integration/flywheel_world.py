"""A flywheel over a small log whose runs are a script, not a distillation: minutes become milliseconds.

The script keeps what a pipeline keeps (finished steps, a published manifest) and notices when it runs twice
at a time. Knows nothing about distilling.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from contracts.dataset import Manifest
from tests.integration.pipeline_world import config_of, write_logs

SCRIPT = """#!/bin/sh
# $1: the run's workdir, $2: the world's folder (a file `hold` there keeps it from ending), $3: steps
cd "$1" || exit 9
echo 1 >> begun
mkdir working 2> /dev/null || echo 1 >> overlap
trap 'rmdir working; exit 130' TERM
n=0
while [ $n -lt "$3" ]; do
  n=$((n + 1))
  [ -f "step-$n" ] && continue
  sleep 0.05 & wait $!
  echo 1 >> "step-$n"
done
while [ -f "$2/hold" ]; do sleep 0.05 & wait $!; done
rmdir working
[ -f "$2/exit" ] && exit "$(cat "$2/exit")"
mkdir -p publish-x && cp "$2/published.json" publish-x/manifest.json
"""


def write_flywheel(
    root: Path,
    rows: int = 60,
    steps: int = 2,
    hold: bool = False,
    route: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Log, distillation, script and the flywheel's configuration; returns its file."""
    root.mkdir(parents=True, exist_ok=True)
    write_logs(root / "logs", rows, per_segment=30)
    for unfinished in (root / "logs").glob("*.open.jsonl"):
        unfinished.unlink()
    (root / "distill.yaml").write_text(json.dumps(config_of(root)))
    (root / "pipeline.sh").write_text(SCRIPT)
    if hold:
        (root / "hold").touch()
    published = Manifest(stage="publish", key="k", notes={"ref": "support-student:1"})
    (root / "published.json").write_text(published.model_dump_json())
    hook = f"echo {{route}} {{ref}} >> {shlex.quote(str(root / 'hooked'))}"
    config: dict[str, Any] = {
        "dir": str(root / "flywheel"),
        "poll_s": 0.1,
        "grace_s": 5,
        "routes": {
            "support": {
                "distill": str(root / "distill.yaml"),
                "triggers": {"rows": 50},
                "min_rows": 0,
                "cooldown_h": 0,
                "command": ["/bin/sh", str(root / "pipeline.sh"), "{workdir}", str(root), str(steps)],
                "on_published": ["/bin/sh", "-c", hook],
            }
            | (route or {})
        },
        "budget": {"nice": 0},
    }
    file = root / "flywheel.yaml"
    file.write_text(json.dumps(config | changes))
    return file
