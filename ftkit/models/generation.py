"""Generate text with a language model, piece by piece."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from ftkit.models.causal_lm import chat_text, next_token_logits, require_language_model, require_window, token_ids
from ftkit.models.kv_cache import takes_cache
from ftkit.models.modules import eval_mode

# a text to continue, its token ids, or the turns of a chat, {"role": …, "content": …}
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

_CUT = "\N{REPLACEMENT CHARACTER}"  # a tokenizer decodes part of a character to this


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[str]:
    """Continue a text, or answer in a chat; ``"".join(generate(…))`` is the whole text.

    The text ends at the model's end token, at a stop string, or after ``max_new_tokens``. The keys and values of the
    text so far are cached, so that each step runs one token.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer, from ``load_language_model``.
        prompt: the text, its token ids, or the turns of a chat.
        max_new_tokens: the largest number of tokens to generate.
        temperature: the logits are divided by it before a token is drawn; 0 always takes the most probable token.
        stop: strings that end the text; they are not part of it.
        seed: seed of the draws; the global random state is left unchanged.

    Returns:
        An iterator over pieces of text, each given as soon as it is certain. A character of several tokens is given
        when it is complete, and left out if it is not complete at the end.

    Raises:
        ValueError: a number is out of range, a stop string is empty, the tokenizer has no chat template, or the prompt
            and the new tokens are longer than the model's window.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give 1 or more.")
    if temperature < 0:
        raise ValueError(f"The temperature is {temperature}: give 0 for the most probable token, or more to draw one.")
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop is {stop!r}: give a list of strings, none of them empty.")
    require_language_model(model)
    ids = _encode(tokenizer, prompt)
    require_window(tokenizer, [ids], max_new_tokens)
    tokens = _take_tokens(model, ids, max_new_tokens, temperature, torch.Generator().manual_seed(seed))
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return _make_text(tokens, tokenizer, ids, ends, stop)


def next_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    k: int = 10,
    *,
    temperature: float = 1.0,
) -> pd.DataFrame:
    """List the k most probable next tokens.

    Args:
        model, tokenizer, prompt: as for ``generate``.
        k: number of tokens.
        temperature: the logits are divided by it; above 0.

    Returns:
        A table with the columns ``token`` (its text), ``id`` and ``probability``, the most probable token first.

    Raises:
        ValueError: as for ``generate``.
    """
    if not temperature > 0:
        raise ValueError(f"The temperature is {temperature}: give a number above 0, 1 for the model's probabilities.")
    require_language_model(model)
    ids = _encode(tokenizer, prompt)
    require_window(tokenizer, [ids], 1)
    probabilities, tokens = (_next_logits(model, ids, None) / temperature).softmax(-1).topk(k)
    return pd.DataFrame(
        {
            "token": [tokenizer.decode([token]) for token in tokens.tolist()],
            "id": tokens.tolist(),
            "probability": probabilities.tolist(),
        }
    )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return token_ids(tokenizer, [prompt])[0]
    if all(isinstance(token, int) for token in prompt):
        return list(prompt)
    return token_ids(tokenizer, [chat_text(tokenizer, prompt)], chat=True)[0]


def _take_tokens(
    model: PreTrainedModel | PeftModel, ids: list[int], limit: int, temperature: float, generator: torch.Generator
) -> Iterator[int]:
    """Choose a token from the logits of the next one, append it, and repeat; ``limit`` tokens at most."""
    cache = DynamicCache(config=model.config) if takes_cache(model) else None
    for _ in range(limit):
        logits = _next_logits(model, ids, cache)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        yield token
        ids = [*ids, token]


def _next_logits(model: PreTrainedModel | PeftModel, ids: list[int], cache: DynamicCache | None) -> Tensor:
    """Logits of the token after ``ids``, float64 of shape (V,); on the CPU, so that a seed draws the same everywhere.

    Only the tokens that are not yet in the cache are run; without a cache, all of them.
    """
    mask = torch.ones(1, len(ids), dtype=torch.int64, device=model.device)
    with eval_mode(model), torch.inference_mode():  # set here: around the `yield` it would also affect the caller
        if cache is None:
            inputs = torch.tensor([ids], device=model.device)
            logits = next_token_logits(model, inputs, mask, mask.sum(1, keepdim=True) - 1)
        else:
            inputs = torch.tensor([ids[cache.get_seq_length() :]], device=model.device)
            outputs = model(
                input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits = outputs.logits
    return logits[0, -1].cpu().double()


def _make_text(
    tokens: Iterator[int],
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    ends: set[int | None],
    stop: Sequence[str],
) -> Iterator[str]:
    """Turn tokens into pieces of text; what may still become a character or a stop string is held back."""

    def decode(new: list[int]) -> str:
        # decoded together with the prompt, because some tokenizers drop the space before a text's first word
        text = tokenizer.decode([*ids, *new], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip(_CUT)

    start, given = len(decode([])), 0
    new: list[int] = []
    text = ""
    for token in tokens:
        if token in ends:
            break
        new.append(token)
        text = decode(new)[start:]
        found = [text.index(string) for string in stop if string in text]
        if found:
            text = text[: min(found)]
            break
        held = max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)
        if len(text) - held > given:
            yield text[given : len(text) - held]
            given = len(text) - held
    if len(text) > given:
        yield text[given:]
