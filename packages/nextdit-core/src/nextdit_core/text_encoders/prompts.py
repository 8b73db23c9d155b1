"""What a text encoder takes: a list of texts, at least one."""

from __future__ import annotations

from collections.abc import Sequence

from nextdit_core.errors import UserError

__all__ = ["check_prompts"]


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse what no text encoder can read.

    Args:
        prompts: What was asked for; the empty text is a prompt.

    Raises:
        UserError: It is one text and not a list, it is empty, or a prompt holds half of a
            surrogate pair, which is no character (a cut or wrongly decoded emoji).

    >>> check_prompts(["seven", ""])
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts is the text {prompts!r}; expected a list of texts: [{prompts!r}]")
    if not prompts:
        raise UserError("no prompt given; expected at least one, which may be empty: ['']")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {row} is {prompt!r}; expected text")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt {row} holds half of a surrogate pair at character {error.start}, which "
                f"is no text; decode it as UTF-16, or leave it out"
            ) from error
