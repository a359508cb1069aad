"""The Dockerfile: nothing builds it here, so that what it copies, pins and installs is compared with the repository."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

from tests import ROOT

#: Instructions of a Dockerfile (docs.docker.com/reference/dockerfile) that may stand in it.
INSTRUCTIONS = {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), comments and continued lines taken together."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def copied() -> list[tuple[list[str], str]]:
    return [(words[:-1], words[-1]) for name, rest in instructions() if name == "COPY" and (words := rest.split())]


def test_launch_dockerfile_is_one_that_docker_reads() -> None:
    found = instructions()
    assert found[0][0] == "FROM" and {name for name, _ in found} <= INSTRUCTIONS
    for name, rest in found:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], check=False).returncode == 0, rest
        if name == "CMD":
            assert re.fullmatch(r'\["[^"]+"(, "[^"]+")*\]', rest)
    assert [rest for name, rest in found if name == "USER"][-1] not in ("root", "0")


def test_launch_dockerfile_pins_what_the_constraints_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    runs = [shlex.split(rest) for name, rest in instructions() if name == "RUN"]
    (torch,) = (word for words in runs for word in words if word.startswith("torch=="))
    # A label of the machine that wrote the constraints (2.13.0+cpu) is no version of the registry.
    assert torch.removeprefix("torch==") == pinned.get("torch", "2.13.0").partition("+")[0]
    (extras,) = (re.fullmatch(r"\.\[([\w,]+)\]", word) for words in runs for word in words if word.startswith(".["))
    assert extras is not None and set(extras[1].split(",")) <= project["optional-dependencies"].keys()
    base = re.match(r"python:(\d+)\.(\d+)-", instructions()[0][1])
    assert base is not None and (int(base[1]), int(base[2])) >= (3, 11)


def test_launch_image_has_all_that_the_package_is_made_of(tmp_path: Path) -> None:
    """Links in src/ lead to what was copied, and .dockerignore lets it through."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources, target in copied():
        for source in sources:
            assert (ROOT / source).exists() and source.removeprefix("./").split("/")[0] in let_through, source
            into = tmp_path / target / (source if (ROOT / source).is_file() else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, into, symlinks=True, dirs_exist_ok=True, ignore=_made_here)
            else:
                shutil.copy2(ROOT / source, into)
    links = [link for link in (tmp_path / "src" / "smoltulu").iterdir() if link.is_symlink()]
    assert len(links) >= 8 and all(link.exists() for link in links), [link.name for link in links if not link.exists()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in (project["readme"], *project["license-files"]):
        assert (tmp_path / name).is_file()


def _made_here(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__" or (Path(folder) == ROOT / "artifacts" and name == "store")}
