"""The fetcher as a urllib opener, for libraries that call `urllib.request.urlopen`.

A thin adapter: img2dataset's own Downloader, for one, takes it through
`urllib.request.install_opener`. It keeps no HTTP code, attempts or times; who wants those calls
`Fetcher.fetch`.
"""

import http.client
import io
import urllib.error
import urllib.request
import urllib.response
from email.message import Message

from pipeline.fetch import Fetcher


class _GuardedHandler(urllib.request.BaseHandler):
    """Answers http and https from the fetcher; there is no handler for anything else."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher

    def http_open(self, request: urllib.request.Request) -> urllib.response.addinfourl:
        """Return the body; method, headers and timeout of the request give way to the config."""
        result = self._fetcher.fetch(request.full_url)
        headers = http.client.HTTPMessage()
        if result.content_type is not None:
            headers["Content-Type"] = result.content_type
        if result.body is None:
            raise _error(request.full_url, f"{result.reason}: {result.detail}", result.http_status)
        return urllib.response.addinfourl(
            io.BytesIO(result.body), headers, result.final_url or result.url, result.http_status
        )

    https_open = http_open


def build_opener(fetcher: Fetcher) -> urllib.request.OpenerDirector:
    """Return an opener that can reach the web through the fetcher, and nothing in another way.

    Other schemes raise URLError; proxies, cookies and credentials are not looked for.
    """
    opener = urllib.request.OpenerDirector()
    opener.addheaders = []
    opener.add_handler(_GuardedHandler(fetcher))
    opener.add_handler(urllib.request.UnknownHandler())
    return opener


def _error(url: str, message: str, status: int | None) -> urllib.error.URLError:
    if status is None or status < 400:
        return urllib.error.URLError(message)
    return urllib.error.HTTPError(url, status, message, Message(), None)
