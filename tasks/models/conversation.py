"""A conversation with a model of an artifact, in its own template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from smoltulu.tasks.models.chat_template import load_chat_template
from smoltulu.tasks.models.classifiers import refuse_classifier
from smoltulu.tasks.models.folders import check_model_folder, load_to_write, load_tokenizer
from smoltulu.tasks.models.tokens import Messages, prompt_ids, stop_token_ids


class Conversation:
    """What was said so far. `max_new_tokens`: of an answer; `temperature`: 0 is greedy.

    Raises:
        ValueError: the folder holds no language model, or none with a template and none is given.
    """

    def __init__(
        self, folder: Path, *, template: str | None, system: str | None, max_new_tokens: int, temperature: float,
        seed: int,
    ) -> None:  # fmt: skip
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        check_model_folder(folder)
        refuse_classifier(folder)
        self.tokenizer = load_tokenizer(folder, _template_of(folder, template))
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        on_gpu = torch.cuda.is_available()
        model = load_to_write(folder, self.tokenizer, bfloat16=on_gpu)
        self.model = model.to("cuda") if on_gpu else model
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: Messages = list(self.system)
        torch.manual_seed(seed)

    def forget(self) -> None:
        """Begin anew."""
        self.turns = list(self.system)

    def answer(self, text: str, show: Callable[[str], None]) -> bool:
        """Answer and remember both; `show` gets the answer piece by piece. Whether it ended by itself.

        ValueError where no room is left for an answer; then nothing of it is remembered.
        """
        import torch
        from transformers import TextStreamer

        class Shown(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                show(text)

        asked = [*self.turns, {"role": "user", "content": text}]
        [ids] = prompt_ids(self.tokenizer, [asked])
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids):,} tokens, and this model reads {len(ids) + room:,}; begin anew (/new)"
            )
        stops = stop_token_ids(self.tokenizer)
        sampled = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        how = sampled if self.temperature else {"do_sample": False}
        with torch.inference_mode():
            made = self.model.generate(
                torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                max_new_tokens=min(self.max_new_tokens, room),
                eos_token_id=stops,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=Shown(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **how,
            )[0, len(ids) :].tolist()
        ended = bool(made) and made[-1] in stops
        said = self.tokenizer.decode(made[:-1] if ended else made, skip_special_tokens=True)
        self.turns = [*asked, {"role": "assistant", "content": said}]
        return ended


def _template_of(folder: Path, given: str | None) -> str:
    """The text of the template; the folder's own where none is given."""
    if given is not None:
        return load_chat_template(given)
    own = folder / "chat_template.jinja"
    if not own.is_file():
        raise ValueError(
            f"the model in {folder} has no chat template: it was never taught one. Give --template, e.g. tulu, and "
            "expect a base model's answers"
        )
    return own.read_text("utf-8")
