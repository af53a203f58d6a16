"""Clients of the service, synchronous and asynchronous. The file needs only httpx and NumPy, and may be copied."""

import io
import time
from collections.abc import Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Space = Literal["student", "teacher"]


class RefusedError(Exception):
    """The service refused a request.

    Attributes:
        status, error_type: HTTP status and type of the error; docs/in-depth/serving.md lists them.
        retry_after: Seconds after which the request may be repeated, or None if repeating it would not help.
    """

    def __init__(self, response: httpx.Response) -> None:
        kind = response.headers.get("content-type", "")
        body = response.json() if kind.startswith("application/json") else {}
        super().__init__(body.get("error", response.text[:200]))
        self.status, self.error_type = response.status_code, body.get("error_type", "unknown")
        self.retry_after = _seconds(response.headers.get("retry-after"))


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds in a ``Retry-After`` header, which proxies may also send as a date; None if it is neither or missing."""
    if retry_after is None:
        return None
    with suppress(ValueError):
        return float(retry_after)
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None


def _request(path: str, files: Sequence[bytes], **parameters: Any) -> dict[str, Any]:
    if isinstance(files, (bytes, str)) or not all(isinstance(file, bytes) for file in files):
        raise TypeError(
            "files must be a list of the contents of audio files, such as [Path('speech.flac').read_bytes()]"
        )
    form = [("file", ("audio", file)) for file in files]
    return {"method": "POST", "url": path, "files": form, "params": parameters}


def _arrays(response: httpx.Response) -> list[Array]:
    if response.status_code != 200:
        raise RefusedError(response)
    archive = np.load(io.BytesIO(response.content), allow_pickle=False)
    return [archive[str(index)] for index in range(len(archive.files))]


def _vectors(response: httpx.Response) -> Array:
    if response.status_code != 200:
        raise RefusedError(response)
    return np.array([item["embedding"] for item in response.json()["data"]], np.float32)


class Client:
    """A synchronous client.

    Args:
        address: Address of the service, such as ``http://127.0.0.1:8000``.
        api_key: API key. Default: none is sent.
        timeout: Longest wait for the service, in seconds. Default 60.

    Example:
        >>> with Client("http://127.0.0.1:8000") as client:
        ...     (features,) = client.features([Path("speech.flac").read_bytes()], layer=3)
    """

    def __init__(self, address: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=address, headers=headers, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def features(self, files: Sequence[bytes], layer: int | str = "last", space: Space = "student") -> list[Array]:
        """Return the features of each file: (T, d) float32, or (L, T, d) for layer ``all``.

        Args:
            files: Contents of audio files.
            layer: Transformer layer counted from 1, ``last`` or ``all``. Default ``last``.
            space: ``student`` for hidden states, ``teacher`` for the predictions of the teacher's layers. Default ``student``.

        Raises:
            RefusedError: the service refused the request.
            TypeError: ``files`` is not a list of bytes.
        """
        request = _request("/v1/features", files, layer=layer, space=space, format="npz")
        return _arrays(self._http.request(**request))

    def embeddings(self, files: Sequence[bytes], layer: int | str = "last", pooling: str = "mean") -> Array:
        """Return one vector per file: (N, d) float32, or (N, 2 d) for pooling ``mean_std``.

        Args:
            files: Contents of audio files.
            layer: Transformer layer counted from 1, or ``last``. Default ``last``.
            pooling: ``mean``, ``max`` or ``mean_std``. Default ``mean``.

        Raises:
            RefusedError: the service refused the request.
        """
        return _vectors(self._http.request(**_request("/v1/embeddings", files, layer=layer, pooling=pooling)))


class AsyncClient:
    """An asynchronous client; see `Client`."""

    def __init__(self, address: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=address, headers=headers, timeout=timeout)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def features(
        self, files: Sequence[bytes], layer: int | str = "last", space: Space = "student"
    ) -> list[Array]:
        """Return the features of each file; see `Client.features`."""
        request = _request("/v1/features", files, layer=layer, space=space, format="npz")
        return _arrays(await self._http.request(**request))

    async def embeddings(self, files: Sequence[bytes], layer: int | str = "last", pooling: str = "mean") -> Array:
        """Return one vector per file; see `Client.embeddings`."""
        return _vectors(await self._http.request(**_request("/v1/embeddings", files, layer=layer, pooling=pooling)))
