"""The policy answers prompts that it is never trained on, at the start, on the way and at the end of RLVR.

One way for all algorithms: the engine of the rollouts writes the answers, at the run's temperature, and the run's
verifiers grade them, whatever `rlvr.reward` pays. The random numbers of an answer depend on seed, prompt and sample,
and not on the step: so two evaluations differ by the policies alone, their difference has less noise, and an evaluation
that is made again after a resume is the same. No random state of the training is touched.

With `keep: best` the weights of the best evaluation lie beside the checkpoints (tasks/trainer/best_weights.py).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from smoltulu.artifacts.keys import LOGS_FOLDER
from smoltulu.schemas.held_out import HeldOutOutputs
from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.tasks.generation.interface import HELD_OUT_TOKENS, Request
from smoltulu.tasks.models.tokens import prompt_ids
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.best_weights import BestWeights
from smoltulu.tasks.training.held_out_record import Evaluation, Record, falls, graded, metrics_of, share_right
from smoltulu.tasks.training.held_out_rows import HeldOutRow, Split
from smoltulu.tasks.training.rewards import Answer, scores_of

logger = logging.getLogger("smoltulu")
HELD_OUT_FILE = f"{LOGS_FOLDER}/held_out.jsonl"


class HeldOut(TrainerCallback):
    """Added to the trainer before the callbacks of tasks/trainer/loop.py: what it writes is part of the checkpoint.

    models  name -> model whose weights are kept together: the policy, and PPO's critic
    """

    def __init__(
        self,
        trainer: Trainer,
        split: Split,
        config: RLVRSettings,
        context: StageContext,
        models: dict[str, torch.nn.Module],
    ) -> None:
        assert config.held_out is not None
        self.trainer, self.split, self.config, self.context = trainer, split, config, context
        self.settings = config.held_out
        self.every = self.settings.every(config.num_steps_per_rollout)
        self.record = Record()
        self.best = BestWeights(trainer, context.work, models, ("held-out accuracy", "rlvr"))
        tokenizer: Any = trainer.processing_class
        rows = [one.row for one in split.held_out]
        self.prompt_ids = prompt_ids(tokenizer, [row["prompt"] for row in rows], [row.get("tools") for row in rows])
        self.backend = trainer.backend.for_purpose(HELD_OUT_TOKENS)

    # ------------------------------------------------------------------------------------------------- in the training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.record = Record.of(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if self.config.keep == "best":
                self.best.require(self.record.best.step, state.global_step)
        if self.record.ended_early:
            # The run is over. transformers' loop would look at the control only after a step.
            state.max_steps, control.should_training_stop = state.global_step, True
            self.trainer._run_epoch = lambda **kwargs: None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.record.evaluations:
            self._evaluate(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        # In the critic's warm-up the policy stands still.
        if not is_last and (step % self.every or step <= (self.config.num_warmup_steps_of_critic or 0)):
            return
        self._evaluate(state, control)
        fallen = falls(self.record, self.settings.max_drop, self.settings.max_kinds_drop)
        if not fallen:
            return
        said = f"at step {step:,} " + ", and ".join(fallen)
        if self.config.keep == "last":
            raise ValueError(
                f"{said}; the checkpoints before it are kept. The policy learns what its verifiers pay and forgets the "
                "rest: lower learning_rate or raise beta. With keep: best the run would end here with the weights of "
                f"step {self.record.best.step:,}, whose accuracy is {self.record.best.accuracy:.3f}"
            )
        if not is_last:
            logger.warning("%s: the run ends early, with the weights of step %s", said, f"{self.record.best.step:,}")
            self.record.ended_early = said
            state.max_steps, control.should_save, control.should_training_stop = step, True, True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.record.save(checkpoint)
            self.best.note(checkpoint, self.record.best.step)

    def _evaluate(self, state: Any, control: Any) -> None:
        """All processes answer a part each, and all know the result."""
        if (settle := getattr(self.trainer, "settle_guard", None)) is not None:
            settle()  # a step at fault is told as such
        made = self._answer(state.global_step)
        if not graded(made.prompts):
            raise ValueError(
                f"none of the {len(made.prompts):,} held-out prompts has a ground truth that its verifier can read; "
                "look at data.rlvr"
            )
        if self.config.keep == "best" and (not self.record.evaluations or made.accuracy > self.record.best.accuracy):
            self.best.write(made.step)
        self.record.evaluations.append(made)
        # transformers' own `log`: TRL's would add the means of the training's metrics, and forget them. It takes a log
        # that is due at this step for done.
        is_due = control.should_log
        Trainer.log(self.trainer, metrics_of(made, self.split.held_out))
        control.should_log = is_due

    def _answer(self, step: int) -> Evaluation:
        process, num_processes = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        mine = list(zip(self.split.held_out, self.prompt_ids, strict=True))[process::num_processes]
        num_samples = self.settings.num_samples
        requests = [Request(ids, 0, one.number, sample) for one, ids in mine for sample in range(num_samples)]
        asked = [one for one, _ in mine for _ in range(num_samples)]
        written = self.backend(requests)
        answers = [
            Answer(one.row["verifier"], one.row["ground_truth"], self._text(rollout), rollout.stopped, "held out")
            for one, rollout in zip(asked, written, strict=True)
        ]
        verdicts = [score.verdict for score in scores_of(self.config, answers)]
        found: list[tuple[int, str, bool, int]] = gather_object(
            [
                (one.number, verdict, rollout.stopped, len(rollout.ids))
                for one, verdict, rollout in zip(asked, verdicts, written, strict=True)
            ]
        )
        of_prompt: dict[int, list[str]] = {}
        for number, verdict, _, _ in found:
            of_prompt.setdefault(number, []).append(verdict)

        def shares(rows: list[HeldOutRow]) -> dict[str, float | None]:
            return {str(row.number): share_right(of_prompt[row.number]) for row in rows}

        return Evaluation(
            step=step,
            prompts=shares([row for row in self.split.held_out if row.kind is None]),
            kinds=shares([row for row in self.split.held_out if row.kind is not None]),
            stopped=sum(stopped for _, _, stopped, _ in found) / len(found),
            mean_length=sum(length for *_, length in found) / len(found),
        )

    def _text(self, rollout: Any) -> str:
        tokenizer: Any = self.trainer.processing_class
        text: str = tokenizer.decode(rollout.ids[:-1] if rollout.stopped else rollout.ids, skip_special_tokens=True)
        return text

    def restore_best(self) -> None:
        """Put the weights that are kept into the models."""
        self.best.restore(self.kept.step)

    # -------------------------------------------------------------------------------------------------------- the end

    @property
    def kept(self) -> Evaluation:
        return self.record.best if self.config.keep == "best" else self.record.evaluations[-1]

    def outputs(self, outputs: ModelOutputs, metrics: dict[str, float]) -> tuple[ModelOutputs, dict[str, float]]:
        """Outputs and metrics of the stage with what the held-out prompts said; writes every evaluation to a file."""
        if not self.trainer.is_world_process_zero():
            return outputs, metrics
        start, kept, last = (
            one.score() for one in (self.record.evaluations[0], self.kept, self.record.evaluations[-1])
        )
        with (self.context.folder / HELD_OUT_FILE).open("w", encoding="utf-8") as file:
            for one in self.record.evaluations:
                shares = {"prompts": one.prompts, "kinds": one.kinds}
                file.write(json.dumps(metrics_of(one, self.split.held_out) | {"step": one.step} | shares) + "\n")
        found = HeldOutOutputs(
            num_prompts=len(self.record.evaluations[0].prompts),
            num_prompts_of_kinds=len(self.record.evaluations[0].kinds),
            num_rows_left_out=self.split.num_left_out,
            start=start,
            kept=kept,
            last=last,
            why=self._why(),
            ended_early=self.record.ended_early,
        )
        logger.info(
            "held-out accuracy %.3f at the start, %.3f at the end; %s", start.accuracy, last.accuracy, found.why
        )
        more = {"held_out/accuracy": kept.accuracy, "held_out/start": start.accuracy, "kept_step": float(kept.step)}
        if start.kinds_accuracy is not None and kept.kinds_accuracy is not None:
            more |= {"held_out/kinds/accuracy": kept.kinds_accuracy, "held_out/kinds/start": start.kinds_accuracy}
        return outputs.model_copy(update={"held_out": found, "held_out_file": HELD_OUT_FILE}), metrics | more

    def _why(self) -> str:
        if self.config.keep == "last":
            return f"keep is last: the weights of step {self.kept.step:,} are kept"
        said = (
            f"keep is best: the weights of step {self.kept.step:,} are kept, whose held-out accuracy "
            f"{self.kept.accuracy:.3f} is the highest of {len(self.record.evaluations):,} evaluations"
        )
        return said + (", so they are those that the run started from" if not self.kept.step else "")
