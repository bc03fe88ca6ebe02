"""How many examples a property that takes long is tried on."""

from hypothesis import settings


def examples(count: int) -> settings:
    """As many as ``count`` of the 20 that the profile "ci" draws: fewer in "few", more at night."""
    return settings(max_examples=max(1, settings().max_examples * count // 20))
