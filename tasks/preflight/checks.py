"""The checks of the preflight: each compares a figure with a threshold, and gives advice where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from smoltulu.artifacts import readable
from smoltulu.schemas.held_out import MIN_PROMPTS_OF_A_FALL
from smoltulu.schemas.preflight import PreflightConfig, PreflightOutputs, TokenizerFacts
from smoltulu.schemas.rlvr import RLVRSettings

Status = Literal["ok", "noticed", "fails"]


@dataclass(frozen=True)
class Check:
    """One check: what was found, the threshold, the first rows that show it, and advice."""

    name: str
    status: Status
    found: str
    threshold: str = "none"
    rows: tuple[int, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        """The check as part of an error message."""
        rows = f" (rows {', '.join(map(str, self.rows))})" if self.rows else ""
        limit = f"; allowed: {self.threshold}" if self.threshold != "none" else ""
        return f"{self.found}{rows}{limit}; {self.advice}"


def checks(config: PreflightConfig, outputs: PreflightOutputs) -> list[Check]:
    """All checks of these rows, in the order of the report."""
    return list(_checks(config, outputs))


def _checks(config: PreflightConfig, outputs: PreflightOutputs) -> Iterator[Check]:
    noun = {"conversations": "rows", "pairs": "pairs", "prompts": "prompts"}[config.kind]

    def share(field: str, name: str, words: str, setting: str | None, advice: str) -> Check:
        """Compare a count of source rows with the largest share that `setting` allows. None: it never fails."""
        count = getattr(outputs, field)
        part = count / max(outputs.num_source_rows, 1)
        limit = 1 if setting is None else getattr(config.settings, setting)
        status: Status = "ok" if not count else "fails" if part > limit else "noticed"
        found = f"{count:,} of {outputs.num_source_rows:,} {noun} ({readable.percent(part)}) {words}"
        threshold = "none" if setting is None else f"preflight.{setting} {limit:g}"
        return Check(name, status, found, threshold, outputs.first_rows.get(field, ()), advice)

    in_answers = config.kind != "prompts" and outputs.num_special_trained
    length = "max_prompt_length" if config.kind == "prompts" else "max_length"
    if not outputs.num_rows:
        nothing = (
            f"none of {outputs.num_source_rows:,} {noun} has anything to train on within {config.max_length} tokens"
        )
        yield Check("Something is left", "fails", nothing, advice=f"raise {length}, or look at the data")
    if config.kind == "prompts" and config.training_settings:
        yield from _prompts_of_a_step(RLVRSettings.model_validate(config.training_settings), outputs)
    refusals = [f"{count:,} {noun}: {why}" for why, count in outputs.refusals.items()]
    fate = "dropped" if config.overlong == "drop" or config.kind == "prompts" else "cut"
    yield share(
        "num_overlong",
        "Length",
        f"are longer than {length} {config.max_length} and {fate}",
        "max_overlong_share",
        f"raise {length}, shorten or filter the data, or allow a larger share",
    )
    yield share(
        "num_malformed",
        "Template renders",
        "are not rendered by the chat template and left out",
        "max_faulty_share",
        "; ".join(["fix or filter these rows, or use a template that renders them", *refusals]),
    )
    if config.kind != "prompts":
        yield share(
            "num_empty",
            "Trained tokens",
            "have nothing to train on, once cut, and are left out",
            "max_faulty_share",
            f"filter them, or raise {length}: their prompts may fill it",
        )
        yield share(
            "num_without_eos",
            "Ends in eos",
            "do not end their last trained turn with eos, or with a token that ends a turn",
            "max_faulty_share",
            "put eos_token, or what ends a turn, inside the template's generation block, and see that it is one of the "
            "tokenizer's added tokens: else the model never learns to stop",
        )
        yield share(
            "num_eos_lost",
            "eos cut off",
            "are cut before the eos of their last answer",
            None,
            f"of these the model does not learn to stop: raise {length}, or set overlong to drop",
        )
        yield share(
            "num_unstable",
            "Prompt as in generation",
            "begin with other tokens than generation would see for the same prompt",
            "max_unstable_share",
            "use a template whose prompt ends on a token boundary (often: an answer that begins with white space)",
        )
    if config.kind == "pairs":
        yield share(
            "num_equal",
            "Sides differ",
            "have the same tokens chosen and rejected, once cut",
            "max_faulty_share",
            f"they teach nothing (gradient 0): filter them, or raise {length} if they differ behind the cut",
        )
    yield share(
        "num_two_bos",
        "One bos",
        "begin with two bos tokens",
        "max_faulty_share",
        "take the bos out of the chat template or out of the data, or leave add_bos_token out",
    )
    yield share(
        "num_special",
        "Special tokens in the data",
        "spell a special token in their own text, which becomes that token"
        + (f"; {outputs.num_special_trained:,} of them in an answer, where it is trained" if in_answers else ""),
        None,
        "the model takes it for the real one, e.g. for the end of a turn: filter or rewrite these rows",
    )
    yield share(
        "num_headers",
        "Headers in the data",
        "hold a header of the chat template in their own text",
        None,
        "it reads as the beginning of a turn: filter or rewrite these rows",
    )
    yield share(
        "num_duplicates", "Duplicates", "have the same tokens as one before them", None, "remove them if unmeant"
    )
    yield from _of_the_model(config, outputs, share)


def _prompts_of_a_step(settings: RLVRSettings, outputs: PreflightOutputs) -> Iterator[Check]:
    """Whether there are as many prompts as rollouts are generated for at once, beside those that are held out."""
    num_rows, held_out = outputs.num_rows, settings.held_out
    found = f"{num_rows:,} prompts are left, and a batch of {settings.num_rollouts:,} rollouts needs "
    found += f"{settings.num_prompts:,} different ones"
    advice, needed = f"lower effective_batch_size, raise {settings.samples_field}, or give more prompts", 0
    if held_out is not None:
        # Kinds may have rows in common, so this is the least that is held out.
        of_kinds = max((outputs.kinds.get(kind, 0) for kind in held_out.kinds), default=0)
        needed = held_out.num_prompts + of_kinds
        found += f", beside {needed:,} that are held out"
        advice += ", or hold out fewer"
    needed += settings.num_prompts
    fails = num_rows < needed
    yield Check("Prompts of a step", "fails" if fails else "ok", found, f"at least {needed:,}", advice=advice)
    # A preflight of an older version did not count kinds.
    missing = [kind for kind in held_out.kinds if kind not in outputs.kinds] if held_out and outputs.kinds else []
    if missing:
        yield Check(
            "Held-out kinds",
            "fails",
            f"no prompt is of kind {', '.join(missing)}, which rlvr.held_out.kinds names",
            f"kinds that there are: {', '.join(outputs.kinds)}",
            advice="name one of these, or leave it out",
        )
    if held_out is not None and outputs.kinds and held_out.max_kinds_drop is not None and not missing:
        most = sum(outputs.kinds[kind] for kind in held_out.kinds)  # some may be one question, or of two kinds
        yield Check(
            "Held-out kinds that fall",
            "fails" if most < MIN_PROMPTS_OF_A_FALL else "ok",
            f"{most:,} prompts are of held-out kinds; of few even a fall of all is not beyond noise",
            f"at least {MIN_PROMPTS_OF_A_FALL}",
            advice="hold out more kinds, or leave max_kinds_drop out",
        )


def _bos(facts: TokenizerFacts) -> Check:
    """What a conversation begins with, and what the tokenizer would do by itself."""
    begins = f"conversations begin with {facts.begins_with!r}, as the chat template writes them"
    added = [
        f"{text!r} {where} a text"
        for text, where in ((facts.adds_before, "before"), (facts.adds_after, "behind"))
        if text
    ]
    if facts.adds_bos:
        return Check(
            "bos of the tokenizer",
            "noticed",
            f"{begins}; called on rendered text, the tokenizer puts a second bos before the template's",
            advice="training does not do so; see that whoever serves the model does not",
        )
    if not added:
        return Check("bos of the tokenizer", "ok", f"{begins}; the tokenizer by itself would add nothing")
    return Check(
        "bos of the tokenizer",
        "noticed",
        f"{begins}; the tokenizer by itself would add {' and '.join(added)}. No stage lets it do so",
        advice="a base model that was pre-trained with a bos is better trained with one: set add_bos_token to true"
        if facts.adds_before
        else "see that whoever serves the model does not let it do so",
    )


def _of_the_model(config: PreflightConfig, outputs: PreflightOutputs, share: Callable[..., Check]) -> Iterator[Check]:
    facts = outputs.tokenizer
    if facts is None:
        return
    same = facts.pad_token_id in (facts.eos_token_id, *facts.stop_token_ids)
    yield Check(
        "pad is not eos",
        "fails" if same else "ok",
        f"pad is token {facts.pad_token_id}, eos {facts.eos_token_id}",
        "different",
        advice="set base_model.pad_token to a token that the template never writes: padding would hide the eos",
    )
    yield share(
        "num_beyond_embeddings",
        "Vocabulary",
        f"hold a token beyond the {facts.num_embeddings or 0:,} embeddings of the base model",
        None,
        "SFT adds embeddings for them, which begin untrained: see that the tokenizer belongs to the model",
    )
    yield _bos(facts)
    room = facts.max_position_embeddings
    if room is not None:
        extra = config.training_settings.get("max_completion_length", 0)  # of RLVR
        longest, allowed = outputs.longest + extra, config.max_length + extra
        status: Status = "fails" if longest > room else "noticed" if allowed > room else "ok"
        answers = f" with its answer of up to {extra:,}" if extra else ""
        yield Check(
            "Positions",
            status,
            f"the longest row has {longest:,} tokens{answers}, at most {allowed:,} are allowed, the model has "
            f"{room:,} positions",
            "max_position_embeddings",
            advice=f"lower the lengths to {room:,} together, or take a model with a longer context",
        )
    run = outputs.dry_run
    if run is not None and isinstance(run.asked_tokens, int) and run.tokens_per_device != run.asked_tokens:
        yield Check(
            "Memory",
            "noticed",
            f"out of memory with the longest rows of {run.asked_tokens:,} tokens; {run.tokens_per_device:,} fit",
            advice=f"set compute.stages.{config.subject}.tokens_per_device to {run.tokens_per_device}; the training "
            "halves it by itself",
        )
    elif run is not None and run.asked_batch_size not in (None, run.per_device_train_batch_size):
        yield Check(
            "Memory",
            "noticed",
            f"out of memory with {run.asked_batch_size} of the longest rows; {run.per_device_train_batch_size} fit",
            advice=f"set compute.stages.{config.subject}.per_device_train_batch_size to "
            f"{run.per_device_train_batch_size}; the training halves it by itself",
        )
