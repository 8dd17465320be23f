"""The request log on S3: a real API (moto's server), the real client library, real router processes."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from contracts.errors import ConfigError
from serve.request_log import Keeper
from serve.request_log.erase import Erased, erase
from serve.request_log.remote import Remote
from serve.request_log.segments import final_segments
from tests.integration.held_port import held_port
from tests.integration.router_rig import World, get, post, total, wait_until
from tests.integration.test_router_feedback import _erase as erase_by_command
from tests.integration.test_router_feedback import ask, judge
from tests.unit.test_log_erase import conversation, line
from tests.unit.test_log_keeper import segment

pytestmark = pytest.mark.integration
KEY_ID, SECRET = "AKIA" + "IOSFODNN7EXAMPLE", "wJalrXUtnFEMI/" + "K7MDENG"
URL = "s3://logs/team/a"
START_S = 60.0
"""Longest wait for moto to listen."""


class S3:
    """An S3 server that can go away and come back with what it holds."""

    def __init__(self) -> None:
        self.port = held_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: ThreadedMotoServer | None = None
        self.up()

    def up(self) -> None:
        """Answer."""
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        # Its start() waits for ever when its own thread ended, as it does when it cannot listen.
        starting = threading.Thread(target=server.start, daemon=True)
        starting.start()
        starting.join(START_S)
        assert not starting.is_alive(), f"moto does not listen on {self.url} after {START_S:.0f} s"
        self._server = server

    def away(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.stop()
        self._server = None

    def forget(self) -> None:
        """Lose everything. Moto keeps it in this process, so it would outlive the server and its test."""
        assert post(f"{self.url}/moto-api/reset", {})[0] == 200

    def client(self) -> Any:
        """Amazon's own client, to look from outside."""
        return boto3.client("s3", endpoint_url=self.url)

    def objects(self) -> dict[str, bytes]:
        """Every object of the bucket by its key."""
        client = self.client()
        found = client.list_objects_v2(Bucket="logs").get("Contents", [])
        return {o["Key"]: client.get_object(Bucket="logs", Key=o["Key"])["Body"].read() for o in found}

    def rows(self) -> list[dict[str, Any]]:
        """Every line of every object."""
        return [json.loads(row) for _, data in sorted(self.objects().items()) for row in data.splitlines()]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A server with the empty bucket `logs`; credentials and endpoint are in the environment, only there."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = S3()
    server.forget()  # first, not last: a test that failed may have left no server to ask
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    s3fs.S3FileSystem.clear_instance_cache()  # kept by options, whatever the environment says
    server.client().create_bucket(Bucket="logs")
    yield server
    server.away()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("keep_local", [True, False])
def test_segments_arrive_below_the_prefix_and_expire_there(s3: S3, tmp_path: Path, keep_local: bool) -> None:
    """Whole objects under their names; those older than the retention go, strangers' objects stay."""
    s3.client().put_object(
        Bucket="logs", Key="team/b/requests-20200101T000000.000000Z-h-1-ab.jsonl", Body=b"b"
    )
    s3.client().put_object(Bucket="logs", Key="team/a/notes.txt", Body=b"n")
    old = segment(tmp_path, 8, data=b"old\n")
    first = Keeper(tmp_path, Remote(URL), keep_local)
    first.tick()
    first._lock.give_back()
    assert s3.objects()[f"team/a/{old.name}"] == b"old\n"
    young = segment(tmp_path, 1, "feedback", data="jung ключ 🔑\n".encode())
    assert Keeper(tmp_path, Remote(URL), keep_local, retention_days=7).tick()
    assert s3.objects() == {
        "team/a/notes.txt": b"n",
        f"team/a/{young.name}": "jung ключ 🔑\n".encode(),
        "team/b/requests-20200101T000000.000000Z-h-1-ab.jsonl": b"b",
    }
    assert final_segments(tmp_path) == ([young] if keep_local else [])


