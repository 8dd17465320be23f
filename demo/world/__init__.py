"""The demo's world: a support desk whose assistant answers with tool calls, and a checkable answer for every
request."""

from demo.world.cases import Case, case, find
from demo.world.grader import grade
from demo.world.splits import SPLITS
from demo.world.tools import TOOLS, canonical, exact_match, schema_ok

__all__ = ["SPLITS", "TOOLS", "Case", "canonical", "case", "exact_match", "find", "grade", "schema_ok"]
