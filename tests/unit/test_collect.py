"""collect: filters, duplicates, the split and the log window, in process (no Ray)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import ConfigError, DataError
from contracts.traffic import RequestRow
from distill_jobs.collect import run
from distill_jobs.collecting.parts import SCHEMA
from distill_jobs.collecting.rows import conversation, normalise, refusal, to_sample
from distill_jobs.collecting.shingles import jaccard, shingles
from distill_jobs.collecting.split import side
from distill_jobs.collecting.unique import drop_exact
from distill_jobs.collecting.window import pin_window, read_segment
from distill_jobs.config import CollectConfig
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from tests.integration.pipeline_world import log_row


def chat(text: str, **more: Any) -> dict[str, Any]:
    """A chat request with one user message."""
    return {"model": "support", "messages": [{"role": "user", "content": text}], **more}


def settings(**changes: Any) -> dict[str, Any]:
    """A collect configuration as a worker gets it."""
    return CollectConfig(log_dir=Path("logs"), **changes).model_dump(mode="json")


def row(**changes: Any) -> RequestRow:
    """A row that nothing is wrong with, but for the changes."""
    return RequestRow.model_validate(
        log_row(1, changes.pop("request", chat("please refund order 4711")), **changes)
    )


def collect(tmp: Path, lines: list[str], **changes: Any) -> tuple[Result, dict[str, list[dict[str, Any]]]]:
    """Run the stage over one segment of the given lines; returns the result and the rows of each split."""
    logs = tmp / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "requests-1.jsonl").write_text("".join(line + "\n" for line in lines))
    config = CollectConfig(log_dir=logs, executor="local", min_rows=1, **changes)
    folder = tmp / "collect"
    folder.mkdir(exist_ok=True)
    window = pin_window(logs, tmp / "window.json")
    result = run(config, window, [], folder, Progress(tmp / "progress.json"))
    return result, {name: pq.read_table(file.path).to_pylist() for name, file in result.outputs.items()}


@pytest.mark.parametrize(
    ("config", "changes", "rule"),
    [
        ({}, {}, None),
        ({}, {"endpoint": "/v1/embeddings"}, "not_chat"),
        ({"route": "sales"}, {}, "other_route"),
        ({"since": 2000.0}, {}, "outside_window"),
        ({"until": 1001.0}, {}, "outside_window"),
        ({"upstreams": ("big",)}, {}, "other_upstream"),
        ({"upstreams": ("teacher",)}, {"arm": "canary"}, "other_upstream"),
        ({"upstreams": ("big",), "other_answers": "relabel"}, {"outcome": "timeout"}, None),
        ({}, {"outcome": "broken_stream"}, "not_ok"),
        ({}, {"finish_reason": "length"}, "not_finished"),
        ({}, {"response_text": ""}, "no_text"),
        ({}, {"response_text": None}, "no_text"),
        ({"max_chars": 50}, {}, "too_long"),
        ({"require_json": True}, {"response_text": "sure!"}, "not_json"),
        ({"drop_failed_grades": True}, {"scores": {"grade": 0.0, "form": 1.0}}, "failed_grade"),
        ({"drop_failed_grades": True}, {"scores": {"form": 0.5}}, None),
        ({}, {"scores": {"grade": 0.0}}, None),
        ({}, {"request": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}}, "not_text"),
    ],
)
def test_each_filter_names_its_rule(
    config: dict[str, Any], changes: dict[str, Any], rule: str | None
) -> None:
    """A dropped row is counted under the first rule that it breaks; a good one under none."""
    assert refusal(row(**changes), settings(**config)) == rule


def test_answers_of_others_are_dropped_from_relabelled_rows() -> None:
    """A student must learn the teacher's text: another upstream's answer never becomes a label."""
    sample = to_sample(row(upstream="student"), settings(upstreams=("teacher",), other_answers="relabel"))
    assert sample["answer"] is None
    assert to_sample(row(), settings(upstreams=("teacher",)))["answer"] == row().response_text


def test_a_whole_response_gives_its_text() -> None:
    """Rows of non-streaming requests may hold only the response body."""
    body = {"choices": [{"message": {"role": "assistant", "content": "[]"}}]}
    assert to_sample(row(response_text=None, response=body), settings())["answer"] == "[]"


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    """OpenAI's list contents count as text only when every part is text."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert conversation({"messages": [{"role": "user", "content": parts}]}) == [
        {"role": "user", "content": "ab"}
    ]
    assert (
        conversation({"messages": [{"role": "user", "content": [*parts, {"type": "input_audio"}]}]}) is None
    )
    assert conversation({"messages": []}) is None


