"""Engine (vLLM): queues, KV cache, speed and prefix hits of the engines behind the routes, by version.

Engines are vLLM's own servers, so the names are vLLM's (`vllm:*`); the label `upstream` comes with the scrape
(the router's /targets), `model_name` is one version's.
"""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s.dashboards import promql as q
from k8s.dashboards.frame import Section, Variable, dashboard
from k8s.dashboards.panels import ANY_IS_BAD, FULL, TPOT_S, TTFT_S, Panel, Query, Thresholds, lines, number

WHICH = ('upstream=~"$upstream"', 'model_name=~"$model"', 'instance=~"$replica"')


def build() -> Dashboard:
    """The dashboard."""
    return dashboard(
        "stillhouse-engine",
        "vLLM behind the routes: queues, KV cache, TTFT, TPOT, tokens, prefix hits by upstream and replica.",
        (
            Variable("upstream", "Upstream", "label_values(vllm:num_requests_running, upstream)"),
            Variable(
                "model", "Model", 'label_values(vllm:num_requests_running{upstream=~"$upstream"}, model_name)'
            ),
            Variable(
                "replica",
                "Replica",
                'label_values(vllm:num_requests_running{upstream=~"$upstream"}, instance)',
            ),
        ),
        (_now(), _load(), _latency(), _tokens(), _cache()),
    )


def _now() -> Section:
    return Section(
        "Now",
        (
            _sum("Running", "Requests that engines work on.", "vllm:num_requests_running"),
            _sum("Waiting", "Requests that wait inside engines.", "vllm:num_requests_waiting", ANY_IS_BAD),
            number(
                "KV cache",
                "The fullest replica's share of its KV cache in use; near 1 requests are preempted.",
                "percentunit",
                Query(q.largest("vllm:kv_cache_usage_perc", "", *WHICH), "used"),
                thresholds=FULL,
            ),
            number(
                "TTFT p95",
                "Inside the engine: arrival to the first token.",
                "s",
                Query(q.quantile(0.95, "vllm:time_to_first_token_seconds", "", *WHICH), "p95"),
                thresholds=TTFT_S,
            ),
            number(
                "Generated",
                "Tokens a second.",
                "short",
                Query(q.rate("vllm:generation_tokens_total", "", *WHICH), "tokens/s"),
            ),
            number(
                "Replicas",
                "Engines that answer scrapes.",
                "short",
                Query(f"count ({q.select('vllm:num_requests_running', *WHICH)})", "replicas"),
            ),
        ),
        height=4,
    )


def _load() -> Section:
    return Section(
        "Load",
        (
            lines(
                "Running and waiting",
                "Requests inside the engines, by upstream.",
                "short",
                Query(q.total("vllm:num_requests_running", "upstream", *WHICH), "{{upstream}} running"),
                Query(q.total("vllm:num_requests_waiting", "upstream", *WHICH), "{{upstream}} waiting"),
            ),
            lines(
                "KV cache in use",
                "Share of each replica's KV cache.",
                "percentunit",
                Query(
                    q.largest("vllm:kv_cache_usage_perc", "upstream, instance", *WHICH),
                    "{{upstream}} {{instance}}",
                ),
                thresholds=FULL,
                top=1,
            ),
            lines(
                "Preempted",
                "Requests a second put back because the KV cache was full; they are computed again.",
                "reqps",
                Query(q.rate("vllm:num_preemptions_total", "upstream", *WHICH), "{{upstream}}"),
                thresholds=ANY_IS_BAD,
            ),
        ),
    )


def _latency() -> Section:
    return Section(
        "Latency inside the engine, p50 / p95 / p99",
        (
            _quantiles("TTFT", "Arrival to the first token.", "vllm:time_to_first_token_seconds", TTFT_S),
            _quantiles(
                "TPOT",
                "Time per output token. vLLM's first bucket ends at 10 ms; the Route dashboard is finer.",
                "vllm:request_time_per_output_token_seconds",
                TPOT_S,
            ),
            _quantiles(
                "Queue",
                "Waiting before a request is first computed. vLLM's first bucket ends at 0.3 s.",
                "vllm:request_queue_time_seconds",
                TTFT_S,
            ),
            lines(
                "Where the time goes",
                "Mean seconds of a finished request: waiting, prefill, decode.",
                "s",
                *(
                    Query(q.mean(f"vllm:request_{part}_time_seconds", "", *WHICH), part)
                    for part in ("queue", "prefill", "decode")
                ),
                width=12,
                stacked=True,
            ),
            lines(
                "Whole request",
                "Arrival to the last token.",
                "s",
                *(
                    Query(q.quantile(p, "vllm:e2e_request_latency_seconds", "upstream", *WHICH), _named(p))
                    for p in q.QUANTILES
                ),
                width=12,
            ),
        ),
    )


def _tokens() -> Section:
    return Section(
        "Tokens and requests",
        (
            lines(
                "Tokens",
                "Tokens a second: prompts read and answers generated.",
                "short",
                Query(q.rate("vllm:prompt_tokens_total", "upstream", *WHICH), "{{upstream}} prompt"),
                Query(q.rate("vllm:generation_tokens_total", "upstream", *WHICH), "{{upstream}} generated"),
            ),
            lines(
                "How requests ended",
                "Requests a second by finish reason: stop, length (cut), abort (the client left), error.",
                "reqps",
                Query(
                    q.rate("vllm:request_success_total", "upstream, finished_reason", *WHICH),
                    "{{upstream}} {{finished_reason}}",
                ),
                stacked=True,
            ),
            lines(
                "Tokens a request",
                "Mean length of prompts and answers.",
                "short",
                Query(q.mean("vllm:request_prompt_tokens", "upstream", *WHICH), "{{upstream}} prompt"),
                Query(q.mean("vllm:request_generation_tokens", "upstream", *WHICH), "{{upstream}} answer"),
            ),
        ),
    )


def _cache() -> Section:
    hits = q.rate("vllm:prefix_cache_hits_total", "upstream", *WHICH)
    asked = q.rate("vllm:prefix_cache_queries_total", "upstream", *WHICH)
    return Section(
        "Prefix cache and process",
        (
            lines(
                "Prefix cache hits",
                "Share of prompt tokens that were found in the KV cache.",
                "percentunit",
                Query(q.ratio(hits, asked), "{{upstream}}"),
                top=1,
            ),
            lines(
                "Tokens an engine step",
                "Mean tokens that one step of an engine works on: how well requests are batched.",
                "short",
                Query(q.mean("vllm:iteration_tokens_total", "upstream", *WHICH), "{{upstream}}"),
            ),
            lines(
                "Memory of the API server",
                "Resident memory of each engine's HTTP process (not of the GPU).",
                "bytes",
                Query(
                    q.largest("process_resident_memory_bytes", "upstream, instance", WHICH[0], WHICH[2]),
                    "{{upstream}} {{instance}}",
                ),
            ),
        ),
    )


def _sum(title: str, description: str, metric: str, thresholds: Thresholds = ()) -> Panel:
    return number(
        title, description, "short", Query(q.total(metric, "", *WHICH), title), thresholds=thresholds
    )


def _quantiles(title: str, description: str, metric: str, thresholds: Thresholds) -> Panel:
    series = (Query(q.quantile(p, metric, "upstream", *WHICH), _named(p)) for p in q.QUANTILES)
    return lines(title, description, "s", *series, thresholds=thresholds)


def _named(p: float) -> str:
    return f"{{{{upstream}}}} p{p * 100:g}"
