"""The same seven steps in redun (SQLite): `redun_dag.py FOLDER`."""

import sys
from pathlib import Path

from redun import Scheduler, task
from redun.config import Config

redun_namespace = "benchmark"


@task(version="1")
def add_one(before: int, step: int) -> int:
    return before + 1


@task(version="1")
def chain() -> int:
    value = 0
    for number in range(7):
        value = add_one(value, number)
    return value


Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
database = {"db_uri": f"sqlite:///{sys.argv[1]}/redun.db"}
scheduler = Scheduler(config=Config({"backend": database, "scheduler": {"log_level": "WARNING"}}))
scheduler.load()
assert scheduler.run(chain()) == 7
