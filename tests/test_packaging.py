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
from smoltulu.tasks.engine.environment import as_tested, environment, pinned_version
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {Requirement(text).name.lower(): Requirement(text) for text in PROJECT["dependencies"]}
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def test_caps_that_keep_prefect_working() -> None:
    """fastapi from 0.151 on breaks `prefect deploy --all`, SQLAlchemy from 2.1 on silently stops cron schedules."""
    for name, last_good, first_bad in (("fastapi", "0.150.0", "0.151.0"), ("sqlalchemy", "2.0.58", "2.1.0")):
        allowed = REQUIREMENTS[name].specifier
        assert allowed.contains(last_good) and not allowed.contains(first_bad)
        assert Version(importlib.metadata.version(name)) < Version(first_bad)


def test_pyproject_holds_ranges_and_constraints_the_pins() -> None:
    """What is pinned exactly cannot be installed beside anything else."""
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    assert not [text for text in [*PROJECT["dependencies"], *extras] if "==" in text]
    torch = REQUIREMENTS["torch"].specifier
    assert torch.contains("2.11.0") and torch.contains("2.13.1") and not torch.contains("2.14.0")
    assert (pinned_version("huggingface_hub"), pinned_version("no-such-package")) == ("2.4.0", None)
    # The Makefile installs torch alone first, from an index of the user's choice: exactly the version that is pinned.
    assert f"torch=={pinned_version('torch')}\n" in (ROOT / "Makefile").read_text()


def test_what_is_installed_is_what_was_tested() -> None:
    assert [check.status for check in doctor._packages()] == ["ok"]
    assert environment()["tested_with"] == {}


def test_other_versions_are_said_by_the_doctor_and_by_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch": "2.12.1"}.get(name) or installed(name))
    (check,) = doctor._packages()
    assert (check.name, check.status) == ("versions", "warn")
    assert check.detail == f"not as tested: torch 2.12.1 (tested: {pinned_version('torch')})"
    made_with = environment.__wrapped__()
    assert made_with["packages"]["torch"] == "2.12.1"
    assert made_with["tested_with"] == {"torch": pinned_version("torch")}
    assert as_tested("torch", f"{pinned_version('torch')}+cpu") and not as_tested("torch", "2.12.1+cpu")


def test_constraints_hold_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
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


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: str(deployment["name"]))
def test_entrypoints_import_and_take_their_parameters(deployment: dict[str, Any]) -> None:
    """`prefect deploy` registers a module that cannot be imported all the same; the run then crashes."""
    from prefect import Flow

    path, _, name = deployment["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(f"smoltulu.{path.removesuffix('.py').replace('/', '.')}"), name)
    assert isinstance(flow, Flow)
    others = {"nightly": "smoltulu-eval", "data": "smoltulu-audit"}
    others |= dict.fromkeys(("surface", "ladder", "selection"), "smoltulu-sweep")
    assert flow.name == others.get(deployment["name"], "smoltulu")
    flow.validate_parameters(deployment.get("parameters", {}))
    assert deployment["work_pool"]["name"] == prefect_api.POOL


def test_deployments_hold_no_template() -> None:
    """A secret that is templated into prefect.yaml is stored in clear by the server."""
    text = (ROOT / "prefect.yaml").read_text()
    assert "{{" not in text and "HF_TOKEN:" not in text
    nightly = next(deployment for deployment in DEPLOYMENTS if deployment["name"] == "nightly")
    assert nightly["schedules"] == [{"slug": "nightly", "cron": "0 3 * * *", "timezone": "UTC", "active": True}]


def test_installed_deployments_name_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's folder there is no flows/pipeline.py, or it is his own."""
    assert machine.prefect_yaml() == (ROOT / "prefect.yaml").read_text()
    monkeypatch.setattr(machine, "CHECKOUT", None)
    given = yaml.safe_load(machine.prefect_yaml())["deployments"]
    assert {entry["name"]: entry["entrypoint"] for entry in given} == {
        "full": "smoltulu.flows.pipeline.smoltulu",
        "tiny": "smoltulu.flows.pipeline.smoltulu",
        "nightly": "smoltulu.flows.evaluation.nightly_evaluation",
        "data": "smoltulu.flows.audit.audit_data",
        "surface": "smoltulu.flows.sweep.smoltulu_sweep",
        "ladder": "smoltulu.flows.ladder.smoltulu_ladder",
        "selection": "smoltulu.flows.sweep.smoltulu_sweep",
    }
    assert [{**entry, "entrypoint": ""} for entry in given] == [{**entry, "entrypoint": ""} for entry in DEPLOYMENTS]


@pytest.mark.parametrize("given", [None, "http://127.0.0.1:4999/api"])
@pytest.mark.parametrize("installed", [False, True])
def test_settings_of_prefect_toml_hold_and_the_environment_wins(
    installed: bool, given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout Prefect reads the file; what `smoltulu up` starts elsewhere gets them by the environment."""
    monkeypatch.delenv("PREFECT_WORKER_QUERY_SECONDS")  # tests/conftest.py
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
    if installed:
        url = given or prefect_api.url_of(prefect_api.DEFAULT_PORT)
        environment = {**environment, **machine.child_environment(tmp_path, url)}
    folder = tmp_path if installed else ROOT
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    url, *rest = done.stdout.split()
    assert url == (given or prefect_api.url_of(prefect_api.DEFAULT_PORT))
    assert rest == ["3.0", "False", "prefect.server.concurrency.lease_storage.filesystem", "True", "True"]


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "setup", "PYTHON=/bin/false", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout and "make setup PYTHON=" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text() and "make lint" in script.read_text()
    # This test itself may run under `SMOLTULU_SLOW=1 make test`, which must not decide what it sees.
    outside = {
        name: value for name, value in os.environ.items() if name != "SMOLTULU_SLOW" and not name.startswith("MAKE")
    }

    def planned(**more: str) -> str:
        command = ["make", "-n", "test"]
        env = outside | more
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout

    assert '-m "not gpu and not slow"' in planned()
    assert '-m "not gpu" ' in planned(SMOLTULU_SLOW="1")
