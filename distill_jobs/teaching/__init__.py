"""What teachers write: text, top-k or sampled distributions, hidden states, from a model here or behind a
URL.

The stage itself is `distill_jobs/teach.py`. Nothing here knows students.
"""
