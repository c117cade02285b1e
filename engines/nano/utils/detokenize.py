"""From tokens to text, a token at a time."""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no character, or not one yet."""


class TextStream:
    """The text of a growing list of tokens. What `push` and `flush` return, joined, is `decode` of all of them.

    A character may be spread over several tokens, so text that ends in replacement characters waits for the next
    token. Each push decodes from the border before the last one at which the text was whole, never from the start: the
    tokens before tell a tokenizer that drops leading spaces that it is not at the start of the text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.window: list[int] = []
        self.border = 0  # in the window: the last place at which the text was whole
        self.shown = 0  # characters of the window's text that were given out
        self.text = ""  # all that was given out

    def push(self, token_id: int) -> str:
        """Take in a token; returns the characters that it completes."""
        self.window.append(token_id)
        text = self.decode(self.window)
        whole = text.rstrip(REPLACEMENT)
        delta = self._give(whole)
        if len(whole) == len(text):
            self.window, self.border = self.window[self.border :], len(self.window) - self.border
            self.shown = len(self.decode(self.window))
        return delta

    def flush(self) -> str:
        """What was held back; call when no token follows."""
        return self._give(self.decode(self.window))

    def _give(self, text: str) -> str:
        delta = text[self.shown :]
        self.shown += len(delta)
        self.text += delta
        return delta
