"""Parameters of a flow as Prefect's form shows them: select boxes, and a description of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import getdoc, signature
from typing import Any, TypeVar, get_type_hints

from pydantic import Field
from pydantic.fields import FieldInfo

Function = TypeVar("Function", bound=Callable[..., Any])
FlowType = TypeVar("FlowType", bound=Any)


def choice(names: Iterable[str], **others: Any) -> Any:
    """A text that the form offers as a select box. The flow itself refuses others, by a message of ours."""
    return Field(json_schema_extra={"enum": list(names)}, **others)


def listed(descriptions: Mapping[str, str]) -> str:
    """Names with their descriptions, as a Markdown list."""
    return "".join(f"\n- `{name}`: {description}" for name, description in descriptions.items())


def described(function: Function) -> Function:
    """Prepare a flow's function for its form; `with_form` must stand above Prefect's decorator.

    The descriptions of the parameters go into the docstring: Prefect takes them from there, not from `Field`. The types
    are set aside: Prefect would make a JSON schema of them whenever the flow is imported, also in the process of every
    run, which for a recipe takes 0.2 s.
    """
    lines = [getdoc(function) or "", "", "Args:"]
    for name, hint in get_type_hints(function, include_extras=True).items():
        for field in getattr(hint, "__metadata__", ()):
            if isinstance(field, FieldInfo) and field.description:
                lines.append(f"    {name}: " + field.description.replace("\n", "\n        "))
    function.__doc__ = "\n".join(lines)
    function.__dict__["form"] = signature(function, eval_str=True)
    function.__annotations__ = {}
    return function


def with_form(flow: FlowType) -> FlowType:
    """Give a flow the types of its parameters: `prefect deploy` makes its form from the flow's signature."""
    flow.__signature__ = flow.fn.form
    return flow
