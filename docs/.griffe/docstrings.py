"""What griffe does not know of this repository's docstrings; mkdocstrings loads this file.

Doctests become example sections, `Convention:` and `Source:` become paragraphs with a bold first
word, brackets of formulas are no Markdown links, `#:` comments document attributes, and the
fields of a pydantic model are the parameters of its class.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

#: `code`, or the place between two brackets that Markdown would read as a reference.
CODE_OR_REFERENCE = re.compile(r"(`[^`\n]*`)|\]\[")
REMARK = re.compile(r"^(Convention|Source):\s*(?=\S)", re.MULTILINE)
DOCTEST = re.compile(r"(?:^Example:\n)?^( *)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Make the docstrings readable for the parser of Google style."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Take the `#:` comment above an attribute for its docstring."""
        if attr.docstring is None and attr.lineno and isinstance(attr.filepath, Path):
            above = attr.filepath.read_text(encoding="utf-8").splitlines()[: attr.lineno - 1]
            comment: list[str] = []
            while above and above[-1].startswith("#:"):
                comment.insert(0, above.pop().removeprefix("#:").strip())
            if comment:
                attr.docstring = griffe.Docstring(markdown("\n".join(comment)), parent=attr)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Give a pydantic model the parameters that pydantic gives it."""
        fields = [
            member
            for name, member in cls.members.items()
            if member.is_attribute and member.annotation is not None and not name.startswith("_")
        ]
        if "_Section" in map(str, cls.bases) and fields:
            cls.set_member(
                "__init__",
                griffe.Function(
                    "__init__",
                    parameters=griffe.Parameters(
                        *(
                            griffe.Parameter(
                                field.name,
                                annotation=field.annotation,
                                kind=griffe.ParameterKind.keyword_only,
                                default=field.value,
                            )
                            for field in fields
                        )
                    ),
                ),
            )


def markdown(text: str) -> str:
    """Rewrite one docstring, already freed of its indentation."""
    parts, end = [], 0
    for example in DOCTEST.finditer(text):
        parts += [_prose(text[end : example.start()]), _example(example)]
        end = example.end()
    return "".join([*parts, _prose(text[end:])])


def _prose(text: str) -> str:
    text = CODE_OR_REFERENCE.sub(lambda found: found[1] or r"]\[", text)
    return REMARK.sub(r"**\1:** ", text)


def _example(found: re.Match[str]) -> str:
    lines = found[0].removeprefix("Example:\n").splitlines()
    return "Examples:\n" + "\n".join(f"    {line.removeprefix(found[1])}" for line in lines)
