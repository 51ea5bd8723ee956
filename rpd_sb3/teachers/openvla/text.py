"""Instructions as token ids of the language model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

PROMPT = "In: What action should the robot take to {}?\nOut:"
BEFORE_ACTION = 29871
"""The token "▁", which came before the actions in training."""
MAX_INSTRUCTIONS = 1024
"""How many of the last instructions are kept tokenized."""


class Prompts:
    """Token ids of instructions, each of which is tokenized once.

    :param path: tokenizer.json of the checkpoint
    :raises ValueError: if it cannot be read
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._known = lru_cache(MAX_INSTRUCTIONS)(self._encode)

    def __call__(self, instruction: str) -> tuple[int, ...]:
        """Ids from the beginning-of-sequence token to the one before the first action.

        :raises ValueError: for an empty instruction
        """
        return self._known(instruction)

    def _encode(self, instruction: str) -> tuple[int, ...]:
        if not instruction.strip():
            raise ValueError(f"OpenVLA needs an instruction, e.g. 'pick up the cube', but got {instruction!r}")
        ids = self._tokenizer.encode(PROMPT.format(instruction.lower())).ids
        return tuple(ids if ids[-1] == BEFORE_ACTION else [*ids, BEFORE_ACTION])
