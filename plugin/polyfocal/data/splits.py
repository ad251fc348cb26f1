"""Which samples of a training set judge a search, and which judge what they taught."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence

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


def remark_on_overlap(
    train: Iterable[Hashable], val: Iterable[Hashable], what: str = "pictures"
) -> list[str]:
    """A remark on samples of val that are trained on; none without such samples.

    Args:
        train: What tells the samples of train apart.
        val: The same of val.
        what: What the samples are.
    """
    both = len(set(train) & set(val))
    return [f"{both} {what} are in train and in val: scores on val mean little."] if both else []
