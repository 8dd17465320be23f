"""Grading of answers: pure graders, the words judges are asked with, and how well judges agree with people.

Knows grading nouns (contracts.grading) and nothing about routers, rollouts or HTTP.
"""
