"""LoRA students on one real engine, whose base is quantized (W4A16): each test shares that engine."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.adapters.make import RANK, make_adapter
from contracts.errors import EngineError
from contracts.model import AdapterBase
from contracts.traffic import Upstream
from distill_jobs.quantizing.dequantize import dequantized
from distill_jobs.training.method_config import FakeQuantConfig
from distill_jobs.training.packed import pack_checkpoint
from registry.adapter import write_base
from registry.digest import digest_folder
from serve.engine.adapters import Guest, effect, load, served, unload
from serve.engine.config import EngineOptions
from serve.engine.lora import LoraOptions
from serve.engine.process import VllmProcess
from serve.state.tables import open_state
from serve.state.traffic import TrafficState
from tests.integration.router_rig import World, get, post

pytestmark = pytest.mark.integration

MODEL = Path(__file__).resolve().parents[2] / "demo" / "models" / "student-base"
IDS = list(range(20, 84))


class Place(NamedTuple):
    """A running engine and adapters of its base that are on no engine yet."""

    engine: VllmProcess
    base: Path
    adapters: dict[str, Path]

    @property
    def url(self) -> str:
        return self.engine.url


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One engine of a W4A16 base with room for two adapters in a batch, and three adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    base = folder / "w4a16"
    pack_checkpoint(MODEL, base, FakeQuantConfig(group_size=32))
    said = AdapterBase(ref="w4a16", digest=digest_folder(base), rank=RANK)
    adapters = {name: make_adapter(MODEL, folder / name, seed) for seed, name in enumerate("abc")}
    for adapter in adapters.values():
        write_base(adapter, said)
    options = EngineOptions(
        max_model_len=512,
        kv_cache_bytes=64 << 20,
        dtype="bfloat16",
        enforce_eager=True,
        lora=LoraOptions(max_loras=2, max_lora_rank=RANK),
    )
    engine = VllmProcess(str(base), "base", options, "127.0.0.1", folder / "engine.log")
    try:
        engine.start()
        engine.wait_ready()
        yield Place(engine, base, adapters)
    finally:
        engine.stop()


def body(model: str, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "What does the ticket of Ada Byron say about her last invoice?"}
    return {"model": model, "messages": [message], "max_tokens": 12, "temperature": 0, **more}


def scores(url: str, model: str) -> torch.Tensor:
    """Log-probabilities of IDS[1:] by the engine."""
    asked = {"model": model, "prompt": IDS, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    status, answer, _ = post(f"{url}/v1/completions", asked)
    assert status == 200, answer
    found = answer["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor([one[str(i)]["logprob"] for one, i in zip(found, IDS[1:], strict=True)])


def whose(url: str, model: str, truth: dict[str, torch.Tensor]) -> str:
    """Whose weights answered: the name whose log-probabilities are nearest, whatever the batch rounded."""
    found = scores(url, model)
    return min(truth, key=lambda name: float((found - truth[name]).abs().mean()))


def offline(base: Path, adapter: Path | None) -> torch.Tensor:
    """The same in fp32 by transformers and peft, on the weights that the artifact's codes stand for."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    weights = {name: one.float() for name, one in dequantized(base).items()}
    model.load_state_dict(weights, strict=False)
    assert set(weights) <= set(model.state_dict())
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def test_an_adapter_on_a_quantized_base_has_its_whole_effect(place: Place) -> None:
    """vLLM runs LoRA on int4 without a word whether it does anything: for base and adapters its
    log-probabilities are those of the dequantized base plus the adapter, each far from the other two's."""
    for name in "ab":
        load(place.url, name, place.adapters[name])
    truth = {"base": offline(place.base, None)} | {n: offline(place.base, place.adapters[n]) for n in "ab"}
    for name, expected in truth.items():
        found = scores(place.url, name)
        off = (found - expected).abs().mean()
        others = [(found - one).abs().mean() for other, one in truth.items() if other != name]
        assert off < 0.1 * min(others), (name, off, others)


def test_a_canary_between_two_adapters_needs_no_new_engine(place: Place, tmp_path: Path) -> None:
    """Two arms share the engine's URL under two names; the router gives each request to one of them, and
    clients cannot reach the paths that load and unload."""
    for name in "ab":
        load(place.url, name, place.adapters[name])
    truth = {name: scores(place.url, name) for name in ("a", "b", "base")}
    world = World(tmp_path)
    try:
        arms = {n: Upstream(name=n, model=n, url=place.url) for n in "ab"}
        world.split(1, weight=0.5, stable=arms["a"], canary=arms["b"])
        router = world.router()
        seen = {whose(router.url, "support", truth) for _ in range(24)}  # one arm alone: 2 in 16 million
        assert seen == {"a", "b"}
        for verb in ("load", "unload"):
            sent = {"lora_name": "a", "lora_path": str(place.adapters["a"])}
            assert post(f"{router.url}/v1/{verb}_lora_adapter", sent)[0] == 404
        assert set(served(place.url).adapters) >= {"a", "b"}
    finally:
        world.close()


def test_hot_loads_under_load_fail_no_request_and_leave_the_base_plain(place: Place) -> None:
    """Adapters come and go while others answer, one more than a batch has slots for; every answer is 200 and
    whole, and beside them the base's are the base's (vLLM on CPU answered as the last slot's adapter)."""
    for name in "ab":
        load(place.url, name, place.adapters[name])
    truth = {"base": offline(place.base, None)} | {n: offline(place.base, place.adapters[n]) for n in "abc"}
    stop = threading.Event()

    def client(name: str) -> int:
        answered = 0
        while not stop.is_set() or answered < 4:
            status, answer, _ = post(f"{place.url}/v1/chat/completions", body(name, ignore_eos=True))
            assert (status, answer["usage"]["completion_tokens"]) == (200, 12)
            answered += 1
        return answered

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, name) for name in "abab"]
        try:
            for number in range(4):
                load(place.url, f"c{number}", place.adapters["c"])
                assert whose(place.url, f"c{number}", truth) == "c"
                assert whose(place.url, "base", truth) == "base"
                unload(place.url, f"c{number}")
        finally:
            stop.set()
        assert all(one.result() >= 4 for one in clients)


def test_an_adapter_of_another_shape_is_refused_and_the_engine_lives(place: Place, tmp_path: Path) -> None:
    """One trained on a wider base: vLLM's reason, no name left, and the others answer as before."""
    from tests.integration.pipeline_world import write_model

    write_model(tmp_path / "wide", hidden=512, layers=2, seed=0)
    with pytest.raises(EngineError, match="did not load adapter 'x'"):
        load(place.url, "x", make_adapter(tmp_path / "wide", tmp_path / "x", 0))
    assert "x" not in served(place.url).adapters
    load(place.url, "a", place.adapters["a"])
    assert effect(place.url, "a") > 0.1


def test_an_unloaded_adapter_finishes_what_it_has(place: Place) -> None:
    """Its stream, begun before, goes on to the last token; the next request for it is a 404."""
    load(place.url, "c", place.adapters["c"])
    long = body("c", max_tokens=200, ignore_eos=True, stream=True, stream_options={"include_usage": True})
    request = urllib.request.Request(
        f"{place.url}/v1/chat/completions", json.dumps(long).encode(), {"content-type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as reply:
        reply.readline()
        unload(place.url, "c")
        lines = [line.decode().removeprefix("data: ").strip() for line in reply if line.strip()]
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["usage"]["completion_tokens"] == 200
    assert post(f"{place.url}/v1/chat/completions", body("c"))[0] == 404


def test_a_guest_finds_its_base_by_the_engines_own_word(place: Place, tmp_path: Path) -> None:
    """What keeps an adapter on its engine: loaded, registered, answered, and unloaded when it leaves."""
    traffic = TrafficState(open_state(f"sqlite:///{tmp_path}/state.db"))
    traffic.put_endpoint("base", "r1", place.url, place.engine.pid)
    guest = Guest(traffic, "guest-v1", "guest-v1", place.adapters["c"])
    assert guest.visit() == 1, guest.why()
    assert [e.url for e in traffic.endpoints()["guest-v1"]] == [place.url]
    truth = {"base": scores(place.url, "base"), "c": offline(place.base, place.adapters["c"])}
    assert whose(place.url, "guest-v1", truth) == "c"
    guest.leave()
    guest.unload()
    assert "guest-v1" not in served(place.url).adapters
    assert get(f"{place.url}/health")[0] == 200
