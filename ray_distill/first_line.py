"""One line about an error, for a sentence that says what it stopped."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message, as a TimeoutError has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
