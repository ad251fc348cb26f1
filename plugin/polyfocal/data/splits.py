"""Which samples of a training set judge settings."""

import hashlib
from collections.abc import Hashable, Sequence

from polyfocal.errors import UserError


def held_out(ids: Sequence[Hashable]) -> list[bool]:
    """Which samples of a training set to judge settings by: every fifth of an order without order.

    The order is that of the hashes of the ids, so that the choice depends on nothing else.

    Args:
        ids: One a sample, each once.

    Raises:
        UserError: There are fewer than five.
    """
    if len(ids) < 5:
        raise UserError(
            f"{len(ids)} training samples cannot be split for a search: expected 5 or more."
        )
    hashes = [hashlib.sha256(str(id_).encode()).digest() for id_ in ids]
    order = sorted(range(len(ids)), key=hashes.__getitem__)
    chosen = set(order[: len(ids) // 5])
    return [place in chosen for place in range(len(ids))]
