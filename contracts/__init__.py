"""The nouns of Stillhouse: pydantic models and enums that cross a process or stage boundary.

Imports nobody else in this repository and no torch, ray, vllm or transformers.
"""
