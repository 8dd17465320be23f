"""Speculative decoding in vLLM: the same greedy tokens, the same distribution, counted acceptance."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from scipy.stats import chi2
from transformers import AutoModelForCausalLM

from contracts.speculative import Speculative
from serve.engine.config import EngineOptions
from serve.tuning.engines import MODEL, drafted, running
from tests.integration.pipeline_world import write_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
FIRST, MOST = 8, 12
"""Likeliest first tokens, and second ones after each, that are counted apart."""
ALPHA = 1e-6


class Pair(NamedTuple):
    """A plain engine and one that drafts, of the same model."""

    plain: str
    drafting: str


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A random model that is sure enough to be drafted for, and its own first block as the draft, which is
    often right and often wrong."""
    at = tmp_path_factory.mktemp("speculative")
    write_model(at / "model", hidden=128, layers=2, seed=3)
    model = AutoModelForCausalLM.from_pretrained(at / "model", dtype=torch.float32)
    model.config.tie_word_embeddings = False
    head = model.lm_head.weight
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():  # the embedding says more than the blocks add, and few tokens are likely
        model.model.embed_tokens.weight = torch.nn.Parameter(10 * head.detach().clone())
        model.lm_head.weight = torch.nn.Parameter(0.22 * torch.randn(head.shape, generator=draw))
    model.save_pretrained(at / "model")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.config.layer_types = model.config.layer_types[:1]
    model.save_pretrained(at / "draft")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (at / "model" / name).exists():
            (at / "draft" / name).write_bytes((at / "model" / name).read_bytes())
    options = EngineOptions(
        max_model_len=128, kv_cache_bytes=2**26, dtype="float32", enforce_eager=True, max_num_seqs=128
    )
    way = Speculative(draft=str(at / "draft"), tokens=3, sampling="probabilistic")
    with ExitStack() as ends:
        yield Pair(
            ends.enter_context(running(str(at / "model"), options, at / "plain.log")),
            ends.enter_context(
                running(
                    str(at / "model"), options.model_copy(update={"speculative": way}), at / "drafting.log"
                )
            ),
        )


def ask(url: str, **body: Any) -> list[dict[str, Any]]:
    """The choices of one completion."""
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps({"model": MODEL, "return_token_ids": True, **body}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        found: list[dict[str, Any]] = json.loads(reply.read())["choices"]
    return found


def prompts(count: int) -> list[list[int]]:
    """Random token ids."""
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 250, (6 + n,), generator=draw).tolist() for n in range(count)]


def test_greedy_tokens_are_those_of_plain_decoding(pair: Pair) -> None:
    """Token by token over several prompts, with proposals kept and proposals refused on the way; and what was
    kept is what vLLM's own counters say."""
    before = drafted(pair.drafting)
    for ids in prompts(8):
        answers = [
            ask(url, prompt=ids, temperature=0, max_tokens=24, ignore_eos=True)[0]["token_ids"]
            for url in pair
        ]
        assert len(answers[0]) == 24
        assert answers[0] == answers[1]
    counted = {name: value - before[name] for name, value in drafted(pair.drafting).items()}
    assert 0 < counted["accepted_tokens"] < counted["draft_tokens"]
    assert counted["drafts"] + counted["accepted_tokens"] >= 8 * 23
    assert drafted(pair.plain) == {}


def likeliest(url: str, ids: list[int], count: int) -> dict[int, float]:
    """The plain engine's own probabilities of the next token, the likeliest ones."""
    found = ask(
        url, prompt=ids, temperature=1, max_tokens=1, logprobs=20, return_tokens_as_token_ids=True, seed=0
    )[0]["logprobs"]["top_logprobs"][0]
    ranked = sorted(found.items(), key=lambda item: -item[1])[:count]
    return {int(name.removeprefix("token_id:")): float(torch.tensor(p).exp()) for name, p in ranked}


def test_the_distribution_of_sampled_tokens_is_the_models(pair: Pair) -> None:
    """Pairs of first tokens, the second of which a draft proposed, come as often as plain decoding's exact
    probabilities say (Pearson's chi-square), while the draft is kept and refused. Draws have seeds."""
    ids = prompts(1)[0]
    exact: dict[tuple[int, int], float] = {}
    for first, p in likeliest(pair.plain, ids, FIRST).items():
        for second, q in likeliest(pair.plain, [*ids, first], MOST).items():
            exact[first, second] = p * q
    before = drafted(pair.drafting)
    drawn: Counter[tuple[int, int]] = Counter()
    for seed in range(24):
        choices = ask(
            pair.drafting, prompt=ids, temperature=1, max_tokens=5, n=100, seed=1000 * seed, ignore_eos=True
        )
        drawn.update((c["token_ids"][0], c["token_ids"][1]) for c in choices)
    counted = {name: value - before[name] for name, value in drafted(pair.drafting).items()}
    assert 0.05 < counted["accepted_tokens"] / counted["draft_tokens"] < 0.98
    total = sum(drawn.values())
    assert total == 2400
    cells = [pair for pair, p in exact.items() if p * total >= 5]
    rest = 1 - sum(exact[cell] for cell in cells)
    seen = [drawn[cell] for cell in cells]
    expected = [exact[cell] * total for cell in cells]
    assert len(cells) >= 5
    if rest * total >= 5:
        seen, expected = [*seen, total - sum(seen)], [*expected, rest * total]
    distance = sum((a - b) ** 2 / b for a, b in zip(seen, expected, strict=True))
    assert chi2.sf(distance, len(seen) - 1) > ALPHA, (distance, len(seen))
