"""The data plane: an ASGI application that assigns every request to an arm and streams the upstream's bytes.

Knows splits, endpoints and request logs; knows nothing about rollouts, statistics or how models are made.
"""
