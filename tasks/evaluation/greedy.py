"""Greedy answers of lm-eval's generation tasks, written by our engine: a full batch, and each prompt read once.

lm-eval's own loop writes batch by batch, each to the end of its longest answer. What an answer says is the same, but
for the rounding of sums. Tasks that draw, and models whose generation settings do more than choose the likeliest token,
go on by transformers' `generate`.
"""

from __future__ import annotations

import json
from typing import Any

from smoltulu.tasks.evaluation.answers import Answer, end_of
from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.interface import Request, Sampling

#: What a model's generation settings may say without a say in what is likeliest.
_HARMLESS = {
    "_from_model_config", "bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "pad_token_id",
    "temperature", "top_k", "top_p", "transformers_version", "use_cache",
}  # fmt: skip


class WritesGreedily:
    """Mixed into lm-eval's HFLM, before `NotesEnds`, which has the other tasks."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        model: Any = self
        groups: dict[str, list[int]] = {}
        for place, one in enumerate(requests):
            groups.setdefault(json.dumps(one.args[1], sort_keys=True, default=str), []).append(place)
        made: dict[int, str] = {}
        for places in groups.values():
            how = normalize_gen_kwargs(dict(requests[places[0]].args[1]), model.max_gen_toks)
            until, num_tokens = how.pop("until", None), how.pop("max_gen_toks")
            if how.pop("do_sample") or how.keys() - {"temperature", "top_p", "top_k"} or not self._chooses_likeliest():
                asked = [requests[place] for place in places]
                answers = super().generate_until(asked, disable_tqdm=disable_tqdm)  # type: ignore[misc]
            else:
                stops = handle_stop_sequences(until, model.tok_decode(model.eot_token_id, skip_special_tokens=False))
                answers = self._write([requests[place].args for place in places], stops, num_tokens)
            made |= zip(places, answers, strict=True)
        return [made[place] for place in range(len(requests))]

    def _chooses_likeliest(self) -> bool:
        model: Any = self
        return not model.think_end_token and not model.model.generation_config.to_diff_dict().keys() - _HARMLESS

    def _write(self, asked: list[Any], stops: list[str], num_tokens: int) -> list[Answer]:
        """asked: (context, generation settings) of each."""
        from lm_eval.models.utils import postprocess_generated_text

        model: Any = self
        room = model.max_length - num_tokens
        assert room > 0, "fit_examples and limit_answers leave room for a prompt"
        prompts = [model.tok_encode(context, left_truncate_len=room) for context, _ in asked]
        ends_by = model.model.generation_config.eos_token_id
        stop_ids = {model.eot_token_id, *(ends_by if isinstance(ends_by, list) else [ends_by])} - {None}
        sampling = Sampling(num_tokens, 0.0, tuple(stop_ids), stop_strings=tuple(stop for stop in stops if stop))
        engine = TransformersEngine(
            model.model, pad_id=model.tokenizer.pad_token_id, batch_size=model.batch_size, decode=model.tok_decode
        )
        answers = []
        written = engine.generate([Request(ids, 0, place, 0) for place, ids in enumerate(prompts)], sampling)
        for one, request in zip(written, asked, strict=True):
            text = postprocess_generated_text(model.tok_decode(one.ids), stops, None)
            answers.append(Answer(text, *end_of(one.ids, stop_ids, stops, model.tok_decode)))
            model.cache_hook.add_partial("generate_until", request, text)
        return answers
