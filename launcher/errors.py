"""What the user can put right, told without a traceback."""


class LauncherError(Exception):
    """A command cannot go on; the message says why and what would be right."""
