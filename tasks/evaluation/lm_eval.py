"""Run one lm-eval 0.4.13 task, stock or from recipes/lm_eval/, and return its Score and samples.

This calls `lm_eval.evaluate`, not `simple_evaluate`, which reseeds every generator and ignores a number of shots where
the task says 0. It never uses lm-eval's request and answer caches: their keys name neither the model nor the template.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.keys import text_digest
from smoltulu.recipes import LM_EVAL_TASKS
from smoltulu.schemas.evaluation import EvaluationSettings, EvaluationTask, Score
from smoltulu.tasks.evaluation.answers import Answer, NotesEnds
from smoltulu.tasks.evaluation.chance import chance_details, guessed
from smoltulu.tasks.evaluation.choices import SharesContexts
from smoltulu.tasks.evaluation.definitions import definition_digest
from smoltulu.tasks.evaluation.gold import add_bits_per_byte, add_to_group
from smoltulu.tasks.evaluation.ifeval import prepare_punkt
from smoltulu.tasks.evaluation.kept import Kept, Resuming
from smoltulu.tasks.evaluation.local_files import forget_files, read_splits
from smoltulu.tasks.evaluation.names import file_problems, local_only, unknown_task
from smoltulu.tasks.evaluation.prepare import check_description, check_model, fit_examples, limit_answers
from smoltulu.tasks.evaluation.samples import Sample, is_parts, marked, sample_counts
from smoltulu.tasks.evaluation.stock_index import quick_index
from smoltulu.tasks.models.tokens import added_tokens, check_prompts

if TYPE_CHECKING:
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("smoltulu")

_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MAX_GEN_TOKS = 256  # lm-eval's, where a task names none


def harness_name() -> str:
    """Package and version, for a Score."""
    return f"lm-eval {metadata.version('lm_eval')}"


@cache
def task_manager(*, stock: bool) -> TaskManager:
    """Index of task definitions: the shipped ones alone (0.03 s), or lm-eval's thousands as well (0.9 s)."""
    from lm_eval.tasks import TaskManager

    # Said of every task with a `custom_dataset`, 27 times for BBH; and it is about lm-eval's command line.
    logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs can be" not in str(record.msg))
    with quick_index():
        return TaskManager(include_path=str(LM_EVAL_TASKS), include_defaults=stock)


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int, chat: bool
) -> HFLM:
    """A model for lm-eval, which sees the tokens that training saw.

    lm-eval by itself adds to a prompt what the tokenizer adds to a text. Here nothing is added where the chat template
    is applied (`chat`): the template says whether there is a bos. To plain text the tokenizer's bos is added, as in
    pre-training, but no eos: the model would have to continue after it.

    RuntimeError where the tokens of a conversation are not those of `tasks.models.tokens`.
    """
    from lm_eval.models.huggingface import HFLM

    before = [] if chat else added_tokens(tokenizer)[0]

    class SameTokens(NotesEnds, SharesContexts, HFLM):
        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **kwargs: Any,
        ) -> list[int]:
            ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
            # As lm-eval, which takes a text that begins with bos to have been written with it.
            if add_special_tokens is not False and ids[: len(before)] != before:
                ids = before + ids
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            assert not truncation, "off in HFLM, and not asked for here"
            rows = [self.tok_encode(string) for string in strings]
            batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            cut = slice(-left_truncate_len, None) if left_truncate_len else slice(None)
            return batch["input_ids"][:, cut], batch["attention_mask"][:, cut]

    wrapped = SameTokens(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype="float32",  # sums of bfloat16 are rounded to a quarter: choices would tie
    )
    if chat:
        rendered = wrapped.apply_chat_template
        check_prompts(tokenizer, "lm-eval", lambda rows: [wrapped.tok_encode(rendered(row)) for row in rows])
        check_prompts(
            tokenizer, "lm-eval", lambda rows: wrapped.tok_batch_encode([rendered(row) for row in rows])[0].tolist()
        )
    return wrapped


