"""The registry's contract, run by the in-memory fake and by real MLflow on SQLite."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from contracts.errors import ConfigError, DataError, NotFoundError
from contracts.model import Artifact, EvalReport, Lineage, ModelRecord
from registry.digest import bytes_of, digest_folder
from registry.fake import FakeRegistry
from registry.mlflow_store import MlflowRegistry, sqlite_uri
from registry.store import Registry

CARD = "---\nlicense: other\n---\n\n# A student, 学生\n"
REPO = Path(__file__).resolve().parents[2]


def make_artifact(folder: Path, content: str) -> Path:
    """A folder with two files and a sub-folder."""
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "sub" / "config.json").write_text("{}")
    return folder


def make_record(folder: Path, name: str = "support") -> ModelRecord:
    """A record whose digest is the folder's."""
    return ModelRecord(
        name=name,
        artifact=Artifact(
            uri=str(folder), digest=digest_folder(folder), precision="bf16", bytes=bytes_of(folder), params=7
        ),
        evaluation=EvalReport(
            metrics={"student.accuracy": 0.5, "missing": None},
            samples=2,
            dataset_digest="d",
            engine="none",
            gates={"results": []},
        ),
        lineage=Lineage(teacher="t", manifests={"collect": "k1"}, log_from=1.0),
        created_at=12.0,
    )


def make_mlflow(tmp: Path) -> MlflowRegistry:
    """Real MLflow on a SQLite file."""
    return MlflowRegistry(sqlite_uri(tmp / "registry.db"), cache_dir=tmp / "cache")


