"""New training samples that the teacher writes: variants of requests, and the steps behind answers.

The stage itself is `distill_jobs/augment.py`. Nothing here knows tokens or students.
"""