def check_tasks(tasks: tuple[EvaluationTask, ...]) -> TaskManager:
    """The smallest index that has all `tasks`. ValueError: unknown names (with the nearest), or no files given."""
    shipped = task_manager(stock=False)
    wanted = {task.name for task in tasks}
    manager = shipped if wanted <= set(shipped.all_tasks) else task_manager(stock=True)
    unknown = (unknown_task(name, manager.all_tasks, harness_name()) for name in wanted - set(manager.all_tasks))
    of_files = (problem for task in tasks for problem in file_problems(task, local_only()))
    if problems := [*sorted(unknown), *of_files]:
        raise ValueError("\n".join(problems))
    if any(map(_tells_sentences_apart, tasks)):
        prepare_punkt()  # lm-eval looks for it, and would download it, when it loads the task
    return manager


def _tells_sentences_apart(task: EvaluationTask) -> bool:
    return "ifeval" in task.name or task.name == "leaderboard"


def run_task(
    model: HFLM,
    manager: TaskManager,
    task: EvaluationTask,
    settings: EvaluationSettings,
    *,
    chat_template: str,
    world: str | None,
    externals: Mapping[str, str],
    on_progress: Callable[[float], None],
    kept: Kept | None = None,
) -> tuple[Score, list[Sample], dict[str, Any]]:
    """Run one task over `model`.

    Args:
        kept: answers that are there already; new ones are kept there.
        externals: content digests of local files, as the key has them.
        on_progress: called with the share of the task's requests that are answered, 0 to 1.

    Returns:
        the headline score (other metrics in `details`), one record per document and filter, and lm-eval's own results.

    Raises:
        ValueError: a split or metric that is not there, shots where the task allows none, files or definitions that
            changed since the key was made.
    """
    import lm_eval

    loaded = _load(manager, task, world, externals)
    if externals.get(f"{task.name}.definition") not in (None, definition_digest(task.name)):
        raise ValueError(
            f"evaluation task {task.name!r}: its definition in {LM_EVAL_TASKS} changed while the run went on, so it is "
            "not the one that the key stands for; leave it alone while a run reads it, and run again"
        )
    leaves = list(loaded["tasks"].values())
    details: dict[str, Any] = {}
    chat = settings.apply_chat_template
    check_model(model, chat=chat)
    fitted = []
    for leaf in leaves:
        _set_shots(leaf, task, settings.seed)
        if chat:
            details.update(check_description(leaf, shipped=task.name in task_manager(stock=False).all_tasks))
        limit_answers(leaf, lambda text: len(model.tok_encode(text, add_special_tokens=False)), chat=chat)
        for name, num in _fit_generation(leaf, model.max_length).items():
            details[name] = max(num, details.get(name, 0))  # each member of BBH has its own
        fitted.append(fit_examples(leaf, model, _max_gen_toks(leaf), task.limit, chat=chat))
    model.set_cache_hook(_AnswerCounter(leaves, on_progress))
    answering: Any = Resuming(model, kept)
    results = lm_eval.evaluate(
        answering,
        loaded,
        limit=task.limit,
        log_samples=True,
        bootstrap_iters=10_000,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    assert results is not None  # this stage is one process
    add_bits_per_byte(answering, leaves, results, chat=chat)
    add_to_group(task.name, leaves, results, task.metric)
    on_progress(1.0)
    if _tells_sentences_apart(task):  # two instructions depend on it, and machines differ
        details["sentences"] = "nltk's punkt_tab" if prepare_punkt() else "punkt without its list of abbreviations"
    if any(fitted):
        details["num_with_fewer_examples"] = sum(one.num_with_fewer for one in fitted if one)

    values = {**results["results"].get(task.name, {}), **results.get("groups", {}).get(task.name, {})}
    metrics = {
        name: value
        for name, value in values.items()
        if "," in name and "_stderr," not in name and isinstance(value, (int, float))
    }
    if task.metric not in metrics:
        raise ValueError(
            f"evaluation task {task.name!r} has no metric {task.metric!r}; "
            f"it reports: {', '.join(sorted(metrics)) or 'none'}"
        )
    cut = {leaf.task_name: _left_cut(leaf, model) for leaf in leaves}
    if num_left_cut := sum(map(len, cut.values())):
        logger.warning(
            "%s: %d prompts are longer than evaluation.max_length leaves room for; their beginning was cut off. "
            "Fewer shots or a longer max_length would help",
            task.name,
            num_left_cut,
        )
    details.update(chance_details(metrics[task.metric], guessed(results, task.metric)))
    if details.get("is_near_chance"):
        found = (task.name, task.metric, metrics[task.metric], details["chance"])
        logger.info("%s %s: %.4f is within noise of chance, %.4f", *found)
    samples = [
        marked(_compact(name, sample) | {"is_left_cut": sample["doc_id"] in cut[name]})
        for name, documents in results.get("samples", {}).items()
        for sample in documents
    ]
    counts = [results["n-samples"][leaf.task_name] for leaf in leaves]
    num_samples = sum(count["effective"] for count in counts)
    stderr = _own_stderr(leaves, task.metric, results)
    if stderr is None:
        stderr = values.get(task.metric.replace(",", "_stderr,"))
    shots_of_leaves = {leaf.get_config("num_fewshot") for leaf in leaves}
    shots = shots_of_leaves.pop() if len(shots_of_leaves) == 1 else None
    score = Score(
        task=task.name,
        metric=task.metric,
        value=float(metrics[task.metric]),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        num_samples=num_samples,
        num_fewshot=shots if isinstance(shots, int) else task.num_fewshot,
        harness=harness_name(),
        task_version=str(results["versions"].get(task.name, "none")),
        template_digest=text_digest(chat_template) if settings.apply_chat_template else "none",
        limited=num_samples < sum(count["original"] for count in counts)
        or any(source.limit is not None for source in task.files.values()),
        details={**details, "metrics": metrics, **_direction(results, task), **sample_counts(samples, task.metric)},
    )
    parts = ("results", "groups", "versions", "n-shot", "n-samples")
    return score, samples, {name: results[name] for name in parts if name in results}


def _direction(results: Mapping[str, Any], task: EvaluationTask) -> dict[str, bool]:
    """`higher_is_better` of the headline, where it is not: a comparison must know."""
    is_up = results.get("higher_is_better", {}).get(task.name, {}).get(task.metric.partition(",")[0])
    return {"higher_is_better": False} if is_up is False else {}


def _own_stderr(leaves: list[Any], metric: str, results: Mapping[str, Any]) -> float | None:
    """Standard error of a metric whose aggregation brings one (`stderr`), as lm-eval knows only that of a mean."""
    name, _, of_filter = metric.partition(",")
    if len(leaves) != 1 or (stderr := getattr(leaves[0].aggregation().get(name), "stderr", None)) is None:
        return None
    samples = results["samples"][leaves[0].task_name]
    found: float | None = stderr([sample[name] for sample in samples if sample["filter"] == of_filter])
    return found


def _load(
    manager: TaskManager, task: EvaluationTask, world: str | None, externals: Mapping[str, str]
) -> dict[str, Any]:
    """lm-eval's task objects. Its `load` merges no dict with a definition by name; what it calls for that does."""
    if not task.files:
        return manager.load([task.name])
    forget_files()  # each task reads its files anew, so that one which changed is seen
    digests = {
        split: digest for split in task.files if (digest := externals.get(f"{task.name}.files.{split}")) is not None
    }
    arguments = {"sources": task.files, "world": world, "digests": digests}
    member: dict[str, Any] = {"dataset_kwargs": arguments}
    if task.name not in task_manager(stock=False).all_tasks:
        # The shipped definitions say themselves how they read their files.
        member |= {"custom_dataset": read_splits, "dataset_path": None, "dataset_name": None}
    if task.num_fewshot == 0:  # or lm-eval would want the examples' split as well
        member |= {"training_split": None, "fewshot_split": None, "fewshot_config": None}
    try:
        built = manager._factory.build(manager.task_index[task.name], overrides=member, registry=manager.task_index)
    except KeyError as error:
        raise ValueError(
            f"evaluation task {task.name!r} needs the split {error}; files give: {', '.join(sorted(task.files))}. "
            "Add the file, or set num_fewshot: 0 if only examples come from that split"
        ) from error
    return manager.load(built if isinstance(built, list) else [built])


def _set_shots(leaf: Any, task: EvaluationTask, seed: int) -> None:
    default = leaf.get_config("num_fewshot")
    if task.num_fewshot is not None:
        if default == 0 and task.num_fewshot > 0:
            raise ValueError(
                f"evaluation task {leaf.task_name!r} is defined without examples (num_fewshot 0); "
                f"remove num_fewshot: {task.num_fewshot}"
            )
        leaf.set_config(key="num_fewshot", value=task.num_fewshot)
    elif default is None:
        leaf.set_config(key="num_fewshot", value=0)
    wanted = leaf.get_config("num_fewshot")
    split = leaf.get_config("fewshot_split") or leaf.get_config("training_split")
    if wanted and task.files and split not in (None, *task.files):
        raise ValueError(
            f"evaluation task {task.name!r} takes its {wanted} examples from the split {split!r}; add it to files "
            f"(given: {', '.join(sorted(task.files))}) or set num_fewshot: 0"
        )
    leaf.set_fewshot_seed(seed=seed)


def _fit_generation(leaf: Any, max_length: int) -> dict[str, int]:
    """Cut answers of over three quarters of `max_length` to a half, which leaves room for the prompt. Score details."""
    if leaf.get_config("output_type") != "generate_until":
        return {}
    asked = _max_gen_toks(leaf)
    if asked <= 0.75 * max_length:
        return {"max_gen_toks": asked}
    given = max_length // 2
    logger.warning(
        "%s asks for answers of %d tokens, prompt and answer may have %d: answers are cut at %d",
        leaf.task_name,
        asked,
        max_length,
        given,
    )
    leaf.set_config(key="generation_kwargs", value={"max_gen_toks": given}, update=True)
    return {"max_gen_toks": given, "max_gen_toks_asked": asked}


def _max_gen_toks(leaf: Any) -> int:
    settings = leaf.get_config("generation_kwargs") or {}
    return next((settings[name] for name in _MAX_TOKENS_NAMES if settings.get(name)), _DEFAULT_MAX_GEN_TOKS)


class _AnswerCounter:
    """A cache hook, which lm-eval calls with every answer. It caches nothing and counts the answers."""

    def __init__(self, leaves: list[Any], on_progress: Callable[[float], None]) -> None:
        self.leaves, self.on_progress = leaves, on_progress
        self.num_answers = 0
        self.num_requests = 0

    def add_partial(self, _method: str, _request: Any, _answer: Any) -> None:
        if not self.num_requests:  # known only once lm-eval has built them
            self.num_requests = sum(len(leaf.instances) for leaf in self.leaves) or 1
        self.num_answers += 1
        # Right answers of a task that generates are asked about after its own requests: the task is not at its end.
        self.on_progress(min(0.99, self.num_answers / self.num_requests))


def _left_cut(leaf: Any, model: HFLM) -> set[int]:
    """Ids of the documents whose prompt (and choice) did not fit, as lm-eval cuts them from the left.

    The last token of a choice is no input. A text whose likelihood is asked for as a whole is read in windows, uncut.
    """
    kind = leaf.get_config("output_type")
    if kind == "loglikelihood_rolling":
        return set()
    room = model.max_length - _max_gen_toks(leaf) if kind == "generate_until" else model.max_length + 1
    room -= len(model.tok_encode(""))  # the bos before a plain text
    texts = [
        "".join(argument for argument in instance.args if isinstance(argument, str)) for instance in leaf.instances
    ]
    lengths = [len(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    return {item.doc_id for item, length in zip(leaf.instances, lengths, strict=True) if length > room}


def _compact(task: str, sample: dict[str, Any]) -> Sample:
    """What a paired comparison and a reader need of one document. Equal hashes: two runs asked the same."""
    record = {"task": task, "id": sample["doc_id"], "filter": sample["filter"], "target": str(sample["target"])}
    record |= {name: sample[name][:16] for name in ("doc_hash", "prompt_hash", "target_hash")}
    record["prompt"] = str(sample["arguments"][0][0])
    record["metrics"] = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], (int, float))}
    # A prompt of IFEval has several instructions: they are resampled together.
    if parts := {name: [float(one) for one in sample[name]] for name in sample["metrics"] if is_parts(sample[name])}:
        record["parts"] = parts
    answer, parsed = sample["resps"][0][0], sample["filtered_resps"][0]
    if isinstance(answer, str):
        record |= {"completion": str(answer), "parsed": parsed if isinstance(parsed, str) else json.dumps(parsed)}
    elif isinstance(answer, tuple):
        record["logliks"] = [float(choice[0][0]) for choice in sample["resps"]]
    elif isinstance(answer, float):
        record["logliks"] = [answer]
    if isinstance(answer, Answer):
        record |= {"stop": answer.stop, "num_tokens": answer.num_tokens}
    return record
