"""Writes a prometheus.yml, with the rules of this folder, for a stack that `stillhouse up` started.

    python -m k8s.monitoring.local --config configs/stillhouse.yaml --out runs/prometheus
    prometheus --config.file=runs/prometheus/prometheus.yml --web.listen-address=127.0.0.1:9090

Routers and the controller are scraped at the stack's public address, engines where its /targets says. Knows
nothing about what the rules say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from contracts.errors import ConfigError, StillhouseError
from k8s.monitoring.rules import read_groups, write_rules
from serve.config import ServeConfig, load_serve_config


def prometheus_config(
    config: ServeConfig, alertmanager: str | None = None, key_file: Path | None = None
) -> dict[str, Any]:
    """What Prometheus is told.

    Args:
        alertmanager: host:port that alerts are sent to.
        key_file: holds an API key; needed where routers ask for keys.

    Raises: ConfigError without a key file where keys are on: engines would never be found.
    """
    if config.router.keys and key_file is None:
        raise ConfigError(
            "--key-file: router.keys is on, and /targets names engines to holders of a key only. "
            "`stillhouse keys create prometheus --no-routes` prints one; put it into a file of mode 600."
        )
    address = f"{config.http.host}:{config.http.port}"
    discovery: dict[str, Any] = {"url": f"http://{address}/targets", "refresh_interval": "15s"}
    if key_file is not None:
        discovery["authorization"] = {"credentials_file": str(key_file.resolve())}
    told: dict[str, Any] = {
        "global": {"scrape_interval": "5s", "evaluation_interval": "15s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {"job_name": "stillhouse-routers", "static_configs": [{"targets": [address]}]},
            {"job_name": "stillhouse-engines", "http_sd_configs": [discovery]},
        ],
    }
    if alertmanager is not None:
        managers = [{"static_configs": [{"targets": [alertmanager]}]}]
        told["alerting"] = {"alertmanagers": managers}
    return told


def write(
    config: ServeConfig, folder: Path, alertmanager: str | None = None, key_file: Path | None = None
) -> Path:
    """Both files; returns prometheus.yml. Raises as `prometheus_config` does."""
    told = prometheus_config(config, alertmanager, key_file)
    folder.mkdir(parents=True, exist_ok=True)
    write_rules(folder / "rules.yml", read_groups())
    target = folder / "prometheus.yml"
    target.write_text(yaml.safe_dump(told, sort_keys=False))
    return target


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m k8s.monitoring.local", description=__doc__)
    parser.add_argument("--config", help="the stack's configuration; found as 'stillhouse up' finds it")
    parser.add_argument("--out", type=Path, default=Path("runs/prometheus"))
    parser.add_argument("--alertmanager", help="host:port of an Alertmanager")
    parser.add_argument("--key-file", type=Path, help="an API key for Prometheus, where router.keys is on")
    given = parser.parse_args()
    try:
        print(write(load_serve_config(given.config), given.out, given.alertmanager, given.key_file))
    except StillhouseError as err:
        sys.exit(f"k8s.monitoring.local: {err}")


if __name__ == "__main__":
    main()
