"""Where a run that was cut short goes on."""

import gzip
import hashlib
import json
import pathlib
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from rmtdamp._cli import write_whole

SECONDS = 5.0  # between two writes, which cost milliseconds for small networks


class Unfinished:
    """The arrays of a run and what it has recorded, in one file while it is made.

    With no `path` nothing is kept.
    """

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        self._last = time.monotonic()

    def load(self, template: Any) -> tuple[Any, Any] | None:
        """What the last `save` kept, its arrays in a tree like `template`.

        Returns:
            (arrays, records); None if there is no file, or if it is damaged or holds
            another tree, so that the run starts anew.
        """
        if self.path is None or not self.path.exists():
            return None
        leaves, structure = jax.tree.flatten(template)
        try:
            content = gzip.decompress(self.path.read_bytes())  # checks a checksum
            found = serialization.msgpack_restore(content)
            kept = [found["arrays"][str(i)] for i in range(len(found["arrays"]))]
            records = json.loads(str(found["records"]))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
            return None
        plain = [_plain(x) for x in leaves]
        same = [(x.shape, x.dtype) for x in kept] == [(x.shape, x.dtype) for x in plain]
        if not same:
            return None
        arrays = [_like(x, like) for x, like in zip(kept, leaves, strict=True)]
        return jax.tree.unflatten(structure, arrays), records

    def save(self, arrays: Any, records: Any) -> None:
        """Keep both, unless that was done less than `SECONDS` ago."""
        if self.path is None or time.monotonic() - self._last < SECONDS:
            return
        plain = [jax.device_get(_plain(x)) for x in jax.tree.leaves(arrays)]
        tree = {
            "arrays": {str(i): x for i, x in enumerate(plain)},
            "records": json.dumps(records),
        }
        content = gzip.compress(serialization.msgpack_serialize(tree), compresslevel=0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda part: part.write_bytes(content))
        self._last = time.monotonic()

    def remove(self) -> None:
        """The run is finished, and kept elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def digest(*of: Any) -> str:
    """A file's name for what a run was asked for."""
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x):
    return jax.random.key_data(x) if _is_key(x) else x


def _like(x, like):
    if _is_key(like):
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))
    return jnp.asarray(x)
