"""A rollout's report: what was decided and why, the evidence over time, and what both arms answered.

`gather` reads the state store and the request log into one `Report`; `page`, `markdown` and JSON say the same
facts. Knows nothing about terminals, and decides nothing.
"""
