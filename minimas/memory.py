"""Prefill a text once, and use its KV cache in many calls.

The KV cache of a text is the same for every question that follows it, so it can be saved with
`KVCache.save`, joined with others by `KVCache.concat`, and passed to every method as `memory=`. The
paper's theorem 3.3 says that a KV cache is equivalent to the text that made it. This file does not
depend on agents or questions.
"""

from .core.cache import KVCache
from .core.errors import ParameterError
from .core.model import prefill
from .core.rollout import Align, think
from .load import LM, text_tokenizer
from .text.tokenizer import PromptText, is_text


def remember(
    lm: LM,
    text: str,
    latent_steps: int = 0,
    align: str | Align = "ridge",
    role: str = "user",
) -> KVCache:
    """Return a KV cache, with one row, of a text and `latent_steps` thoughts after it.

    `role` "user" or "system" makes the text a message in the model's chat template, which is closed
    after the thoughts. "agent" makes it a user message, with the thoughts in the assistant turn
    that follows, like an agent's in layout "chat". "plain" is the text alone. For `align`, see
    `latent_mas`. Raises ValueError naming the parameter if the text is empty, cannot be encoded, or
    exceeds the model's context, or if `latent_steps` is not a whole number, 0 or more.
    """
    tokenizer = text_tokenizer(lm)
    if not is_text(text):
        raise ParameterError("text", f"found {text!r:.80}, expected UTF-8 text that is not blank")
    if type(latent_steps) is not int or latent_steps < 0:
        raise ParameterError("latent_steps", f"found {latent_steps!r}, expected 0 or more")
    if role == "plain":
        opened = PromptText.from_user(text)
        closing = PromptText("")
    elif role == "agent":
        opened = tokenizer.turn(text, last=False)
        closing = PromptText(tokenizer.turn_end)
    elif role in ("user", "system"):
        opened, closing = tokenizer.message(text, role)
    else:
        raise ParameterError("role", f"found {role!r}, expected user, system, agent or plain")
    ids = tokenizer.encode_turn(opened)
    end = tokenizer.encode_turn(closing)
    needed = len(ids) + latent_steps + len(end)
    limit = lm.model.config.max_position_embeddings
    if needed > limit:
        raise ParameterError(
            "text",
            f"found {needed:,} tokens and thoughts, expected at most {limit:,} (the context)",
        )
    cache = lm.model.new_cache(1)
    hidden = prefill(lm.model, [ids], cache)
    if latent_steps:
        think(
            lm.model, align if callable(align) else lm.aligner(align), hidden, cache, latent_steps
        )
    if end:
        prefill(lm.model, [end], cache)
    return cache