def test_digest_ignores_case_width_and_spaces_but_not_the_system_prompt() -> None:
    """Equal requests are one sample however they are typed; another instruction makes another sample."""
    assert normalise(" Ｒefund\n\tME ") == "refund me"
    digests = [
        to_sample(row(request=request), settings())["sample_digest"]
        for request in (
            chat("Refund  me"),
            chat("refund me"),
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "refund me"}]},
        )
    ]
    assert digests[0] == digests[1] != digests[2]


def test_malformed_lines_are_counted_and_named(tmp_path: Path) -> None:
    """Garbage in a log costs a line, never the job, and the manifest says which lines."""
    good = [json.dumps(log_row(n, chat(f"request number {n} about topic {n * 7919}"))) for n in range(4)]
    lines = [good[0], "{not json", good[1], '{"request_id": "x"}', "", good[2], good[3], "\x00\xff"]
    result, rows = collect(tmp_path, lines, validation=0, calibration=0)
    assert result.counts["malformed"] == 3
    assert json.loads(result.notes["malformed_lines"]) == {"requests-1.jsonl": [2, 4, 8]}
    assert len(rows["train"]) == result.counts["train"] == 4
    assert result.counts["read"] == 7


def test_the_latest_answer_of_equal_requests_stays() -> None:
    """A teacher that was replaced must not speak through old logs; a real answer beats a missing one."""
    samples = [
        {"sample_digest": "d", "answer": "old", "ts": 1.0, "request_id": "a", "corrected": False},
        {"sample_digest": "d", "answer": "new", "ts": 2.0, "request_id": "b", "corrected": False},
        {"sample_digest": "d", "answer": None, "ts": 3.0, "request_id": "c", "corrected": False},
        {"sample_digest": "c", "answer": None, "ts": 3.0, "request_id": "d", "corrected": False},
    ]

    def answers(rows: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
        left = drop_exact(pa.Table.from_pylist(rows, schema=SCHEMA)).to_pylist()
        return [(s["sample_digest"], s["answer"]) for s in left]

    assert answers(samples) == answers(samples[::-1]) == [("c", None), ("d", "new")]
    samples[0]["corrected"] = True
    assert answers(samples) == answers(samples[::-1]) == [("c", None), ("d", "old")]
    assert answers([]) == []


NEAR = [
    "please cancel the order number 1001 that i placed last week, it has not been delivered to my house yet",
    "please cancel the order number 1002 that i placed last week, it has not been delivered to my house yet",
    "what are your opening hours on sunday in the store at the main station, and is there parking close by?",
    "我的包裹上周就应该送到了，但是现在还没有收到，请帮我查询一下物流状态，谢谢你们的帮助和理解",
    "我的包裹上周就应该送到了，但是现在还没有收到，请帮我查询一下物流情况，谢谢你们的帮助和理解",
]


def test_near_duplicates_fall_to_one_a_cluster(tmp_path: Path) -> None:
    """One word changed in a long request is the same training sample twice, in English and in Chinese."""
    result, rows = collect(
        tmp_path,
        [json.dumps(log_row(n, chat(t))) for n, t in enumerate(NEAR)],
        near_duplicates=0.7,
        validation=0,
    )
    assert result.counts["near_duplicate"] == 2
    assert len(rows["train"]) + len(rows["calibration"]) == 3


def test_jaccard_is_exact() -> None:
    """The threshold means Jaccard of character 5-grams: abcdef and abcdeg share 1 of 3."""
    assert jaccard(shingles("abcdef"), shingles("abcdeg")) == pytest.approx(1 / 3)
    assert jaccard(shingles("abc"), shingles("abc")) == 1.0


@pytest.mark.parametrize("as_json", [True, False])
def test_held_out_requests_and_their_near_duplicates_are_dropped(tmp_path: Path, as_json: bool) -> None:
    """What is evaluated on is never trained on, reworded a little or not."""
    held = tmp_path / "held.txt"
    held.write_text(json.dumps({"request": chat(NEAR[0])}) if as_json else NEAR[0])
    result, rows = collect(
        tmp_path,
        [json.dumps(log_row(n, chat(t))) for n, t in enumerate(NEAR)],
        near_duplicates=0.7,
        holdout=(held,),
        validation=0,
    )
    assert result.counts["held_out"] == 2
    left = {s["text"] for split in rows.values() for s in split}
    assert not left & {normalise(NEAR[0]), normalise(NEAR[1])}


def test_a_broken_holdout_file_is_an_error(tmp_path: Path) -> None:
    """A held-out file that cannot be read must not quietly hold out nothing."""
    held = tmp_path / "held.jsonl"
    held.write_text('{"messages": []}')
    with pytest.raises(ConfigError, match="request"):
        collect(tmp_path, [json.dumps(log_row(1, chat("x")))], holdout=(held,))


def test_split_is_a_function_of_the_digest() -> None:
    """More traffic never moves a sample from validation to training, and the shares are what was asked
    for.
    """
    sides = [side(f"digest-{n}", 0.1, 0.2) for n in range(5000)]
    assert sides == [side(f"digest-{n}", 0.1, 0.2) for n in range(5000)]
    assert sides.count("calibration") / 5000 == pytest.approx(0.1, abs=0.02)
    assert sides.count("validation") / 5000 == pytest.approx(0.2, abs=0.02)
    grown = [side(f"digest-{n}", 0.1, 0.0) for n in range(5000)]
    assert grown.count("validation") == 0


def test_no_text_is_in_two_splits(tmp_path: Path) -> None:
    """Every kept text appears once over all splits, and all are accounted for."""
    lines = [
        json.dumps(log_row(n, chat(f"{n % 60} tell me about {n % 60 * 7919} please"))) for n in range(120)
    ]
    result, rows = collect(tmp_path, lines, validation=0.3, calibration=0.3, near_duplicates=None)
    texts = [s["text"] for split in rows.values() for s in split]
    assert len(texts) == len(set(texts)) == 60
    assert result.counts["exact_duplicate"] == 60
    assert all(rows[name] for name in ("train", "calibration", "validation"))


def test_too_few_samples_say_where_they_went(tmp_path: Path) -> None:
    """The error of an empty dataset carries the counts, so that the filter at fault is seen."""
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.jsonl").write_text(json.dumps(log_row(1, chat("x"), outcome="timeout")) + "\n")
    (tmp_path / "c").mkdir()
    config = CollectConfig(log_dir=logs, executor="local")
    with pytest.raises(DataError, match="'not_ok': 1"):
        run(config, pin_window(logs, tmp_path / "w.json"), [], tmp_path / "c", Progress(tmp_path / "p.json"))


def test_the_window_is_fixed_at_the_first_start(tmp_path: Path) -> None:
    """Rows logged after a job started do not change it; a torn tail is not read; a closed segment is
    found.
    """
    logs = tmp_path / "logs"
    logs.mkdir()
    lines = [json.dumps(log_row(n, chat(f"r{n}"))) for n in range(3)]
    opened = logs / "requests-2.open.jsonl"
    opened.write_text(lines[0] + "\n" + lines[1][:50])
    first = pin_window(logs, tmp_path / "window.json")
    assert [(s.name, s.bytes, s.torn) for s in first] == [(opened.name, len(lines[0]) + 1, 1)]
    opened.write_text("\n".join(lines) + "\n")
    opened.rename(logs / "requests-2.jsonl")
    (logs / "requests-3.jsonl").write_text(lines[2] + "\n")
    assert pin_window(logs, tmp_path / "window.json") == first
    assert read_segment(logs, first[0]) == lines[0].encode() + b"\n"


def test_a_segment_closed_after_its_job_was_planned_is_still_read(tmp_path: Path) -> None:
    """Rotation does not wait for collect: the pinned name may be gone when its worker comes to it."""
    logs = tmp_path / "logs"
    logs.mkdir()
    opened = logs / "requests-2.open.jsonl"
    opened.write_text(json.dumps(log_row(1, chat("refund"))) + "\n")
    window = pin_window(logs, tmp_path / "window.json")
    opened.rename(logs / "requests-2.jsonl")
    config = CollectConfig(log_dir=logs, executor="local", min_rows=1, validation=0, calibration=0)
    (tmp_path / "c").mkdir()
    result = run(config, window, [], tmp_path / "c", Progress(tmp_path / "progress.json"))
    assert result.counts["train"] == 1


def test_a_segment_seen_under_both_names_is_read_once(tmp_path: Path) -> None:
    """A folder listed in the middle of a rename must not give every row twice."""
    for name in ("requests-2.open.jsonl", "requests-2.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert [s.name for s in pin_window(tmp_path, tmp_path / "w.json")] == ["requests-2.jsonl"]


def test_a_vanished_segment_is_an_error(tmp_path: Path) -> None:
    """Retention that removed a pinned segment is told, rather than training on less."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    (segment,) = pin_window(tmp_path, tmp_path / "w.json")
    (tmp_path / "a.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match=r"a\.jsonl is gone"):
        read_segment(tmp_path, segment)
    with pytest.raises(DataError, match="no request-log segments"):
        pin_window(tmp_path / "none", tmp_path / "w2.json")


def test_finished_segments_are_not_parsed_again(tmp_path: Path) -> None:
    """A killed collect goes on with the segments that are left: the parts that exist are taken as they
    are.
    """
    lines = [json.dumps(log_row(n, chat(f"request {n} {n * 7919}"))) for n in range(8)]
    collect(tmp_path, lines, validation=0, calibration=0)
    (report,) = (tmp_path / "collect" / "segments").glob("*.json")
    marked = json.loads(report.read_text())
    marked["counts"]["kept_by_first_run"] = 1
    report.write_text(json.dumps(marked))
    result, _ = collect(tmp_path, lines, validation=0, calibration=0)
    assert result.counts["kept_by_first_run"] == 1


def test_rows_without_texts_are_counted_and_redacted_ones_are_used(tmp_path: Path) -> None:
    """A log of metadata says so instead of giving an empty dataset; redacted texts are training data."""
    modes = {"metadata": "question one", "redacted": "question two of [EMAIL]", "full": "question three here"}
    lines = [json.dumps(log_row(n, chat(t), log_mode=m)) for n, (m, t) in enumerate(modes.items())]
    result, rows = collect(tmp_path, lines, validation=0, calibration=0)
    assert result.counts["texts_not_logged"] == 1
    assert {r["text"] for r in rows["train"]} == {"question two of [email]", "question three here"}


@pytest.mark.parametrize("url", ["file://{}", "memory://collect/log"])
def test_a_log_is_read_from_where_it_was_uploaded(tmp_path: Path, url: str) -> None:
    """Any fsspec URL works like a folder: pinned at the first start, checked by digest."""
    import fsspec

    log_dir = url.format(tmp_path / "far")
    data = json.dumps(log_row(1, chat("a question from far away"))).encode() + b"\n"
    with fsspec.open(f"{log_dir}/requests-1.jsonl", "wb", auto_mkdir=True) as file:
        file.write(data)
    config = CollectConfig(log_dir=log_dir, executor="local", min_rows=1, validation=0, calibration=0)
    window = pin_window(config.log_dir, tmp_path / "window.json")
    assert [(s.name, s.bytes) for s in window] == [("requests-1.jsonl", len(data))]
    (tmp_path / "c").mkdir()
    result = run(config, window, [], tmp_path / "c", Progress(tmp_path / "p.json"))
    assert result.counts["train"] == 1
    with pytest.raises(DataError, match="no request-log segments"):
        pin_window(f"{log_dir}/nowhere", tmp_path / "w2.json")
