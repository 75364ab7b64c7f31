"""Text from outside (file names, messages of other programs) in a form that is safe to print."""


def printable(text: object) -> str:
    r"""`text` on one line, with control characters and invisible ones escaped (`\n`, `\x1b`).

    A file name may hold a newline or an escape sequence of the terminal. Printed as it is, it could
    forge a line of the log.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )
