"""The same seven steps in ai2-tango (LocalWorkspace): `tango_dag.py FOLDER`."""

import sys

from tango import Step
from tango.workspaces import LocalWorkspace


@Step.register("add_one")
class AddOne(Step):
    DETERMINISTIC = True
    CACHEABLE = True

    def run(self, before: int) -> int:
        return before + 1


workspace = LocalWorkspace(sys.argv[1])
step: AddOne | int = 0
for number in range(7):
    step = AddOne(step_name=f"step-{number}", before=step)
assert step.result(workspace) == 7