@pytest.fixture(scope="module")
def mlflow_registry(tmp_path_factory: pytest.TempPathFactory) -> MlflowRegistry:
    """One database for the module: MLflow takes seconds to make its schema."""
    return make_mlflow(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(params=["fake", "mlflow"])
def registry(request: pytest.FixtureRequest) -> Registry:
    """Each implementation in turn; tests use model names of their own."""
    if request.param == "fake":
        return FakeRegistry()
    made: MlflowRegistry = request.getfixturevalue("mlflow_registry")
    return made


@pytest.fixture
def publish(
    registry: Registry, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[str], ModelRecord]:
    """Publish a folder of the given content under a name that only this test uses."""
    name = request.node.originalname

    def run(content: str) -> ModelRecord:
        folder = tmp_path / content
        if not folder.exists():
            make_artifact(folder, content)
        return registry.publish(make_record(folder, name), folder, CARD)

    return run


def test_publish_numbers_versions_and_keeps_the_record(
    registry: Registry, publish: Callable[..., ModelRecord]
) -> None:
    """Versions count from 1 and everything but version and uri comes back as it went in."""
    first, second = publish("a"), publish("b")
    assert (first.version, second.version) == (1, 2)
    assert first.evaluation is not None
    assert first.evaluation.metrics == {
        "student.accuracy": 0.5,
        "missing": None,
    }
    assert first.lineage.manifests == {"collect": "k1"}
    assert registry.history(first.name) == [first, second]
    assert first.name in registry.list_models()


def test_publishing_a_digest_twice_returns_its_version(
    registry: Registry, publish: Callable[..., ModelRecord]
) -> None:
    """A publish stage that is killed and run again does not make a second version."""
    first = publish("a")
    publish("b")
    assert publish("a") == first
    assert [r.version for r in registry.history(first.name)] == [1, 2]


def test_get_takes_version_alias_and_latest(registry: Registry, publish: Callable[..., ModelRecord]) -> None:
    """The three forms of a reference mean what they say."""
    first, second = publish("a"), publish("b")
    name = first.name
    registry.set_alias(name, "champion", 1, by="test", reason="first")
    assert registry.get(f"{name}:1") == first
    assert registry.get(name) == second
    assert registry.get(f"{name}@champion") == first


def test_unknown_references_say_what_exists(registry: Registry, publish: Callable[..., ModelRecord]) -> None:
    """A wrong version, alias or name is answered with the right ones."""
    name = publish("a").name
    with pytest.raises(NotFoundError, match=r"versions \[1\]"):
        registry.get(f"{name}:9")
    with pytest.raises(NotFoundError, match="no alias 'champion'"):
        registry.get(f"{name}@champion")
    with pytest.raises(NotFoundError, match="no model 'nobody'"):
        registry.get("nobody")
    with pytest.raises(ConfigError, match="name:3"):
        registry.get("a b")


def test_alias_moves_leave_events(registry: Registry, publish: Callable[..., ModelRecord]) -> None:
    """Promotion, rollback and removal are three events in order, each with what it replaced."""
    name = publish("a").name
    publish("b")
    registry.set_alias(name, "champion", 1, by="ann", reason="first")
    registry.set_alias(name, "champion", 2, by="rollout", reason="promoted")
    registry.set_alias(name, "champion", 2, by="rollout", reason="again after a crash")
    registry.set_alias(name, "champion", 1, by="rollout", reason="rolled back")
    assert registry.aliases(name) == {"champion": 1}
    registry.set_alias(name, "champion", None, by="ann", reason="retired")
    events = registry.alias_events(name)
    assert [(e.version, e.previous) for e in events] == [(1, None), (2, 1), (1, 2), (None, 1)]
    assert [e.reason for e in events] == ["first", "promoted", "rolled back", "retired"]
    assert registry.aliases(name) == {}
    assert len(registry.set_alias(name, "champion", 1, by="ann", reason="r" * 9_000).reason) == 2_000


def test_alias_to_a_missing_version_is_refused(
    registry: Registry, publish: Callable[..., ModelRecord]
) -> None:
    """An alias never points at nothing, and its name never looks like a version."""
    name = publish("a").name
    with pytest.raises(NotFoundError, match="no version 5"):
        registry.set_alias(name, "champion", 5, by="t", reason="r")
    with pytest.raises(ConfigError, match="not an alias"):
        registry.set_alias(name, "v1", 1, by="t", reason="r")
    assert registry.alias_events(name) == []


def test_download_verifies_the_files(
    registry: Registry, publish: Callable[..., ModelRecord], tmp_path: Path
) -> None:
    """A download has the record's digest; a damaged artifact is an error, not a model."""
    record = publish("a")
    copy = registry.download(record.ref, tmp_path / "copy")
    assert digest_folder(copy) == record.artifact.digest
    stored = Path(record.artifact.uri)
    (stored / "model.safetensors").write_text("damaged")
    with pytest.raises(DataError, match="digest"):
        registry.download(record.ref)


def test_a_record_for_another_folder_is_refused(registry: Registry, tmp_path: Path) -> None:
    """What is published is what was evaluated: the digest must be the folder's."""
    folder = make_artifact(tmp_path / "x", "x")
    record = make_record(folder, "refused")
    (folder / "model.safetensors").write_text("changed after evaluation")
    with pytest.raises(DataError, match="digest"):
        registry.publish(record, folder, CARD)


def test_a_version_has_its_card(registry: Registry, publish: Callable[..., ModelRecord]) -> None:
    """Beside the artifact, by every form of a reference; the digest is the artifact's alone."""
    first = publish("a")
    registry.set_alias(first.name, "champion", 1, by="t", reason="r")
    assert registry.card(first.ref) == registry.card(f"{first.name}@champion") == CARD
    assert digest_folder(registry.download(first.ref)) == first.artifact.digest


def test_a_student_without_a_card_is_refused(registry: Registry, tmp_path: Path) -> None:
    """What the pipeline made needs one, and no version is made; what somebody else made may have none."""
    folder = make_artifact(tmp_path / "x", "no card")
    record = make_record(folder, f"cardless-{type(registry).__name__}")
    for card in (None, "", "  \n"):
        with pytest.raises(DataError, match="no model card"):
            registry.publish(record, folder, card)
    assert record.name not in registry.list_models()
    others = record.model_copy(update={"lineage": Lineage(base_model="b")})
    published = registry.publish(others, folder)
    with pytest.raises(NotFoundError, match=f"{record.name}:1 has no model card"):
        registry.card(published.ref)


def test_mlflow_refuses_an_edited_card(tmp_path: Path, mlflow_registry: MlflowRegistry) -> None:
    """A card is as immutable as its version: one that somebody improves by hand is found out."""
    folder = make_artifact(tmp_path / "x", "card")
    published = mlflow_registry.publish(make_record(folder, "edited-card"), folder, CARD)
    (Path(published.artifact.uri).parent / "MODEL_CARD.md").write_text(CARD + "It is perfect.\n")
    with pytest.raises(DataError, match="changed after it was published"):
        mlflow_registry.card(published.ref)


def test_mlflow_refuses_an_edited_record(tmp_path: Path, mlflow_registry: MlflowRegistry) -> None:
    """Somebody who edits a version's tag by hand is found out: records are immutable."""
    folder = make_artifact(tmp_path / "x", "x")
    mlflow_registry.publish(make_record(folder, "edited"), folder, CARD)
    client = mlflow_registry._connect()
    client.set_model_version_tag("edited", "1", "stillhouse.record", "{}")
    with pytest.raises(DataError, match="changed"):
        mlflow_registry.get("edited:1")


def test_mlflow_goes_on_with_a_half_uploaded_run(tmp_path: Path, mlflow_registry: MlflowRegistry) -> None:
    """SIGKILL between upload and version: the next publish uses the same run and makes one version."""
    folder = make_artifact(tmp_path / "x", "half")
    record = make_record(folder, "half")
    client = mlflow_registry._connect()
    mlflow_registry._ensure_model(client, record)
    run = mlflow_registry._run_for(client, record)
    client.log_artifacts(run.info.run_id, str(folder / "sub"), "artifact/sub")
    published = mlflow_registry.publish(record, folder, CARD)
    assert run.info.run_id in published.artifact.uri
    assert [r.version for r in mlflow_registry.history("half")] == [1]


_PUBLISH = """
import sys
from pathlib import Path
sys.path[:0] = [{repo!r}]
from tests.contract.test_registry import CARD, make_mlflow, make_record
folder = Path({folder!r})
print(make_mlflow(Path({tmp!r})).publish(make_record(folder, "race"), folder, CARD).version)
"""


def test_two_processes_publish_one_digest_once(tmp_path: Path) -> None:
    """On a fresh SQLite file, two processes at once make the schema and one version between them."""
    folder = make_artifact(tmp_path / "x", "race")
    code = _PUBLISH.format(repo=str(REPO), folder=str(folder), tmp=str(tmp_path))
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], answers
    assert [out.strip() for out, _ in answers] == ["1", "1"]
    assert [r.version for r in make_mlflow(tmp_path).history("race")] == [1]
