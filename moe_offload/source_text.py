"""What a function of a model computes, told from its source.

transformers writes the same few lines into the file of each model. Native code that stands in for
some of them does so only where it finds exactly those lines.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def statements(
    function: Any, num_arguments: int | None = 2, decorator: str | None = None
) -> str | None:
    """The statements of a function or method, as `ast.unparse` writes them.

    Comments and the docstring are left out. None where there is no source, or where the function is
    decorated (by another call than of `decorator`) or takes something else than `num_arguments`
    positional arguments (None: any).
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # none, or no source
        return None
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef):
        return None
    if any(ast.unparse(d).partition("(")[0] != decorator for d in node.decorator_list):
        return None
    taken = node.args
    if num_arguments is not None and (
        len(taken.args) != num_arguments or taken.vararg or taken.kwonlyargs
    ):
        return None
    body = node.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return "\n".join(map(ast.unparse, body))
