"""Instructions as the language model reads them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

PROMPT = "In: What action should the robot take to {}?\nOut:"
BEFORE_ACTION = 29871
"""The lone "▁" that stood before the actions in training."""


class Prompts:
    """Token ids of instructions, each of which is tokenised once.

    :param path: tokenizer.json of the checkpoint
    :raises ValueError: if it cannot be read
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{path} is no tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, instruction: str) -> tuple[int, ...]:
        """Ids from the beginning-of-sequence token to the one before the first action.

        :raises ValueError: for an empty instruction
        """
        if instruction not in self._known:
            if not instruction.strip():
                raise ValueError(f"OpenVLA needs an instruction, e.g. 'pick up the cube', but got {instruction!r}")
            ids = self._tokenizer.encode(PROMPT.format(instruction.lower())).ids
            self._known[instruction] = tuple(ids if ids[-1] == BEFORE_ACTION else [*ids, BEFORE_ACTION])
        return self._known[instruction]
