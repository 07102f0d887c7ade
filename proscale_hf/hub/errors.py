"""Why the Hub, or what goes to it, was refused: one line that says what to do."""

import socket
import ssl
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from proscale_hf.files.text import one_line


LARGEST_REASON = 300  # characters


class HubError(ValueError):
    """The folder is no complete model, or the Hub refused; the text is one line that says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def explain(error: BaseException) -> str:
    """
    Args:
        error: What the Hub's client, or transformers on top of it, raised.

    Returns:
        Why the Hub did not do what was asked, and what helps; part of a sentence.
    """
    for link in _chain(error):
        if constants.HF_HUB_OFFLINE and isinstance(link, OfflineModeIsEnabled | LocalEntryNotFoundError):
            return "HF_HUB_OFFLINE is set, so the Hub is not asked, and what is needed is not in the cache; unset it"
        if isinstance(link, LocalTokenNotFoundError):
            return "you are not logged in; run hf auth login, or set HF_TOKEN"
        if isinstance(link, GatedRepoError):
            return (
                "its owner grants access one by one (403); ask for it on the repository's page, and run hf auth login"
            )
        if isinstance(link, RepositoryNotFoundError):
            return (
                "the Hub has no such repository, or none that your token may see; check the name, or run hf auth login"
            )
        if isinstance(link, HfHubHTTPError) and link.response.status_code != 404:
            return _explain_status(link)
        if isinstance(link, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
            return f"{constants.ENDPOINT} cannot be reached ({_first_line(link)}); check the network"
    return _first_line(error)  # which names the file or revision that is not there, if it is that


def _explain_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "the Hub does not accept the token (401); run hf auth login, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"your token does not allow that (403: {error.server_message or 'forbidden'}); take one that may write"
    if status == 412:
        return "somebody else changed the repository at the same time (412); try again"
    if status == 429:
        return "the Hub wants fewer requests (429); wait some minutes"
    if status >= 500:
        return f"the Hub has a fault of its own ({status}); try again later"
    return f"the Hub answered {status}: {error.server_message or _first_line(error)}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _first_line(error: BaseException) -> str:
    return one_line(error)[:LARGEST_REASON].rstrip(".")
