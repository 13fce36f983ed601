"""What `gradclip` takes and returns of JAX's arrays."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from told import assert_type

import gradclip
from gradclip import limits


class Params(NamedTuple):
    w: Array
    b: list[Array | None]


j = jnp.array([3.0, 4.0])
params = Params(j, [j, None])

assert_type(gradclip.clip_by_global_norm(j, 1.0), tuple[Array, Array])
assert_type(gradclip.clip_by_global_norm([j, None], j.sum()), tuple[list[Array | None], Array])
assert_type(gradclip.clip_by_global_norm({"w": j}, 1.0), tuple[dict[str, Array], Array])
assert_type(gradclip.clip_by_global_norm(params, 1.0), tuple[Params, Array])
assert_type(gradclip.clip_by_global_norm((x for x in [j]), 1.0)[0], list[Array])
assert_type(gradclip.clip_by_global_norm([j], limits.ZScore())[1], Array)
assert_type(gradclip.global_norm({"w": j}), Array)
assert_type(gradclip.global_norm({"w": j}.values()), Array)
assert_type(gradclip.norms(params), gradclip.Norms[Array, Array])
assert_type(gradclip.norms([j]).values, Array)
