"""`assert_type`: a type checker holds an expression against a type, and running it the value."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import assert_type
else:
    from functools import partial

    from typeguard import CollectionCheckStrategy, ForwardRefPolicy, check_type

    assert_type = partial(
        check_type,
        collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS,
        forward_ref_policy=ForwardRefPolicy.IGNORE,  # within others' named tuples
    )

__all__ = ["assert_type"]
