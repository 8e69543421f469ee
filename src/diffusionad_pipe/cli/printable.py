"""Text as it may be shown: a file's name can hold line breaks and a terminal's commands."""

import re

# Control characters, the other line breaks, and those that turn the direction of what follows.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """One line of text in which nothing moves a cursor: unseen characters are escaped as in Python."""
    return UNSEEN.sub(lambda found: found.group().encode("unicode_escape").decode(), str(text))
