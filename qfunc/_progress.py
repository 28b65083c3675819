"""Progress bars on long work, where tqdm is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item] | Iterable[Item], what: str, progress: bool | None, label: Callable[[Item], str] = str) -> Iterator[Item]:
    """Iterate under a bar that names the current item.

    `progress`: True shows it (ImportError where tqdm is missing), False hides it, None shows it in a terminal after two seconds.
    """
    if progress is False:
        yield from items
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # in a notebook without widgets tqdm warns and falls back to text by itself
            from tqdm.auto import tqdm
    except ImportError:
        if progress:
            raise
        yield from items
        return
    options = {} if progress else {"delay": 2, "disable": None}
    with tqdm(items, desc=what, unit="leaf", leave=bool(progress), **options) as bar:
        for item in bar:
            bar.set_postfix_str(label(item), refresh=False)
            yield item
