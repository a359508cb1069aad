"""`smoltulu compare`: two evaluations, item by item. Needs no server, imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoltulu.flows.cli.output import console, echo, failures, print_json, table
from smoltulu.flows.cli.store import JsonOption, StoreOption, finished, open_catalogue, ref_of

if TYPE_CHECKING:
    from smoltulu.artifacts.manifests import Ref
    from smoltulu.artifacts.upkeep.catalogue import Catalogue
    from smoltulu.schemas.run import RunRecord
    from smoltulu.tasks.comparison.evaluations import Comparison, Measured
    from smoltulu.tasks.comparison.paired import PairedTest

_POWER = 0.8
#: Settings that all scores of an evaluation share, and where they are given.
_SETTINGS = {
    "precision": "evaluation.precision; lm-eval: dtype in --model_args",
    "backend": "lm-eval: --model hf",
    "max_length": "evaluation.max_length",
}
_NUM_CHARACTERS = 300
_WHAT = (
    "an evaluation, or a model that was evaluated: RUN:STAGE (as tiny-…:sft), a tag, or first digits of a key; or a "
    "folder that lm-eval wrote with --log_samples"
)


def compare(
    before: Annotated[str, typer.Argument(help=_WHAT)],
    after: Annotated[str, typer.Argument(help="the same")],
    level: Annotated[float, typer.Option(min=1e-9, max=0.5, help="of significance, for all scores together")] = 0.05,
    metric: Annotated[
        str | None, typer.Option(help="judge by this one instead of the headlines, e.g. bits_per_byte")
    ] = None,
    flips: Annotated[int, typer.Option(min=0, help="changed items of each score to show")] = 0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which scores of two evaluations truly differ: paired by item, exact tests, all scores together (Holm).

    What is not the same thing (documents, prompts, template, shots, harness, task version, backend, precision, the way
    to generate) is not compared, and named.
    """
    from smoltulu.tasks.comparison import evaluations

    with failures():
        sides = [_read(what, store, metric, texts=flips > 0) for what in (before, after)]
        comparisons = evaluations.compare("", *(measured for measured, _ in sides))
        _check_settings(*(settings for _, settings in sides))
        if metric and not comparisons:
            raise ValueError(f"neither evaluation has a task with the metric {metric!r}; leave --metric out")
    judged = evaluations.verdicts(comparisons, level)
    num_tests = sum(one.test is not None for one in comparisons)
    values = [_values(one, adjusted, verdict, level, num_tests) for one, adjusted, verdict in judged]
    if as_json:
        print_json(values)
        return
    out = console()
    if not values:
        echo("neither evaluation has a score")
        return
    shown = table(*values[0], right=("before", "after", "difference", "p", "p (Holm)"), whole=("task",))
    for row in values:
        shown.add_row(*row.values())
    out.print(shown)
    echo(f"interval: of 95 %, each by itself; visible: what {_POWER:.0%} of such comparisons would find")
    for one, _, _ in judged:
        if (test := one.over_members) is not None:
            echo(
                f"{one.task}: of other members like its {test.num_items} (each one value): "
                f"{_signed(one, test)['difference']} [{_signed(one, test)['interval']}], p {test.p_value:.3g}"
            )
        if not one.higher_is_better:
            echo(f"{one.task}: {one.metric} is better when it is lower; lost are the items where it rose")
    for one, _, _ in judged if flips else ():
        if one.test is not None:
            _print_flips(one, sides[0][0][one.task], sides[1][0][one.task], flips)


def _values(one: Comparison, adjusted: float | None, verdict: str, level: float, num_tests: int) -> dict[str, str]:
    from smoltulu.tasks.comparison.paired import smallest_visible

    test, made = one.test, {"task": one.task, "metric": one.metric}
    made |= {"before": f"{one.before:.4f}", "after": f"{one.after:.4f}"}
    if test is None:
        unknown = dict.fromkeys(("difference", "interval", "items", "lost, gained", "p", "p (Holm)", "visible"), "-")
        return made | unknown | {"verdict": f"not comparable: {one.reason}"}
    # Of right and wrong it is the share that changed.
    squared = test.stderr**2 * (test.num_items - 1) + test.difference**2
    visible = smallest_visible(test.num_items, squared, level / num_tests, _POWER)
    return made | {
        **_signed(one, test),
        "items": f"{test.num_items:,}",
        "lost, gained": f"{test.num_lost:,}, {test.num_gained:,}",
        "p": f"{test.p_value:.3g}",
        "p (Holm)": f"{adjusted:.3g}",
        "visible": f"{visible:.4f}" if squared else "-",
        "verdict": verdict,
    }