def test_an_erasure_rewrites_the_objects_that_hold_the_rows(s3: S3, tmp_path: Path) -> None:
    """Rows of the conversation are gone from S3, all others are there, other objects are not rewritten."""
    remote = Remote(URL)
    names = [segment(tmp_path, days).name for days in (3, 2, 1)]
    remote.write(names[0], line(1, "c1") + line(2, "c2"))
    remote.write(names[1], line(3, "c2"))
    remote.write(names[2], line(4, "c1"))
    before = s3.client().head_object(Bucket="logs", Key=f"team/a/{names[1]}")["LastModified"]
    time.sleep(1.1)  # S3 knows whole seconds
    assert erase(tmp_path, remote, conversation("c1")) == Erased(remote=2)
    assert [row["request"]["n"] for row in s3.rows()] == [2, 3]
    assert s3.client().head_object(Bucket="logs", Key=f"team/a/{names[1]}")["LastModified"] == before
    assert s3.objects()[f"team/a/{names[2]}"] == b""
    assert erase(tmp_path, remote, conversation("c1")) == Erased()


def test_a_bucket_that_is_not_there_is_not_made(
    s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong name is an error that is told and tried again; nothing local is removed, no bucket appears."""
    path = segment(tmp_path)
    results: list[bool] = []
    with caplog.at_level(logging.ERROR, "stillhouse.request_log"):
        Keeper(tmp_path, Remote("s3://lgos/team/a"), keep_local=False, uploaded=results.append).tick()
    assert (results, final_segments(tmp_path)) == ([False], [path])
    assert "s3://lgos/team/a" in caplog.text
    assert [b["Name"] for b in s3.client().list_buckets()["Buckets"]] == ["logs"]


def test_the_endpoint_may_be_an_option_of_fsspec(
    s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """FSSPEC_S3_ENDPOINT_URL is read too: the way that every protocol of fsspec has."""
    import fsspec

    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", s3.url)
    monkeypatch.setattr(fsspec.config, "conf", {})
    fsspec.config.set_conf_env(fsspec.config.conf)  # what the package does when it is imported
    path = segment(tmp_path)
    Keeper(tmp_path, Remote(URL)).tick()
    assert list(s3.objects()) == [f"team/a/{path.name}"]


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    """The URL stands in log lines and error messages; credentials have no place in it."""
    for url in (f"s3://{KEY_ID}:{SECRET}@logs/a", "sftp://me:pa/ss@host/x", "ftp://me:@host/x"):
        with pytest.raises(ConfigError, match="holds a password") as refused:
            Remote(url)
        assert SECRET not in str(refused.value)
        assert KEY_ID not in str(refused.value)
    assert Remote("memory://host:22/a@b").names() == []


@pytest.mark.parametrize("keep_local", [True, False])
def test_no_row_is_lost_while_s3_is_away(
    s3: S3, tmp_path: Path, keep_local: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """S3 goes and comes back under a running router: no request notices, every row arrives exactly once, then
    the command erases a user there; no credential is in any output, metric or file.
    """
    world = World(tmp_path)
    try:
        world.split(1)
        log = {"dir": str(tmp_path / "log"), "rotate_s": 0.3, "upload": URL, "keep_local": keep_local}
        router = world.router(log=log)
        sent = [ask(router, f"early {i}") for i in range(5)]
        wait_until("the first rows are there", lambda: len(s3.rows()) == 5)
        s3.away()
        sent += [ask(router, f"meanwhile {i}") for i in range(20)]
        wait_until("an upload failed", lambda: _uploads(router.url, "error") > 0)
        s3.up()
        by_bob = post(
            f"{router.url}/v1/chat/completions",
            {"model": "support", "messages": [{"role": "user", "content": "y"}], "user": "bob"},
        )[2]["x-request-id"]
        assert judge(router, by_bob, good=True)[0] == 200
        wait_until("all rows and the judgement are there", lambda: len(s3.rows()) == 27)
        scrape = get(f"{router.url}/metrics")[1]
        erase_by_command(world, log, "--user", "ann")
        router.stop()
        assert sorted(r["request_id"] for r in s3.rows()) == [by_bob, by_bob]
        local = [
            json.loads(row) for f in (tmp_path / "log").glob("*.jsonl") for row in f.read_text().splitlines()
        ]
        assert [r["request_id"] for r in local] == ([by_bob, by_bob] if keep_local else [])
    finally:
        world.close()
    said = [scrape, *capfd.readouterr(), *(f.read_text("utf-8", "replace") for f in _texts(tmp_path))]
    assert "could not be uploaded to s3://logs/team/a" in "".join(said)
    assert not [text for text in said if KEY_ID in text or SECRET in text]
    assert len(sent) == 25


def _uploads(url: str, result: str) -> float:
    return total(get(f"{url}/metrics")[1], "stillhouse_log_uploads_total", result=result)


def _texts(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.is_file()]
