"""The files of deploy/ are what they say: the servers accept them, and compose runs the processes of `up`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import redis as redis_sync
import yaml

from app.embedded import Valkey
from app.settings import SECRETS, Settings
from tests.ha.redis_watched import Sentinel
from tests.sockets import quiet_port

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_redis_conf_is_accepted_and_durable(tmp_path: Path) -> None:
    lines = (DEPLOY / "redis.conf").read_text().splitlines()
    settings = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    given = {name: value for name, value in settings if name not in ("port", "dir", "bind", "protected-mode")}
    server = Valkey(tmp_path / "valkey", "secret", settings=given)
    try:
        server.start()
        with contextlib.closing(redis_sync.Redis.from_url(server.url)) as client:
            for name in ("appendonly", "appendfsync", "maxmemory-policy", "auto-aof-rewrite-percentage"):
                assert client.config_get(name)[name] == given[name]
    finally:
        server.kill()


def test_cluster_conf_on_top_of_redis_conf_is_accepted(tmp_path: Path) -> None:
    settings: dict[str, str] = {}
    for name in ("redis.conf", "cluster.conf"):
        lines = (DEPLOY / name).read_text().splitlines()
        settings |= dict(line.split(None, 1) for line in lines if line.strip() and not line.startswith("#"))
    given = {
        name: value
        for name, value in settings.items()
        if name not in ("port", "dir", "bind", "protected-mode")
    }
    server = Valkey(tmp_path / "valkey", "secret", settings=given | {"cluster-port": str(quiet_port())})
    try:
        server.start()
        with contextlib.closing(redis_sync.Redis.from_url(server.url)) as client:
            for name in ("appendfsync", "cluster-require-full-coverage", "cluster-node-timeout"):
                assert client.config_get(name)[name] == given[name]
    finally:
        server.kill()


def test_sentinel_conf_is_accepted(tmp_path: Path) -> None:
    sentinel = Sentinel(tmp_path / "sentinel", "secret")
    lines = (DEPLOY / "sentinel.conf").read_text().replace(" redis1 ", " 127.0.0.1 ").splitlines()
    settings = [line.rpartition(" ") for line in lines if line.strip() and not line.startswith("#")]
    sentinel.settings = {name: value for name, _, value in settings if name not in ("port", "dir")}
    try:
        sentinel.start()
        with contextlib.closing(redis_sync.Redis(port=sentinel.port, password="secret")) as client:
            answer = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "fairdrop")
        assert answer == [b"127.0.0.1", b"6379"]
    finally:
        sentinel.kill()


@pytest.mark.stores_matrix
def test_postgresql_conf_is_accepted_and_durable(stores, store_kind: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    postgres = stores.of(store_kind).postgres
    conf = tmp_path / "postgresql.conf"
    shutil.copy(DEPLOY / "postgresql.conf", conf)
    for name, value in {"fsync": "on", "synchronous_commit": "on", "max_connections": "200"}.items():
        # -C computes one value from the file; it refuses to be root, and reads no data but the control file.
        done = subprocess.run(
            [
                str(postgres.bin_dir / "postgres"),
                "-C",
                name,
                "-D",
                str(tmp_path),
                "-c",
                f"config_file={conf}",
            ],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )
        assert not re.search(r"unrecognized|invalid|error in", done.stderr), done.stderr
        if done.returncode == 0:
            assert done.stdout.strip() == value


def test_compose_runs_the_processes_of_up_with_settings_that_exist() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert {"front", "office", "worker", "sandbox", "migrate", "redis", "postgres"} == set(
        compose["services"]
    )
    for name in ("front", "office", "worker", "sandbox", "migrate"):
        service = compose["services"][name]
        assert service["command"] == [name]
        for variable in service["environment"]:
            setting = variable.removeprefix("FAIRDROP_").lower()
            if setting.endswith("_file"):
                assert setting.removesuffix("_file") in SECRETS
                assert setting.removesuffix("_file") in compose["secrets"]
            else:
                assert setting in Settings.model_fields, variable


def test_a_process_is_given_longer_to_end_than_it_drains() -> None:
    """kill -9 in the middle of a drain is what a rolling restart is there to avoid."""
    text = (DEPLOY / "kubernetes.yaml").read_text()
    documents = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}
    told = documents["ConfigMap", "fairdrop"]["data"]
    assert {name.removeprefix("FAIRDROP_").lower() for name in told} <= Settings.model_fields.keys()
    drains_s = float(told["FAIRDROP_DRAIN_S"]) + float(told["FAIRDROP_CLOSE_WITHIN_S"])
    for name in ("front", "office", "worker"):
        pod = documents["Deployment", f"fairdrop-{name}"]["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > drains_s
        assert pod["containers"][0]["args"] == [name]
        # Else the service fairdrop-front sets FAIRDROP_FRONT_PORT=tcp://… in every pod, and none starts.
        assert pod["enableServiceLinks"] is False
    settings = Settings()
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("front", "office"):
        assert float(compose[name]["stop_grace_period"][:-1]) > settings.drain_s + settings.close_within_s


def test_nginx_gives_up_idle_connections_before_a_front_door_that_drains_closes_them() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    upstream = text[text.index("upstream front") : text.index("server {")]
    (kept_s,) = re.findall(r"keepalive_timeout (\d+)s;", upstream)
    assert float(kept_s) < Settings().drain_s
    assert "non_idempotent" not in text
    assert text.count("{") == text.count("}")


def test_make_secrets_writes_what_compose_needs_and_never_changes_it(tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    script = tmp_path / "make-secrets"
    shutil.copy(DEPLOY / "make-secrets", script)
    subprocess.run([str(script)], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(made) == set(compose["secrets"])
    subprocess.run([str(script)], check=True)
    assert made == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}


def test_the_image_is_built_from_files_that_exist() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    assert copied
    for name in copied:
        assert (DEPLOY.parent / name).exists(), name
