"""The oracle of every sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Naive(NamedTuple):
    """Greedy, one conversation at a time, without a cache or padding: what every sampler must equal at temperature 0.

    The template renders the prompt, and the tokenizer reads it as a whole.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]

    def __call__(self, conversation: list[dict[str, str]], most: int) -> tuple[str, int, str]:
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        written = self.go_on(ids, most)
        finish = "stop" if written[-1] in self.ends else "length"
        return self.tokenizer.decode(written, skip_special_tokens=True).strip(), len(written), finish

    def go_on(self, ids: list[int], most: int) -> list[int]:
        written: list[int] = []
        while len(written) < most and not self.ends.intersection(written):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids + written])).logits
            written.append(int(logits[0, -1].argmax()))
        return written
