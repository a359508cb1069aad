"""A cell of a sweep as a plain script does it: TRL trains, a few lines of transformers measure. Nothing of smoltulu.

`trl_cell.py JOB.json` runs the cells of the file one after the other and prints, as JSON in its last line, the seconds
of each. Many files of one cell are the plain loop; one file of many cells is a loop inside one process.

Job: {"model", "rows", "items": paths, "template": text, "cells": [{"learning_rate", "batch", "seed", "num_steps"}]}.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run_cell(job: dict[str, Any], cell: dict[str, Any], folder: str, tokenized: list[Any]) -> dict[str, Any]:
    """Train, save, load again, and measure: {skill: (accuracy, bits per byte)}.

    `tokenized` keeps the rows as the first cell made them: no loop tokenises them twice.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.chat_template = job["template"]
    if not tokenized:
        rows = [json.loads(line)["messages"] for line in Path(job["rows"]).read_text().splitlines()]
        pairs = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"]),
        args=SFTConfig(
            output_dir=folder, max_steps=cell["num_steps"], learning_rate=cell["learning_rate"], seed=cell["seed"],
            per_device_train_batch_size=cell["batch"], lr_scheduler_type="linear", warmup_steps=0.05, weight_decay=0.0,
            max_length=64, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=50, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": bool(tokenized)},
        ),
        train_dataset=tokenized[0] if tokenized else Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip
    tokenized[:] = [trainer.train_dataset]
    trainer.train()
    trainer.save_model(folder)
    return measure(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer, Path(job["items"]))


def measure(model: Any, tokenizer: Any, file: Path) -> dict[str, Any]:
    """Greedy answers and the likelihood of the right ones, a skill at a time."""
    import torch

    scores = {}
    items = [json.loads(line) for line in file.read_text().splitlines()]
    for skill in dict.fromkeys(item["subset"] for item in items):
        own = [item for item in items if item["subset"] == skill]
        asked = [[{"role": "user", "content": item["prompt"]}] for item in own]
        prompts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in asked]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with torch.inference_mode():
            written = model.generate(**encoded, max_new_tokens=24, do_sample=False)
            answers = tokenizer.batch_decode(written[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            # (num_items, num_tokens), answers at the right end
            both = [prompt + item["answer"] for prompt, item in zip(prompts, own, strict=True)]
            asked = tokenizer(both, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
            logps = model(**asked).logits[:, :-1].log_softmax(-1).gather(-1, asked["input_ids"][:, 1:, None])[..., 0]
            bits = []
            for own_logps, item in zip(logps, own, strict=True):
                num_tokens = len(tokenizer(item["answer"], add_special_tokens=False)["input_ids"])
                bits.append(-own_logps[-num_tokens:].sum().item() / math.log(2) / len(item["answer"]))
        right = [answer.strip() == item["answer"] for answer, item in zip(answers, own, strict=True)]
        scores[skill] = (sum(right) / len(right), sum(bits) / len(bits))
    return scores


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch
    import trl  # noqa: F401 - a loop inside one process pays for it once

    if job.get("num_threads"):
        torch.set_num_threads(job["num_threads"])
    seconds, scores, tokenized = [], [], []
    for cell in job["cells"]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            scores.append(run_cell(job, cell, folder, tokenized))
        seconds.append(time.monotonic() - began)
    print(json.dumps({"seconds": seconds, "scores": scores}))


if __name__ == "__main__":
    main()
