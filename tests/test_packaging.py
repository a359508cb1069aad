"""Pins, deployments, settings and the Makefile agree with each other and with what is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from smoltulu.flows.machine import doctor, machine, prefect_api

PROJECT = tomllib.loads((machine.PROJECT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {Requirement(text).name.lower(): Requirement(text) for text in PROJECT["dependencies"]}
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((machine.PROJECT / "prefect.yaml").read_text())["deployments"]


def test_caps_that_keep_prefect_working() -> None:
    """fastapi from 0.151 on breaks `prefect deploy --all`, SQLAlchemy from 2.1 on silently stops cron schedules."""
    for name, last_good, first_bad in (("fastapi", "0.150.0", "0.151.0"), ("sqlalchemy", "2.0.58", "2.1.0")):
        allowed = REQUIREMENTS[name].specifier
        assert allowed.contains(last_good) and not allowed.contains(first_bad)
        assert Version(importlib.metadata.version(name)) < Version(first_bad)


def test_what_is_installed_is_what_is_pinned() -> None:
    assert doctor.wrong_packages() == []


def test_constraints_hold_every_requirement() -> None:
    lines = (machine.PROJECT / "constraints.txt").read_text().splitlines()
    frozen = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            # No local label (2.13.0+cpu), file or address: those exist on one machine only.
            assert equals and "+" not in version and "@" not in line and "/" not in line, line
            frozen[name.lower().replace("_", "-")] = version
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    for text in [*PROJECT["dependencies"], *extras]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:  # an extra that takes in others
            continue
        version = frozen[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), (text, version)


def test_every_package_is_listed_and_is_ours() -> None:
    listed = tomllib.loads((machine.PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = {name.partition(".")[0] for name in listed}
    on_disk = {
        ".".join(path.parent.relative_to(machine.PROJECT).parts)
        for top in tops
        for path in (machine.PROJECT / top).rglob("__init__.py")
    }
    assert on_disk <= set(listed)
    for name in on_disk & tops:
        # Names as general as `tasks` are easily shadowed by another package.
        assert Path(importlib.import_module(name).__file__ or "").is_relative_to(machine.PROJECT)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: str(deployment["name"]))
def test_entrypoints_import_and_take_their_parameters(deployment: dict[str, Any]) -> None:
    """`prefect deploy` registers a module that cannot be imported all the same; the run then crashes."""
    from prefect import Flow

    path, _, name = deployment["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(flow, Flow)
    expected = {"nightly": "smoltulu-eval", "data": "smoltulu-audit"}.get(deployment["name"], "smoltulu")
    assert flow.name == expected
    flow.validate_parameters(deployment.get("parameters", {}))
    assert deployment["work_pool"]["name"] == prefect_api.POOL


def test_deployments_hold_no_template() -> None:
    """A secret that is templated into prefect.yaml is stored in clear by the server."""
    text = (machine.PROJECT / "prefect.yaml").read_text()
    assert "{{" not in text and "HF_TOKEN:" not in text
    nightly = next(deployment for deployment in DEPLOYMENTS if deployment["name"] == "nightly")
    assert nightly["schedules"] == [{"slug": "nightly", "cron": "0 3 * * *", "timezone": "UTC", "active": True}]


@pytest.mark.parametrize("given", [None, "http://127.0.0.1:4999/api"])
def test_prefect_toml_is_read_and_the_environment_wins(given: str | None) -> None:
    code = """if True:
        from prefect.settings import get_current_settings
        settings = get_current_settings()
        server = settings.server
        print(settings.api.url, settings.worker.query_seconds, server.analytics_enabled)
        print(server.concurrency.lease_storage, server.logs.stream_out_enabled, server.logs.stream_publishing_enabled)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    if given:
        environment["PREFECT_API_URL"] = given
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=machine.PROJECT, env=environment, capture_output=True, text=True, check=True
    )
    url, *rest = done.stdout.split()
    assert url == (given or prefect_api.url_of(prefect_api.DEFAULT_PORT))
    assert rest == ["3.0", "False", "prefect.server.concurrency.lease_storage.filesystem", "True", "True"]


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "setup", "PYTHON=/bin/false", f"VENV={tmp_path}/venv"],
        cwd=machine.PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout and "make setup PYTHON=" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_ci_runs_what_the_readme_says() -> None:
    script = machine.PROJECT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text() and "make lint" in script.read_text()
    # This test itself may run under `SMOLTULU_SLOW=1 make test`, which must not decide what it sees.
    outside = {
        name: value for name, value in os.environ.items() if name != "SMOLTULU_SLOW" and not name.startswith("MAKE")
    }

    def planned(**more: str) -> str:
        command = ["make", "-n", "test"]
        env = outside | more
        return subprocess.run(command, cwd=machine.PROJECT, env=env, capture_output=True, text=True, check=True).stdout

    assert '-m "not gpu and not slow"' in planned()
    assert '-m "not gpu" ' in planned(SMOLTULU_SLOW="1")
