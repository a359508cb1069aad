"""Stage `samples`: a model answers prompts of the recipe's data, several times each.

Random numbers belong to a prompt and a sample, as in RLVR's rollouts (tasks/generation), so neither batches
nor parts nor other prompts change what a prompt is answered, but for the rounding of sums.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.keys import canonical_json, file_digest, folder_digest, text_digest
from smoltulu.schemas.common import scientific
from smoltulu.schemas.sampled import SamplesConfig, SamplesInputs, SamplesOutputs
from smoltulu.tasks.data.draw import drawn, seed_of
from smoltulu.tasks.data.rows import rows_at, stored_rows
from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.interface import Request, Sampling, Written
from smoltulu.tasks.models.folders import check_model_folder, load_to_write, load_tokenizer, use_bfloat16
from smoltulu.tasks.models.processes import processes_of
from smoltulu.tasks.models.tokens import prompt_ids, rendering_errors, stop_token_ids
from smoltulu.tasks.models.turns import Messages, Tools
from smoltulu.tasks.sampled import parts
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.prepare import prepare_torch

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

#: Prompts that are tokenised at once.
_BATCH_ROWS = 512
_PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Prompt:
    """A prompt that is asked. number: of its row."""

    number: int
    id: str
    messages: Messages
    tools: Tools | None
    verifier: str
    ground_truth: str
    ids: list[int]


@dataclass
class Asked:
    """The prompts that are asked, in the order of their rows, and how many are not, and why."""

    prompts: list[Prompt] = field(default_factory=list)
    num_repeated: int = 0
    num_too_long: int = 0
    num_not_rendered: int = 0


def write_samples(
    config: SamplesConfig, inputs: SamplesInputs, context: StageContext
) -> tuple[SamplesOutputs, dict[str, float]]:
    """Let a model answer prompts, `num_samples` times each.

    Raises:
        ValueError: no rows, or no prompt that leaves room for an answer.
    """
    prepare_torch(context)
    model = Path(inputs.model)
    check_model_folder(model)
    tokenizer = load_tokenizer(model, inputs.chat_template)
    asked = asked_prompts(config, tokenizer, Path(inputs.dataset), _longest_prompt(config, model))
    groups = [
        asked.prompts[start : start + parts.PART_PROMPTS] for start in range(0, len(asked.prompts), parts.PART_PROMPTS)
    ]
    # The longest prompt first: what does not fit into memory fails at once.
    order = sorted(range(len(groups)), key=lambda number: -max(len(prompt.ids) for prompt in groups[number]))
    progress = _Progress(context, len(asked.prompts), config.num_samples)
    sample: Callable[[Sequence[Prompt]], list[list[Written]]] | None = None

    def make(number: int) -> parts.Lines:
        nonlocal sample
        sample = sample or _sampler(config, inputs, tokenizer, context, progress)
        progress.num_before = sum(len(groups[earlier]) for earlier in order[: order.index(number)])
        return [
            _line(tokenizer, prompt, several)
            for prompt, several in zip(groups[number], sample(groups[number]), strict=True)
        ]

    totals = {"num_ended": 0, "num_written_tokens": 0}

    def see(lines: parts.Lines) -> None:
        samples = [sample for line in lines for sample in line["samples"]]
        totals["num_ended"] += sum(sample["ended"] for sample in samples)
        totals["num_written_tokens"] += sum(sample["num_tokens"] for sample in samples)

    made = parts.lines_in_parts(context, _made_from(config, inputs), order, schema(), make)
    parts.write_lines(context, SamplesOutputs.model_fields["file"].default, schema(), made, see)
    outputs = SamplesOutputs(
        writer=config.writer,
        num_asked=len(asked.prompts),
        num_samples=config.num_samples,
        num_repeated=asked.num_repeated,
        num_too_long=asked.num_too_long,
        num_not_rendered=asked.num_not_rendered,
        **totals,
    )
    num_samples = outputs.num_asked * outputs.num_samples
    return outputs, {
        "num_prompts": float(outputs.num_asked),
        "ended_share": outputs.num_ended / num_samples,
        "mean_tokens": outputs.num_written_tokens / num_samples,
    }


def schema() -> pa.Schema:
    """Columns of the file: a line a prompt. `verifier` and `ground_truth` are empty where the rows have none.

    `whole_prompt`: {"prompt", "tools"} as JSON where a prompt has more than role and content, else empty.
    """
    import pyarrow as pa

    text = {"nullable": False}
    turn = pa.struct([pa.field(name, pa.string(), **text) for name in ("role", "content")])
    sample = pa.struct(
        [
            pa.field("text", pa.string(), **text),
            pa.field("ended", pa.bool_(), **text),
            pa.field("num_tokens", pa.int32(), **text),
        ]
    )
    return pa.schema(
        [
            pa.field("id", pa.string(), **text),
            pa.field("prompt", pa.list_(turn), **text),
            pa.field("whole_prompt", pa.string(), **text),
            pa.field("verifier", pa.string(), **text),
            pa.field("ground_truth", pa.string(), **text),
            pa.field("samples", pa.list_(sample), **text),
        ]
    )


def is_of_samples(columns: pa.Schema) -> bool:
    """Whether a file is one of samples. Those of before prompts could offer tools have no `whole_prompt`."""
    own = schema()
    return bool(columns.equals(own) or columns.equals(own.remove(own.get_field_index("whole_prompt"))))


def asked_prompts(
    config: SamplesConfig, tokenizer: PreTrainedTokenizerBase, dataset: Path, longest: int | None
) -> Asked:
    """The prompts of a rows file that are asked. Of rows with one prompt the first; so many are drawn; long ones go."""
    firsts: dict[bytes, tuple[int, str]] = {}
    num_rows = 0
    for number, row in enumerate(stored_rows(dataset)):
        num_rows += 1
        said = canonical_json([*_messages(row), *([row["tools"]] if "tools" in row else [])])
        firsts.setdefault(sha256(said.encode()).digest(), (number, str(row["id"])))
    if not num_rows:
        raise ValueError("there are no rows whose prompts could be asked; look at the data set that `prompts` names")
    different = list(firsts.values())
    chosen = drawn([name for _, name in different], config.num_prompts, config.seed)
    rows = rows_at(dataset, [different[place][0] for place in chosen])
    asked = Asked(num_repeated=num_rows - len(different))
    numbers = sorted(rows)
    for start in range(0, len(numbers), _BATCH_ROWS):
        batch = numbers[start : start + _BATCH_ROWS]
        for number, ids in zip(batch, _prompt_ids(tokenizer, [rows[one] for one in batch]), strict=True):
            row = rows[number]
            if ids is None:
                asked.num_not_rendered += 1
            elif longest is not None and len(ids) > longest:
                asked.num_too_long += 1
            else:
                truth = str(row.get("verifier", "")), str(row.get("ground_truth", ""))
                asked.prompts.append(Prompt(number, str(row["id"]), _messages(row), row.get("tools"), *truth, ids))
    if not asked.prompts:
        raise ValueError(
            f"none of {len(chosen):,} prompts can be asked: {asked.num_too_long:,} have more than {longest or 0:,} "
            f"tokens, the chat template refuses {asked.num_not_rendered:,}; raise max_prompt_length, lower "
            "max_new_tokens, or take other prompts"
        )
    return asked


def _messages(row: dict[str, Any]) -> Messages:
    """The prompt of a row: of a conversation, all before its last answer."""
    messages: Messages = row["messages"][:-1] if "messages" in row else row["prompt"]
    return messages


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[list[int] | None]:
    """Token ids of the prompt of each; None where the template refuses it."""
    try:
        return list(prompt_ids(tokenizer, list(map(_messages, rows)), [row.get("tools") for row in rows]))
    except rendering_errors():
        return [None] if len(rows) == 1 else [ids for one in rows for ids in _prompt_ids(tokenizer, [one])]


def _longest_prompt(config: SamplesConfig, model: Path) -> int | None:
    """Most tokens of a prompt; None: any number."""
    positions = json.loads((model / "config.json").read_text()).get("max_position_embeddings")
    if not isinstance(positions, int):
        return config.max_prompt_length
    room = positions - config.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens {config.max_new_tokens:,} leaves no room for a prompt: the model has {positions:,} "
            "positions; lower it"
        )
    return room if config.max_prompt_length is None else min(room, config.max_prompt_length)


@dataclass
class _Progress:
    """Prompts that are done, and tokens a second, for a reader."""

    context: StageContext
    num_prompts: int
    num_samples: int
    num_before: int = 0
    begun: float = field(default_factory=time.monotonic)
    num_tokens: int = 0

    def on_batch(self, num_done: int, num_texts: int) -> None:
        seconds = max(time.monotonic() - self.begun, 1e-9)
        self.context.report(
            min(self.num_before + num_done // self.num_samples, self.num_prompts),
            self.num_prompts,
            **({"tokens_per_second": self.num_tokens / seconds} if self.num_tokens else {}),
        )


def _sampler(
    config: SamplesConfig,
    inputs: SamplesInputs,
    tokenizer: PreTrainedTokenizerBase,
    context: StageContext,
    progress: _Progress,
) -> Callable[[Sequence[Prompt]], list[list[Written]]]:
    """The model, loaded, as a function."""
    model = load_to_write(Path(inputs.model), tokenizer, use_bfloat16(config.precision, context.compute))
    model.to(str(processes_of(context).device))
    batch_size = context.compute.per_device_eval_batch_size
    engine = TransformersEngine(model, pad_id=tokenizer.pad_token_id, batch_size=batch_size)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=tuple(stop_token_ids(tokenizer)),
        top_p=config.top_p,
        seed=seed_of(config.seed, "samples"),
    )
    progress.begun = time.monotonic()

    def sample(prompts: Sequence[Prompt]) -> list[list[Written]]:
        numbers = range(config.num_samples)
        requests = [Request(prompt.ids, 0, prompt.number, number) for prompt in prompts for number in numbers]
        written = engine.generate(requests, sampling, progress.on_batch)
        progress.num_tokens += sum(len(one.ids) for one in written)
        return [written[start : start + len(numbers)] for start in range(0, len(written), len(numbers))]

    return sample


def _line(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, samples: Sequence[Written]) -> dict[str, Any]:
    texts = tokenizer.batch_decode(
        [one.ids[:-1] if one.stopped else one.ids for one in samples], skip_special_tokens=True
    )
    return {
        "id": prompt.id,
        **stored_prompt(prompt.messages, prompt.tools),
        "verifier": prompt.verifier,
        "ground_truth": prompt.ground_truth,
        "samples": [
            {"text": text, "ended": one.stopped, "num_tokens": len(one.ids)}
            for text, one in zip(texts, samples, strict=True)
        ],
    }


def stored_prompt(messages: Messages, tools: Tools | None) -> dict[str, Any]:
    """Columns of a prompt: role and content of its turns, for readers, and all of it where there is more."""
    said = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    whole = {"prompt": messages} | ({"tools": tools} if tools else {})
    is_plain = said == messages and not tools
    return {"prompt": said, "whole_prompt": "" if is_plain else json.dumps(whole, ensure_ascii=False)}


def asked_of(line: dict[str, Any]) -> tuple[Messages, Tools | None]:
    """The prompt of a line as it was given, and the tools that it offers."""
    if not line.get("whole_prompt"):
        return line["prompt"], None
    whole = json.loads(line["whole_prompt"])
    return whole["prompt"], whole.get("tools")


def _made_from(config: SamplesConfig, inputs: SamplesInputs) -> str:
    """What the parts are made from."""
    return canonical_json(
        {
            "model": folder_digest(Path(inputs.model)),
            "rows": file_digest(Path(inputs.dataset)),
            "template": text_digest(inputs.chat_template),
            "config": scientific(config),
            "packages": {name: metadata.version(name) for name in _PACKAGES},
            "part_prompts": parts.PART_PROMPTS,
            "columns": schema().names,
        }
    )


def _most_flops(config: SamplesConfig, num_rows: int | None) -> float | None:
    """2 a token that is written; reading the prompts, which is done once for all samples of one, is left out."""
    asked = [count for count in (config.num_prompts, num_rows) if count is not None]
    return 2.0 * min(asked) * config.num_samples * config.max_new_tokens if asked else None


samples = Stage(
    "samples", 1, SamplesConfig, SamplesInputs, SamplesOutputs, write_samples,
    block="sampled", distributed=True, eval_batch=True, most_flops=_most_flops,
)  # fmt: skip