def _signed(one: Comparison, test: PairedTest) -> dict[str, str]:
    """Of the scores as they are: the test's is positive where they got better."""
    ends = (test.difference, test.low, test.high) if one.higher_is_better else (-test.difference, -test.high, -test.low)
    return {"difference": f"{ends[0]:+.4f}", "interval": f"{ends[1]:+.4f} to {ends[2]:+.4f}"}


def _check_settings(before: dict[str, str], after: dict[str, str]) -> None:
    """ValueError where the two were measured in another precision, on another backend, or cut at another length."""
    for name, advice in _SETTINGS.items():
        values = [side.get(name, "unknown") for side in (before, after)]
        if values[0] != values[1] and (name == "precision" or "unknown" not in values):
            raise ValueError(
                f"measured with another {name.replace('_', ' ')}: {' -> '.join(values)}; evaluate both with one "
                f"({advice})"
            )


def _print_flips(one: Comparison, before: Measured, after: Measured, limit: int) -> None:
    from smoltulu.tasks.comparison.evaluations import flipped

    pairs = flipped(before, after)
    echo(f"\n{one.task}: {len(pairs):,} items changed" + (f", {limit} of them" if len(pairs) > limit else ""))
    for old, new in pairs[:limit]:
        echo(f"  item {old.row.get('id')}: {old.value:g} -> {new.value:g}; target {_short(old.row.get('target'))}")
        for name, item in (("before", old), ("after", new)):
            answer = item.row.get("completion", item.row.get("completions"))
            if answer is not None:
                echo(f"    {name:6} {_short(answer)}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= _NUM_CHARACTERS else text[:_NUM_CHARACTERS] + "…")


# ------------------------------------------------------------------------------------------------- what a user names


def _read(
    what: str, store: Path | None, metric: str | None, *, texts: bool
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Scores with their items, and the settings that they share."""
    from smoltulu.schemas.evaluation import EvaluationOutputs
    from smoltulu.tasks.comparison.evaluations import measured
    from smoltulu.tasks.comparison.lm_eval_files import read_folder, settings_of

    if Path(what).is_dir():
        found = read_folder(Path(what))
        if metric is not None:
            found = {name: one for name, one in found.items() if one.score.metric.partition(",")[0] == metric}
        return found, settings_of(Path(what))
    catalogue = open_catalogue(store)
    folder, manifest = finished(catalogue, evaluation_of(catalogue, what))
    settings = manifest["spec"]["config"].get("settings", {})
    shared = {name: str(settings[name]) for name in _SETTINGS if name in settings}
    outputs = EvaluationOutputs.model_validate(manifest["outputs"])
    # What was asked for, or what the device had, where the scores say it.
    if dtypes := {str(one.details["dtype"]) for one in outputs.scores if "dtype" in one.details}:
        shared["precision"] = ", ".join(sorted(dtypes))
    return measured(folder, outputs, metric, texts=texts), {"backend": "transformers"} | shared


def evaluation_of(catalogue: Catalogue, what: str) -> Ref:
    """The evaluation that is meant. ValueError: nothing, or several, and which."""
    from smoltulu.artifacts.manifests import scores_of
    from smoltulu.flows.cli.store_views import refs_of_run
    from smoltulu.tasks.stages import made_by

    def evaluations(run: RunRecord) -> dict[str, Ref]:
        made = {node: ref for node, ref in refs_of_run(run).items() if scores_of(catalogue.known(ref))}
        return {node.removeprefix("evaluation-"): ref for node, ref in made.items()}

    found = ref_of(catalogue, what, "evaluation", evaluations)
    if made_by(found.stage) == "scores" and scores_of(catalogue.known(found)):
        return found
    made = catalogue.evaluations_of(found)
    if len(made) != 1:
        names = ", ".join(f"{ref.stage}/{ref.key[:12]}" for ref in made)
        raise ValueError(
            f"{what} was evaluated {len(made)} times: {names}; name one of them" if made else
            f"{what} ({found.stage}) was not evaluated; run the recipe up to evaluation"
        )  # fmt: skip
    return made[0]
