"""A plain Prefect flow of seven no-op tasks: what orchestration costs without any artifact."""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE


@task(cache_policy=NO_CACHE, persist_result=False)
def nothing(before: int) -> int:
    return before + 1


@flow(name="seven-no-op-tasks", persist_result=False)
def seven() -> int:
    value: object = 0
    for _ in range(7):
        value = nothing.submit(value)
    return value.result()


assert seven() == 7
