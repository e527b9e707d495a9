"""Numbers of a configuration that do not fit each other: a hint what to change when a model's forward pass fails."""

from typing import Any

from transformers import PretrainedConfig

# (a key, the names of a key that it may not exceed), (a key, the names of a key that it must divide)
Relations = tuple[tuple[str, tuple[str, ...]], ...]
LIMITS: Relations = (
    ("num_experts_per_tok", ("num_experts", "num_local_experts", "n_routed_experts")),
    ("topk_group", ("n_group",)),
)
DIVISORS: Relations = (("num_key_value_heads", ("num_attention_heads",)), ("n_group", ("n_routed_experts", "num_experts")))


def misfit(config: PretrainedConfig) -> str:
    """The first relation between numbers of `config` that does not hold, as a hint that begins with "; ", or nothing.

    Not every architecture has every relation. So this is no check: it explains an error that has occurred.
    """
    text = config.get_text_config()
    for key, names in LIMITS:
        for name, limit in given(text, names):
            if (value := number(text, key)) is not None and value > limit:
                return f"; {key} is {value}, but must be at most {name}, {limit}"
    for key, names in DIVISORS:
        for name, whole in given(text, names):
            if (value := number(text, key)) and whole % value:
                return f"; {key} is {value}, which does not divide {name}, {whole}"
    width, heads = number(text, "hidden_size"), number(text, "num_attention_heads")
    rotary, of_head = number(text, "qk_rope_head_dim"), number(text, "head_dim")
    if rotary is not None and of_head is not None and rotary != of_head:
        return f"; head_dim is {of_head}, which is the rotary part of a head here and must be qk_rope_head_dim, {rotary}"
    if of_head is None and width and heads:
        of_head = width // heads
    fraction = (getattr(text, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if rotary is None and of_head and isinstance(fraction, int | float) and int(of_head * fraction) % 2:
        return (
            f"; a head has {of_head} dimensions, of which rotary positions take {int(of_head * fraction)}: that must be even, as "
            f"hidden_size / num_attention_heads, head_dim and partial_rotary_factor say"
        )
    if (rank := number(text, "kv_lora_rank")) and rank % 2:
        return f"; kv_lora_rank is {rank}, but must be even, since rotary positions follow it in one tensor"
    return ""


def number(config: PretrainedConfig, key: str) -> int | None:
    """The value of a key if it is a whole number, else None."""
    value: Any = getattr(config, key, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def given(config: PretrainedConfig, names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Those of `names` that have a whole number."""
    return [(name, value) for name in names if (value := number(config, name)) is not None]
