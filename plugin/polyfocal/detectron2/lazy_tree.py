"""Goes through the tree of a LazyConfig."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf


def walk(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], DictConfig]]:
    """Every dictionary in a config tree with the keys that lead to it, the outermost first."""
    if isinstance(node, DictConfig):
        yield path, node
        for key in list(node):
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from walk(node[key], (*path, key))
    elif isinstance(node, ListConfig):
        for index, value in enumerate(node):
            yield from walk(value, (*path, index))
