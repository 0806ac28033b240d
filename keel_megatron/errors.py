"""The error that is the user's to mend."""

from __future__ import annotations

from keel_megatron.urls import without_credentials


class UserError(Exception):
    """A mistake in input or surroundings: the command prints the message alone and exits with 2.

    The message names the setting (or file) and says what would be right.

    Args:
        message: what is said to the user; its URLs are shown without what may be a secret.
        reported: another rank of the run says it; this one only ends.
    """

    def __init__(self, message: str, *, reported: bool = False) -> None:
        super().__init__(without_credentials(message))
        self.reported = reported
