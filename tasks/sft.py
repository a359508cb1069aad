"""SFT: loss on assistant tokens and the closing eos only, token-exact over the optimizer step.

TRL divides the summed loss by the number of supervised tokens in the whole optimizer step, so the gradient does not
depend on how the batch is cut into micro-batches; Tulu 3 summed and left the scale to Adam (open-instruct,
`--reduce_loss sum`), which is the same up to a per-step factor.
"""

from __future__ import annotations

from pathlib import Path

from schemas.models import ModelOutputs
from schemas.training import SFTSettings, TrainingInputs
from tasks.models import fit_embeddings, load_language_model, load_tokenizer, stop_ids
from tasks.stage import Stage, StageContext
from tasks.training import (
    callbacks,
    finish,
    load_rows,
    prepare_torch,
    train,
    trainer_arguments,
)


def train_sft(
    config: SFTSettings, inputs: TrainingInputs, context: StageContext
) -> tuple[ModelOutputs, dict[str, float]]:
    """Fine-tune a base model on conversations. Rows: {"messages": [{"role", "content"}, ...]}."""
    prepare_torch(context)
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    model = load_language_model(Path(inputs.model))
    fit_embeddings(model, tokenizer)
    stop_ids(model, tokenizer)

    rows = load_rows(inputs.dataset, context, ["messages"])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **trainer_arguments(config, context),
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps or -1,
            max_length=config.max_length,
            assistant_only_loss=True,
            packing=False,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks(context),
    )
    num_steps = train(trainer, context, len(rows), config.schedule)
    shown = ("loss", "mean_token_accuracy", "tokens_per_second")
    return finish(trainer, tokenizer, context, num_steps, shown)


sft = Stage("sft", 1, SFTSettings, TrainingInputs, ModelOutputs, train_sft)
