"""SFT as one plain loop, to read before `tasks/training/sft.py`, which takes the same steps: tests hold the two equal.

    python recipes/loops/sft.py MODEL ROWS.jsonl OUTPUT      # a row: {"messages": [{"role": ..., "content": ...}, ...]}

What the stage has besides: checkpoints, guards, a gate, packing, several processes, a fused output head, LoRA.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def sft(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], *,
    learning_rate: float = 5e-6, effective_batch_size: int = 128, micro_batch_size: int = 4, max_length: int = 4096,
    num_train_epochs: int = 2, warmup_ratio: float = 0.03, weight_decay: float = 0.0, adam_epsilon: float = 1e-8,
    max_grad_norm: float = 1.0, bfloat16: bool = False, seed: int = 123,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train `model` (float32 weights) in place, and say of every optimizer step what it was. Defaults: Tulu 3."""
    # Tokens, and labels: the tokens that are trained on, which are what the assistant says and the eos that closes it.
    made = tokenizer.apply_chat_template(conversations, return_dict=True, return_assistant_tokens_mask=True)
    rows = []
    for tokens, mask in zip(made["input_ids"], made["assistant_masks"], strict=True):
        ids, trained = torch.tensor(tokens[:max_length]), torch.tensor(mask[:max_length]) == 1
        if trained[1:].any():
            rows.append((ids, ids.masked_fill(~trained, -100)))
    # AdamW: matrices decay, vectors (the scales of the norms) do not.
    groups = [{"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": weight_decay}]
    groups += [{"params": [weight for weight in model.parameters() if weight.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=adam_epsilon)
    num_steps = num_train_epochs * math.ceil(len(rows) / effective_batch_size)
    step, num_warmup = 0, math.ceil(warmup_ratio * num_steps)
    model.train()
    for epoch in range(num_train_epochs):
        # An epoch has an order of its own, drawn from seed + epoch; its last step takes the rows that are left.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, len(rows), effective_batch_size):
            batch = [rows[index] for index in order[start : start + effective_batch_size]]
            loss, num_trained_tokens = 0.0, sum(int((labels[1:] != -100).sum()) for _, labels in batch)
            for first in range(0, len(batch), micro_batch_size):
                # A micro-batch, padded at the end: no token before the padding sees it, and it has no label.
                ids, labels = zip(*batch[first : first + micro_batch_size], strict=True)
                ids_BT = pad_sequence(ids, batch_first=True).to(model.device)
                labels_BT = pad_sequence(labels, batch_first=True, padding_value=-100).to(model.device)
                with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
                    logits_BTV = model(ids_BT).logits
                # The logits at t predict the token at t + 1. Every micro-batch divides by the tokens of the whole step:
                # the gradients add up to that of the mean over all of them, however the step is cut.
                predicted_NV, wanted_N = logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten()
                part = torch.nn.functional.cross_entropy(predicted_NV, wanted_N, reduction="sum") / num_trained_tokens
                part.backward()
                loss += part.item()
            # Clip, and step at a rate that rises from 0 during warm-up and then falls to 0, both linearly.
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            share = step / num_warmup if step < num_warmup else (num_steps - step) / (num_steps - num_warmup)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * share
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            yield {"step": step, "loss": loss, "grad_norm": float(grad_norm), "learning_rate": group["lr"]}


if __name__ == "__main__":
    tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForCausalLM))
    tokenizer.chat_template = (Path(__file__).resolve().parents[1] / "chat_templates" / "tulu.jinja").read_text("utf-8")
    model.float().to("cuda" if torch.cuda.is_available() else "cpu")
    rows = [json.loads(line) for line in Path(sys.argv[2]).read_bytes().splitlines()]
    if any(row.get("tools") or any(turn.keys() != {"role", "content"} for turn in row["messages"]) for row in rows):
        sys.exit("this loop reads role and content only; a row or a turn has more, which tasks/training/sft.py reads")
    for done in sft(model, tokenizer, [row["messages"] for row in rows], bfloat16=model.device.type == "cuda"):
        print(done, flush=True)
    model.save_pretrained(sys.argv[3])
    tokenizer.save_pretrained(sys.argv[3])
