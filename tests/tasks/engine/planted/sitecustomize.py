"""Faults planted into one rank of a training, for tests/tasks/engine/test_ranks_faults.py.

Python imports this module at its start from PYTHONPATH. SMOLTULU_PLANTED names a file that says which fault, of which
rank, before which step: {"fault", "rank", "step"}. The rank writes when it came (`<file>.at`), then lets it happen.
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time

_MODULE = "smoltulu.tasks.trainer.loop"


class _Wrap(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            of_trainings = module.callbacks
            module.callbacks = lambda *args, **kwargs: [*of_trainings(*args, **kwargs), _fault()]

        spec.loader.exec_module = exec_module
        return spec


def _fault():
    import torch
    from transformers import TrainerCallback

    with open(os.environ["SMOLTULU_PLANTED"]) as file:
        planted = json.load(file)
    fault, is_mine = planted["fault"], os.environ.get("RANK") == str(planted["rank"])

    def came():
        with open(os.environ["SMOLTULU_PLANTED"] + ".at", "w") as file:
            file.write(str(time.monotonic()))

    class Planted(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if not is_mine or state.global_step + 1 != planted["step"]:
                return
            came()
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "raises":
                raise RuntimeError("the card fell off the bus")
            elif fault == "asleep":
                time.sleep(600)
            elif fault == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault == "nan":
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))
            elif fault == "memory" and args.per_device_train_batch_size > 1:
                torch.empty(10**15)
            elif fault == "terminated":
                os.kill(os.getpid(), signal.SIGTERM)
            elif fault == "slow":
                model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
            elif fault == "disk":
                from smoltulu.tasks.trainer import checkpoint_writer

                def write_pieces(pieces, name):
                    with open("/dev/full", "w") as file:
                        file.write("x" * 10**6)

                assert checkpoint_writer.write_pieces
                checkpoint_writer.write_pieces = write_pieces

    return Planted()


if "SMOLTULU_PLANTED" in os.environ:
    sys.meta_path.insert(0, _Wrap())
