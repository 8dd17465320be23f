"""The request log: one JSON row a request, written off the hot path into crash-safe segments.

Knows rows (contracts.traffic) and nothing about routing: what it is given is a draft that can build its row.
"""

from serve.request_log.keeper import Keeper
from serve.request_log.log import Draft, LogHooks, RequestLog
from serve.request_log.segments import SegmentWriter, recover

__all__ = ["Draft", "Keeper", "LogHooks", "RequestLog", "SegmentWriter", "recover"]
