"""The one exception type that carries a message meant for the person at the screen."""


class QuantTuneError(ValueError):
    """A mistake in an input, told in one sentence: which input or file, what is wrong, the cure."""
