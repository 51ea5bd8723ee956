"""Samples of Octo's action head, each with a random key of its own.

Shape letters: M rows, P rows after padding, S samples of a row, T images of the history, K actions of a chunk, A = 7.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rpd_sb3.teachers.octo.checkpoint import ACTION_SIZE

Tree = dict[str, Any]
"""Arrays by name, nested."""
MAX_INSTRUCTIONS = 1024
"""How many of the last instructions are kept tokenized."""


class Sampler:
    """Draws chunks of normalized actions.

    The transformer runs once for a row, its head S times. The key of a sample is
    ``fold_in(fold_in(fold_in(PRNGKey(seed), env_id), count), sample)``, so it depends neither on the other rows nor on
    the padding. The size of the batch changes only the last bits of matrix products, which twenty steps of diffusion
    amplify: between 1 and 32 rows the median of the difference was 1e-6, the largest of 224 values 6e-5.

    :param model: the loaded ``OctoModel``
    :param n_samples: S
    :param batch_sizes: to which M is padded, as each size is compiled once; more rows go in several calls
    :param seed: of the keys
    """

    def __init__(self, model: Any, n_samples: int, batch_sizes: Sequence[int], seed: int) -> None:
        import jax

        self._batch_sizes = sorted(set(batch_sizes))
        self._base = jax.random.PRNGKey(seed)
        # From numpy arrays, as they are loaded, every call would copy all weights to the device.
        self._model = model.replace(
            params=jax.device_put(model.params),
            example_batch=jax.device_put(model.example_batch),
            dataset_statistics=None,
        )
        self._sample = jax.jit(functools.partial(_sample, n_samples=n_samples))
        self._tokens = functools.lru_cache(maxsize=MAX_INSTRUCTIONS)(functools.partial(_tokens, self._model))

    def draw(
        self,
        images: Mapping[str, np.ndarray],
        mask: np.ndarray,
        instructions: Sequence[str],
        env_ids: Sequence[int],
        counts: Sequence[int],
    ) -> np.ndarray:
        """Chunks of normalized actions.

        :param images: ``image_primary`` and the like, (M, T, H, W, 3) uint8
        :param mask: (M, T) bool, False where the history does not reach back so far
        :param instructions: M of them
        :param env_ids: M of them
        :param counts: M of them: how many answers were sampled for the environment before
        :return: (M, S, K, A) float32
        """
        import jax

        tasks = jax.tree_util.tree_map(lambda *rows: np.concatenate(rows), *map(self._tokens, instructions))
        ids, numbers = (np.array([x % 2**32 for x in values], np.uint32) for values in (env_ids, counts))
        inputs = ({**images, "timestep_pad_mask": mask}, tasks, ids, numbers)
        largest = self._batch_sizes[-1]
        parts = []
        for at in range(0, len(mask), largest):
            m = min(largest, len(mask) - at)
            padded = next(size for size in self._batch_sizes if size >= m)
            rows = at + np.minimum(np.arange(padded), m - 1)
            batch = jax.tree_util.tree_map(functools.partial(np.take, indices=rows, axis=0), inputs)
            parts.append(np.asarray(self._sample(self._model, self._base, *batch))[:m])
        return np.concatenate(parts)

    def warm_up(self, image_sizes: Mapping[str, tuple[int, int]], horizon: int) -> None:
        """Compile for every size of a batch: each takes seconds, and a client should not have to wait for that."""
        for size in self._batch_sizes:
            images = {key: np.zeros((size, horizon, *hw, 3), np.uint8) for key, hw in image_sizes.items()}
            self.draw(images, np.ones((size, horizon), bool), [""] * size, [0] * size, [0] * size)


def sample_keys(base: Any, env_ids: Any, counts: Any, n_samples: int) -> Any:
    """The random key of each sample.

    :param base: a key
    :param env_ids: (P,) uint32
    :param counts: (P,) uint32
    :param n_samples: S
    :return: (P, S, 2) uint32
    """
    import jax

    def of_row(env_id: Any, count: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(base, env_id), count)
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jax.numpy.arange(n_samples))

    return jax.vmap(of_row)(env_ids, counts)


def _sample(
    model: Any, base: Any, observations: Tree, tasks: Tree, env_ids: Any, counts: Any, *, n_samples: int
) -> Any:
    """Samples (P, S, K, A). The model is an argument, lest its weights become constants of the compiled program."""
    import jax

    outputs = model.run_transformer(observations, tasks, observations["timestep_pad_mask"], train=False)
    head = model.module.bind({"params": model.params}).heads["action"]

    def one(readout: Any, key: Any) -> Any:
        row = {head.readout_key: jax.tree_util.tree_map(lambda x: x[None], readout)}
        return head.predict_action(row, rng=key, train=False, embodiment_action_dim=ACTION_SIZE)[0, :, :ACTION_SIZE]

    keys = sample_keys(base, env_ids, counts, n_samples)
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(outputs[head.readout_key], keys)


def _tokens(model: Any, instruction: str) -> Tree:
    """The task of one instruction, arrays with first dimension 1.

    Octo fills in zeros for missing goal images; they are left out here, which gives the same bits.
    """
    tasks = model.create_tasks(texts=[instruction])
    language = tasks["language_instruction"]
    if hasattr(language, "items"):  # a mapping of the tokenizer's own type, which JAX does not accept
        language = {key: np.asarray(value) for key, value in language.items()}
    kept = {key: value for key, value in tasks.items() if not key.startswith("image_")}
    return {**kept, "language_instruction": language}
