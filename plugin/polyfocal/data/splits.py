"""Which samples of a training set judge the settings of a search."""

import hashlib
from collections.abc import Hashable, Sequence

from polyfocal.errors import UserError


def held_out(ids: Sequence[Hashable]) -> list[bool]:
    """Which samples of a training set are held out: every fifth in the order of the ids' hashes.

    So the choice depends on nothing but the ids.

    Args:
        ids: One per sample, each once.

    Raises:
        UserError: There are fewer than five samples.
    """
    if len(ids) < 5:
        raise UserError(
            f"{len(ids)} training samples cannot be split for a search: expected 5 or more."
        )
    hashes = [hashlib.sha256(str(id_).encode()).digest() for id_ in ids]
    order = sorted(range(len(ids)), key=hashes.__getitem__)
    chosen = set(order[: len(ids) // 5])
    return [place in chosen for place in range(len(ids))]
